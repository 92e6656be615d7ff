"""Table and learning curves of the runs in a folder of benchmarks/results; CSV files <dataset>-<method>-seed<n>.csv.

    python benchmarks/summarize.py benchmarks/results/lunarlander-continuous

Prints a markdown table of the last evaluation of each run, mean ± standard deviation over seeds (a run's own number is
a mean over its evaluation episodes), and writes curves.png into the folder. Runs of finetune/cql.py get a second table:
scores where the phases meet, the lowest of the three evaluations after that and how far it is below, and regrets.
"""

import argparse
import csv
import re
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def read_runs(folder: Path) -> dict[tuple[str, str], list[list[dict[str, str]]]]:
    """(dataset, method) -> rows of each seed's run."""
    runs = defaultdict(list)
    for path in sorted(folder.glob("*-seed*.csv")):
        dataset, method = re.fullmatch(r"(.+)-([^-]+)-seed\d+", path.stem).groups()
        with open(path, newline="") as file:
            runs[dataset, method].append(list(csv.DictReader(file)))
    return runs


def column(runs: list[list[dict[str, str]]], name: str) -> np.ndarray:
    """[seeds, evaluations], NaN where empty."""
    return np.array([[float(row[name] or "nan") for row in rows] for rows in runs])


def cell(values: np.ndarray) -> str:
    return "-" if np.isnan(values).all() else f"{values.mean():.1f} ± {values.std():.1f}"


def cell3(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ± {values.std():.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    groups = read_runs(folder)
    if not groups:
        parser.exit(1, f"summarize.py: {folder} holds no <dataset>-<method>-seed<n>.csv\n")
    print("| dataset | method | seeds | updates | return | worst seed | score | predicted value | discounted return |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (dataset, method), runs in groups.items():
        last = {name: column(runs, name)[:, -1] for name in runs[0][-1]}
        cells = [cell(last["eval_return"]), f"{last['eval_return'].min():.1f}", cell(last["d4rl_normalized_score"])]
        cells += [cell(last["eval_predicted_value"]), cell(last["eval_discounted_return"])]
        print(f"| {dataset} | {method} | {len(runs)} | {last['step'][0]:,.0f} | {' | '.join(cells)} |")

    online = {key: runs for key, runs in groups.items() if "eval_regret" in runs[0][0]}
    if online:
        names = ("offline score", "lowest of the next three", "dip", "last score", "train regret", "eval regret")
        print(f"\n| dataset | method | {' | '.join(names)} |")
        print("|---|---|---|---|---|---|---|---|")
    for (dataset, method), runs in online.items():
        scores, regrets = column(runs, "d4rl_normalized_score"), column(runs, "eval_regret")
        switch = int(np.isfinite(regrets[0]).argmax())
        offline, lowest = scores[:, switch], scores[:, switch + 1 : switch + 4].min(axis=1)
        cells = [offline, lowest, offline - lowest, scores[:, -1]]
        texts = [cell(x) for x in cells] + [cell3(column(runs, x)[:, -1]) for x in ("train_regret", "eval_regret")]
        print(f"| {dataset} | {method} | {' | '.join(texts)} |")

    datasets = sorted({dataset for dataset, _ in groups})
    _, axes = plt.subplots(1, len(datasets), figsize=(5 * len(datasets), 3.5), squeeze=False)
    for axis, dataset in zip(axes[0], datasets):
        for method in (method for name, method in groups if name == dataset):
            steps, returns = (column(groups[dataset, method], name) for name in ("step", "eval_return"))
            (line,) = axis.plot(steps[0], returns.mean(axis=0), label=method)
            axis.fill_between(steps[0], returns.min(axis=0), returns.max(axis=0), alpha=0.2, color=line.get_color())
        switches = [column(runs, "eval_regret")[0] for (name, _), runs in online.items() if name == dataset]
        if switches:
            axis.axvline(
                steps[0][np.isfinite(switches[0]).argmax()], color="grey", linestyle=":", label="online from here"
            )
        axis.set(title=dataset, xlabel="updates, then steps online" if switches else "updates")
        axis.legend()
    axes[0, 0].set_ylabel("evaluation return (mean; band: all seeds)")
    plt.tight_layout()
    plt.savefig(folder / "curves.png", dpi=100)


if __name__ == "__main__":
    main()

"""How good are policies that are chosen without a simulator? Compares ways to choose by the returns of evaluations.

    python benchmarks/studies/choices.py runs/alpha-* --fqe fqe.csv --output policies.csv
    python benchmarks/studies/choices.py benchmarks/results/fqe/lunarlander.csv

The first command takes run folders of --keep_policies True whose policies were evaluated in a simulator, and the tables
that fqe.py made of these policies, and writes one row per policy. Both commands print tables of such rows. The
first holds rank correlations with the real returns: of FQE, of the critic's own prediction (eval_predicted_value; the
column `promise`), and of nearness to the data (`off data` of fqe.py). The second holds regrets, the best mean return
minus that of the chosen policy, in one run and in all runs of a seed, of choosing by each of these, by diagnose.py, the
last policy, and any policy (a random choice). The third is of the policies that fqe.py ranks, which are those whose
values it trusts.

Exit status: 0 done, 1 cannot be done, 2 a bad command line. An error is one line on stderr and writes nothing.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import Parser, fail, one_line_errors

from algorithms.offline.cql import save
from benchmarks.diagnose import choose_alpha, judge, read


def collect(folders: list[Path], fqe: list[Path]) -> pd.DataFrame:
    """One row per policy. Raises ValueError and OSError."""
    estimates, rows, sweeps = pd.concat(map(pd.read_csv, fqe)).set_index("policy"), [], {}
    for folder in folders:
        _, metrics, config = read(folder)
        sweeps.setdefault(config["seed"], []).append((metrics, config))
        chosen = judge(metrics, config).step
        for row in metrics:
            path = folder / f"policy-{row['step']}.pt"
            if str(path) not in estimates.index:
                raise ValueError(f"--fqe {' '.join(map(str, fqe))} has no row of {path}")
            if not row["eval_return"]:
                raise ValueError(f"{folder} has no evaluation at step {row['step']}")
            step, estimate = int(row["step"]), estimates.loc[str(path)]
            rows.append({"run": folder.name, "cql_alpha": config["cql_alpha"], "seed": config["seed"], "step": step})
            # Discounted returns and predictions are those of the rewards in training.
            names = {"return": "eval_return", "return_std": "eval_return_std"}
            names |= {"discounted_return": "eval_discounted_return", "promise": "eval_predicted_value"}
            rows[-1] |= {new: float(row[name]) for new, name in names.items()} | {"fqe": estimate["estimate"]}
            rows[-1] |= {f"fqe_{name}": estimate[name] for name in ("low", "high", "seed_std", "bounded", "off_data")}
            rows[-1]["fqe_rank"] = estimate["rank"]  # empty where fqe.py does not trust the value
            rows[-1] |= {"diagnose": int(step == chosen), "last": int(row is metrics[-1])}
    alphas = {seed: choose_alpha(sweep).alpha for seed, sweep in sweeps.items() if len(sweep) > 1}
    for row in rows:
        row["diagnose_alpha"] = int(row["cql_alpha"] == alphas.get(row["seed"]))
    return pd.DataFrame(rows)


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rank correlation over the last axis, NaN if all are equal: [..., policies] twice -> [...]."""
    ranks = (pd.DataFrame(np.atleast_2d(z)).rank(axis=1).to_numpy() for z in (x, y))
    x, y = (z - z.mean(axis=1, keepdims=True) for z in ranks)
    with np.errstate(invalid="ignore"):
        return np.squeeze((x * y).sum(axis=1) / np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1)))


def correlation(rows: pd.DataFrame, x: str, y: str) -> str:
    """Spearman's rank correlation with its 95 % bootstrap interval over policies."""
    x, y = rows[x].to_numpy(), rows[y].to_numpy()
    drawn = np.random.default_rng(0).integers(len(rows), size=(1000, len(rows)))
    low, high = np.nanquantile(spearman(x[drawn], y[drawn]), [0.025, 0.975])
    return f"{spearman(x, y):.2f} ({low:.2f} to {high:.2f})"


def regrets(rows: pd.DataFrame) -> dict[str, float]:
    """The regret of each way to choose among these policies; NaN if it chooses none."""
    lost = rows["return"].max() - rows["return"]
    diagnosed = lost[(rows["diagnose"] > 0) & ((rows["diagnose_alpha"] > 0) | (rows["run"].nunique() == 1))]
    result = {"fqe": lost[rows["fqe"].idxmax()], "promise": lost[rows["promise"].idxmax()]}
    result["near"] = lost[rows["near"].idxmax()]
    return result | {"diagnose": diagnosed.mean(), "last": lost[rows["last"] > 0].mean(), "any": lost.mean()}


def report(rows: pd.DataFrame) -> str:
    """Markdown tables."""
    rows = rows.assign(near=-rows["fqe_off_data"])
    lines = [f"{len(rows)} policies of {rows['run'].nunique()} runs; the best returns {rows['return'].max():.1f}", ""]
    lines += ["| rank correlation with | return | discounted return |", "|---|---|---|"]
    for name, words in (("fqe", "FQE"), ("promise", "the critic's prediction"), ("near", "nearness to the data")):
        cells = [correlation(rows, name, other) for other in ("return", "discounted_return")]
        lines.append(f"| {words}, all policies | {' | '.join(cells)} |")
        runs = [run for _, run in rows.groupby("run")]
        cells = [[spearman(run[name], run[other]) for run in runs] for other in ("return", "discounted_return")]
        lines.append(
            f"| {words}, in one run, mean of {len(runs)} | {' | '.join(f'{np.nanmean(x):.2f}' for x in cells)} |"
        )
    lines += [
        "",
        "| regret of choosing | by FQE | by the prediction | nearest to the data | by diagnose.py | the last | any |",
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for words, key in (("in one run", "run"), ("in all runs of a seed", "seed")):
        found = pd.DataFrame([regrets(group) for _, group in rows.groupby(key)])
        cells = [f"{found[name].mean():.1f} (worst {found[name].max():.1f})" for name in found]
        lines.append(f"| {words} ({len(found)}) | {' | '.join(cells)} |")
    if "fqe_rank" in rows:
        lines += ["", "| seed | policies | rank correlation of FQE | its regret | ranked | correlation | regret |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for seed, group in rows.groupby("seed"):
            cells = []
            for some in (group, group[group["fqe_rank"].notna()]):
                found = ["", ""]
                if len(some) > 1:
                    lost = group["return"].max() - some["return"]
                    found = [f"{spearman(some['fqe'], some['return']):.2f}", f"{lost[some['fqe'].idxmax()]:.1f}"]
                cells += [str(len(some)), *found]
            lines.append(f"| {seed} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("paths", type=Path, nargs="+", metavar="PATH", help="run folders, or one file that --output wrote")
    add(
        "--fqe",
        type=Path,
        nargs="+",
        metavar="FILE.csv",
        help="tables of these policies by fqe.py --output",
    )
    add("--output", type=Path, metavar="FILE.csv", help="file for the rows")
    args = parser.parse_args(argv)
    from_file = args.paths[0].suffix == ".csv" and len(args.paths) == 1
    if from_file != (args.fqe is None) or from_file and args.output:
        parser.error("--fqe and --output go with run folders, which need --fqe")
    try:
        rows = pd.read_csv(args.paths[0]) if from_file else collect(args.paths, args.fqe)
        text = report(rows)
        if args.output:
            save(args.output, rows.to_csv(index=False))
        print(text)
    except KeyError as error:
        fail(1, f"{args.paths[0]} cannot be used: it has no {error}")
    except (OSError, ValueError) as error:  # a DataError is a ValueError
        fail(1, f"{args.paths[0]} cannot be used: {error}")


if __name__ == "__main__":
    with one_line_errors():
        main()

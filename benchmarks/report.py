"""Tables and pictures of runs, on one page that needs nothing else.

    python benchmarks/report.py runs --out report                       # all run folders in runs/
    python benchmarks/report.py runs/a runs/b --out report --by cql_alpha --rename "CQL cql_alpha=0" "offline SAC"
    python benchmarks/report.py benchmarks/results/finetune runs --out benchmarks/results/finetune    # adds runs
    python benchmarks/report.py --update README.md docs/results.md      # the tables between their markers

RUNS are run folders of any script, folders of them, CSV files <dataset>-<method>-seed<n>.csv (a run's metrics.csv) or
folders of those, a runs.csv that this program wrote (or its folder), and wandb:<entity>/<project>[/<group>]. DIR gets
index.html, its tables as table.md, its pictures as PNG files, runs.csv (every row of every run, an input for later) and
behaviour.csv (the returns of the data: of local datasets, and of what behaviour.csv beside an input has).

A run's dataset is its option env (hopper-medium-v2 is d4rl/hopper-medium-v2): versions never share a row, nor a number
over datasets. Its method is the option name and what differs between runs of that name on that dataset, but for seeds
and what cannot change a policy; --by names the options instead. Runs that were not finished are named, count only where
no run of their kind was finished, and never over datasets; CSV files do not say what was asked for, and the longest of
a dataset stands for it. Seeds of different length are compared at the last step that all have.

A table in a file is written anew between <!-- report: {...} --> and <!-- end -->. The braces hold YAML: `runs`, folders
from the root of the repository; `rows` and `columns`, each a mapping from datasets, methods (or behaviour) and
quantities (see QUANTITIES) to the words that stand for them, which may be left out; `dataset`, `method` and `quantity`
where the whole table has one; and `head`, the words above the rows.

Needs requirements-extra.txt. Exit status: 0 written, 1 cannot be done, 2 a bad command line; an error is one line on
stderr and leaves older files as they were.
"""

import argparse
import base64
import html
import importlib.metadata
import io
import itertools
import math
import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parents[1]
KEYS = ["dataset", "method", "seed", "run", "status", "last_step", "online_from", "episodes"]  # of runs.csv
RETURN, STD, SCORE = "eval_return", "eval_return_std", "d4rl_normalized_score"
# Options that do not make another method: what is in the columns, what cannot change a policy, and whose model it is.
NEUTRAL = {
    "env", "seed", "eval_seed", "run_id", "device", "checkpoints_path", "keep_policies", "log_interval", "compile",
    "project", "group", "name", "buffer_size", "eval_freq", "n_episodes", "max_timesteps", "online_iterations",
    "dynamics_path",
}  # fmt: skip
REPEATS = 5000  # resamples of a bootstrap interval
METRICS = {  # a panel of training metrics -> the columns it may stand in
    "TD error": ("qf1_loss", "qf_loss"),
    "TD error, held out": ("holdout_td_error",),
    "CQL's gap": ("cql_qf1_diff", "cql_qf_diff"),
    "mean Q of the data": ("average_qf1", "average_qf"),
    "mean Q of the data, held out": ("holdout_q",),
    "policy's log-probability": ("log_pi",),
    "entropy coefficient": ("alpha",),
    "policy loss": ("policy_loss",),
    "feature rank": ("feature_rank",),
    "return online": ("online_return",),
}


class ReportError(Exception):
    """What a user can mend; `status` is the exit status."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


def fail(status, message):
    print(f"report.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(status)


# Reading runs


@dataclass
class Run:
    """One run: `rows` has step and metrics, a row an evaluation; `config` is empty where only a CSV is left of it."""

    dataset: str
    method: str
    seed: int
    source: str
    rows: pd.DataFrame
    last_step: float = math.nan  # that was asked for
    online_from: float = math.nan  # NaN: no online phase
    episodes: float = math.nan  # an evaluation
    status: str = ""
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def script(self) -> str:
        kinds = {
            "online_iterations": "finetune/cql.py",
            "head": "discrete/cql_dqn.py",
            "real_ratio": "offline/combo.py",
        }
        return next((script for option, script in kinds.items() if option in self.config), "offline/cql.py")

    def settle(self, last_step: float) -> None:
        rows = self.rows.dropna(axis="columns", how="all") if len(self.rows) else self.rows
        self.rows = rows.sort_values("step").drop_duplicates("step", keep="last").reset_index(drop=True)
        self.last_step = last_step if math.isnan(self.last_step) else self.last_step
        self.status = self.status or ("finished" if self.end >= self.last_step else "unfinished")

    @property
    def end(self) -> float:
        """The step of its last row."""
        return self.rows["step"].max()


def read_csv(path: Path) -> pd.DataFrame:
    """Rows of numbers, without empty columns. Raises ReportError for what is no table of evaluations."""
    try:
        rows = pd.read_csv(path, float_precision="round_trip", keep_default_na=False, na_values=["", "nan", "NaN"])
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise ReportError(f"{path} cannot be read: {error}") from None
    for name in rows.columns.difference(["dataset", "method", "run", "status"]):
        try:
            rows[name] = rows[name].astype(float).replace([np.inf, -np.inf], np.nan)
        except ValueError as error:
            raise ReportError(f"{path}: column {name} holds what is no number: {error}") from None
    if "step" not in rows or rows["step"].isna().any():
        raise ReportError(f"{path} has no column step, or rows without one")
    return rows


def from_config(config: Any, rows: pd.DataFrame, source: str) -> Run:
    """Raises ReportError for what is no configuration of a run."""

    def option(name: str) -> float:
        return float(config.get(name, math.nan))

    try:
        dataset = str(config["env"])
        if dataset == "none":
            dataset = f"none ({config.get('eval_env')})"
        elif "/" not in dataset:
            dataset = f"d4rl/{dataset}"
        config = config | {"name": str(config["name"])}
        run = Run(dataset, "", int(config["seed"]), source, rows, config=config, episodes=option("n_episodes"))
        offline, online = option("offline_iterations"), option("online_iterations")
        run.last_step = option("max_timesteps") if math.isnan(offline) else offline + online
        run.online_from = offline if online else math.nan
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReportError(f"{source}: its config.yaml is not that of a run: {error!r}") from None
    return run


def read_folder(folder: Path) -> Run:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ReportError(f"{folder}/config.yaml cannot be read: {error}") from None
    path = folder / "metrics.csv"
    return from_config(config, read_csv(path) if path.exists() else pd.DataFrame({"step": []}), str(folder))


def read_file(path: Path) -> list[Run]:
    rows = read_csv(path)
    if not set(KEYS) <= set(rows.columns):
        match = re.fullmatch(r"(.+)-([^-]+)-seed(\d+)", path.stem)
        if not match:
            raise ReportError(f"{path} is neither a runs.csv nor a <dataset>-<method>-seed<n>.csv")
        run = Run(match[1], match[2], int(match[3]), str(path), rows)
        if "eval_regret" in rows and rows["eval_regret"].notna().any():
            run.online_from = rows["step"][rows["eval_regret"].notna().idxmax()]
        return [run]
    if rows[KEYS[:3]].isna().any(axis=None):
        raise ReportError(f"{path} has rows without dataset, method or seed")
    runs = []
    for (dataset, method, seed), group in rows.groupby(KEYS[:3], sort=False):
        *_, source, status, last_step, online_from, episodes = group[KEYS].fillna({"run": "", "status": ""}).iloc[0]
        about = source, group.drop(columns=KEYS), last_step, online_from, episodes, status
        runs.append(Run(str(dataset), str(method), int(seed), *about))
    return runs


def read_wandb(name: str) -> list[Run]:
    """Runs of a W&B project, of those that someone who is logged in may read."""
    import wandb

    entity, _, rest = name.removeprefix("wandb:").partition("/")
    project, _, group = rest.partition("/")
    if not entity or not project:
        raise ReportError(f"{name}: it takes wandb:<entity>/<project>[/<group>]", 2)
    try:
        found, runs = wandb.Api(timeout=20).runs(f"{entity}/{project}", {"group": group} if group else None), []
        for run in found:
            rows = [{k: v for k, v in row.items() if k[0] != "_"} for row in run.scan_history() if "step" in row]
            if rows:  # records between evaluations have no step of their own
                rows = pd.DataFrame(rows).apply(pd.to_numeric, errors="coerce").astype(float)
                runs.append(from_config(dict(run.config), rows, f"{entity}/{project}/{run.name}"))
    except ReportError:
        raise
    except Exception as error:  # no account, no network, no such project
        raise ReportError(f"{name} cannot be read: {error or repr(error)}; see `wandb login`") from None
    return runs


def read(names: list[str], notes: list[str]) -> list[Run]:
    """The runs that are there, those of files first. Raises ReportError."""
    files, runs = [], []
    for name in names:
        path, before = Path(name), len(runs) + len(files)
        if name.startswith("wandb:"):
            runs += read_wandb(name)
        elif path.is_file():
            files += read_file(path)
        elif (path / "config.yaml").exists():
            runs.append(read_folder(path))
        elif (path / "runs.csv").exists():
            files += read_file(path / "runs.csv")
        else:
            runs += [read_folder(x.parent) for x in sorted(path.glob("*/config.yaml"))]
            files += [run for x in sorted(path.glob("*-seed*.csv")) for run in read_file(x)]
        if len(runs) + len(files) == before:
            raise ReportError(f"{name} holds no run: a folder with config.yaml, runs.csv or *-seed<n>.csv files")
    longest = {}  # of a dataset, for files that do not tell what was asked for
    for run in files:
        longest[run.dataset] = max(longest.get(run.dataset, 0), run.end)
    for run in files + runs:
        run.settle(longest.get(run.dataset, 0))
    notes += [f"{run.source} has no evaluation yet, and is left out" for run in files + runs if run.rows.empty]
    if not (found := [run for run in files + runs if not run.rows.empty]):
        raise ReportError("; ".join(notes))
    return found


def label(runs: list[Run], by: Optional[list[str]]) -> None:
    """Names the methods of runs whose configuration is known."""
    groups = {}
    for run in runs:
        if run.config:
            groups.setdefault((run.dataset, run.config["name"], run.script), []).append(run)
    for (dataset, name, script), group in groups.items():
        if by and (missing := set(by) - {option for run in runs for option in run.config}):
            raise ReportError(f"--by {missing.pop()}: no run has this option", 2)
        options = group[0].config if by is None else by
        differ = [x for x in options if len({repr(run.config.get(x)) for run in group}) > 1 and x not in NEUTRAL]
        shared = any(key[:2] == (dataset, name) and key[2] != script for key in groups)
        for run in group:
            values = {x: run.config.get(x) for x in (by or differ)}
            words = [
                x if value is True else f"{x}={value:g}" if isinstance(value, float) else f"{x}={value}"
                for x, value in values.items()
                if value is not None and value is not False
            ]
            run.method = " ".join([name, *([script] if shared else []), *words])


def unite(runs: list[Run], notes: list[str]) -> list[Run]:
    """One run a dataset, method and seed: of several the longest. Raises ReportError where that is none."""
    found = {}
    for run in runs:
        key = run.dataset, run.method, run.seed
        other = found.setdefault(key, run)
        if other.rows.sort_index(axis="columns").equals(run.rows.sort_index(axis="columns")):
            continue
        text = f"seed {run.seed} of {run.method} on {run.dataset} is there twice: {other.source} and {run.source}"
        if run.end == other.end:
            raise ReportError(f"{text}; give one of them, or tell them apart with --by OPTION")
        found[key] = max(other, run, key=lambda x: x.end)
        notes.append(f"{text}; the longer one counts")
    return list(found.values())


def rename(runs: list[Run], pairs: list[list[str]]) -> None:
    for old, new in pairs:
        known = {x for run in runs for x in (run.dataset, run.method)}
        if old not in known:
            raise ReportError(f"--rename {old!r}: no dataset or method has this name; there are {sorted(known)}", 2)
        for run in runs:
            run.dataset, run.method = (new if x == old else x for x in (run.dataset, run.method))


# What the runs of a dataset and method say


class Cell:
    """Runs of one method on one dataset that count, at the steps that they share."""

    def __init__(self, runs: list[Run]):
        self.all = sorted(runs, key=lambda run: run.seed)
        self.finished = [run for run in self.all if run.status == "finished"]
        self.runs = self.finished or self.all
        self.steps = np.array(sorted(set.intersection(*(set(run.rows["step"]) for run in self.runs))))
        self.online_from = self.runs[0].online_from

    def values(self, name: str) -> np.ndarray:
        """[seeds, steps], NaN where there is none."""
        rows = [run.rows.set_index("step") for run in self.runs]
        return np.array([x[name].loc[self.steps] if name in x else np.full(len(self.steps), np.nan) for x in rows])

    def last(self, name: str = RETURN) -> np.ndarray:
        """[seeds], of those that have it."""
        values = self.values(name)[:, -1:].ravel()
        return values[np.isfinite(values)]

    def best(self) -> np.ndarray:
        """Largest scores of the runs, [seeds]."""
        return np.array([np.nanmax(x) for x in self.values(SCORE) if np.isfinite(x).any()])

    def phases(self) -> dict[str, np.ndarray]:
        """Scores and regrets of offline and online phase, [seeds] each."""
        scores, place = self.values(SCORE), int(np.searchsorted(self.steps, self.online_from))
        if place + 1 >= len(self.steps) or self.steps[place] != self.online_from:
            return {}
        lowest = np.min(scores[:, place + 1 : place + 4], axis=1)
        found = {"offline score": scores[:, place], "lowest of the next three": lowest, "last score": scores[:, -1]}
        found |= {name.replace("_", " "): self.values(name)[:, -1] for name in ("train_regret", "eval_regret")}
        return found | {"dip": scores[:, place] - lowest}


Results = dict[tuple[str, str], Cell]
Behaviours = dict[str, dict[str, float]]  # dataset -> return, std, episodes and score of the data


def collect(runs: list[Run], notes: list[str]) -> Results:
    groups, results = {}, {}
    for run in runs:
        groups.setdefault((run.dataset, run.method), []).append(run)
    for (dataset, method), group in groups.items():
        cell, name = Cell(group), f"{method} on {dataset}"
        for run in cell.all:
            if run.status != "finished":
                reached = f"{run.status}, {run.end:,.0f} of {run.last_step:,.0f} steps"
                counts = "" if run in cell.runs else "; it does not count"
                notes.append(f"seed {run.seed} of {name}: {reached}{counts}")
        if not len(cell.steps):
            notes.append(f"{name} is left out: its seeds share no step")
            continue
        end, returns = f"step {cell.steps[-1]:,.0f}", cell.values(RETURN)
        if len({run.end for run in cell.runs}) > 1:
            notes.append(f"seeds of {name} have different lengths, and are compared at {end}")
        for run, missing in zip(cell.runs, np.isnan(returns[:, -1])):
            if missing and np.isfinite(returns).any():
                notes.append(f"seed {run.seed} of {name} has no return at {end}, and does not count")
        results[dataset, method] = cell
    if not results:
        raise ReportError("; ".join(notes))
    return results


def unique(items) -> list:
    return list(dict.fromkeys(items))


def stored_behaviours(names: list[str]) -> Behaviours:
    """From behaviour.csv beside inputs."""
    found = {}
    for folder in [Path(x) if Path(x).is_dir() else Path(x).parent for x in names]:
        if (folder / "behaviour.csv").exists():
            table = pd.read_csv(folder / "behaviour.csv", float_precision="round_trip", index_col="dataset")
            found |= table.to_dict("index")
    return found


def behaviour(dataset: str) -> Optional[dict[str, float]]:
    """The same of a local Minari dataset, but for a last episode that was cut short; None where there is none."""
    import minari

    try:
        if not minari.storage.get_dataset_path(dataset).exists():
            return None
        data = minari.load_dataset(dataset)
        episodes = [(len(x.rewards), x.terminations[-1], float(np.sum(x.rewards))) for x in data.iterate_episodes()]
    except Exception:  # its name is none of Minari's, or its files are of another kind: the report goes without
        return None
    lengths, terminated, returns = map(np.array, zip(*episodes))
    if not terminated[-1] and lengths[-1] < lengths.max():
        returns = returns[:-1]
    ends, mean = [data.storage.metadata.get(f"ref_{x}_score") for x in ("min", "max")], float(returns.mean())
    score = math.nan if None in ends else 100 * (mean - ends[0]) / (ends[1] - ends[0])
    return {"return": mean, "std": float(returns.std()), "episodes": len(returns), "score": score}


# Statistics over datasets and seeds; the numbers are rliable's


def iqm(scores: np.ndarray) -> np.ndarray:
    """Mean of the middle half, over the last axis."""
    cut = scores.shape[-1] // 4
    return np.sort(scores, axis=-1)[..., cut : scores.shape[-1] - cut].mean(axis=-1)


def resample(strata: list[np.ndarray], repeats: int = REPEATS, seed: int = 0) -> list[np.ndarray]:
    """Seeds drawn anew within each dataset: [seeds, ...] -> [repeats, seeds, ...], of each."""
    rng = np.random.default_rng(seed)
    return [x[rng.integers(len(x), size=(repeats, len(x)))] for x in strata]


def interval(values: np.ndarray) -> np.ndarray:
    """The middle 95 % of [repeats, ...]."""
    return np.percentile(values, [2.5, 97.5], axis=0)


def iqm_interval(strata: list[np.ndarray]) -> np.ndarray:
    return interval(iqm(np.concatenate(resample(strata), axis=1)))


def improvement(first: list[np.ndarray], second: list[np.ndarray]) -> np.ndarray:
    """Probability that a run of the first is better than one of the second, ties half: [..., seeds] a dataset -> [...],
    the mean over datasets."""
    differences = [x[..., :, None] - y[..., None, :] for x, y in zip(first, second)]
    return np.mean([np.mean((x > 0) + 0.5 * (x == 0), axis=(-2, -1)) for x in differences], axis=0)


def improvement_interval(first: list[np.ndarray], second: list[np.ndarray]) -> np.ndarray:
    return interval(improvement(resample(first), resample(second, seed=1)))


def profile(scores: np.ndarray, taus: np.ndarray) -> np.ndarray:
    """Share of runs above each tau: [..., runs] -> [..., taus]."""
    return np.stack([np.mean(scores > tau, axis=-1) for tau in taus], axis=-1)


class Comparison(NamedTuple):
    """Normalised last scores of the methods, on the datasets where all of them have one."""

    datasets: list[str]
    scores: dict[str, list[np.ndarray]]  # method -> dataset -> [seeds]

    @property
    def spread(self) -> bool:
        """Whether there are seeds to draw from."""
        return all(len(x) > 1 for strata in self.scores.values() for x in strata)


def version(dataset: str) -> str:
    match = re.fullmatch(r"d4rl/.*-(v\d+)", dataset)
    return f"D4RL {match[1]}" if match else "Minari's"


def compare(results: Results, notes: list[str]) -> Comparison:
    """Of finished runs; of nothing where datasets are of several versions, whose scores are not to be pooled."""
    last = {key: cell.last(SCORE) if cell.finished else () for key, cell in results.items()}
    scored, methods = (unique(key[i] for key, x in last.items() if len(x)) for i in (0, 1))
    shared = [x for x in scored if all(len(last.get((x, method), ())) for method in methods)]
    returned = unique(dataset for (dataset, _), cell in results.items() if len(cell.last()))
    if missing := [x for x in returned if not any(len(results[k].last(SCORE)) for k in results if k[0] == x)]:
        notes.append(
            f"no reference returns, hence no scores: {', '.join(missing)} (left out where datasets are pooled)"
        )
    if missing := [x for x in scored if x not in shared]:
        missing = ", ".join(missing)
        notes.append(f"not every method has a finished run on: {missing} (left out where datasets are pooled)")
    if len(versions := unique(map(version, shared))) > 1:
        notes.append(f"scores of {' and '.join(versions)} datasets are not pooled: make a report of each")
        shared = []
    return Comparison(shared, {method: [last[dataset, method] for dataset in shared] for method in methods if shared})


def pairs(comparison: Comparison) -> list[tuple[str, str]]:
    """All pairs of methods, or the best with each other one where that would be more than 21."""
    methods = sorted(comparison.scores, key=lambda x: -iqm(np.concatenate(comparison.scores[x])))
    found = list(itertools.combinations(methods, 2))
    return found if len(found) <= 21 else [(methods[0], other) for other in methods[1:]]


# Tables


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]
    text: str = ""  # how to read it

    def markdown(self) -> str:
        lines = [f"| {' | '.join(x.replace('|', chr(92) + '|') for x in line)} |" for line in (self.header, *self.rows)]
        return "\n".join([lines[0], "|---" * len(self.header) + "|", *lines[1:]])

    def html(self) -> str:
        def row(cells, kind):
            return f"<tr>{''.join(f'<{kind}>{html.escape(x)}</{kind}>' for x in cells)}</tr>"

        body = "\n".join(row(line, "td") for line in self.rows)
        return f'<div class="wide"><table>\n{row(self.header, "th")}\n{body}\n</table></div>'


def spread(values: np.ndarray, digits: int = 1) -> str:
    """Mean ± standard deviation over seeds, of which one has none."""
    deviation = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}" if len(values) else "-"


def returns_text(cell: Cell) -> str:
    """Over seeds; of one seed over its episodes."""
    returns = cell.last()
    if len(returns) != 1 or not len(cell.last(STD)):
        return spread(returns)
    return f"{returns[0]:.1f} ± {cell.last(STD)[0]:.1f}"


def brackets(ends: Any, digits: int = 1) -> str:
    return f"[{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


def short(source: str) -> str:
    """The repository or the authors of a published score."""
    match = re.match(r"https://github.com/[^/]+/([^/,]+)", source)
    return match[1] if match else source.split(",")[0]


def published_scores(datasets: list[str]) -> pd.DataFrame:
    """Of the same datasets, version included; a column `label` for method, source, and whether it is a best score."""
    table = pd.read_csv(ROOT / "benchmarks/published_scores.csv", float_precision="round_trip")
    table = table[table["dataset"].isin(datasets)]
    best = table["last_or_best"].map({"best": " (best)"}).fillna("")
    return table.assign(label="published " + table["method"] + ", " + table["source"].map(short) + best)


def published_text(row: pd.Series) -> str:
    text = f"{row['score']:.1f}" if math.isnan(row["std"]) else f"{row['score']:.1f} ± {row['std']:.1f}"
    return text if pd.isna(row["note"]) else f"{text} (suspect)"


def score_table(results: Results, behaviours: Behaviours, comparison: Comparison) -> Optional[Table]:
    """Datasets x methods, with published scores of the same datasets beside ours."""
    scored = [key for key, cell in results.items() if len(cell.last(SCORE))]
    if not scored:
        return None
    datasets, methods = (unique(names) for names in zip(*scored))
    published = published_scores(datasets)
    others, rows = unique(published["label"]), []
    for dataset in datasets:
        score = behaviours.get(dataset, {}).get("score", math.nan)
        row = [dataset, "-" if math.isnan(score) else f"{score:.1f}"]
        for method in methods:
            cell = results.get((dataset, method))
            state = "" if cell is None or cell.finished else f" ({cell.runs[0].status})"
            row.append(f"{spread(cell.last(SCORE))}{state}" if cell else "-")
        own = published[published["dataset"] == dataset].set_index("label")
        rows.append([*row, *(published_text(own.loc[x]) if x in own.index else "-" for x in others)])
    if comparison.datasets:
        row = [f"interquartile mean of {len(comparison.datasets)} dataset(s)", "-"]
        for strata in (comparison.scores.get(method) for method in methods):
            ends = f" {brackets(iqm_interval(strata))}" if strata and comparison.spread else ""
            row.append(f"{iqm(np.concatenate(strata)):.1f}{ends}" if strata else "-")
        rows.append(row + ["-"] * len(others))
    text = (
        "Score of the last evaluation, 0 and 100 at the dataset's reference returns: mean ± standard deviation over "
        "seeds, and the interquartile mean over datasets and seeds [95 % interval]. A best score is called so."
    )
    text += "".join(f" Published score, {note}." for note in unique(published["note"].dropna()))
    text += f" Sources: {'; '.join(unique(published['source']))}." if len(published) else ""
    return Table("Scores", ["dataset", "behaviour", *methods, *others], rows, text)


def run_table(results: Results) -> Table:
    header = "dataset, method, seeds, episodes, steps, last return, 95 % interval, worst seed, last score"
    header = [*header.split(", "), "best score (over evaluations)", "promised value", "realised value", "state"]
    rows = []
    for (dataset, method), cell in results.items():
        returns, episodes = cell.last(), unique(f"{x.episodes:.0f}" for x in cell.runs if not math.isnan(x.episodes))
        ends = brackets(interval(resample([returns])[0].mean(axis=1))) if len(returns) > 1 else "-"
        row = [dataset, method, str(len(returns)), " or ".join(episodes) or "-", f"{cell.steps[-1]:,.0f}"]
        row += [returns_text(cell), ends, f"{returns.min():.1f}" if len(returns) else "-", spread(cell.last(SCORE))]
        row += [spread(cell.best()), spread(cell.last("eval_predicted_value"))]
        row += [spread(cell.last("eval_discounted_return")), "finished" if cell.finished else cell.runs[0].status]
        rows.append(row)
    text = (
        "At the last evaluation, mean ± standard deviation over seeds (of one seed: return ± over its episodes). A "
        "run's own number is the mean over its evaluation episodes. The best score is the largest over a run's "
        "evaluations: it takes the simulator to choose it, and is no result. Promised is what the critics predict at "
        "the starts, realised the discounted return of the same training rewards."
    )
    return Table("Runs", header, rows, text)


def improvement_table(comparison: Comparison) -> Optional[Table]:
    rows = []
    for first, second in pairs(comparison):
        strata = comparison.scores[first], comparison.scores[second]
        ends = brackets(improvement_interval(*strata), 2) if comparison.spread else "-"
        rows.append([f"{first} > {second}", f"{improvement(*strata):.2f}", ends])
    text = (
        "How likely a run of the first method scores above one of the second on the same dataset; 0.5: no difference."
    )
    header = ["methods", "probability", "95 % interval"]
    return Table("Probability of improvement", header, rows, text) if rows else None


PHASES = ("offline score", "lowest of the next three", "dip", "last score", "train regret", "eval regret")


def phase_table(results: Results) -> Optional[Table]:
    rows = []
    for (dataset, method), cell in results.items():
        if phases := cell.phases():
            texts = [spread(phases[x][np.isfinite(phases[x])], 3 if "regret" in x else 1) for x in PHASES]
            rows.append([dataset, method, str(len(cell.runs)), *texts])
    text = (
        "Scores where the phases meet, the lowest of the three evaluations after that, how far it lies below (dip), "
        "and at the end; regret is the mean of 1 - score / 100 (or of failures) over online episodes, and over "
        "evaluations from there on."
    )
    return Table("Offline, then online", ["dataset", "method", "seeds", *PHASES], rows, text) if rows else None


# Pictures


def matplotlib_pyplot():
    try:
        import matplotlib
    except ImportError:
        raise ReportError("the package matplotlib is missing: pip install -r requirements-extra.txt") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False})
    plt.rcParams["text.parse_math"] = False  # a dollar in a name is one
    return plt


def style(methods: list[str], method: str) -> dict[str, Any]:
    """A colour a method, with other dashes from the eleventh on."""
    i = methods.index(method)
    return {"color": f"C{i % 10}", "linestyle": ("-", "-.", (0, (1, 1)))[i // 10 % 3]}


def panels(plt, names: list[str], width: float = 4.2, height: float = 3.2, columns: int = 3):
    columns = 2 if len(names) == 4 and columns == 3 else min(columns, len(names))
    n_rows = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(
        n_rows, columns, figsize=(max(width * columns, 6), height * n_rows + 0.2), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names):
        axis.set_title(name)
        axis.locator_params(axis="x", nbins=6)
    return figure, list(axes.flat[: len(names)])


def legend(figure, axes) -> None:
    """One below all panels, where it hides nothing."""
    handles = {}
    for axis in axes:
        for handle, text in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(text, handle)
    width = 0.6 + 0.08 * max(map(len, handles), default=1)  # inches of an entry
    columns = max(1, min(len(handles), int(figure.get_figwidth() / width)))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(handles) / columns))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)


def tame(axis, values: np.ndarray) -> None:
    """A scale that shows both what lies near 0 and what diverged."""
    sizes = np.abs(values[np.isfinite(values)])
    typical = np.median(sizes) if len(sizes) else 0
    if len(sizes) and sizes.max() > 100 * max(typical, 1e-9) > 0:
        axis("symlog", linthresh=max(typical, 1e-9))


def draw_curve(axis, cell: Cell, values: np.ndarray, look: dict[str, Any], text: str) -> None:
    """Mean over seeds and its interval; a cross where no seed goes on."""
    seen = np.isfinite(values).any(axis=0)
    if not seen.any():
        return
    steps, values = cell.steps[seen], values[:, seen]
    axis.plot(steps, np.nanmean(values, axis=0), marker="." if len(steps) < 30 else None, label=text, **look)
    if len(values) > 1:
        (drawn,) = resample([values])
        with np.errstate(invalid="ignore"):  # where all that was drawn is missing
            means = np.nansum(drawn, axis=1) / np.isfinite(drawn).sum(axis=1)
        low, high = np.nanpercentile(means, [2.5, 97.5], axis=0)
        axis.fill_between(steps, low, high, color=look["color"], alpha=0.2, linewidth=0)
    if not cell.finished:
        axis.plot(steps[-1], np.nanmean(values[:, -1]), "X", color=look["color"], markersize=9, markeredgecolor="black")


def step_name(cells: list[Cell]) -> str:
    starts = {cell.online_from for cell in cells if not math.isnan(cell.online_from)}
    return "steps online" if starts == {0} else "updates offline, then steps online" if starts else "updates"


def title(dataset: str, cells: dict[str, Cell]) -> str:
    counts = sorted({len(cell.runs) for cell in cells.values()})
    return f"{dataset}\n{' to '.join(map(str, counts[:: max(1, len(counts) - 1)]))} seed{'s' * (counts != [1])}"


def score_axis(axis, cells: dict[str, Cell]) -> None:
    """A second scale, since a score is a line in the return."""
    points = [np.stack([cell.values(RETURN), cell.values(SCORE)]).reshape(2, -1) for cell in cells.values()]
    points = np.concatenate(points, axis=1)
    returns, scores = points[:, np.isfinite(points).all(axis=0)]
    if len(returns) > 1 and np.ptp(returns) > 0:
        low, high = returns.argmin(), returns.argmax()
        slope = (scores[high] - scores[low]) / np.ptp(returns)
        offset = scores[low] - slope * returns[low]
        second = axis.secondary_yaxis("right", functions=(lambda x: offset + slope * x, lambda y: (y - offset) / slope))
        second.set_ylabel("normalised score")


def curves(plt, results: Results, methods: list[str], behaviours: Behaviours):
    seen = unique(key[0] for key, cell in results.items() if np.isfinite(cell.values(RETURN)).any())
    if not seen:
        return None
    groups = {x: {method: cell for (name, method), cell in results.items() if name == x} for x in seen}
    figure, axes = panels(plt, [title(*group) for group in groups.items()])
    for axis, (dataset, cells) in zip(axes, groups.items()):
        for method, cell in cells.items():
            look = style(methods, method)
            draw_curve(axis, cell, cell.values(RETURN), look, method)
            for run in cell.all:
                if run not in cell.runs and RETURN in run.rows:
                    axis.plot(run.rows["step"], run.rows[RETURN], linewidth=0.7, marker="x", markevery=[-1], **look)
        if dataset in behaviours:
            text = "behaviour (mean of the data)"
            axis.axhline(behaviours[dataset]["return"], color="black", linestyle="--", linewidth=1, label=text)
        for step in unique(cell.online_from for cell in cells.values() if cell.online_from > 0):
            axis.axvline(step, color="grey", linestyle=":", label="online from here")
        axis.set(xlabel=step_name(list(cells.values())), ylabel="return of an episode")
        score_axis(axis, cells)
    legend(figure, axes)
    return figure


def values(plt, results: Results, methods: list[str]):
    """Promised against realised value at every evaluation."""
    names = "eval_discounted_return", "eval_predicted_value"
    points = {key: np.stack([cell.values(name) for name in names]) for key, cell in results.items()}
    points = {key: x for key, x in points.items() if np.isfinite(x).all(axis=0).any()}
    datasets = unique(dataset for dataset, _ in points)
    if not datasets:
        return None
    figure, axes = panels(plt, datasets)
    for axis, dataset in zip(axes, datasets):
        own = {method: x for (name, method), x in points.items() if name == dataset}
        everything = np.concatenate([x[:, np.isfinite(x).all(axis=0)].ravel() for x in own.values()])
        tame(axis.set_xscale, everything)
        tame(axis.set_yscale, everything)
        for method, x in own.items():
            look = {"color": style(methods, method)["color"], "marker": "os^"[methods.index(method) // 10 % 3]}
            axis.scatter(*x[:, :, :-1].reshape(2, -1), s=9, alpha=0.4, linewidths=0, **look)
            axis.scatter(*x[:, :, -1], s=34, edgecolors="black", linewidths=0.5, label=method, **look)
        line = np.linspace(everything.min(), everything.max(), 500)
        axis.plot(line, line, "--", color="black", linewidth=1, label="promise kept")
        axis.set(xlabel="realised discounted return", ylabel="value promised at the starts")
    legend(figure, axes)
    return figure


def metrics(plt, results: Results, methods: list[str]):
    datasets, panel_list = unique(dataset for dataset, _ in results), []
    for dataset in datasets:
        cells = {method: cell for (name, method), cell in results.items() if name == dataset}
        for title, names in METRICS.items():
            found = [(m, c, name, c.values(name)) for m, c in cells.items() for name in names]
            if found := [x for x in found if np.isfinite(x[3]).any()]:
                panel_list.append((f"{dataset}\n{title}", found))
    if not panel_list:
        return None
    figure, axes = panels(plt, [title for title, _ in panel_list], 3.4, 2.6, 4)
    for axis, (_, found) in zip(axes, panel_list):
        for method, cell, _, x in found:
            draw_curve(axis, cell, x, style(methods, method), method)
        tame(axis.set_yscale, np.concatenate([x.ravel() for *_, x in found]))
        names = " or ".join(unique(name for *_, name, _ in found))
        axis.set(xlabel=step_name([cell for _, cell, *_ in found]), ylabel=names)
    legend(figure, axes)
    return figure


def aggregates(plt, comparison: Comparison, methods: list[str]):
    """Interquartile means, performance profiles, and probabilities of improvement."""
    if not comparison.datasets:
        return None
    figure, axes = panels(plt, ["Interquartile mean", "Performance profile", "Probability of improvement"], 4.6, 3.6)
    everything = np.concatenate([x for strata in comparison.scores.values() for x in strata])
    taus = np.linspace(everything.min() - 1e-9, everything.max(), 201)
    for i, (method, strata) in enumerate(comparison.scores.items()):
        pooled, look = np.concatenate(strata), style(methods, method)
        axes[0].plot(iqm(pooled), -i, "o", color=look["color"])
        axes[1].plot(taus, profile(pooled, taus), label=method, **look)
        if comparison.spread:
            axes[0].plot(iqm_interval(strata), [-i, -i], color=look["color"], linewidth=4, alpha=0.4)
            drawn = profile(np.concatenate(resample(strata, 1000), axis=1), taus)
            axes[1].fill_between(taus, *interval(drawn), color=look["color"], alpha=0.2, linewidth=0)
    axes[0].set_yticks(-np.arange(len(comparison.scores)), list(comparison.scores))
    axes[0].set(xlabel=f"normalised score, {len(comparison.datasets)} dataset(s)")
    axes[0].set(ylim=(0.5 - len(comparison.scores), 0.5))
    axes[1].set(xlabel="normalised score τ", ylabel="share of runs above τ")
    names = pairs(comparison)
    for i, (first, second) in enumerate(names):
        strata = comparison.scores[first], comparison.scores[second]
        axes[2].plot(improvement(*strata), -i, "o", color="C0")
        if comparison.spread:
            axes[2].plot(improvement_interval(*strata), [-i, -i], color="C0", linewidth=4, alpha=0.4)
    axes[2].axvline(0.5, color="black", linestyle="--", linewidth=1)
    axes[2].set_yticks(-np.arange(len(names)), [f"{first} > {second}" for first, second in names])
    axes[2].set(xlabel="probability", xlim=(-0.03, 1.03), ylim=(0.5 - max(1, len(names)), 0.5))
    if not names:
        figure.delaxes(axes[2])
    figure.set_figheight(max(3.6, 0.9 + 0.22 * max(len(names), len(comparison.scores))))
    legend(figure, axes[1:2])
    return figure


CAPTIONS = {  # picture -> title, how to read it
    "curves": (
        "Learning curves",
        "Mean over seeds of the evaluation return, with a 95 % bootstrap interval of that mean over seeds: too narrow "
        "where there are few, and none where there is one. A large cross marks a method of which no run was finished, "
        "a thin line an unfinished run that does not count.",
    ),
    "aggregates": (
        "Over all datasets",
        "From normalised scores of the last evaluation; bands are 95 % intervals of a bootstrap over seeds within "
        "each dataset. The interquartile mean leaves out the lowest and the highest quarter of the runs.",
    ),
    "values": (
        "Promised and realised value",
        "What the critics promise at the starts of episodes against the discounted return that the policy gets, both "
        "in training rewards: above the line they promise too much. Large dots are the last evaluation.",
    ),
    "metrics": ("Training metrics", "Means since the evaluation before; the names are those of metrics.csv."),
}


def draw(results: Results, behaviours: Behaviours, comparison: Comparison) -> dict[str, bytes]:
    """Name -> PNG."""
    plt, methods, pictures = matplotlib_pyplot(), unique(method for _, method in results), {}
    figures = {"curves": curves(plt, results, methods, behaviours), "aggregates": aggregates(plt, comparison, methods)}
    figures |= {"values": values(plt, results, methods), "metrics": metrics(plt, results, methods)}
    for name, figure in figures.items():
        if figure is not None:
            file = io.BytesIO()
            figure.savefig(file, dpi=100, format="png", metadata={"Software": None})
            pictures[name] = file.getvalue()
    plt.close("all")
    return pictures


# The page


STYLE = """body { font: 15px/1.5 sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px } th, td { border: 1px solid #ccc; padding: 3px 8px }
th { background: #f2f2f2; text-align: left } .wide { overflow-x: auto } img { max-width: 100% }"""


def packages() -> str:
    found = [f"Python {sys.version.split()[0]}"]
    for name in ("torch", "numpy", "gymnasium", "minari", "mujoco", "matplotlib"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def sources(runs: list[Run]) -> list[list[str]]:
    rows = []
    for run in runs:
        command = (
            f"python algorithms/{run.script} --config_path {shlex.quote(run.source + '/config.yaml')} --run_id again"
        )
        rows.append([run.dataset, run.method, str(run.seed), run.source, command if run.config else "-"])
    return rows


def page(summary: str, notes: list[str], tables: list[Table], pictures: dict[str, bytes]) -> str:
    """HTML with all in it: the first table, the pictures, the other tables."""
    parts = [f"<h2>{x.title}</h2>\n<p>{html.escape(x.text)}</p>\n{x.html()}" for x in tables]
    images = []
    for name, picture in pictures.items():
        heading, text = CAPTIONS[name]
        data = base64.b64encode(picture).decode()
        images.append(f'<h2>{heading}</h2>\n<p>{text}</p>\n<img alt="{heading}" src="data:image/png;base64,{data}">')
    lines = "\n".join(f"<li>{html.escape(note)}</li>" for note in notes)
    head = f'<meta charset="utf-8"><title>Report</title><style>{STYLE}</style>'
    start = f"<h1>Report</h1>\n<p>{html.escape(summary)}</p>\n<ul>{lines}</ul>"
    body = "\n".join([start, parts[0], *images, *parts[1:]])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def long_form(runs: list[Run]) -> str:
    """runs.csv."""
    parts = []
    for run in runs:
        own = [run.dataset, run.method, run.seed, Path(run.source).name.removesuffix(".csv"), run.status]
        own += [run.last_step, run.online_from, run.episodes]
        parts.append(pd.concat([pd.DataFrame([own] * len(run.rows), columns=KEYS), run.rows], axis=1))
    rows = pd.concat(parts)
    for name in ("last_step", "online_from", "episodes", "step"):
        rows[name] = rows[name].astype("Int64")
    return rows.to_csv(index=False, lineterminator="\n")


def write(path: Path, content: str | bytes) -> None:
    """Whole, or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def report(names: list[str], out: Path, by: Optional[list[str]], pairs: list[list[str]], command: str) -> None:
    """Raises ReportError and OSError."""
    notes = []
    runs = read(names, notes)
    label(runs, by)
    rename(runs, pairs)
    runs = unite(runs, notes)
    results = collect(runs, notes)
    comparison = compare(results, notes)
    behaviours, datasets = stored_behaviours(names), unique(run.dataset for run in runs)
    behaviours = {x: behaviours.get(x) or behaviour(x) for x in datasets}
    behaviours = {x: row for x, row in behaviours.items() if row}
    pictures = draw(results, behaviours, comparison)
    tables = [score_table(results, behaviours, comparison), run_table(results)]
    tables = [x for x in (*tables, improvement_table(comparison), phase_table(results)) if x]
    counts = [len(runs), len(datasets), len(unique(x.method for x in runs))]
    summary = "{} runs, {} datasets, {} methods".format(*counts)
    text = f"Made by: {command}; with {packages()} (the runs may have had others). Run folders can be run again."
    made = Table("How it was made", ["dataset", "method", "seed", "run", "the same again"], sources(runs), text)
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        write(out / f"{name}.png", picture)
    write(out / "runs.csv", long_form(runs))
    if behaviours:
        table = pd.DataFrame.from_dict(behaviours, orient="index")
        write(out / "behaviour.csv", table.to_csv(index_label="dataset", lineterminator="\n"))
    texts = [f"## {x.title}\n\n{x.text}\n\n{x.markdown()}\n" for x in tables]
    write(out / "table.md", "\n".join([*(f"- {note}" for note in notes), *([""] if notes else []), *texts]))
    write(out / "index.html", page(f"{summary}.", notes, [*tables, made], pictures))
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{summary}: {out / 'index.html'}")


# Tables in files


def returned(cell: Cell, short: bool = True) -> str:
    """A cell of a table in a file; of a run that was not finished the word for it."""
    if cell.finished:
        return returns_text(cell)
    status = cell.runs[0].status
    return status.split()[0] if short else f"{status}; {returns_text(cell)} at {cell.steps[-1]:,.0f}"


def worst(cell: Cell) -> str:
    return f"{returned(cell)} [{cell.last().min():.0f}]"


def with_score(cell: Cell) -> str:
    return f"{returned(cell, short=False)} ({cell.last(SCORE).mean():.1f})"


QUANTITIES = {
    "return": returned,  # mean ± standard deviation over seeds of the last evaluation, of one seed over its episodes
    "return [worst]": worst,
    "return (score)": with_score,
    "each return": lambda cell: ", ".join(f"{x:.1f}" for x in cell.last()),  # of the seeds in order
    "mean return": lambda cell: spread(cell.values(RETURN).mean(axis=1)),  # over a run's evaluations
    "steps": lambda cell: f"{cell.steps[-1]:,.0f}",
    "promised": lambda cell: spread(cell.last("eval_predicted_value")),  # by the critics, at the start states
    "realised": lambda cell: spread(cell.last("eval_discounted_return")),
    "regulariser": lambda cell: spread(cell.last("combo_regulariser"), 2),  # of offline/combo.py
} | {name: lambda cell, name=name: spread(cell.phases()[name], 3 if "regret" in name else 1) for name in PHASES}


def behaviour_text(row: dict[str, float], quantity: str) -> str:
    text = f"{row['return']:.1f} ± {row['std']:.1f}"
    return f"{text} ({row['score']:.1f})" if quantity == "return (score)" else text


def make_table(spec: dict[str, Any]) -> Table:
    """The table that a marker describes. Raises ReportError."""
    folders, rows = [str(ROOT / x) for x in spec["runs"]], []
    results, behaviours = collect(read(folders, []), []), stored_behaviours(folders)
    datasets = {dataset for dataset, _ in results}
    for row, words in spec["rows"].items():
        texts = [words or row] if "head" in spec else []
        for column in spec["columns"]:
            place = {"quantity": "return"} | {x: spec[x] for x in ("dataset", "method", "quantity") if x in spec}
            place |= {
                "quantity" if x in QUANTITIES else "dataset" if x in datasets else "method": x for x in (row, column)
            }
            dataset, method, quantity = place["dataset"], place.get("method"), place["quantity"]
            if method == "behaviour":
                texts.append(behaviour_text(behaviours[dataset], quantity))
                continue
            cells = [cell for key, cell in results.items() if key[0] == dataset and method in (None, key[1])]
            if not cells:
                raise ReportError(f"a table has {method} on {dataset}, which is not in {', '.join(spec['runs'])}")
            texts.append(" or ".join(unique(QUANTITIES[quantity](cell) for cell in cells)))
        rows.append(texts)
    header = [words or column for column, words in spec["columns"].items()]
    return Table("", [spec["head"], *header] if "head" in spec else header, rows)


def update(path: Path) -> str:
    """The file's text with its tables made anew. Raises ReportError."""

    def replace(match):
        try:
            return f"{match[1]}\n{make_table(yaml.safe_load(match[2])).markdown()}\n{match[4]}"
        except ReportError as error:
            raise ReportError(f"{path}: {error}") from None
        except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            raise ReportError(f"{path}: {match[2][:60]}... describes no table: {error!r}") from None

    text = path.read_text()
    text, n = re.subn(r"(<!-- report: (\{.*?\}) -->)\n(.*?)(<!-- end -->)", replace, text, flags=re.DOTALL)
    if not n:
        raise ReportError(f"{path} has no <!-- report: {{...}} --> with an <!-- end -->")
    return text


def main(argv=None):
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: fail(2, message)
    parser.add_argument("runs", nargs="*", metavar="RUNS", help="run folders, folders of them, CSV files, wandb:...")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for page, tables and pictures")
    parser.add_argument("--by", nargs="+", metavar="OPTION", help="options that tell methods apart")
    parser.add_argument(
        "--rename", nargs=2, action="append", default=[], metavar=("OLD", "NEW"), help="of a method or dataset"
    )
    parser.add_argument(
        "--update", nargs="+", type=Path, metavar="FILE", help="rewrite the tables between their markers"
    )
    args = parser.parse_args(argv)
    if bool(args.update) == bool(args.runs) or bool(args.runs) != bool(args.out):
        parser.error("it takes RUNS and --out DIR, or --update FILE...")
    try:
        if args.runs:
            words = ["python", "benchmarks/report.py", *(sys.argv[1:] if argv is None else argv)]
            report(args.runs, args.out, args.by, args.rename, shlex.join(words))
        for path, text in [(path, update(path)) for path in args.update or ()]:
            print(f"{path}: {'as it was' if text == path.read_text() else 'written'}")
            write(path, text)
    except ReportError as error:
        fail(error.status, error)
    except OSError as error:
        fail(1, f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        fail(130, "interrupted")


if __name__ == "__main__":
    main()

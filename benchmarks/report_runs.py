"""The runs of a report: reads them, names their methods, decides which count, and computes statistics over seeds."""

import ast
import functools
import itertools
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import pandas as pd
import yaml

from benchmarks.common import READERS, ROOT, SCRIPTS, DataError, OptionError, local_dataset, read_dataset

TEXTS = ["dataset", "method", "run", "status"]  # columns of runs.csv that hold no numbers
KEYS = ["dataset", "method", "seed", "run", "status", "last_step", "online_from", "episodes"]  # of runs.csv
RETURN, STD, SCORE = "eval_return", "eval_return_std", "d4rl_normalized_score"
OVERESTIMATE = "eval_predicted_value - eval_discounted_return"
# Options that do not make another method: they have columns of their own, cannot change a policy, or say whose model a
# run used.
NEUTRAL = {
    "env", "seed", "eval_seed", "run_id", "device", "checkpoints_path", "keep_policies", "log_interval", "compile",
    "project", "group", "name", "buffer_size", "eval_freq", "n_episodes", "max_timesteps", "online_iterations",
    "dynamics_path",
}  # fmt: skip
LONG = 60  # characters of a method's name from which its options are abbreviated
MIN_RUNS = 3  # of each method, for a statistic that pools runs
REPEATS = 5000  # resamples of a bootstrap interval


def unique(items) -> list:
    return list(dict.fromkeys(items))


# Scripts


class Script(NamedTuple):
    path: Path
    label: str
    defaults: dict[str, Any]  # option -> default; what is computed when the script starts is None


@functools.cache
def read_script(path: Path) -> Script:
    """Reads the options of a training script without running it. Raises OptionError."""

    def value(node: ast.expr) -> Any:
        try:
            return ast.literal_eval(ast.unparse(node).replace("math.inf", "1e999"))
        except ValueError:
            return None

    try:
        classes = {x.name: x for x in ast.parse(path.read_text()).body if isinstance(x, ast.ClassDef)}
        defaults = {x.target.id: value(x.value) for x in classes["TrainConfig"].body if isinstance(x, ast.AnnAssign)}
    except (OSError, SyntaxError, ValueError, KeyError) as error:
        raise OptionError(f"--script {path} is not a training script with a class TrainConfig: {error!r}") from None
    return Script(path, f"{path.parent.name}/{path.stem}" if ROOT in path.parents else path.stem, defaults)


# Reading runs


@dataclass(eq=False)
class Run:
    """One run. `rows` has step and metrics, one row per evaluation; `config` is empty if it comes from a runs.csv."""

    dataset: str
    method: str
    seed: int
    source: str  # folder, or name of a W&B run
    rows: pd.DataFrame
    link: str  # path or address
    last_step: float = math.nan  # that was asked for
    online_from: float = math.nan  # NaN: no online phase
    episodes: float = math.nan  # per evaluation
    status: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    script: Optional[Script] = None  # whose options are most like its own
    order: tuple = ()  # place among the methods of a dataset

    @property
    def end(self) -> float:
        """The step of its last row."""
        return self.rows["step"].max()

    @property
    def foreign(self) -> list[str]:
        """Options that its script does not have, since it comes from a copy or an older version."""
        return sorted(self.config.keys() - self.script.defaults.keys())

    @property
    def family(self) -> tuple[str, str]:
        """Its name, and its script with the options that the script does not have."""
        return self.config["name"], "+".join([self.script.label, *self.foreign])

    @functools.cached_property
    def options(self) -> dict[str, Any]:
        """The options that make its method, with defaults for those that its script did not have yet."""
        return {x: self.value(x) for x in self.script.defaults | self.config if x not in NEUTRAL}

    def value(self, option: str) -> Any:
        value = self.config.get(option, self.script.defaults.get(option))
        if option == "load_model":  # each seed may have a checkpoint of its own
            return bool(value)
        return float(value) if type(value) is int else value  # W&B makes 5.0 into 5

    def settle(self) -> None:
        """Sorts the rows, and decides whether the run was finished."""
        rows = self.rows.replace([np.inf, -np.inf], np.nan)
        rows = rows.dropna(axis="columns", how="all") if len(rows) else rows
        self.rows = rows.sort_values("step").drop_duplicates("step", keep="last").reset_index(drop=True)
        self.status = self.status or ("finished" if self.end >= self.last_step else "unfinished")


def read_csv(path: Path) -> pd.DataFrame:
    """Reads a table of numbers with a column step. Raises DataError."""
    try:
        options = {"float_precision": "round_trip", "keep_default_na": False, "na_values": ["", "nan", "NaN"]}
        rows = pd.read_csv(path, dtype=dict.fromkeys(TEXTS, str), **options)
        numbers = rows.columns.difference(TEXTS)
        rows[numbers] = rows[numbers].astype(float)
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise DataError(f"{path} cannot be read: {error}") from None
    if "step" not in rows or not np.isfinite(rows["step"]).all():
        raise DataError(f"{path} has no column step, or rows without one")
    return rows


def from_config(config: Any, rows: pd.DataFrame, source: str, link: str) -> Run:
    """Raises DataError for what is not the configuration of a run."""
    if not isinstance(config, dict) or any(config.get(x) is None for x in ("env", "name", "seed")):
        raise DataError(f"{source}: its configuration has no env, name or seed")
    dataset, name = str(config["env"]), str(config["name"])
    try:
        numbers = ("n_episodes", "max_timesteps", "offline_iterations", "online_iterations")
        episodes, updates, offline, online = (float(config.get(x, math.nan)) for x in numbers)
        seed = int(config["seed"])
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{source}: its configuration has something else where a number belongs: {error}") from None
    if dataset == "none":
        dataset = f"none ({config.get('eval_env')})"
    elif "/" not in dataset:
        dataset = f"d4rl/{dataset}"
    last_step, online_from = (updates, math.nan) if math.isnan(offline) else (offline + online, offline)
    about = last_step, online_from if online else math.nan, episodes
    return Run(dataset, "", seed, source, rows, link, *about, config=config | {"name": name})


def read_folder(folder: Path) -> list[Run]:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        started = (folder / "metrics.csv").exists()
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{folder}/config.yaml cannot be read: {error}") from None
    rows = read_csv(folder / "metrics.csv") if started else pd.DataFrame({"step": []})
    return [from_config(config, rows, str(folder), str(folder))]


def read_file(path: Path) -> list[Run]:
    """The runs of a runs.csv. Raises DataError."""
    rows, runs = read_csv(path), []
    if not set(KEYS) <= set(rows.columns) or rows[KEYS[:3]].isna().any(axis=None):
        raise DataError(f"{path} is not a runs.csv: each row needs dataset, method and seed; others may be empty")
    for (dataset, method, seed), group in rows.groupby(KEYS[:3], sort=False):
        *_, source, status, last_step, online_from, episodes = group[KEYS].fillna({"run": "", "status": ""}).iloc[0]
        about = source, group.drop(columns=KEYS), str(path), last_step, online_from, episodes, status
        runs.append(Run(dataset, method, int(seed), *about))
    return runs


def read_wandb(name: str, notes: list[str]) -> list[Run]:
    """Reads the runs of a W&B project; those that are not of this project's kind are noted. Raises DataError."""
    import wandb

    entity, _, rest = name.removeprefix("wandb:").partition("/")
    project, _, group = rest.partition("/")
    if not entity or not project:
        raise OptionError(f"{name}: it takes wandb:<entity>/<project>[/<group>]")
    try:
        found = list(wandb.Api(timeout=20).runs(f"{entity}/{project}", {"group": group} if group else None))
        histories = [list(run.scan_history()) for run in found]
    except Exception as error:  # no account, no network, no such project
        raise DataError(f"{name} cannot be read: {error or repr(error)}; see `wandb login`") from None
    runs = []
    for run, history in zip(found, histories):  # records between evaluations have no step of their own
        rows = [{k: v for k, v in row.items() if k[0] != "_"} for row in history if "step" in row]
        rows = pd.DataFrame(rows or {"step": []}).apply(pd.to_numeric, errors="coerce").astype(float)
        try:
            runs.append(from_config(dict(run.config), rows, f"{entity}/{project}/{run.name}", run.url))
        except DataError as error:
            notes.append(f"{error}; left out")
    return runs


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, which may be damaged, or is closed to us."""
    if not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
        return folder.is_dir()
    return any((folder / name).exists() for name in ("config.yaml", "metrics.csv", "checkpoint.pt"))


def paths_of(name: str) -> list[Path]:
    """The run folders, or the runs.csv, that an input stands for. Raises DataError."""
    path = Path(name)
    if not path.exists():
        raise DataError(f"{name} does not exist")
    if path.is_file() or is_run(path):
        return [path]
    return [path / "runs.csv"] if (path / "runs.csv").exists() else [x for x in sorted(path.iterdir()) if is_run(x)]


def read(names: list[str], notes: list[str]) -> list[Run]:
    """Reads all inputs, those of a runs.csv first. What cannot be used is noted. Raises DataError if no run is left."""
    runs = []
    for name in names:
        if name.startswith("wandb:"):
            runs += read_wandb(name, notes)
            continue
        if not (paths := paths_of(name)):
            notes.append(f"{name} holds neither run folders nor a runs.csv; left out")
        for path in paths:
            try:
                runs += read_folder(path) if path.is_dir() else read_file(path)
            except DataError as error:
                notes.append(" ".join(f"{error}; left out".split()))
    for run in runs:
        run.settle()
    notes += [f"{run.source} has no evaluation yet; left out" for run in runs if run.rows.empty]
    if all(run.rows.empty for run in runs):
        more = f"; and {len(notes) - 3} more" if len(notes) > 3 else ""
        raise DataError(f"there is no run to report: {'; '.join(notes[:3])}{more}")
    return sorted((run for run in runs if not run.rows.empty), key=lambda run: bool(run.config))


# Names of methods


def differing(runs: list[Run]) -> list[str]:
    """Returns the options in which runs differ."""
    options = unique(x for run in runs for x in run.options)
    return [x for x in options if len({repr(run.options.get(x)) for run in runs}) > 1]


def separating(groups: list[list[Run]]) -> list[str]:
    """Returns few options that tell apart, within each group, all runs that differ at all."""

    def n_kinds(options: list[str]) -> int:
        kinds = [{tuple(repr(run.options.get(x)) for x in options) for run in group} for group in groups]
        return sum(map(len, kinds))

    chosen = unique(x for group in groups for x in differing(group))
    for option in list(chosen):  # from the general ones to those of the method, which stand last
        rest = [x for x in chosen if x != option]
        if n_kinds(rest) == n_kinds(chosen):
            chosen = rest
    return chosen


def usual_values(runs: list[Run], options: list[str]) -> dict[str, Any]:
    """Returns the values that more than half of the methods share, and False of switches: names leave them out."""
    methods = {(run.dataset, *(repr(run.value(x)) for x in options)): run for run in runs}.values()
    usual = {}
    for option in options:
        values = [run.value(option) for run in methods]
        common = max(values, key=values.count)
        if 2 * values.count(common) > len(values) > 1:
            usual[option] = common
        elif all(isinstance(x, bool) for x in values):
            usual[option] = False
    return usual


def unusual(run: Run, options: list[str], usual: dict[str, Any]) -> dict[str, Any]:
    return {x: run.value(x) for x in options if x not in usual or repr(run.value(x)) != repr(usual[x])}


def short(value: Any, digits: int = 15) -> str:
    return re.sub(r"e\+?(-?)0*", r"e\1", f"{value:.{digits}g}") if type(value) is float else str(value)


def method_name(start: str, values: dict[str, Any], digits: int, width: Optional[int] = None) -> str:
    """Names a method by the values of options, whose words are cut to a width."""
    names = ["_".join(word[:width] for word in option.split("_")) for option in values]
    return " ".join([start, *(x if v is True else f"{x}={short(v, digits)}" for x, v in zip(names, values.values()))])


def groups_of(runs: list[Run], key: Callable[[Run], Any]) -> dict[Any, list[Run]]:
    found = {}
    for run in runs:
        found.setdefault(key(run), []).append(run)
    return found


def name_methods(runs: list[Run], by: Optional[list[str]], scripts: list[Script]) -> None:
    """Names the methods of runs whose configuration is known by what separates them within a dataset. The same options
    do it on all datasets, so that a method has one name. Raises OptionError."""
    runs = [run for run in runs if run.config]
    for run in runs:
        names = run.config.keys()  # a script that lacks one of them is another one; an older run has fewer
        run.script = min(scripts, key=lambda x: (len(names - x.defaults.keys()), len(x.defaults.keys() - names)))
    if missing := set(by or ()) - {option for run in runs for option in run.config}:
        raise OptionError(f"--by {missing.pop()}: no run has this option")
    families = {x: {run.family for run in group} for x, group in groups_of(runs, lambda run: run.dataset).items()}
    for (name, script), family in groups_of(runs, lambda run: run.family).items():
        datasets = groups_of(family, lambda run: run.dataset)
        chosen = by or separating(list(datasets.values()))
        usual = dict.fromkeys(by, False) if by else usual_values(family, chosen)
        for dataset, group in datasets.items():
            shared = sum(x == name for x, _ in families[dataset]) > 1
            start = f"{name} {script}" if shared else name
            options = by or [x for x in differing(group) if x in chosen]
            shown = [unusual(run, options, usual) for run in group]
            names, rounded, cut = ([method_name(start, x, *how) for x in shown] for how in ((15,), (4,), (4, 4)))
            if len(set(rounded)) == len(set(names)):
                names = cut if max(map(len, rounded)) > LONG and len(set(cut)) == len(set(names)) else rounded
            for run, method in zip(group, names):
                values = [run.value(x) for x in options]
                order = [("", float(x)) if isinstance(x, (bool, float)) else (str(x), 0.0) for x in values]
                run.method, run.order = method, (dataset, start, order)


def rename(runs: list[Run], pairs: list[list[str]]) -> None:
    """Raises OptionError for a name that nothing has."""
    for old, new in pairs:
        known = {x for run in runs for x in (run.dataset, run.method)}
        if old not in known:
            raise OptionError(f"--rename {old!r}: no dataset or method has this name; there are {sorted(known)}")
        for run in runs:
            run.dataset, run.method = (new if x == old else x for x in (run.dataset, run.method))


def unite(runs: list[Run], notes: list[str]) -> list[Run]:
    """Keeps one run per dataset, method and seed, and notes the others: the longer one, or the first. Raises DataError
    where they are not known to have the same options."""
    found = {}
    for run in runs:
        key = run.dataset, run.method, run.seed
        other = found.setdefault(key, run)
        if other.rows.sort_index(axis="columns").equals(run.rows.sort_index(axis="columns")):
            continue
        text = f"seed {run.seed} of {run.method} on {run.dataset} exists twice: {other.source} and {run.source}"
        known = run.config and other.config and not differing([run, other]) and run.family == other.family
        if run.end == other.end and not known:
            raise DataError(f"{text}; give one of them, or tell them apart with --by or --rename")
        found[key] = max(other, run, key=lambda x: x.end)
        notes.append(f"{text}; the {'first' if run.end == other.end else 'longer'} one counts")
    return sorted(found.values(), key=lambda run: (bool(run.config), run.order))


# The runs that count


class Cell:
    """The runs of one method on one dataset that count, at the steps that they share."""

    def __init__(self, runs: list[Run]):
        self.all = sorted(runs, key=lambda run: run.seed)
        self.finished = [run for run in self.all if run.status == "finished"]
        self.runs = self.finished or self.all
        self.steps = np.array(sorted(set.intersection(*(set(run.rows["step"]) for run in self.runs))))
        self.online_from = self.runs[0].online_from

    @property
    def state(self) -> str:
        return "finished" if self.finished else self.runs[0].status

    def values(self, name: str) -> np.ndarray:
        """[seeds, steps], NaN where there is none."""
        if name == OVERESTIMATE:
            return self.values("eval_predicted_value") - self.values("eval_discounted_return")
        rows = [run.rows.set_index("step") for run in self.runs]
        return np.array([x[name].loc[self.steps] if name in x else np.full(len(self.steps), np.nan) for x in rows])

    def last(self, name: str = RETURN) -> np.ndarray:
        """[seeds], without those that have none."""
        values = self.values(name)[:, -1:].ravel()
        return values[np.isfinite(values)]

    def best(self) -> np.ndarray:
        """The largest scores of the runs, [seeds]."""
        return np.array([np.nanmax(x) for x in self.values(SCORE) if np.isfinite(x).any()])

    def phases(self) -> dict[str, np.ndarray]:
        """Scores and regrets of the offline and the online phase, [seeds] each; empty without these phases."""
        scores, place = self.values(SCORE), int(np.searchsorted(self.steps, self.online_from))
        if place + 1 >= len(self.steps) or self.steps[place] != self.online_from:
            return {}
        lowest = np.min(scores[:, place + 1 : place + 4], axis=1)
        found = {"offline score": scores[:, place], "lowest of the next three": lowest, "last score": scores[:, -1]}
        found |= {name.replace("_", " "): self.values(name)[:, -1] for name in ("train_regret", "eval_regret")}
        return found | {"dip": scores[:, place] - lowest}


Results = dict[tuple[str, str], Cell]  # of dataset and method
Behaviours = dict[str, dict[str, float]]  # dataset -> return, std, episodes and score of the data


def collect(runs: list[Run], notes: list[str]) -> Results:
    """Raises DataError if no runs of a method share a step."""
    results = {}
    for (dataset, method), group in groups_of(runs, lambda run: (run.dataset, run.method)).items():
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
        raise DataError("; ".join(notes))
    return results


def stored_behaviours(names: list[str], notes: list[str]) -> Behaviours:
    """Reads behaviour.csv beside the inputs; one that cannot be read is noted."""
    found, kinds = {}, {"return": float, "std": float, "episodes": int, "score": float}
    for path in unique((x if x.is_dir() else x.parent) / "behaviour.csv" for x in map(Path, names)):
        if path.exists():
            try:
                table = pd.read_csv(path, float_precision="round_trip", index_col="dataset", dtype=kinds)
                found |= table[list(kinds)].to_dict("index")
            except (OSError, ValueError, KeyError) as error:
                notes.append(f"{path} cannot be read: {error}; left out")
    return found


def behaviour(dataset: str, notes: list[str]) -> Optional[dict[str, float]]:
    """The returns of a local dataset, without a last episode that was cut short; None if there is no such dataset, and
    where it cannot be read, which is noted."""
    from algorithms.offline.cql import episodes  # here, since torch takes seconds to import

    if not local_dataset(dataset):
        return None
    try:
        data = read_dataset(dataset, (*READERS, SCRIPTS[1]))  # which reads frames
    except DataError as error:
        notes.append(f"the data of {dataset} cannot be read, so their returns are missing ({error})")
        return None
    returns, ends = episodes(data)[2], data.get("reference_scores")
    mean = float(returns.mean())
    score = 100 * (mean - ends[0]) / (ends[1] - ends[0]) if ends else math.nan
    return {"return": mean, "std": float(returns.std()), "episodes": len(returns), "score": score}


# Statistics over datasets and seeds; the numbers are those of rliable


def iqm(scores: np.ndarray) -> np.ndarray:
    """Mean of the middle half, over the last axis."""
    cut = scores.shape[-1] // 4
    return np.sort(scores, axis=-1)[..., cut : scores.shape[-1] - cut].mean(axis=-1)


def resample(strata: list[np.ndarray], repeats: int = REPEATS, seed: int = 0) -> list[np.ndarray]:
    """Draws seeds again within each dataset: [seeds, ...] -> [repeats, seeds, ...], of each."""
    rng = np.random.default_rng(seed)
    return [x[rng.integers(len(x), size=(repeats, len(x)))] for x in strata]


def interval(values: np.ndarray) -> np.ndarray:
    """The middle 95 % of [repeats, ...]."""
    return np.percentile(values, [2.5, 97.5], axis=0)


def iqm_interval(strata: list[np.ndarray]) -> np.ndarray:
    return interval(iqm(np.concatenate(resample(strata), axis=1)))


def improvement(first: list[np.ndarray], second: list[np.ndarray]) -> np.ndarray:
    """Probability that a run of the first is better than one of the second, ties half: [..., seeds] per dataset ->
    [...], the mean over datasets."""
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
    """Compares finished runs over datasets: those of methods with MIN_RUNS runs or more, and none where datasets are of
    several versions, whose scores are not to be pooled."""
    last = {key: cell.last(SCORE) for key, cell in results.items() if cell.finished and len(cell.last(SCORE))}
    scored, methods = (unique(key[i] for key in last) for i in (0, 1))

    def few(datasets: list[str]) -> list[str]:
        runs = {method: sum(len(last.get((x, method), ())) for x in datasets) for method in methods}
        return [method for method, n in runs.items() if n < MIN_RUNS]

    pooled = "left out where runs are pooled"
    if missing := few(scored):
        some = ", ".join(missing) if len(missing) < len(methods) else "every method"
        notes.append(f"fewer than {MIN_RUNS} finished runs with a score: {some} ({pooled})")
        methods = [x for x in methods if x not in missing]
    shared = [x for x in scored if all((x, method) in last for method in methods)] if methods else []
    returned = unique(dataset for (dataset, _), cell in results.items() if len(cell.last()))
    if missing := [x for x in returned if not any(len(results[k].last(SCORE)) for k in results if k[0] == x)]:
        notes.append(f"no reference returns, hence no scores: {', '.join(missing)} ({pooled})")
    if methods and (missing := [x for x in scored if x not in shared]):
        notes.append(f"not every method has a finished run on: {', '.join(missing)} ({pooled})")
    if len(versions := unique(map(version, shared))) > 1:
        notes.append(f"scores of {' and '.join(versions)} datasets are not pooled: make a report of each")
        shared = []
    if shared and (missing := few(shared)):
        notes.append(
            f"fewer than {MIN_RUNS} runs on the datasets of all methods: {', '.join(missing)} (nothing pooled)"
        )
        shared = []
    return Comparison(shared, {method: [last[dataset, method] for dataset in shared] for method in methods if shared})


def pairs(comparison: Comparison) -> list[tuple[str, str]]:
    """All pairs of methods; if there are more than 21, the best method with each other one."""
    methods = sorted(comparison.scores, key=lambda x: -iqm(np.concatenate(comparison.scores[x])))
    found = list(itertools.combinations(methods, 2))
    return found if len(found) <= 21 else [(methods[0], other) for other in methods[1:]]

"""Judge training runs without a simulator: name those that over-fit, under-fit or diverge, say which checkpoint to
take and what to change next, and choose among several cql_alpha.

    python benchmarks/diagnose.py runs/shop
    python benchmarks/diagnose.py runs/alpha-* --output runs/alphas.png

RUN is the run folder of any script, or a metrics.csv; train with --holdout_fraction 0.1 --keep_policies True. For each
run the program prints a verdict (healthy, under-fitting, over-fitting, diverging, too short to judge), the evidence in
numbers, the policy to take and what to change next. If runs on the same data differ in cql_alpha, it compares their TD
errors and gaps after the same number of updates. It never looks at the returns of evaluations. --output draws the
curves behind the verdicts. docs/choosing.md explains them and says how often they were right.

--output needs matplotlib. Exit status: 0 with any verdict, 1 not a run or not writable, 2 a bad command line. An error
is one line on stderr and leaves an older file as it was.
"""

import contextlib
import csv
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # other programs import this one, without `common`
from benchmarks.common import Parser, fail, one_line_errors

WINDOW = 3  # rows of a running mean, or a tenth of all, since the peak of a raw curve is noise
MIN_ROWS = 8  # fewer show no rise, peak and decline
MIN_TARGET_LIVES = 5  # updates times target rate: the target network's first weights still count for exp(-5)
# The limits lie between the values of the healthy and of the other calibration runs in docs/choosing_evidence.md;
# DECLINE, STEEP and NOISE were set beforehand.
NOISE = 3.0  # standard deviations of a curve's noise, beyond which a change is none
STEEP = 2.0  # standard errors of a slope beyond which a curve falls
DECLINE = 0.05  # of data Q's largest size, below which a change of data Q does not count
# Two rises must both reach their limit: that of a held-out loss above its lowest, and that of its distance from the
# training loss. The smaller of the two was
GROWTH = 2.0  # for TD errors, as a factor: up to 1.5 in healthy runs, 3.1 and more where critics over-fitted
RISE = 0.05  # for gaps and the losses of clones, in nats: up to 0.01 in healthy runs, 0.09 and more in the others
NO_EXCESS = 1.15  # of the ratio, if held-out episodes fare like training ones: 1.02 with too small a network, else 1.4
SHORT = 0.25  # share of the data's mean return that data Q may lack: 0.38 with too small a network, 0.1 in good runs
DIVERGENCE = 100.0  # of a TD error above its lowest: up to 10 in runs that learned, above 3,000 in those that blew up
FIT = math.e  # an alpha fits if its TD error and likelihood of the data are within this factor of the best (set before)

# Each curve is the mean of these columns, of any script. No column of an evaluation is among them.
CURVES = {
    "step": "step",
    "q": "average_qf average_qf1 average_qf2",
    "holdout_q": "holdout_q",
    "td": "qf_loss qf1_loss qf2_loss",
    "holdout_td": "holdout_td_error",
    "gap": "cql_qf_diff cql_qf1_diff cql_qf2_diff",
    "holdout_gap": "holdout_gap",
    "nll": "policy_loss",  # a clone's
    "holdout_log_prob": "holdout_log_prob",
    "data_return": "data_discounted_return",
    "c51": "c51_edge_mass",  # only this head has it
    "weighted_gap": "cql_min_qf_loss cql_min_qf1_loss cql_min_qf2_loss",
    "online": "env_steps_per_second",
}
LONGER, NOTHING = "a longer run may gain", "nothing has to change"
# Options that may differ among the runs of one sweep of cql_alpha.
FREE = {
    *("cql_alpha", "cql_alpha_online", "seed", "eval_seed", "eval_env", "eval_freq", "n_episodes", "max_timesteps"),
    *("offline_iterations", "online_iterations", "device", "compile", "checkpoints_path", "run_id", "keep_policies"),
    *("log_interval", "project", "group", "name"),
}
Curves = dict[str, np.ndarray]  # [T] each


class Verdict(NamedTuple):
    name: str  # healthy, under-fitting, over-fitting, diverging or too short to judge
    evidence: str
    step: int  # evaluation whose policy to take
    advice: str


class Choice(NamedTuple):
    alpha: float | None  # None: none fits
    step: int  # number of updates after which the runs are compared
    table: list[tuple[float, int, float, float, float]]  # alpha, runs, TD error, gap, factor to the best
    advice: str


def number(text: Any) -> float:
    """The number that a text stands for, else NaN."""
    with contextlib.suppress(TypeError, ValueError):
        return float(text)
    return math.nan


def curves(rows: list[dict[str, Any]]) -> Curves:
    """The curves of a run's offline phase, in the order of steps; NaN where a cell is missing or not a number."""
    found = []
    for row in rows:
        cells = {name: [number(row[x]) for x in columns.split() if x in row] for name, columns in CURVES.items()}
        found.append({name: sum(x) / len(x) if x else math.nan for name, x in cells.items()})
    found = sorted((x for x in found if math.isfinite(x["step"])), key=lambda x: x["step"])
    found = [x for x in found if math.isnan(x["online"])]
    return {name: np.array([x[name] for x in found]) for name in CURVES}


def complete(c: Curves, needed: list[str], wanted: str) -> Curves:
    """The rows in which the needed curves have numbers; also the wanted one, if it has numbers at all."""
    names = [*needed, wanted] if np.isfinite(c[wanted]).any() else needed
    known = ~np.any([np.isnan(c[name]) for name in names], axis=0)
    return {name: x[known] for name, x in c.items()}


def width(x: np.ndarray) -> int:
    """The number of rows that a running mean takes."""
    return max(WINDOW, len(x) // 10)


def smooth(x: np.ndarray) -> np.ndarray:
    """Running mean over `width` rows, fewer at the ends: [T] -> [T]."""
    ones = np.ones(width(x))
    return np.convolve(x, ones, "same") / np.convolve(np.ones_like(x), ones, "same")


def falls(x: np.ndarray) -> bool:
    """Whether a line through the last half of a curve has a slope STEEP standard errors below 0."""
    x = x[len(x) // 2 :]
    t = np.arange(len(x)) - (len(x) - 1) / 2
    slope = (t @ x) / (t @ t)
    rest = x - x.mean() - slope * t
    return bool(slope < -STEEP * math.sqrt((rest @ rest) / (len(x) - 2) / (t @ t)))


def least(q: np.ndarray, data_return: float) -> float:
    """The smallest difference of data Q that counts: more than noise, and than a part of its size and of the return."""
    smoothed = smooth(q)
    sizes = DECLINE * np.abs(smoothed).max(), SHORT * abs(np.nan_to_num(data_return))
    return max(*sizes, NOISE * np.std(q - smoothed))


def decline(q: np.ndarray, limit: float) -> int | None:
    """The row of the peak of data Q, if Q rose to it by more than the limit and then stays below it by as much. (A fall
    from the first rows on, where Q comes from untrained networks, does not count: negative rewards cause it.)"""
    smoothed = smooth(q)
    peak, stays = int(smoothed.argmax()), max(width(q), len(q) // 4)
    fell = len(q) - peak > stays and q[-stays:].max() < smoothed[peak] - limit
    return peak if fell and smoothed[peak] - smoothed[0] > limit else None


def turn(train: np.ndarray, holdout: np.ndarray, rise: float) -> int | None:
    """The last row before a held-out loss turns upwards, if it ends `rise` above its lowest value, and its difference
    from the training loss ends `rise` above what it was there, both beyond noise. Rows with NaN do not count."""
    (rows,) = np.isfinite(holdout - train).nonzero()
    if len(rows) < MIN_ROWS:
        return None
    holdout, difference = holdout[rows], smooth((holdout - train)[rows])
    smoothed = smooth(holdout)
    lowest = int(smoothed.argmin())
    noise = np.std(np.diff(holdout, 2)) / math.sqrt(6)  # of a row, whatever the curve's slope and bend
    limit = max(rise, NOISE * noise)
    last = holdout[-max(2, width(holdout) - 1) :]
    if min(last.min() - smoothed[lowest], difference[-1] - difference[lowest]) < limit:
        return None
    return int(rows[lowest + (smoothed[lowest:] > smoothed[lowest] + limit / 4).argmax() - 1])


def judge(rows: list[dict[str, Any]], config: dict[str, Any]) -> Verdict:
    """The verdict on a run, from the rows of its metrics.csv (numbers or texts) and its configuration ({} if unknown).
    Only the metrics of training and of held-out episodes in the offline phase count. Raises ValueError."""
    c = curves(rows)
    if not len(c["step"]):
        raise ValueError("it has no row of offline training")
    last = int(c["step"][-1])
    if np.isnan(c["td"]).all():
        return judge_clone(c, config, last)
    if (c["weighted_gap"] == 0).all():  # with cql_alpha 0 the gap is not trained
        c["gap"][:] = c["holdout_gap"][:] = math.nan
    c = complete(c, ["td", "q"], "holdout_td")
    return divergence(c, config) or shortness(c, config, last) or over_fitting(c, config) or fitting(c, config)


def has_penalty(config: dict[str, Any]) -> bool:
    """Whether --cql_alpha is an option of the run's script; those of policy_constraint.py have a divergence instead."""
    return "divergence_weight" not in config


def divergence(c: Curves, config: dict[str, Any]) -> Verdict | None:
    td = np.where(np.isfinite(c["q"]), c["td"], np.inf)
    lowest = np.minimum.accumulate(td)
    if not len(td) or not td[-1] > max(DIVERGENCE * lowest[-1], td[0]):  # a tiny error may well grow a hundredfold
        return None
    row = max(int((td > math.sqrt(DIVERGENCE) * lowest).argmax()) - 1, 0)
    evidence = f"TD error {td[-1]:.3g}, at its lowest {lowest[-1]:.3g}; data Q {c['q'][-1]:.4g}"
    weight = "--cql_alpha" if has_penalty(config) else "--divergence_weight"
    return Verdict("diverging", evidence, int(c["step"][row]), f"a larger {weight}, or a smaller --qf_lr")


def shortness(c: Curves, config: dict[str, Any], last: int) -> Verdict | None:
    rate = number(config.get("soft_target_update_rate", 0.005)) / max(number(config.get("target_update_period", 1)), 1)
    needed = math.ceil(MIN_TARGET_LIVES / rate) if rate > 0 and not np.isnan(c["td"]).all() else 0
    if len(c["step"]) >= MIN_ROWS and last >= needed:
        return None
    n = len(c["step"])
    evidence = f"{n} complete row{'s' * (n != 1)} up to {last:,} updates; a verdict takes {MIN_ROWS} rows"
    evidence += f" and {needed:,} updates, so that the target network is renewed" if needed else ""
    length = "--offline_iterations" if "offline_iterations" in config else "--max_timesteps"
    return Verdict("too short to judge", evidence, last, f"a larger {length}, or a smaller --eval_freq")


def losses(c: Curves) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """The critics' losses in training and held out, in nats, and the rise that counts. TD errors are compared by their
    ratios, so by logarithms; c51's are cross-entropies already."""
    td, rise = [c["td"], c["holdout_td"]], RISE
    if np.isnan(c["c51"]).all():
        negligible = max(1e-12, (np.abs(c["q"]).max(initial=0) / 1000) ** 2)  # a square, too
        td, rise = np.log(np.maximum(td, negligible)), math.log(GROWTH)
    return {"td": (*td, rise), "gap": (c["gap"], c["holdout_gap"], RISE)}


def over_fitting(c: Curves, config: dict[str, Any]) -> Verdict | None:
    """The verdict over-fitting, from the held-out losses or, if they do not rise, from data Q; None if neither shows
    it."""
    step, found, advice = c["step"].astype(int), [], remedies(config)
    for words, name in (("TD error", "td"), ("gap", "gap")):
        if (row := turn(*losses(c)[name])) is not None:
            train, holdout = (x[row:][np.isfinite(x[row:])] for x in (c[name], c[f"holdout_{name}"]))
            text = f"held-out {words} {holdout[0]:.3g} to {holdout[-1]:.3g} since {step[row]:,}"
            text += f" (training {train[0]:.3g} to {train[-1]:.3g})"
            found.append((row, text))
    if found:
        row = max(row for row, _ in found)  # before it, one of the two losses still fell
        evidence = ", ".join(text for _, text in found)
        advice += "; a smaller --eval_freq, since it may have begun before the first row" * (row < 2)
        return Verdict("over-fitting", evidence, int(step[row]), advice)
    if (row := decline(c["q"], least(c["q"], c["data_return"][-1]))) is not None:
        # Kumar et al. (2021) found this where critics over-fit, and take the policy of the peak.
        evidence = f"data Q fell from {smooth(c['q'])[row]:.3g} at {step[row]:,} to {c['q'][-1]:.3g}"
        advice += ", a smaller --cql_alpha" * has_penalty(config)
        return Verdict("over-fitting", evidence, int(step[row]), advice)
    return None


def fitting(c: Curves, config: dict[str, Any]) -> Verdict:
    """The verdict under-fitting or healthy, on a run that does not over-fit."""
    step, q, gap, data_return = int(c["step"][-1]), c["q"], c["gap"], c["data_return"][-1]
    train, holdout, _ = losses(c)["td"]
    held_out = bool(np.isfinite(holdout).all())
    learning = [name for name, x in (("TD error", c["td"]), ("gap", gap)) if np.isfinite(x).all() and falls(x)]
    evidence = f"TD error {c['td'][-1]:.3g}" + f" (held out {c['holdout_td'][-1]:.3g})" * held_out
    if np.isfinite(gap).all():
        evidence += f", gap {gap[-1]:.3g}" + f" (held out {c['holdout_gap'][-1]:.3g})" * held_out
    evidence += f"; still falling: {' and '.join(learning) or 'neither'}"
    larger = resized(config, 2)
    if has_penalty(config) and number(config.get("cql_alpha", 1)) > 0:
        larger += ", or a smaller --cql_alpha"
    # What a time-out cuts off is missing from the data's return, and adds to it only if returns are positive.
    if data_return > 0 and data_return - q[-1] > least(q, data_return):
        evidence = f"data Q {q[-1]:.3g} is far below the data's return of {data_return:.3g}; {evidence}"
        return Verdict("under-fitting", evidence, step, f"a longer run, {larger}")
    if not held_out:
        return Verdict("healthy", evidence, step, f"{hold_out(config)}: without held-out episodes little shows")
    if np.isnan(gap).all() and has_penalty(config):
        advice = "--cql_alpha above 0: nothing here shows what the values of unseen actions are worth"
        if config.get("target") == "sarsa":
            advice = "if average_qf is near data_discounted_return, another --target; else look for a fault in the data"
        return Verdict("healthy", evidence, step, advice)
    excess, distance = smooth(holdout - train), smooth(c["holdout_gap"] - gap)
    if not learning and excess[-1] - excess.min() < math.log(NO_EXCESS) and distance[-1] < RISE:
        advice = f"{larger}: if both fall then, this run was too small"
        return Verdict("under-fitting", f"{evidence}, and held-out episodes fare no worse", step, advice)
    return Verdict("healthy", evidence, step, LONGER if learning else NOTHING)


def judge_clone(c: Curves, config: dict[str, Any], last: int) -> Verdict:
    """The verdict on behaviour cloning, from the log-likelihood of the data's actions; if they are discrete, that is
    minus the gap."""
    c = c | {"holdout_nll": -c["holdout_log_prob"]}
    train, holdout = ("gap", "holdout_gap") if np.isnan(c["nll"]).all() else ("nll", "holdout_nll")
    c = complete(c, [train], holdout)
    if verdict := shortness(c, config, last):
        return verdict
    if not np.isfinite(c[holdout]).all():
        evidence = "a clone without held-out episodes: nothing shows whether it over-fits"
        return Verdict("too short to judge", evidence, last, hold_out(config))
    row = turn(c[train], c[holdout], RISE)
    ends = [f"{c[name][-1]:.3g}" for name in (train, holdout)]
    evidence = f"negative log-likelihood of the data's actions {ends[0]}, held out {ends[1]}"
    if row is not None:
        step = int(c["step"][row])
        evidence += f" (at {step:,}: {c[train][row]:.3g} and {c[holdout][row]:.3g})"
        return Verdict("over-fitting", evidence, step, remedies(config))
    return Verdict("healthy", evidence, last, LONGER if falls(c[holdout]) else NOTHING)


def remedies(config: dict[str, Any]) -> str:
    """Advice against over-fitting, with the options that this run's script has and that are off."""
    options = {"weight_decay": 0.3, "dropout": 0.2, "critic_layer_norm": True}  # as in docs/choosing_evidence.md
    if "policy_lr" in config and str(config.get("bc_only")) == "True":
        options = {}  # they act on the critics, which a clone of continuous actions does not train
    if number(config.get("cql_backprop_actions")) > 0:
        options.pop("dropout", None)  # the script refuses the two together
    off = [f"--{name} {value}" for name, value in options.items() if config.get(name, value) in (0, False)]
    return f"one of: {', '.join([*off, resized(config, 0.5), 'more episodes', 'fewer updates'])}"


def hold_out(config: dict[str, Any]) -> str:
    if number(config.get("holdout_fraction")) > 0:  # the script held nothing out, as the data were one episode
        return "import the data as several episodes (weeks of a plant, for example), of which some can be held out"
    return "--holdout_fraction 0.1"


def resized(config: dict[str, Any], factor: float) -> str:
    words = "a smaller" if factor < 1 else "a larger"
    if not has_penalty(config):
        return f"{words} network (--q_hidden_dims)"
    width = number(config.get("hidden_dim"))
    return f"{words} network (--hidden_dim {max(1, round(width * factor))})" if width > 0 else f"{words} --hidden_dim"


def alpha_of(rows: list[dict[str, Any]], config: dict[str, Any]) -> float:
    """cql_alpha, taken from the metrics if the configuration is not known; NaN for a clone, and if it is tuned."""
    c = curves(rows)
    if str(config.get("cql_lagrange")) == "True" or np.isnan(c["td"]).all():
        return math.nan
    known = complete(c, ["gap", "weighted_gap"], "gap")
    measured = float(f"{known['weighted_gap'][-1] / known['gap'][-1]:.4g}") if len(known["gap"]) else 0.0
    return number(config.get("cql_alpha", measured))


def choose_alpha(runs: list[tuple[list[dict[str, Any]], dict[str, Any]]]) -> Choice:
    """The best cql_alpha of runs (rows, configuration) that differ in it and in seeds: the one whose TD error and gap
    are both nearest to the smallest of all after the same number of updates. A gap is minus a log-likelihood of the
    data's actions under the soft-max policy; so gaps are compared by their differences, and a constant offset of their
    estimate does not matter. Raises ValueError."""
    found, common = {}, None
    for rows, config in runs:
        c = complete(curves(rows), ["td", "gap"], "td")
        if len(c["step"]):
            found.setdefault(alpha_of(rows, config), []).append(c)
            common = set(c["step"]) & (set(c["step"]) if common is None else common)
    if len(found) < 2 or not common:
        raise ValueError("two cql_alpha are needed with rows of TD error and gap after the same numbers of updates")
    compared = sorted(common)[-WINDOW:]
    means = {}
    for alpha, group in sorted(found.items()):
        here = [np.isin(c["step"], compared) for c in group]
        td = np.mean([np.log(np.maximum(c["td"][rows], 1e-12)).mean() for c, rows in zip(group, here)])
        means[alpha] = len(group), td, np.mean([c["gap"][rows].mean() for c, rows in zip(group, here)])
    lowest = np.min(list(means.values()), axis=0)
    table = [
        (alpha, n, math.exp(td), float(gap), math.exp(max(td - lowest[1], gap - lowest[2])))
        for alpha, (n, td, gap) in means.items()
    ]
    best = min(table, key=lambda row: (row[-1], -row[0]))  # the larger alpha of two equal ones
    if best[-1] > FIT:
        advice = "no alpha makes both small: try a larger network, or alphas between these"
        return Choice(None, int(compared[-1]), table, advice)
    alphas, advice = [row[0] for row in table], "both are small there"
    if best[0] in (alphas[0], alphas[-1]) and best[0] > 0:
        advice = f"it is the end of the sweep: try {'smaller' if best[0] == alphas[0] else 'larger'} ones too"
    return Choice(best[0], int(compared[-1]), table, advice)


class Run(NamedTuple):
    path: Path
    rows: list[dict[str, str]]
    config: dict[str, Any]  # {} where there is no config.yaml

    @property
    def name(self) -> str:
        return self.path.parent.name if self.path.name == "metrics.csv" else self.path.stem

    def policy(self, step: int) -> str:
        """The place of the policy of an evaluation, in words."""
        kept, last = self.path.with_name(f"policy-{step}.pt"), self.path.with_name("policy.pt")
        if kept.exists():
            return str(kept)
        if last.exists() and step == max(number(row["step"]) for row in self.rows):
            return str(last)
        return f"that of step {step:,}" + ", which was not kept; next time use --keep_policies True" * bool(self.config)


def read(path: Path) -> Run:
    """The run of a folder or a metrics.csv. Raises ValueError and OSError."""
    path = path / "metrics.csv" if path.is_dir() else path
    if not path.exists():
        raise ValueError(
            "there is no such file or folder" if path.name != "metrics.csv" else "it has no metrics.csv yet"
        )
    config = {}
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        if path.with_name("config.yaml").exists() and path.name == "metrics.csv":
            config = yaml.safe_load(path.with_name("config.yaml").read_text())
    except (csv.Error, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"it is not a CSV file of text, or its config.yaml is not a YAML file ({error})") from error
    if not rows or "step" not in rows[0]:
        raise ValueError("it is not a metrics.csv: it has no row, or no column step")
    return Run(path, rows, config if isinstance(config, dict) else {})


def sweeps(runs: list[Run]) -> list[list[Run]]:
    """Groups of runs that differ only in cql_alpha, seed and length, and do differ in cql_alpha."""
    groups = {}
    for run in runs:
        if math.isfinite(alpha_of(run.rows, run.config)):
            options = {name: value for name, value in run.config.items() if name not in FREE}
            data = "" if run.config else curves(run.rows)["data_return"][-1:]  # a table alone does not name its data
            groups.setdefault(f"{sorted(options.items())}{data}", []).append(run)
    return [x for x in groups.values() if len({alpha_of(run.rows, run.config) for run in x}) > 1]


def report(runs: list[Run], verdicts: list[Verdict]) -> None:
    for run, verdict in zip(runs, verdicts):
        name = run.path.parent if run.path.name == "metrics.csv" else run.path
        print(f"{name}: {verdict.name}\n  evidence: {verdict.evidence}")
        if any(math.isfinite(number(row.get("env_steps_per_second"))) for row in run.rows):
            print("  only the offline phase was judged: online, returns tell more")
        print(f"  policy:   {run.policy(verdict.step)}\n  next:     {verdict.advice}")
    for group in sweeps(runs):
        try:
            choice = choose_alpha([(run.rows, run.config) for run in group])
        except ValueError as error:
            print(f"cql_alpha: cannot be compared: {error}")
            continue
        n_runs = sum(row[1] for row in choice.table)
        print(f"cql_alpha of {n_runs} runs, mean of the last {WINDOW} common rows, up to {choice.step:,} updates:")
        print("  cql_alpha   runs   TD error       gap   factor to the best")
        for alpha, n, td, gap, factor in choice.table:
            print(f"  {alpha:9.4g}   {n:4d}   {td:8.4g}   {gap:7.3f}   {factor:18.3g}")
        print(f"  take: {'none' if choice.alpha is None else f'{choice.alpha:g}'} ({choice.advice})")


def plot(runs: list[Run], verdicts: list[Verdict], output: Path) -> None:
    """Draws one column per run: data Q, TD error and gap (for a clone its loss), in training and held out. Raises
    OSError."""
    try:
        import matplotlib
    except ImportError:
        fail(1, "the package matplotlib is missing: pip install -r requirements-extra.txt")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, len(runs), figsize=(1 + 3.4 * len(runs), 7.5), sharex="col", squeeze=False)
    for i, (run, verdict) in enumerate(zip(runs, verdicts)):
        c = curves(run.rows)
        clone = bool(np.isnan(c["td"]).all() and np.isfinite(c["nll"]).any())
        c51 = np.isfinite(c["c51"]).any()
        c["holdout_nll"] = -c["holdout_log_prob"]
        panels = {"q": "mean Q of data actions", "td": "TD error (nats)" if c51 else "TD error"}
        panels |= {"nll": "negative log-likelihood (nats)"} if clone else {"gap": "gap (nats)"}
        for axis, (name, label) in zip(axes[:, i], panels.items()):
            for curve, style in ((name, "-"), (f"holdout_{name}", "--")):
                known = np.isfinite(c[curve])
                words = "held-out episodes" if "holdout" in curve else "training episodes"
                axis.plot(c["step"][known], c[curve][known], style, label=words, color="C1" if style == "--" else "C0")
            if name == "q" and np.nanmax(c["data_return"], initial=0) > 0:  # see fitting
                axis.axhline(np.nanmax(c["data_return"]), color="grey", linestyle=":", label="the data's mean return")
            if name == "td" and np.nanmax(c["td"], initial=0) > 10 * np.nanmin(c["td"], initial=np.inf):
                axis.set_yscale("log")
            if not np.isfinite([c[name], c[f"holdout_{name}"]]).any():
                axis.text(0.5, 0.7, "not logged", ha="center", transform=axis.transAxes)
            axis.axvline(verdict.step, color="black", linewidth=1, label="policy to take")
            axis.set_ylabel(label)
        axes[0, i].set_title(f"{run.name}\n{verdict.name}", fontsize=9)
        axes[-1, i].set_xlabel("updates")
    lines = {line.get_label(): line for axis in axes.flat for line in axis.get_lines() if len(line.get_xdata())}
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncols=min(len(lines), 1 + len(runs)), fontsize=8)
    figure.tight_layout(rect=(0, 0.03 + 0.03 * (len(runs) < 3), 1, 1))
    temporary = output.with_name(output.name + ".tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, format="png", dpi=100)
        os.replace(temporary, output)
    finally:
        plt.close(figure)
        with contextlib.suppress(OSError):
            temporary.unlink()


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, or a metrics.csv")
    parser.add_argument("--output", type=Path, metavar="PNG", help="draw the curves of the runs, one column per run")
    args = parser.parse_args(argv)
    if args.output and args.output.suffix != ".png":
        parser.error(f"--output {args.output} does not end in .png")
    runs, verdicts = [], []
    try:
        for path in args.runs:
            runs.append(read(path))
            verdicts.append(judge(runs[-1].rows, runs[-1].config))
    except (ValueError, OSError) as error:
        fail(1, f"{path}: {error.strerror if isinstance(error, OSError) else error}")
    report(runs, verdicts)
    try:
        if args.output:
            plot(runs, verdicts, args.output)
    except OSError as error:
        fail(1, f"--output {args.output} cannot be written: {error.strerror}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is not an error
    with one_line_errors():
        main()

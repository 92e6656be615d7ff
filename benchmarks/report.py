"""Tables and pictures of training runs, on one page that needs no network.

    python benchmarks/report.py runs --out report                       # all run folders in runs/
    python benchmarks/report.py runs/a runs/b --out report --by cql_alpha --rename "CQL cql_alpha=0" "offline SAC"
    python benchmarks/report.py benchmarks/results/finetune runs --out benchmarks/results/finetune    # adds runs
    python benchmarks/report.py --update README.md docs/results.md      # the tables between their markers

RUNS are run folders of any script, folders of them, a runs.csv that this program wrote (or its folder), and
wandb:<entity>/<project>[/<group>]. DIR gets index.html, its tables as table.md, its pictures as PNG files, runs.csv
(all rows of all runs) and behaviour.csv (the returns of the data, if a dataset is local or a behaviour.csv lies beside
an input). A damaged run is named and left out.

The dataset of a run is its option env (hopper-medium-v2 is d4rl/hopper-medium-v2). Versions of a dataset never share a
row, and are never pooled. The method of a run is its option name and the options that separate it from other runs of
that name on that dataset, except seeds and options that cannot change a policy; a value that most of them share is left
out. --by names the options instead. Runs of different scripts stay apart. --script names your own copies, so that
their own options tell them apart.

Unfinished runs are named. They count only where no run of their method was finished, and are never pooled. Seeds of
different length are compared at the last step that all have. Statistics that pool runs need three of each method.

--update rewrites each table between <!-- report: {...} --> and <!-- end -->. The braces hold YAML: `runs`, folders from
the root of the repository; `rows` and `columns`, each a mapping from datasets, methods (or behaviour) and quantities
(see QUANTITIES) to the words to show for them, if others; `dataset`, `method` and `quantity` where the whole table has
one; and `head`, the words above the rows.

Needs requirements-extra.txt. Exit status: 0 written, 1 cannot be done, 2 a bad command line; an error is one line on
stderr and leaves older files as they were.
"""

import functools
import math
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pandas as pd
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import report_page, report_runs
from benchmarks.common import ROOT, DataError, OptionError, Parser, fail, one_line_errors
from benchmarks.report_page import METRICS, Table
from benchmarks.report_runs import KEYS, RETURN, SCORE, STD, Behaviours, Cell, Comparison, Results, Run, short, unique


def spread(values: np.ndarray, form: str = ".1f") -> str:
    """Mean ± standard deviation over seeds; one seed has no deviation."""
    deviation = f" ± {values.std():{form}}" if len(values) > 1 else ""
    return f"{values.mean():{form}}{deviation}" if len(values) else "-"


def count(n: int, word: str) -> str:
    return f"{n} {word}{'s' * (n != 1)}"


def returns_text(cell: Cell) -> str:
    """Mean ± standard deviation over seeds, or over the episodes of a single seed."""
    returns = cell.last()
    if len(returns) != 1 or not len(cell.last(STD)):
        return spread(returns)
    return f"{returns[0]:.1f} ± {cell.last(STD)[0]:.1f}"


def brackets(ends: np.ndarray, form: str = ".1f") -> str:
    return f"[{ends[0]:{form}}, {ends[1]:{form}}]"


# Tables of the page


def short_source(source: str) -> str:
    """The repository or the authors of a published score."""
    match = re.match(r"https://github.com/[^/]+/([^/,]+)", source)
    return match[1] if match else source.split(",")[0]


def published_scores(datasets: list[str], returns: bool = False) -> pd.DataFrame:
    """Scores, or returns, on the same datasets, version included; `label` says method, source, and whether it is the
    best. The numbers of D4RL's datasets are scores, those of frames are returns."""
    table = pd.read_csv(ROOT / "benchmarks/published_scores.csv", float_precision="round_trip")
    table = table[table["dataset"].isin(datasets) & (table["dataset"].str.startswith("d4rl/") != returns)]
    best = table["last_or_best"].map({"best": " (best)"}).fillna("")
    return table.assign(label="published " + table["method"] + ", " + table["source"].map(short_source) + best)


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
            state = "" if cell is None or cell.finished else f" ({cell.state})"
            row.append(f"{spread(cell.last(SCORE))}{state}" if cell else "-")
        own = published[published["dataset"] == dataset].set_index("label")
        rows.append([*row, *(published_text(own.loc[x]) if x in own.index else "-" for x in others)])
    text = "Score of the last evaluation, 0 and 100 at the dataset's reference returns: mean ± standard deviation."
    if comparison.datasets:
        row = [f"interquartile mean of {count(len(comparison.datasets), 'dataset')}", "-"]
        for strata in (comparison.scores.get(method) for method in methods):
            ends = f" {brackets(report_runs.iqm_interval(strata))}" if strata and comparison.spread else ""
            row.append(f"{report_runs.iqm(np.concatenate(strata)):.1f}{ends}" if strata else "-")
        rows.append(row + ["-"] * len(others))
        text += " The interquartile mean is over datasets and seeds [95 % interval]."
    text += "".join(f" Published score, {note}." for note in unique(published["note"].dropna()))
    if len(published):
        text += f" (best) marks a published best score. Sources: {'; '.join(unique(published['source']))}."
    return Table("Scores", ["dataset", "behaviour", *methods, *others], rows, text)


def without_empty(table: Table) -> Table:
    """Drops columns without a value."""
    keep = [i for i in range(len(table.header)) if any(row[i] != "-" for row in table.rows)]
    return table._replace(header=[table.header[i] for i in keep], rows=[[row[i] for i in keep] for row in table.rows])


def run_table(results: Results) -> Optional[Table]:
    header = "dataset, method, seeds, episodes, steps, last return, 95 % interval, worst seed, last score"
    header = [*header.split(", "), "best score (over evaluations)", "predicted value", "realised value", "state"]
    rows = []
    for (dataset, method), cell in results.items():
        returns, ends = cell.last(), "-"
        if not len(returns):
            continue
        if len(returns) > 1:
            ends = brackets(report_runs.interval(report_runs.resample([returns])[0].mean(axis=1)))
        episodes = unique(f"{x.episodes:.0f}" for x in cell.runs if not math.isnan(x.episodes))
        row = [dataset, method, str(len(returns)), " or ".join(episodes) or "-", f"{cell.steps[-1]:,.0f}"]
        row += [returns_text(cell), ends, f"{returns.min():.1f}", spread(cell.last(SCORE)), spread(cell.best())]
        row += [spread(cell.last("eval_predicted_value")), spread(cell.last("eval_discounted_return")), cell.state]
        rows.append(row)
    published = published_scores(unique(row[0] for row in rows), returns=True)
    published = published[published["last_or_best"] != "best"]
    for _, other in published.iterrows():
        seeds = "-" if math.isnan(other["seeds"]) else f"{other['seeds']:.0f}"
        row = [other["dataset"], other["label"], seeds, "-", "-", published_text(other)]
        rows.append(row + ["-"] * (len(header) - len(row)))
    text = (
        "At the last evaluation, mean ± standard deviation over seeds (of one seed: return ± over its episodes). The "
        "return of a run is the mean over its evaluation episodes. The best score is the largest over a run's "
        "evaluations: choosing it takes the simulator, so it is not a result. The predicted value is that of the "
        "critics at the starts of episodes, the realised one the discounted return of the same training rewards."
    )
    if len(published):
        text += f" Sources of published returns: {'; '.join(unique(published['source']))}."
    return without_empty(Table("Runs", header, rows, text)) if rows else None


def metrics_table(results: Results) -> Optional[Table]:
    """Training metrics of runs that have no returns."""
    rows = []
    for (dataset, method), cell in results.items():
        if not len(cell.last()):
            row = [dataset, method, str(len(cell.runs)), f"{cell.steps[-1]:,.0f}"]
            for names in METRICS.values():
                row.append(next((spread(x, ".4g") for x in map(cell.last, names) if len(x)), "-"))
            rows.append([*row, cell.state])
    text = (
        "Nothing evaluated these policies, so there is no return. Training metrics of the last row, mean ± standard "
        "deviation over seeds. With --holdout_fraction there are metrics of episodes kept from training; python "
        "benchmarks/diagnose.py says what they mean for a run."
    )
    header = ["dataset", "method", "seeds", "steps", *METRICS, "state"]
    return without_empty(Table("Runs without returns", header, rows, text)) if rows else None


def method_table(runs: list[Run]) -> Optional[Table]:
    """All options that differ between the runs of a dataset; the names of methods have only some of them."""
    rows, n_datasets = {}, len({run.dataset for run in runs})
    known = [run for run in runs if run.config]
    for (dataset, _, script), family in report_runs.groups_of(known, lambda run: (run.dataset, *run.family)).items():
        options = report_runs.differing(family)
        usual = report_runs.usual_values(family, options)
        instead = {x: f" (else {short(value)})" for x, value in usual.items()}
        for method, run in {run.method: run for run in family}.items():
            values = report_runs.unusual(run, options, usual).items()
            texts = [f"{x} {short(value)}{instead.get(x, '')}" for x, value in values]
            rows.setdefault((method, script, ", ".join(texts) or "-"), []).append(dataset)
    text = (
        "All options in which runs of one name, script and dataset differ; a method's name has only those that tell "
        "it from the others. A script is recognised by its options: +option marks one that no script here has."
    )
    rows = [["all" if len(x) == n_datasets > 1 else ", ".join(x), *key] for key, x in rows.items()]
    header = ["dataset", "method", "script", "options that differ"]
    return Table("Methods", header, rows, text) if rows else None


def improvement_table(comparison: Comparison) -> Optional[Table]:
    rows = []
    for first, second in report_runs.pairs(comparison):
        strata = comparison.scores[first], comparison.scores[second]
        ends = brackets(report_runs.improvement_interval(*strata), ".2f") if comparison.spread else "-"
        rows.append([f"{first} > {second}", f"{report_runs.improvement(*strata):.2f}", ends])
    text = (
        "How likely a run of the first method scores above one of the second on the same dataset; 0.5: no difference."
    )
    header = ["methods", "probability", "95 % interval"]
    return Table("Probability of improvement", header, rows, text) if rows else None


PHASES = {  # of a run that goes online -> digits
    "offline score": ".1f", "lowest of the next three": ".1f", "dip": ".1f", "last score": ".1f", "train regret": ".3f",
    "eval regret": ".3f",
}  # fmt: skip


def phase_table(results: Results) -> Optional[Table]:
    rows = []
    for (dataset, method), cell in results.items():
        if phases := cell.phases():
            texts = [spread(phases[x][np.isfinite(phases[x])], PHASES[x]) for x in PHASES]
            rows.append([dataset, method, str(len(cell.runs)), *texts])
    text = (
        "Scores where the phases meet, the lowest of the three evaluations after that, how far it lies below (dip), "
        "and at the end. Regret is the mean of 1 - score / 100 (or of failures) over online episodes, and over "
        "evaluations from there on."
    )
    return Table("Offline, then online", ["dataset", "method", "seeds", *PHASES], rows, text) if rows else None


# The files of a report


def long_form(runs: list[Run]) -> str:
    """The text of runs.csv."""
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
    """Writes a file whole, or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def report(args: Any, command: str) -> None:
    """Writes the page and all that belongs to it. Raises DataError and OSError."""
    if report_runs.is_run(args.out) or any(args.out.glob("*/config.yaml")):
        raise OptionError(f"--out {args.out} holds run folders: name another folder")
    notes = []
    scripts = [report_runs.read_script(path) for path in [*sorted(ROOT.glob("algorithms/*/*.py")), *args.script]]
    runs = report_runs.read(args.runs, notes)
    report_runs.name_methods(runs, args.by, scripts)
    report_runs.rename(runs, args.rename)
    runs = report_runs.unite(runs, notes)
    results = report_runs.collect(runs, notes)
    comparison = report_runs.compare(results, notes)
    datasets = unique(run.dataset for run in runs)
    known = report_runs.stored_behaviours(args.runs, notes)
    behaviours = {x: known.get(x) or report_runs.behaviour(x, notes) for x in datasets}
    behaviours = {x: row for x, row in behaviours.items() if row}
    pictures = report_page.draw(results, behaviours, comparison)
    tables = [score_table(results, behaviours, comparison), run_table(results), metrics_table(results)]
    tables += [improvement_table(comparison), phase_table(results), method_table(runs)]
    tables = [x for x in tables if x]
    n_methods = len(unique(run.method for run in runs))
    summary = f"{count(len(runs), 'run')}, {count(len(datasets), 'dataset')}, {count(n_methods, 'method')}"
    args.out.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        write(args.out / f"{picture.name}.png", picture.png)
    write(args.out / "runs.csv", long_form(runs))
    if behaviours:
        table = pd.DataFrame.from_dict(behaviours, orient="index")
        write(args.out / "behaviour.csv", table.to_csv(index_label="dataset", lineterminator="\n"))
    texts = [f"## {x.title}\n\n{x.text}\n\n{x.markdown()}\n" for x in tables]
    write(args.out / "table.md", "\n".join([*(f"- {note}" for note in notes), *([""] if notes else []), *texts]))
    made = report_page.made(runs, args.out, command)
    write(args.out / "index.html", report_page.page(f"{summary}.", notes, tables, pictures, made))
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{summary}: {args.out / 'index.html'}")


# Tables in files


def returned(cell: Cell, short: bool = True) -> str:
    """The text of a cell in a table of a file: the return, or the state of runs that were not finished."""
    if cell.finished:
        return returns_text(cell)
    return cell.state.split()[0] if short else f"{cell.state}; {returns_text(cell)} at {cell.steps[-1]:,.0f}"


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
    "promised": lambda cell: spread(cell.last("eval_predicted_value")),  # the critics' prediction at the starts
    "realised": lambda cell: spread(cell.last("eval_discounted_return")),
    "regulariser": lambda cell: spread(cell.last("combo_regulariser"), ".2f"),  # of offline/combo.py
} | {name: lambda cell, name=name: spread(cell.phases()[name], PHASES[name]) for name in PHASES}
QUANTITIES |= {
    "late return": lambda cell: spread(cell.values(RETURN)[:, len(cell.steps) // 2 :].mean(axis=1)),  # last half
    "held-out TD error": lambda cell: spread(cell.last("holdout_td_error"), ".2f"),
    "held-out gap": lambda cell: spread(cell.last("holdout_gap"), ".2f"),
}


def behaviour_text(row: dict[str, float], quantity: str) -> str:
    text = f"{row['return']:.1f} ± {row['std']:.1f}"
    return f"{text} ({row['score']:.1f})" if quantity == "return (score)" else text


@functools.cache  # a page has many tables of the same runs
def stored(*folders: str) -> tuple[Results, Behaviours]:
    """The runs of folders below the repository's root. Raises DataError if one cannot be used."""
    folders, notes = [str(ROOT / x) for x in folders], []
    results = report_runs.collect(report_runs.read(folders, notes), [])
    behaviours = report_runs.stored_behaviours(folders, notes)
    if notes:
        raise DataError("; ".join(notes))
    return results, behaviours


def make_table(spec: dict[str, Any]) -> Table:
    """The table that a marker describes. Raises DataError."""
    results, behaviours = stored(*spec["runs"])
    datasets, rows = {dataset for dataset, _ in results}, []
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
                raise DataError(f"a table has {method} on {dataset}, which is not in {', '.join(spec['runs'])}")
            texts.append(" or ".join(unique(QUANTITIES[quantity](cell) for cell in cells)))
        rows.append(texts)
    header = [words or column for column, words in spec["columns"].items()]
    return Table("", [spec["head"], *header] if "head" in spec else header, rows)


def update(path: Path) -> str:
    """Returns the file's text with its tables rewritten. Raises DataError and OSError."""

    def replace(match):
        try:
            return f"{match[1]}\n{make_table(yaml.safe_load(match[2])).markdown()}\n{match[4]}"
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: {match[2][:60]}... does not describe a table: {error!r}") from None

    text = path.read_text()
    text, n = re.subn(r"(<!-- report: (\{.*?\}) -->)\n(.*?)(<!-- end -->)", replace, text, flags=re.DOTALL)
    if not n:
        raise DataError(f"{path} has no <!-- report: {{...}} --> with an <!-- end -->")
    return text


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUNS", help="run folders, folders of them, a runs.csv, wandb:<entity>/<project>")
    add("--out", type=Path, metavar="DIR", help="folder for the page, tables and pictures")
    add("--by", nargs="+", metavar="OPTION", help="options that separate methods, in place of those that differ")
    add(
        "--rename",
        nargs=2,
        action="append",
        default=[],
        metavar=("OLD", "NEW"),
        help="another name for a method or dataset",
    )
    add("--script", nargs="+", type=Path, default=[], metavar="FILE.py", help="your own copies of training scripts")
    add("--update", nargs="+", type=Path, metavar="FILE", help="rewrite the tables between the markers in these files")
    args = parser.parse_args(argv)
    if bool(args.update) == bool(args.runs) or bool(args.runs) != bool(args.out):
        parser.error("it takes RUNS and --out DIR, or --update FILE...")
    with one_line_errors():
        try:
            if args.runs:
                words = ["python", "benchmarks/report.py", *(sys.argv[1:] if argv is None else argv)]
                report(args, shlex.join(words))
            for path, text in [(path, update(path)) for path in args.update or ()]:
                print(f"{path}: {'as it was' if text == path.read_text() else 'written'}")
                write(path, text)
        except OSError as error:  # of files that a person named
            fail(1, error)


if __name__ == "__main__":
    main()

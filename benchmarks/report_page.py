"""The pictures and the page of report.py."""

import base64
import html
import io
import itertools
import math
import os
import re
import shlex
import textwrap
import urllib.parse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import report_runs
from benchmarks.common import DataError
from benchmarks.report_runs import OVERESTIMATE, RETURN, SCORE, Behaviours, Cell, Comparison, Results, Run, unique

WIDTH = 12.4  # inches of a picture, which fills the page
APART = 10  # times as many steps as another method's: from here on the axis of steps is logarithmic
METRICS = {  # a panel of training metrics -> the columns it may stand in
    "over-estimation": (OVERESTIMATE,),
    "TD error": ("qf1_loss", "qf_loss"),
    "TD error, held out": ("holdout_td_error",),
    "CQL's gap": ("cql_qf1_diff", "cql_qf_diff"),
    "CQL's gap, held out": ("holdout_gap",),
    "mean Q of the data": ("average_qf1", "average_qf"),
    "mean Q of the data, held out": ("holdout_q",),
    "policy's log-probability": ("log_pi",),
    "data's log-probability, held out": ("holdout_log_prob",),
    "entropy coefficient": ("alpha",),
    "policy loss": ("policy_loss",),
    "feature rank": ("feature_rank",),
    "return online": ("online_return",),
}


class Table(NamedTuple):
    """A table of the page, of table.md, and of the files that --update rewrites."""

    title: str
    header: list[str]
    rows: list[list[str]]
    text: str = ""  # how to read it

    def markdown(self) -> str:
        lines = [f"| {' | '.join(x.replace('|', chr(92) + '|') for x in line)} |" for line in (self.header, *self.rows)]
        return "\n".join([lines[0], "|---" * len(self.header) + "|", *lines[1:]])

    def html(self) -> str:
        return html_table(self.header, [[html.escape(cell) for cell in row] for row in self.rows])


class Picture(NamedTuple):
    name: str  # of its file
    title: str
    text: str  # how to read it
    png: bytes


# Pictures


def matplotlib_pyplot():
    try:
        import matplotlib
    except ImportError:
        raise DataError("the package matplotlib is missing: pip install -r requirements-extra.txt") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False})
    plt.rcParams["text.parse_math"] = False  # a dollar in a name is one
    plt.rcParams["axes.formatter.useoffset"] = False
    return plt


def wrap(text: str, width: int) -> str:
    """Breaks lines, within words too if need be, and leaves three."""
    return textwrap.fill(text, width, max_lines=3, placeholder=" ...")


def style(methods: list[str], method: str) -> dict[str, Any]:
    """A colour for each method, with other dashes from the eleventh on."""
    i = methods.index(method)
    return {"color": f"C{i % 10}", "linestyle": ("-", "-.", (0, (1, 1)))[i // 10 % 3]}


def panels(plt, names: list[str], most: int):
    """A figure of the page's width with a panel for each name, at most so many in a row."""
    n, n_rows = len(names), math.ceil(len(names) / most)
    columns = math.ceil(n / n_rows)
    width = WIDTH / columns
    size = WIDTH, n_rows * min(4.4, 0.9 + 0.6 * width)
    figure, axes = plt.subplots(n_rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[n:]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names):
        axis.set_title(wrap(name, int(11 * width)))
    return figure, list(axes.flat[:n])


def legend(figure, axes) -> None:
    """One below all panels, where it hides nothing."""
    handles = {}
    for axis in axes:
        handles |= {wrap(text, 60): handle for handle, text in zip(*axis.get_legend_handles_labels())}
    longest = max((len(line) for text in handles for line in text.split("\n")), default=1)
    columns = max(1, min(len(handles), int(WIDTH / (0.6 + 0.08 * longest))))
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0)}  # below the figure, which grows when it is saved
    figure.legend(handles.values(), handles.keys(), ncols=columns, frameon=False, **place)


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
        (drawn,) = report_runs.resample([values])
        with np.errstate(invalid="ignore"):  # where all that was drawn is missing
            means = np.nansum(drawn, axis=1) / np.isfinite(drawn).sum(axis=1)
        low, high = np.nanpercentile(means, [2.5, 97.5], axis=0)
        axis.fill_between(steps, low, high, color=look["color"], alpha=0.2, linewidth=0)
    if not cell.finished:
        axis.plot(steps[-1], np.nanmean(values[:, -1]), "X", color=look["color"], markersize=9, markeredgecolor="black")


def step_axis(axis, cells: list[Cell]) -> None:
    """Names and scales the axis of steps."""
    from matplotlib.ticker import EngFormatter

    starts = {cell.online_from for cell in cells if not math.isnan(cell.online_from)}
    name = "steps online" if starts == {0} else "updates offline, then steps online" if starts else "updates"
    ends = [cell.steps[-1] for cell in cells]
    if max(ends) >= APART * min(ends) > 0:
        axis.set_xscale("symlog", linthresh=min(cell.steps[cell.steps > 0].min() for cell in cells), subs=[2, 5])
        axis.autoscale(axis="x")  # the limits of the linear axis would leave an empty half
        axis.xaxis.set_minor_formatter(EngFormatter(sep=""))
        name += " (log scale)"
    else:
        axis.locator_params(axis="x", nbins=6)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlabel(name)


def by_dataset(results: Results) -> dict[str, dict[str, Cell]]:
    """Dataset -> method -> cell."""
    found = {}
    for (dataset, method), cell in results.items():
        found.setdefault(dataset, {})[method] = cell
    return found


def curves(plt, results: Results, methods: list[str], behaviours: Behaviours):
    groups = by_dataset({key: cell for key, cell in results.items() if np.isfinite(cell.values(RETURN)).any()})
    if not groups:
        return None
    figure, axes = panels(plt, list(groups), 3)
    for axis, (dataset, cells) in zip(axes, groups.items()):
        name = SCORE if all(np.isfinite(cell.values(SCORE)).any() for cell in cells.values()) else RETURN
        for method, cell in cells.items():
            look = style(methods, method)
            draw_curve(axis, cell, cell.values(name), look, method)
            for run in cell.all:
                if run not in cell.runs and name in run.rows:
                    axis.plot(run.rows["step"], run.rows[name], linewidth=0.7, marker="x", markevery=[-1], **look)
        if dataset in behaviours:
            text, value = "behaviour (mean of the data)", behaviours[dataset]["score" if name == SCORE else "return"]
            axis.axhline(value, color="black", linestyle="--", linewidth=1, label=text)
        for step in unique(cell.online_from for cell in cells.values() if cell.online_from > 0):
            axis.axvline(step, color="grey", linestyle=":", label="online from here")
        axis.set_ylabel("normalised score" if name == SCORE else "return of an episode")
        step_axis(axis, list(cells.values()))
    legend(figure, axes)
    return figure


def metrics(plt, dataset: str, cells: dict[str, Cell], methods: list[str]):
    found = {}
    for title, names in METRICS.items():
        own = [(method, cell, name, cell.values(name)) for method, cell in cells.items() for name in names]
        if own := [x for x in own if np.isfinite(x[3]).any()]:
            found[title] = own
    if not found:
        return None
    figure, axes = panels(plt, list(found), 4)
    figure.suptitle(wrap(dataset, int(11 * WIDTH)))
    for axis, own in zip(axes, found.values()):
        for method, cell, _, x in own:
            draw_curve(axis, cell, x, style(methods, method), method)
        tame(axis.set_yscale, np.concatenate([x.ravel() for *_, x in own]))
        axis.set_ylabel(wrap(" or ".join(unique(name for *_, name, _ in own)), 24))
        step_axis(axis, [cell for _, cell, *_ in own])
    legend(figure, axes)
    return figure


def profiles(plt, comparison: Comparison, methods: list[str]):
    if not comparison.datasets:
        return None
    figure, (axis,) = panels(plt, [", ".join(comparison.datasets)], 1)
    everything = np.concatenate([x for strata in comparison.scores.values() for x in strata])
    taus = np.linspace(everything.min() - 1e-9, everything.max(), 201)
    for method, strata in comparison.scores.items():
        look = style(methods, method)
        axis.plot(taus, report_runs.profile(np.concatenate(strata), taus), label=method, **look)
        if comparison.spread:
            drawn = report_runs.profile(np.concatenate(report_runs.resample(strata, 1000), axis=1), taus)
            axis.fill_between(taus, *report_runs.interval(drawn), color=look["color"], alpha=0.2, linewidth=0)
    axis.set(xlabel="normalised score τ", ylabel="share of runs above τ")
    legend(figure, [axis])
    return figure


CAPTIONS = {  # picture -> title, how to read it
    "curves": (
        "Learning curves",
        "The score of each evaluation, or its return where there is no score: mean over seeds, with a 95 % bootstrap "
        "interval of that mean, which is too narrow where there are few seeds. A large cross marks a method without a "
        "finished run, a thin line an unfinished run that does not count. Where one method took at least ten times "
        "as many steps as another, the axis of steps is logarithmic.",
    ),
    "profile": (
        "Performance profile",
        "Share of runs whose last score is above τ, with a 95 % bootstrap interval over seeds within each dataset.",
    ),
    "metrics": (
        "Training metrics of {}",
        "Means since the last evaluation, by their names in metrics.csv; bands as above. Over-estimation is what the "
        "critics predict at the starts of episodes minus the discounted return from there, in training rewards.",
    ),
}


def draw(results: Results, behaviours: Behaviours, comparison: Comparison) -> list[Picture]:
    """Raises DataError without matplotlib."""
    plt, methods, pictures = matplotlib_pyplot(), unique(method for _, method in results), []

    def add(kind: str, figure, dataset: str = "") -> None:
        if figure is not None:
            file, (title, text) = io.BytesIO(), CAPTIONS[kind]
            figure.savefig(file, dpi=100, format="png", bbox_inches="tight", metadata={"Software": None})
            name = re.sub(r"[^\w.]+", "-", f"{kind} {dataset}".strip())
            pictures.append(Picture(name, title.format(dataset), text, file.getvalue()))
            plt.close(figure)

    add("curves", curves(plt, results, methods, behaviours))
    add("profile", profiles(plt, comparison, methods))
    for dataset, cells in by_dataset(results).items():
        add("metrics", metrics(plt, dataset, cells, methods), dataset)
    return pictures


# The page

STYLE = """body { font: 15px/1.5 sans-serif; max-width: 1240px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px } .wide { overflow-x: auto } img { width: 100%; min-width: 800px }
th, td { border: 1px solid #ccc; padding: 3px 8px; white-space: nowrap; text-align: left }
th { background: #f2f2f2; white-space: normal } th.long { min-width: 9em }
td.long { white-space: normal; min-width: 26em }
code { user-select: all; overflow-wrap: anywhere }"""


def html_table(header: list[str], rows: list[list[str]]) -> str:
    """A table of cells that are HTML already, below a header that is text. It scrolls where the page is narrow."""

    def line(cells: list[str], kind: str, long: int) -> str:
        start = [f"<{kind} class=long>" if len(x) > long else f"<{kind}>" for x in cells]
        return "<tr>" + "".join(f"{tag}{x}</{kind}>" for tag, x in zip(start, cells)) + "</tr>"

    body = "\n".join(line(row, "td", 60) for row in rows)
    return f'<div class="wide"><table>\n{line(list(map(html.escape, header)), "th", 20)}\n{body}\n</table></div>'


def with_links(text: str) -> str:
    """HTML of a text in which addresses are links."""
    return re.sub(r"https://[^\s,;]+", r'<a href="\g<0>">\g<0></a>', html.escape(text))


def again(run: Run, taken: set[str]) -> str:
    """A command that repeats a run in a folder that does not exist yet; else why there is none."""
    if not run.config:
        return "its options are not known"
    if run.foreign:
        return f"no script here has its option {run.foreign[0]}: --script names the one that has"
    folder = Path(run.config.get("checkpoints_path") or "runs")
    base = re.sub(r"[^\w.=-]+", "-", f"{Path(run.source).name}-again")
    names = (f"{base}-{i}" if i > 1 else base for i in itertools.count(1))
    name = next(x for x in names if x not in taken and not (folder / x).exists())
    taken.add(name)
    words = ["python", os.path.relpath(run.script.path)]
    if Path(run.source, "config.yaml").exists():
        words += ["--config_path", f"{run.source}/config.yaml"]
    else:  # W&B has the options alone
        options = {x: value for x, value in run.config.items() if x != "run_id"}
        words += [f"--{x}={value}" for x, value in options.items() if value != run.script.defaults.get(x)]
    return shlex.join([*words, "--run_id", name])


def made(runs: list[Run], out: Path, command: str) -> str:
    """The section that says where the runs are and how to repeat them, as HTML."""
    rows, taken = [], set()
    for run in runs:
        link = run.link if "://" in run.link else urllib.parse.quote(os.path.relpath(run.link, out))
        source = f'<a href="{html.escape(link)}">{html.escape(run.source)}</a>'
        row = [html.escape(x) for x in (run.dataset, run.method, str(run.seed))]
        rows.append([*row, source, f"<code>{html.escape(again(run, taken))}</code>"])
    text = (
        f"Made by: {command}. The last column repeats a run under a new name, from the folder where that command ran."
    )
    header = ["dataset", "method", "seed", "run", "to repeat it"]
    return f"<h2>How it was made</h2>\n<p>{html.escape(text)}</p>\n{html_table(header, rows)}"


def page(summary: str, notes: list[str], tables: list[Table], pictures: list[Picture], made: str) -> str:
    """HTML with all in it: the first table, the pictures, the other tables, and how it was made."""
    parts = [f"<h2>{x.title}</h2>\n<p>{with_links(x.text)}</p>\n{x.html()}" for x in tables]
    images, texts = [], set()  # of many datasets, the first picture is explained
    for picture in pictures:
        title, data = html.escape(picture.title), base64.b64encode(picture.png).decode()
        image = f'<div class="wide"><img alt="{title}" src="data:image/png;base64,{data}"></div>'
        text = "" if picture.text in texts else f"<p>{picture.text}</p>\n"
        images.append(f"<h2>{title}</h2>\n{text}{image}")
        texts.add(picture.text)
    lines = "\n".join(f"<li>{html.escape(note)}</li>" for note in notes)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>Report</title><style>{STYLE}</style>"
    start = f"<h1>Report</h1>\n<p>{html.escape(summary)}</p>\n<ul>{lines}</ul>"
    body = "\n".join([start, parts[0], *images, *parts[1:], made])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'

"""Pictures of the results in `examples/benchmarks/results`, drawn by `pages.py`.

Each function makes one picture of a results file, and the words that stand for it where it cannot be seen.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

import claims
import dimension
import learning_rates
import pareto as parameters
import timing
import unlearning
from claims import SMALL_TASKS, TASKS, Entry
from peft_subspace.continual.metrics import draw_heatmap
from support import sequences
from verdicts import SEQUENCES

FOLDER = Path(__file__).resolve().parents[2] / "model_cards" / "figures"

OURS = {  # colors that most color-blind readers tell apart
    "flora": "#d55e00",
    "flora-zero": "#e8956a",
    "flora-all": "#8c3d00",
    "mos": "#0072b2",
    "lora-sb": "#009e73",
    "effort": "#cc79a7",
    "continual-svd": "#e69f00",
    "continual-svd-16": "#a06f00",
}
OTHERS = "#8a8a8a"
LOOKS = tuple(zip("sDv^<>pPhHdX", 3 * ("#8a8a8a", "#8c6d31", "#5254a3", "#a04a4b"), strict=True))
"""Markers and muted colors of the methods that are not ours."""

_COLORS = ("#d55e00", "#8a8a8a", "#5254a3", "#0072b2", "#e69f00", "#a06f00", "#009e73", "#006b4f")

Drawn = tuple[Figure, str]


def accuracy(content: dict[str, Any], kind: str) -> Drawn | None:
    """Accuracy against trained parameters on all tasks of a kind, each with its Pareto front."""
    measured = dict.fromkeys(run["task"] for run in content["runs"].values())
    tasks = [task for task in measured if task in (*TASKS.get(kind, ()), *SMALL_TASKS.get(kind, ()))]
    points = {task: _points(content, task) for task in tasks}
    if not points:
        return None
    figure, charts = _panels(len(points), width=3.6, height=3.1)
    entries = list(dict.fromkeys(entry for found in points.values() for entry in found))
    for chart, (task, found) in zip(charts, points.items(), strict=False):
        counts = [count for count, _ in found.values()]
        front = pareto([(count, statistics.fmean(scores)) for count, scores in found.values()])
        steps = zip(*front, (max(counts), front[-1][1]), strict=True)
        chart.step(*steps, where="post", color="#d8d8d8", lw=4, zorder=0, label="Pareto front")
        for entry, (count, scores) in found.items():
            chart.errorbar(
                count,
                statistics.fmean(scores),
                statistics.stdev(scores) if len(scores) > 1 else 0.0,
                label=claims.label(entry),
                **_style(entry, entries),
            )
        chart.set(xscale="log", title=task)
        chart.xaxis.set_major_locator(LogLocator(subs=(1,) if max(counts) > 300 * min(counts) else (1, 3)))
        chart.xaxis.set_major_formatter(EngFormatter(sep=""))
        chart.xaxis.set_minor_locator(NullLocator())
        chart.margins(x=0.12)
        chart.grid(alpha=0.25)
    figure.supxlabel("trained parameters, head included", fontsize="medium")
    figure.supylabel("test accuracy", fontsize="medium")
    _legend(figure, charts)
    return figure, f"Test accuracy against trained parameters on {', '.join(points)}, with Pareto fronts"


def _points(content: dict[str, Any], task: str) -> dict[Entry, tuple[int, list[float]]]:
    """Trained parameters and accuracy of the runs of every entry on a task."""
    runs = {entry: claims.chosen(content, task, entry) for entry in claims.ENTRIES}
    return {
        entry: (found[0]["trainable"], [run["test_accuracy"] for run in found])
        for entry, found in runs.items()
        if found
    }


def _style(entry: Entry, entries: Sequence[Entry]) -> dict[str, Any]:
    """How the point of an entry looks: ours are large and colored."""
    if entry.method in OURS:
        return {
            "marker": "o",
            "ms": 9,
            "color": OURS[entry.method],
            "mec": "black",
            "capsize": 3,
            "zorder": 3,
        }
    others = [other for other in entries if other.method not in OURS]
    place = others.index(entry)
    marker, color = LOOKS[place % len(LOOKS)]
    return {
        "marker": marker,
        "ms": 6,
        "color": color,
        "mfc": "white" if place % 2 else color,
        "capsize": 2,
        "elinewidth": 0.8,
    }


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other beats with as few parameters, from few to many."""
    front: list[tuple[float, float]] = []
    for count, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or score > front[-1][1]:
            front.append((count, score))
    return front


def matrices(content: dict[str, Any]) -> Drawn:
    """Accuracy on each task after each task, by method: means over the seeds of the first order."""
    runs = content["runs"].values()
    order = min(runs, key=lambda run: run["split"] != "validation")["order"]  # rates are chosen in the first
    found = {
        method["title"]: sequences.mean_matrix(content, name, order)
        for name, method in content["summary"].items()
        if not sequences.LEARNERS[name].joint
        and any(run["order"] == order for run in sequences.tested(content, name))
    }
    size = 0.46 * len(order)
    figure, charts = _panels(len(found), width=size + 0.9, height=size + 1.1)
    for chart, (title, matrix) in zip(charts, found.items(), strict=False):
        seen = [
            [value if j <= i else math.nan for j, value in enumerate(row)] for i, row in enumerate(matrix)
        ]
        image = draw_heatmap(chart, seen, order, digits=2)
        chart.set_title(textwrap.fill(title, round(11 * size + 8)), fontsize="medium")
    figure.supxlabel("accuracy on", fontsize="medium")
    figure.supylabel("after training on", fontsize="medium")
    figure.colorbar(image, ax=charts, shrink=0.8, pad=0.02)
    alt = f"Accuracy on each task after each task of the order {', '.join(order)}, by method"
    return figure, alt


def averages(content: dict[str, Any]) -> Drawn:
    """Average accuracy right after each task and at the end, by method; what lies between is forgotten."""
    found = content["summary"]
    figure = Figure(figsize=(7.5, 1.2 + 0.55 * len(found)), layout="constrained")
    chart = figure.subplots()
    for place, (name, method) in enumerate(found.items()):
        color = OURS.get(name, OTHERS)
        for measure, offset, alpha in (("learned", -0.19, 0.4), ("average_accuracy", 0.19, 1.0)):
            values = method[measure]
            mean = statistics.fmean(values)
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            chart.barh(place + offset, mean, 0.36, color=color, alpha=alpha)
            chart.errorbar(mean, place + offset, xerr=spread, color="black", capsize=2, lw=0.8)
            chart.text(0.01, place + offset, f"{mean:.3f}", va="center", fontsize="small")
    for alpha, label in ((0.4, "right after each task"), (1.0, "at the end")):
        chart.bar(0, 0, color="#555555", alpha=alpha, label=label)
    chart.set_yticks(range(len(found)), [method["title"] for method in found.values()])
    chart.invert_yaxis()
    chart.set(xlabel="average accuracy over the tasks, task known", xlim=(0, 1))
    figure.legend(*chart.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure, "Average accuracy right after each task and at the end of the sequence, by method"


def spectra(content: dict[str, Any]) -> Drawn:
    """Singular values of the updates of a few weights, by method."""
    methods = content["methods"]
    weights = list(next(iter(methods.values()))["spectra"])
    figure, charts = _panels(len(weights), width=3.9, height=2.9, columns=2)
    for chart, weight in zip(charts, weights, strict=True):
        for name, method in methods.items():
            values = method["spectra"][weight]
            chart.plot(range(1, len(values) + 1), values, label=method["title"], **_line(name))
        chart.set(xscale="log", yscale="log", title=weight, ylim=(1e-4, 1.5))
        chart.xaxis.set_major_formatter(EngFormatter(sep=""))
        chart.grid(alpha=0.25)
    figure.supxlabel("index of the singular value", fontsize="medium")
    figure.supylabel("singular value / largest", fontsize="medium")
    _legend(figure, charts)
    alt = f"Singular values of the trained updates of {', '.join(weights)}, by method"
    return figure, alt


def rates(content: dict[str, Any]) -> Drawn:
    """Accuracy against the learning rate, by task and method, with the constants of the authors as dashes."""
    tasks = list(dict.fromkeys(run["task"] for run in content["runs"].values()))
    figure, charts = _panels(len(tasks), width=3.9, height=3.1)
    for chart, task in zip(charts, tasks, strict=True):
        for name in learning_rates.CONFIGS:
            color = OURS.get(name.lower().replace(", r=", "-").replace(" ", "-"), "black")
            for before, style in ((True, "--"), (False, "-")):
                found = learning_rates.by_rate(content, task, name, before=before)
                means = [
                    statistics.fmean(run["test_accuracy"] for run in runs.values()) for runs in found.values()
                ]
                label = None if before else name
                chart.plot(list(found), means, style, marker="o", ms=3, color=color, label=label)
        chart.set(xscale="log", title=task)
        chart.grid(alpha=0.25)
    figure.supxlabel("learning rate", fontsize="medium")
    figure.supylabel("test accuracy", fontsize="medium")
    _legend(figure, charts)
    return figure, f"Test accuracy against the learning rate on {', '.join(tasks)}, by method"


def converged(content: dict[str, Any]) -> Drawn:
    """Accuracy against trained parameters without the head, untuned, one line for each method."""
    tasks = list(dict.fromkeys(run["task"] for run in content["runs"].values()))
    figure, charts = _panels(len(tasks), width=3.9, height=3.1)
    for chart, task in zip(charts, tasks, strict=True):
        points = parameters.points(content, task)
        for (title, found), (marker, color) in zip(sorted(points.items()), LOOKS, strict=False):
            counts, scores = zip(*sorted(found.items()), strict=True)
            means, spreads = zip(*(_mean(values) for values in scores), strict=True)
            color = OURS.get(title.lower(), color)
            chart.errorbar(counts, means, spreads, marker=marker, ms=4, color=color, label=title, capsize=2)
        chart.set(xscale="log", title=task)
        chart.xaxis.set_major_formatter(EngFormatter(sep=""))
        chart.grid(alpha=0.25)
    figure.supxlabel("trained parameters, without the head", fontsize="medium")
    figure.supylabel("test accuracy", fontsize="medium")
    _legend(figure, charts)
    return figure, f"Test accuracy against trained parameters on {', '.join(tasks)}, by method"


def dimensions(content: dict[str, Any]) -> Drawn:
    """Accuracy against the size of a random subspace, beside that of the whole network."""
    found = dimension.accuracies(content)
    full = statistics.fmean(found.pop(dimension.FULL).values())
    figure, (chart,) = _panels(1, width=5, height=3.1)
    means, spreads = zip(*(_mean([*found[size].values()]) for size in sorted(found)), strict=True)
    chart.errorbar(
        sorted(found), means, spreads, marker="o", ms=4, capsize=2, color="#0072b2", label="subspace"
    )
    chart.axhline(full, color="black", lw=0.8, label="all parameters")
    chart.axhline(
        dimension.SHARE * full, color="black", lw=0.8, ls="--", label=f"{dimension.SHARE:.0%} of it"
    )
    chart.axvline(dimension.PUBLISHED, color=OTHERS, ls=":", label="published for MNIST")
    chart.set(xscale="log", xlabel="dimensions", ylabel="test accuracy")
    chart.xaxis.set_major_formatter(EngFormatter(sep=""))
    chart.grid(alpha=0.25)
    _legend(figure, [chart])
    return figure, "Test accuracy on digits against the dimensions of the random subspace that trains"


def _mean(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _line(name: str) -> dict[str, Any]:
    if name in OURS:
        return {"color": OURS[name], "lw": 2}
    return {"color": "black", "lw": 1.4, "ls": "--" if name == "lora" else ":"}


def forgetting(content: dict[str, Any]) -> Drawn:
    """What else is lost against what is still recited, of all strengths, by the means over seeds."""
    told = {name: unlearning.MEASURES[name] for name in ("perplexity", "problems", "topics")}
    figure, charts = _panels(len(told), width=3.4, height=3.1)
    entries = [entry for entry in unlearning.ENTRIES if entry not in (unlearning.BEFORE, unlearning.AFTER)]
    for entry, color in zip(entries, _COLORS, strict=False):
        of = [run["points"] for run in content["runs"].values() if run["entry"] == entry]
        points = [
            [point for points in of for point in points[n : n + 1]]
            for n in range(max(map(len, of), default=0))
        ]
        for chart, measure in zip(charts, told, strict=True):
            lines = ([statistics.fmean(p[name] for p in at) for at in points] for name in ("strict", measure))
            chart.plot(*lines, marker="o", ms=4, color=color, label=entry)
    for chart, (measure, title) in zip(charts, told.items(), strict=True):
        for entry, style in {unlearning.BEFORE: ":", unlearning.AFTER: "--"}.items():
            of = [run["points"][0][measure] for run in content["runs"].values() if run["entry"] == entry]
            if of:
                chart.axhline(statistics.fmean(of), ls=style, color="black", lw=0.8, label=entry)
        chart.set(title=title, yscale="linear" if measure == "topics" else "log")
        chart.grid(alpha=0.25)
    figure.supxlabel("part of the texts that are still recited", fontsize="medium")
    _legend(figure, charts)
    return figure, f"{', '.join(told.values())} against the part of memorized texts that are still recited"


def _panels(count: int, width: float, height: float, columns: int = 3) -> tuple[Figure, list[Any]]:
    """A figure with as many charts in rows, those that are left over taken away."""
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(columns * width + 1.6, rows * height + 0.4), layout="constrained")
    charts = list(figure.subplots(rows, columns, squeeze=False).flat)
    for chart in charts[count:]:
        chart.remove()
    return figure, charts[:count]


def _legend(figure: Figure, charts: Sequence[Any]) -> None:
    """One legend for all charts, on their right."""
    handles = {
        label: handle
        for chart in charts
        for handle, label in zip(*chart.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside right center",
        fontsize="small",
        frameon=False,
    )


FIGURES: dict[str, tuple[str, Callable[[dict[str, Any]], Drawn | None]]] = {  # results file, and what draws
    **{f"accuracy_{kind}": ("quality", partial(accuracy, kind=kind)) for kind in TASKS},
    **{f"accuracy_{kind}_small": ("quality-small", partial(accuracy, kind=kind)) for kind in SMALL_TASKS},
    **{f"{name}_{draw.__name__}": (name, draw) for name in SEQUENCES for draw in (averages, matrices)},
    "spectra": ("spectra", spectra),
    "learning_rates": ("learning_rates", rates),
    "converged": ("pareto", converged),
    "dimensions": ("dimension", dimensions),
    "forgetting": ("unlearning", forgetting),
}


def draw(name: str, folder: Path = FOLDER) -> str | None:
    """Draw a figure into `folder` as `NAME.png`, if it has been measured.

    Returns:
        The words that stand for it; None if there is nothing to draw.
    """
    source, function = FIGURES[name]
    measured = (timing.RESULTS / f"{source}.json").exists()
    drawn, path = function(timing.load(source)) if measured else None, folder / f"{name}.png"
    if drawn is None:
        path.unlink(missing_ok=True)  # or an earlier picture would outlive its results
        return None
    figure, alt = drawn
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"Software": None}  # without them the bytes stay the same
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata=versions)
    return alt

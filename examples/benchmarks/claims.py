"""What each method is said to do, beside what it is measured, and what the runs of `quality.py` say of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Entry:
    """A method at a size: a rank, or as many trained parameters as another method at a size."""

    method: str
    size: int = 0
    like: tuple[str, int] | None = None


@dataclass(frozen=True)
class Claim:
    """What a method is said to do, and beside what it is measured.

    Attributes:
        text: The claim.
        kinds: Kinds of tasks.
        subject: What it is about; compared with each of `beside`.
    """

    text: str
    kinds: tuple[str, ...]
    subject: Entry
    beside: tuple[Entry, ...]


CLAIMS = {
    "lora-sb": Claim(
        "LoRA-SB reaches LoRA of the same rank with 27 to 90 times fewer parameters",
        ("text", "decoder"),
        Entry("lora-sb", 16),
        (
            Entry("lora", 16),
            Entry("lora", 1),
            Entry("rslora", 16),
            Entry("pissa", 16),
            Entry("lora-ga", 16),
            Entry("tinylora", like=("lora-sb", 16)),
            Entry("full"),
            Entry("probe"),
        ),
    ),
    "mos": Claim(
        "MoS reaches LoRA with 8 times fewer parameters, and beats VB-LoRA with as many",
        ("text", "decoder"),
        Entry("mos", 2),
        (
            Entry("lora", 16),
            Entry("lora", 2),
            Entry("vb-lora", like=("mos", 2)),
            Entry("randlora", like=("mos", 2)),
        ),
    ),
    "flora": Claim(
        "FLoRA beats LoRA, LoHa and LoKr on convolutional networks with as many parameters",
        ("images",),
        Entry("flora", 8),
        (
            Entry("lora", like=("flora", 8)),
            Entry("loha", like=("flora", 8)),
            Entry("lokr", like=("flora", 8)),
            Entry("full"),
            Entry("probe"),
        ),
    ),
}


def label(entry: Entry) -> str:
    """Short name of an entry, as in the results file."""
    if entry.like:
        return f"{entry.method} as {entry.like[0]}-{entry.like[1]}"
    return f"{entry.method}-{entry.size}" if entry.size else entry.method


def chosen(content: dict[str, Any], task: str, entry: Entry) -> list[dict[str, Any]]:
    """Runs of an entry on a task with the rate that validated best with seed 0."""
    runs = [r for r in content["runs"].values() if (r["task"], r["entry"]) == (task, label(entry))]
    tuning = [run for run in runs if run["seed"] == 0]
    if not tuning:
        return []
    best = min(tuning, key=lambda run: run["validation_loss"])["rate"]
    return sorted((run for run in runs if run["rate"] == best), key=lambda run: run["seed"])


def differences(content: dict[str, Any], claim: Claim, other: Entry) -> dict[str, list[float]]:
    """Accuracy of a claim's subject minus another's, seed by seed, by task."""
    found = {}
    for task in _tasks(content):
        pairs = zip(chosen(content, task, claim.subject), chosen(content, task, other), strict=False)
        values = [one["test_accuracy"] - two["test_accuracy"] for one, two in pairs]
        if values:
            found[task] = values
    return found


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean ± standard deviation."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(content: dict[str, Any], name: str) -> str:
    """One claim's accuracies by task, with the trained parameters of the first task."""
    claim = CLAIMS[name]
    entries = (claim.subject, *claim.beside)
    tasks = [task for task in _tasks(content) if chosen(content, task, claim.subject)]
    if not tasks:
        return f"Claim: {claim.text}. Not measured yet."
    rows = []
    for entry in entries:
        found = {task: chosen(content, task, entry) for task in tasks}
        if not all(found.values()):
            continue
        gaps = differences(content, claim, entry)
        rows.append(
            [
                label(entry),
                f"{found[tasks[0]][0]['trainable']:,}",
                *(spread([run["test_accuracy"] for run in found[task]], 3) for task in tasks),
                "" if entry == claim.subject else spread([gap for task in tasks for gap in gaps[task]], 3),
            ]
        )
    header = ["", "trained parameters, head included", *tasks, f"{label(claim.subject)} minus it"]
    return f"Claim: {claim.text}. Test accuracy:\n\n{markdown(header, rows)}"


def plot(content: dict[str, Any], task: str, file: Path) -> None:
    """Accuracy against trained parameters on one task, with the Pareto front."""
    from matplotlib.figure import Figure

    entries = {label(entry): entry for claim in CLAIMS.values() for entry in (claim.subject, *claim.beside)}
    points = []
    for name, entry in entries.items():
        runs = chosen(content, task, entry)
        if runs:
            scores = [run["test_accuracy"] for run in runs]
            points.append((runs[0]["trainable"], statistics.fmean(scores), name, scores))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for count, mean, name, scores in points:
        axis.errorbar(
            count, mean, [[mean - min(scores)], [max(scores) - mean]], marker="o", color="C0", capsize=2
        )
        axis.annotate(name, (count, mean), xytext=(4, 3), textcoords="offset points", fontsize=7)
    front = pareto([(count, mean) for count, mean, *_ in points])
    axis.step(*zip(*front, strict=True), where="post", color="C1", label="Pareto front")
    axis.set(xscale="log", xlabel="trained parameters, head included", ylabel="test accuracy", title=task)
    axis.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other beats with as few parameters, from few to many."""
    front: list[tuple[float, float]] = []
    for count, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or score > front[-1][1]:
            front.append((count, score))
    return front


def _tasks(content: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(run["task"] for run in content["runs"].values()))

"""What each method is said to do, beside what it is measured, and what the runs of `quality.py` say of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SMALL_TASKS = {"text": ("bbcnews",), "images": ("digits",)}
TASKS = {
    "text": ("agnews", "trec6", "dbpedia", "clinc150", "imdb"),
    "images": ("cifar10", "digits"),
    "resnet": ("resnet-cifar10", "resnet-digits"),
    "clip": ("clip-cifar10", "clip-fewshot"),
    "decoder": ("gsm8k-svamp", "agnews-generation"),
}
"""Tasks by kind, of the small comparison and of the large one."""

WITH_PEERS = ("bbcnews", "trec6", "cifar10", "digits", "resnet-cifar10", "resnet-digits")
"""Tasks on which all is measured; on the others only that on which a claim depends."""


@dataclass(frozen=True)
class Entry:
    """A method at a size: a rank, or as many trained parameters as another method at a size."""

    method: str
    size: int = 0
    like: tuple[str, int] | None = None


PROBE = Entry("probe")
WITH_HEAD = ("text", "images", "resnet", "clip")
"""Kinds of tasks for which a network gets a new head."""

NETWORKS = {
    "text": "MiniLM",
    "images": "MobileNetV2",
    "resnet": "ResNet-50 of half width",
    "clip": "CLIP ViT-B/16",
    "decoder": "SmolLM2-135M",
}
"""What is trained, by kind of task."""


@dataclass(frozen=True)
class Claim:
    """What a method is said to do, and beside what it is measured.

    Attributes:
        text: The claim.
        kinds: Kinds of tasks.
        subject: What it is about.
        reaches: What it is said to be as good as.
        beats: What it is said to be better than.
        beside: What else it is compared with, on some tasks.
        large: What else, on those of these tasks that are large.
    """

    text: str
    kinds: tuple[str, ...]
    subject: Entry
    reaches: tuple[Entry, ...] = ()
    beats: tuple[Entry, ...] = ()
    beside: tuple[Entry, ...] = ()
    large: tuple[Entry, ...] = ()

    def entries(self, task: str | None = None) -> tuple[Entry, ...]:
        """What is measured, on any task or on one."""
        judged = (self.subject, *self.reaches, *self.beats)
        if task is not None and task not in WITH_PEERS:
            return judged
        small = any(task in names for names in SMALL_TASKS.values())
        return (*judged, *(() if small else self.large), *self.beside)


CLAIMS = {
    "lora-sb": Claim(
        "LoRA-SB reaches LoRA of the same rank with 27 to 90 times fewer parameters",
        ("text", "clip", "decoder"),
        Entry("lora-sb", 16),
        reaches=(Entry("lora", 16),),
        beside=(
            Entry("lora", 1),
            Entry("rslora", 16),
            Entry("pissa", 16),
            Entry("lora-ga", 16),
            Entry("tinylora", like=("lora-sb", 16)),
            Entry("full"),
            PROBE,
        ),
        large=(Entry("lora-sb", 64),),
    ),
    "mos": Claim(
        "MoS reaches LoRA with 8 times fewer parameters, and beats VB-LoRA with as many",
        ("text", "clip", "decoder"),
        Entry("mos", 2),
        reaches=(Entry("lora", 16),),
        beats=(Entry("vb-lora", like=("mos", 2)),),
        beside=(Entry("lora", 2), PROBE),
        large=(Entry("randlora", like=("mos", 2)),),
    ),
    "flora": Claim(
        "FLoRA beats LoRA, LoHa and LoKr on convolutional networks with as many parameters",
        ("images", "resnet"),
        Entry("flora", 8),
        beats=tuple(Entry(method, like=("flora", 8)) for method in ("lora", "loha", "lokr")),
        beside=(
            Entry("flora-zero", 8),
            Entry("flora-all", like=("flora", 8)),
            Entry("full"),
            PROBE,
        ),
    ),
}


ENTRIES = tuple(dict.fromkeys(entry for claim in CLAIMS.values() for entry in claim.entries()))
"""What the claims are measured with, each once."""


def kind_of(task: str) -> str:
    """Kind of a task."""
    return next(k for group in (TASKS, SMALL_TASKS) for k, names in group.items() if task in names)


def label(entry: Entry) -> str:
    """Short name of an entry, as in the results file."""
    if entry.like:
        return f"{entry.method} as {entry.like[0]}-{entry.like[1]}"
    return f"{entry.method}-{entry.size}" if entry.size else entry.method


def chosen(content: dict[str, Any], task: str, entry: Entry) -> list[dict[str, Any]]:
    """Runs of an entry on a task with the rate that validated best with seed 0."""
    return runs_of(content, task, label(entry))


def runs_of(
    content: dict[str, Any], task: str, entry: str, rate: float | None = None
) -> list[dict[str, Any]]:
    """Runs of an entry, by its label, with one rate; without it, with the one that validated best."""
    runs = [run for run in content["runs"].values() if (run["task"], run["entry"]) == (task, entry)]
    tuning = [run for run in runs if run["seed"] == 0]
    if rate is None and tuning:
        rate = min(tuning, key=lambda run: run["validation_loss"])["rate"]
    return sorted((run for run in runs if run["rate"] == rate), key=lambda run: run["seed"])


def differences(content: dict[str, Any], claim: Claim, other: Entry) -> dict[str, list[float]]:
    """Accuracy of a claim's subject minus another's, seed by seed, by task."""
    found = {}
    for task in _tasks(content):
        pairs = zip(chosen(content, task, claim.subject), chosen(content, task, other), strict=False)
        values = [one["test_accuracy"] - two["test_accuracy"] for one, two in pairs]
        if values:
            found[task] = values
    return found


def reproduced(content: dict[str, Any], earlier: dict[str, Any]) -> str:
    """Which test accuracies are those of earlier runs: their means no further apart than both spreads."""
    count, apart = 0, []
    for task in _tasks(content):
        for entry in ENTRIES:
            found = [
                [run["test_accuracy"] for run in chosen(runs, task, entry)] for runs in (content, earlier)
            ]
            if any(len(values) < 2 for values in found):
                continue
            count += 1
            one, other = map(statistics.fmean, found)
            if abs(one - other) > sum(map(statistics.stdev, found)):
                apart.append(f"{label(entry)} on {task} ({one:.3f}, before {other:.3f})")
    return f"{count - len(apart)} of {count} accuracies are those of before, within their spreads" + (
        f"; not {', '.join(apart)}" if apart else ""
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean ± standard deviation."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def cell(values: Sequence[float]) -> str:
    """The same with three digits; nothing of no values."""
    return spread(values, 3) if values else ""


def table(content: dict[str, Any], name: str) -> str:
    """One claim's accuracies, and losses of language models: a table for each network."""
    claim = CLAIMS[name]
    tasks = [task for task in _tasks(content) if chosen(content, task, claim.subject)]
    if not tasks:
        return f"Claim: {claim.text}. Not measured yet."
    kinds: dict[str, list[str]] = {}
    for task in tasks:
        kinds.setdefault(kind_of(task), []).append(task)
    tables = (_of_kind(content, claim, kind, of_kind) for kind, of_kind in kinds.items())
    return "\n\n".join([f"Claim: {claim.text}. Test accuracy:", *tables])


def _of_kind(content: dict[str, Any], claim: Claim, kind: str, tasks: list[str]) -> str:
    """Tasks of one kind; trained parameters are those on the first that an entry has runs of."""
    columns = [(task, "test_accuracy", task) for task in tasks]
    columns += [(task, "test_loss", f"{task}, loss") for task in tasks if kind == "decoder"]
    rows = []
    for entry in claim.entries():
        found = {task: runs for task in tasks if (runs := chosen(content, task, entry))}
        if not found:
            continue
        gaps = differences(content, claim, entry)
        rows.append(
            [
                label(entry),
                f"{next(iter(found.values()))[0]['trainable']:,}",
                *(
                    spread([run[measure] for run in found[task]], 3) if task in found else "not run"
                    for task, measure, _ in columns
                ),
                "" if entry == claim.subject else spread([gap for task in found for gap in gaps[task]], 3),
            ]
        )
    titles = [title for _, _, title in columns]
    counts = "trained parameters" + ", head included" * (kind in WITH_HEAD)
    return markdown([NETWORKS[kind], counts, *titles, f"{label(claim.subject)} minus it"], rows)


def _tasks(content: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(run["task"] for run in content["runs"].values()))

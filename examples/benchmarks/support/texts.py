"""Text classification tasks that follow each other, with the classes of all of them in one head."""

import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support import demos

SPLITS = ("train", "validation", "test")
TOPIC_PAIRS = {
    "business-sports": ("business", "sports"),
    "politics-tech": ("politics", "tech"),
    "entertainment-business": ("entertainment", "business"),
}
"""Tasks made of BBC News."""

Pair = tuple[str, str]
"""A text and its label."""


@dataclass
class TextTask:
    """Rows of one task, with labels counted over the classes of all tasks.

    Attributes:
        first: Number of its first class in the common head.
        classes: Names of its classes.
        rows: Rows by split, `{"text": …, "labels": …}`.
    """

    name: str
    first: int
    classes: list[str]
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def span(self) -> slice:
        """Its rows of the common head."""
        return slice(self.first, self.first + len(self.classes))


def load(names: list[str], folder: Path | None, wanted: dict[str, int], seed: int) -> dict[str, TextTask]:
    """Tasks by name, cut to the wanted number of rows of each split.

    Rows that the training split has twice, or has in common with the test split, count once, as test rows.
    """
    tasks: dict[str, TextTask] = {}
    first = 0
    for name in names or list(TOPIC_PAIRS):
        train, test = _read(name, folder, seed)
        held_out = set(test)
        train = [pair for pair in dict.fromkeys(train) if pair not in held_out]
        classes = sorted({label for _, label in [*train, *test]})
        task = tasks[name] = TextTask(name, first, classes)
        first += len(classes)
        random.Random(seed).shuffle(train)
        end = wanted["validation"] + wanted["train"]
        parts = {"validation": train[: wanted["validation"]], "train": train[wanted["validation"] : end]}
        for split, pairs in {**parts, "test": test[: wanted["test"]]}.items():
            task.rows[split] = [{"text": t, "labels": task.first + classes.index(c)} for t, c in pairs]
    return tasks


def _read(name: str, folder: Path | None, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and test rows of a task, the latter in random order."""
    if folder is not None:
        files = (folder / f"{name}.{split}.jsonl.gz" for split in ("train", "test"))
        train, test = ([(row["text"], str(row["label"])) for row in lines(file)] for file in files)
    elif name in TOPIC_PAIRS:
        articles = demos.bbcnews_articles().items()
        rows = [(text, topic) for text, topic in articles if topic in TOPIC_PAIRS[name]]
        random.Random(seed).shuffle(rows)
        train, test = rows[len(rows) // 3 :], rows[: len(rows) // 3]
    else:
        import datasets

        data = datasets.load_dataset(name)
        train, test = ([(row["text"], str(row["label"])) for row in data[s]] for s in ("train", "test"))
    random.Random(seed + 1).shuffle(test)
    return train, test


def lines(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of a compressed file with a JSON object in each line."""
    with gzip.open(file, "rt", encoding="utf-8") as opened:
        yield from map(json.loads, opened)

"""One frozen MiniLM with a fixed head for each of several tasks, as adapters that are merged need it.

A head is fitted on the features of the pretrained encoder and stays as it is, like the text features of CLIP,
so that the pretrained encoder, adapters trained apart, and merges of them are read by the same heads.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import timing
from support import demos, texts
from support.task import DATA_SEED, Sizes

TARGETS = r"encoder\..*\.(query|key|value|dense)"
BATCH = 50

Rows = list[tuple[list[int], int]]
"""Ids of tokens, and the class."""


def parser(description: str | None, tasks: list[str], name: str) -> argparse.ArgumentParser:
    """Command line of a script that trains and merges such adapters, with files by its name."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--data", type=Path, metavar="FOLDER", required=True, help="folder with the texts")
    made.add_argument("--tasks", nargs="+", default=tasks, help="tasks to merge, in this order")
    made.add_argument("--seeds", type=int, default=1, help="trainings of each adapter")
    made.add_argument("--small", action="store_true", help="few rows and steps, to try the script")
    made.add_argument("--work", type=Path, default=Path("outputs") / name, help="adapters")
    made.add_argument("--results", type=Path, default=timing.RESULTS / f"{name}.json")
    return made


def encoder() -> nn.Module:
    """A fresh pretrained encoder, without its unused pooler."""
    folder = demos.minilm_folder()
    return AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False).eval()


def features(model: nn.Module, rows: list[list[int]]) -> Tensor:
    """Means over the tokens of each row, `(rows, width)`."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@dataclass
class HeadedTask:
    """Rows of a task by split, and its head `(classes, width + 1)`, fitted on the pretrained encoder."""

    name: str
    rows: dict[str, Rows]
    classes: int
    head: Tensor

    def logits(self, model: nn.Module, rows: Rows) -> Tensor:
        """What the head says of rows."""
        return features(model, [ids for ids, _ in rows]) @ self.head[:, :-1].T + self.head[:, -1]

    def loss(self, model: nn.Module, rows: Rows) -> Tensor:
        """Cross-entropy."""
        labels = torch.tensor([label for _, label in rows])
        return nn.functional.cross_entropy(self.logits(model, rows), labels)

    @torch.no_grad()
    def accuracy(self, model: nn.Module, split: str) -> float:
        """Part of the rows of a split that is told right; rows of one length go together."""
        rows = sorted(self.rows[split], key=lambda row: len(row[0]))
        right = 0
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            found = self.logits(model, part).argmax(1)
            right += int((found == torch.tensor([label for _, label in part])).sum())
        return right / len(rows)

    def batches(self, size: int, seed: int, split: str = "train") -> Iterator[Rows]:
        """Rows in random order, without end."""
        rng = random.Random(seed)
        while True:
            rows = list(self.rows[split])
            rng.shuffle(rows)
            yield from (rows[i : i + size] for i in range(0, len(rows) - size + 1, size))


Batch = tuple[HeadedTask, Rows]
"""A task and some of its rows."""


def rounds(tasks: list[HeadedTask], size: int, seed: int, count: int) -> list[dict[str, Batch]]:
    """Batches of all tasks, by name, as often as asked for."""
    streams = {task.name: task.batches(size, seed) for task in tasks}
    return [{task.name: (task, next(streams[task.name])) for task in tasks} for _ in range(count)]


def predict(model: nn.Module, batch: Batch) -> Tensor:
    """What a task's head says of its rows."""
    task, rows = batch
    return task.logits(model, rows)


def load(names: list[str], folder: Path, sizes: Sizes) -> list[HeadedTask]:
    """Tasks with their heads."""
    tokenizer = AutoTokenizer.from_pretrained(demos.minilm_folder())
    wanted = {split: getattr(sizes, split) for split in texts.SPLITS}
    model, tasks = encoder(), []
    for name in names:
        source = texts.load([name], folder / "text", wanted, DATA_SEED)[name]
        rows = {split: _encoded(tokenizer, source.rows[split], sizes.tokens) for split in texts.SPLITS}
        tasks.append(HeadedTask(name, rows, len(source.classes), _head(model, rows, len(source.classes))))
    return tasks


def _encoded(tokenizer: Any, rows: list[dict[str, Any]], tokens: int) -> Rows:
    ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=tokens)["input_ids"]
    return [(one, row["labels"]) for one, row in zip(ids, rows, strict=True)]


@torch.no_grad()
def _features_of(model: nn.Module, rows: Rows) -> Tensor:
    parts = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    return torch.cat([features(model, [ids for ids, _ in part]) for part in parts])


def _head(model: nn.Module, rows: dict[str, Rows], classes: int) -> Tensor:
    """Logistic regression, of the decays tried the one that is best on validation rows."""
    data = {
        s: (_features_of(model, rows[s]), torch.tensor([c for _, c in rows[s]]))
        for s in ("train", "validation")
    }
    best, chosen = -1.0, torch.empty(0)
    for decay in (1e-4, 1e-3, 1e-2):
        head = _fitted(*data["train"], classes, decay)
        x, y = data["validation"]
        score = float(((x @ head[:, :-1].T + head[:, -1]).argmax(1) == y).float().mean())
        if score > best:
            best, chosen = score, head
    return chosen


def _fitted(x: Tensor, y: Tensor, classes: int, decay: float) -> Tensor:
    head = torch.zeros(classes, x.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([head], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        with torch.enable_grad():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(x @ head[:, :-1].T + head[:, -1], y)
            loss = loss + decay * head.square().sum()
            loss.backward()
        return loss

    optimizer.step(closure)
    return head.detach()

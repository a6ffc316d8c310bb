"""Tasks that the methods are graded on: from installed packages, or from a folder with more data.

The folder holds `text/NAME.{train,test}.jsonl.gz` with rows `{"text": …, "label": …}`,
`math/gsm8k.{train,test}.jsonl.gz` with rows `{"question": …, "answer": …}`, and
`images/cifar10/{train,test}/CLASS/*.jpg`.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import interpolate
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    default_data_collator,
)

from support import demos, photos, texts
from support.task import Task

DATA_SEED = 0
POINTWISE = r".*\.(conv_1x1|expand_1x1|reduce_1x1)\.convolution"
"""MobileNetV2's dense convolutions: those in groups are beyond most of the methods."""

ENCODER = r".*\.encoder\..*\.(query|key|value|dense)"
"""MiniLM's linear layers but the pooler's: MoS shares pools among modules of one shape and place."""

DECODER = r".*\.([qkvo]_proj|(gate|up|down)_proj)"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Rows of each split, and how much of each row is kept.

    Attributes:
        tokens: Tokens of a text.
        pixels: Width and height of an image.
    """

    train: int
    validation: int
    test: int
    tokens: int = 64
    pixels: int = 64


def load(name: str, folder: Path | None, decoder: Path | None, sizes: Sizes) -> Task:
    """A task by name, cut to size.

    Args:
        name: `bbcnews` or `digits`; with a folder also `gsm8k`, `cifar10` or the name of a text file in it.
        folder: Folder with more data.
        decoder: Directory of the language model.
        sizes: Rows of each split.
    """
    if name == "digits":
        return _cut(dataclasses.replace(demos.digits(sizes.pixels), target_modules=POINTWISE), sizes)
    if name == "bbcnews":
        return _cut(dataclasses.replace(demos.bbcnews(sizes.tokens), target_modules=ENCODER), sizes)
    if folder is None:
        raise SystemExit(f"task {name!r} needs --data; without it there are {', '.join(demos.TASKS)}")
    if name == "gsm8k":
        return _math(folder, decoder, sizes)
    return _images(folder, sizes) if name == "cifar10" else _text(name, folder, sizes)


def _cut(task: Task, sizes: Sizes) -> Task:
    def part(split: str) -> list[Any]:
        rows = getattr(task, split)
        chosen = random.Random(DATA_SEED).sample(range(len(rows)), min(getattr(sizes, split), len(rows)))
        return [rows[i] for i in chosen]

    return dataclasses.replace(task, train=part("train"), validation=part("validation"), test=part("test"))


def _text(name: str, folder: Path, sizes: Sizes) -> Task:
    """MiniLM on text classification, its linear layers adapted."""
    wanted = {split: getattr(sizes, split) for split in texts.SPLITS}
    source = texts.load([name], folder / "text", wanted, DATA_SEED)[name]
    tokenizer = AutoTokenizer.from_pretrained(demos.minilm_folder())

    def encoded(split: str) -> list[dict[str, Any]]:
        return [
            {**tokenizer(row["text"], truncation=True, max_length=sizes.tokens), "labels": row["labels"]}
            for row in source.rows[split]
        ]

    return Task(
        f"MiniLM on {name}",
        lambda: AutoModelForSequenceClassification.from_pretrained(
            demos.minilm_folder(),
            num_labels=len(source.classes),
            dtype=torch.float32,  # whatever the file has: half precision would not train
        ),
        train=encoded("train"),
        validation=encoded("validation"),
        test=encoded("test"),
        collate=DataCollatorWithPadding(tokenizer),
        peft_task_type="SEQ_CLS",
        new_modules=["classifier"],
        target_modules=ENCODER,
    )


def _images(folder: Path, sizes: Sizes) -> Task:
    """MobileNetV2 on CIFAR-10, its dense convolutions adapted."""
    splits: dict[str, list[tuple[Path, int]]] = {}
    root = folder / "images" / "cifar10"
    classes = sorted(path.name for path in (root / "train").iterdir())
    for split in ("train", "test"):
        files = [(file, classes.index(file.parent.name)) for file in photos.found(root / split)]
        random.Random(DATA_SEED).shuffle(files)
        splits[split] = files
    end = sizes.validation + sizes.train
    validation, train = splits["train"][: sizes.validation], splits["train"][sizes.validation : end]
    return Task(
        "MobileNetV2 on CIFAR-10",
        lambda: demos.mobilenet_v2(num_labels=len(classes)),
        train=_pixels(train, sizes.pixels),
        validation=_pixels(validation, sizes.pixels),
        test=_pixels(splits["test"][: sizes.test], sizes.pixels),
        collate=default_data_collator,
        new_modules=["classifier"],
        target_modules=POINTWISE,
    )


def _pixels(files: Sequence[tuple[Path, int]], pixels: int) -> list[dict[str, Any]]:
    mean = torch.tensor(demos.IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(demos.IMAGENET_STD).view(3, 1, 1)
    rows = []
    for file, label in files:
        small = photos.stacked([photos.opened(file)]).float() / 255
        (image,) = interpolate(small, size=(pixels, pixels), mode="bilinear")
        rows.append({"pixel_values": (image - mean) / std, "labels": label})
    return rows


def _math(folder: Path, decoder: Path | None, sizes: Sizes) -> Task:
    """A decoder on worked answers to word problems; the loss counts the answers only."""
    if decoder is None:
        raise SystemExit("task 'gsm8k' needs --decoder, the directory of a language model")
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def encoded(row: dict[str, str]) -> dict[str, list[int]]:
        question = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        answer = tokenizer(f" {row['answer']}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
        ids, labels = question + answer, [-100] * len(question) + answer
        return {"input_ids": ids[: sizes.tokens], "labels": labels[: sizes.tokens]}

    source = {s: list(texts.lines(folder / "math" / f"gsm8k.{s}.jsonl.gz")) for s in ("train", "test")}
    # rows without room for an answer would train nothing
    rows = {s: [r for r in map(encoded, found) if max(r["labels"]) >= 0] for s, found in source.items()}
    make_base: Callable[[], Any] = lambda: AutoModelForCausalLM.from_pretrained(  # noqa: E731
        decoder, dtype=torch.float32
    )
    whole = Task(
        "SmolLM2 on GSM8K",
        make_base,
        rows["train"][sizes.validation :],
        rows["train"][: sizes.validation],
        rows["test"],
        collate=DataCollatorForSeq2Seq(tokenizer),
        peft_task_type="CAUSAL_LM",
        target_modules=DECODER,
        measure="perplexity",
    )
    return _cut(whole, sizes)

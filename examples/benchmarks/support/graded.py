"""Tasks that the methods are graded on: from installed packages, or from a folder with more data.

The folder holds `text/NAME.{train,test}.jsonl.gz` with rows `{"text": …, "label": …}`, and what
`support/language.py` and `support/pictures.py` name.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
)

from support import demos, language, pictures, texts
from support.task import DATA_SEED, Sizes, Task, cut

ENCODER = r".*\.encoder\..*\.(query|key|value|dense)"
"""MiniLM's linear layers but the pooler's: MoS shares pools among modules of one shape and place."""


def load(name: str, folder: Path | None, decoder: Path | None, sizes: Sizes) -> Task:
    """A task by name, cut to size.

    Args:
        name: `bbcnews` or one of `pictures.DIGITS`; with a folder also the other tasks of `pictures`, those
            of `language`, or the name of a text file in it.
        folder: Folder with more data.
        decoder: Directory of the language model.
        sizes: Rows of each split.
    """
    if name in pictures.DIGITS:
        network = pictures.DIGITS[name]
        digits = dataclasses.replace(
            demos.digits(sizes.pixels),
            make_base=lambda: network.make(sizes.pixels, 10),
            target_modules=network.target_modules,
        )
        return cut(digits, sizes)
    if name == "bbcnews":
        return cut(dataclasses.replace(demos.bbcnews(sizes.tokens), target_modules=ENCODER), sizes)
    if folder is None:
        without = ", ".join(("bbcnews", *pictures.DIGITS))
        raise SystemExit(f"task {name!r} needs --data; without it there are {without}")
    if name in language.TASKS:
        if decoder is None:
            raise SystemExit(f"task {name!r} needs --decoder, the directory of a language model")
        return language.TASKS[name](folder, decoder, sizes)
    if name in pictures.NETWORKS:
        return pictures.cifar10(name, folder, sizes)
    return _text(name, folder, sizes)


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

"""The description of a task that every run of `finetune.py` starts from."""

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

DATA_SEED = 0

Rows = Any
"""A dataset with a length and integer indices: a list of dictionaries, or one of the `datasets` library."""


class Choice(NamedTuple):
    """A question to a language model: rows that differ in their answers, and which of them is right."""

    candidates: list[dict[str, Any]]
    right: int


@dataclass
class Task:
    """A base model, its data and how they fit together."""

    name: str
    make_base: Callable[[], PreTrainedModel]
    """Gives a fresh base model; only the new head differs from call to call."""
    train: Rows
    validation: Rows
    test: Rows
    collate: Callable[[list], dict[str, torch.Tensor]]
    peft_task_type: str | None = None
    """PEFT's `task_type`."""
    new_modules: list[str] = field(default_factory=list)
    """Modules that the checkpoint lacks, such as the head: trained in full and stored with the adapter."""
    target_modules: str | None = None
    """Regex of the modules to adapt; None adapts all linear and convolution layers but the new modules."""
    embed: Callable[[PreTrainedModel, dict[str, torch.Tensor]], torch.Tensor] | None = None
    """Frozen features of a batch for the linear probe; None means that there is no probe."""
    choices: list[Choice] = field(default_factory=list)
    """What a language model's accuracy is tested with, where it is not that of its tokens."""
    measure: str = "accuracy"
    """What is reported: "accuracy", or "perplexity" of a language model."""
    processor: Any = None
    """Tokenizer or image processor, saved beside the adapter."""


@dataclass(frozen=True)
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


def cut(task: Task, sizes: Sizes) -> Task:
    """The task with rows of each split, chosen at random and always the same."""

    def part(rows: Any, wanted: int) -> list[Any]:
        chosen = random.Random(DATA_SEED).sample(range(len(rows)), min(wanted, len(rows)))
        return [rows[i] for i in chosen]

    return dataclasses.replace(
        task,
        train=part(task.train, sizes.train),
        validation=part(task.validation, sizes.validation),
        test=part(task.test, sizes.test),
        choices=part(task.choices, sizes.test),
    )

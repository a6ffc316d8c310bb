"""The description of a task that every run of `finetune.py` starts from."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

Rows = Any
"""A dataset with a length and integer indices: a list of dictionaries, or one of the `datasets` library."""


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
    measure: str = "accuracy"
    """What is reported: "accuracy", or "perplexity" of a language model."""
    processor: Any = None
    """Tokenizer or image processor, saved beside the adapter."""

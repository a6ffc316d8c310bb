"""The batches of a Trainer's first steps, with the loss and the weights that the Trainer gives them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_subspace.initialization.batches import Batches, read_batches, sum_over_processes
from peft_subspace.runtime import distributed as processes


class TrainerBatches(Batches):
    """Batches whose weighted gradients are those of a Trainer's optimizer steps, averaged over the steps.

    An item is a batch, the number of items (labels) in all batches of its step, and the number of these
    batches: the Trainer divides by one or the other.

    Args:
        trainer: The Trainer.
        dataloader: Its training batches.
        num_batches: Batches to read.
        device: Device on which processes exchange tensors.
    """

    def __init__(
        self, trainer: Any, dataloader: Iterable[Any], num_batches: int, device: torch.device
    ) -> None:
        self.trainer = trainer
        count = trainer.args.gradient_accumulation_steps
        with processes.raise_in_all_processes(device, "reading the batches"):
            read = read_batches(dataloader, num_batches)
        steps = [read[start : start + count] for start in range(0, len(read), count)]
        items: list[Any] = []
        for step in steps:
            batches, labels = trainer.get_batch_samples(iter(step), len(step), device)
            items += [(batch, labels, len(batches)) for batch in batches]
        super().__init__(items, [1.0] * len(items), sum_over_processes([len(steps)], device))

    def loss(self, model: nn.Module, item: Any) -> Tensor:
        """Loss of one batch as the Trainer divides it."""
        batch, labels, count = item
        given = dict(batch) if isinstance(batch, Mapping) else batch  # some losses take entries out
        trainer = self.trainer
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, given, num_items_in_batch=labels)
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            by_labels = trainer.model_accepts_loss_kwargs and labels is not None
            scaled = by_labels or trainer.compute_loss_func is not None
        return loss if scaled else loss / count

"""Passes over batches in which some layers are watched, after which model and generators are as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from peft_subspace.initialization.evaluating import device_of, evaluating
from peft_subspace.runtime.progress import progress as shown

Hook = Callable[[nn.Module, tuple, Tensor], Any]
"""A forward hook."""


class Padding:
    """Which positions of the batch that is running are padding, as its `attention_mask` has it."""

    def __init__(self) -> None:
        self._mask: Tensor | None = None

    def start(self, batch: Any) -> None:
        """Note the mask of the next batch."""
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        self._mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def without(self, values: Tensor, *, last: bool = True) -> Tensor:
        """Values at the positions that are no padding, in one axis; all where no mask fits them.

        Args:
            values: `(batch, length, …)`, or `(batch · length, …)` as some layers get them.
            last: Whether the last axis is one of features.
        """
        mask = self._mask
        if mask is None:
            return values
        positions = values.shape[:-1] if last else values.shape
        if positions == mask.shape:
            return values[mask.to(values.device)]
        flat = tuple(positions) == (mask.numel(),) and mask.shape[1] > 1
        return values[mask.flatten().to(values.device)] if flat else values


def forward(model: nn.Module, batch: Any) -> Any:
    """Run the model on a batch of keyword arguments, or on its only one."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def run(
    model: nn.Module,
    batches: Sequence[Any],
    hooks: Iterable[tuple[nn.Module, Hook]],
    padding: Padding,
    step: Callable[[nn.Module, Any], Any] = forward,
    *,
    gradients: bool = False,
    description: str = "gathering statistics",
    hidden: bool = False,
) -> None:
    """Run the model in evaluation mode, with its active adapters, on all batches.

    Args:
        model: The model.
        batches: What `step` takes.
        hooks: Layers and their forward hooks, which are there during the passes only.
        padding: Told of each batch before it runs.
        step: Function of model and batch.
        gradients: Whether gradients are recorded.
        description: What a progress bar says.
        hidden: Whether there is none.
    """
    device = device_of(model)
    handles = [layer.register_forward_hook(hook) for layer, hook in hooks]
    try:
        with evaluating(model, [], ""), torch.set_grad_enabled(gradients):
            for batch in shown(batches, len(batches), description, hidden=hidden):
                batch = send_to_device(batch, device)
                padding.start(batch)
                step(model, batch)
    finally:
        for handle in handles:
            handle.remove()

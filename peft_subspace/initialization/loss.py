"""Losses whose gradients are taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

LossFunction = Callable[[nn.Module, Any], Tensor]
"""Function of model and batch that returns the mean loss of the batch's samples."""


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Loss that a model returns for a batch with labels.

    Raises:
        ValueError: If it returns none.
    """
    outputs = model(**batch) if isinstance(batch, Mapping) else model(batch)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is None:
        raise ValueError(
            "the model returned no loss for the batch; give batches with labels, or a loss_fn(model, batch)"
        )
    return loss


def check_loss(loss: Any, number: int | str) -> None:
    """Raise unless the loss of batch `number` is one finite number with a gradient.

    Raises:
        TypeError: If it is no tensor with one entry.
        ValueError: If it has no gradient, or is not finite.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError("loss_fn must return a tensor with one entry, the mean loss of the batch's samples")
    if not loss.requires_grad:
        raise ValueError(
            f"the loss of batch {number} has no gradient: no adapted module takes part in it, or loss_fn "
            "detaches it"
        )
    if not torch.isfinite(loss):
        raise ValueError(f"the loss of batch {number} is {loss.item()}; look for broken samples")

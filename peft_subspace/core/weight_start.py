"""Adapters started from the base weights, each distinct weight once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .config import SubspaceConfig
from .delta import Delta

if TYPE_CHECKING:
    from .layer import SubspaceLayer


DELAY = 2.0
"""Seconds after which a start shows its progress."""


class WeightStarts:
    """Starts of one adapter's deltas, with a progress bar if they take more than two seconds.

    Args:
        total: Number of starts to come.
    """

    def __init__(self, total: int = 0) -> None:
        self.bar = tqdm(total=total, desc="decomposing weights", delay=DELAY, disable=total < 2)
        self._known: dict[Any, tuple[Delta, Tensor]] = {}

    def start(self, delta: Delta, layer: SubspaceLayer, config: SubspaceConfig) -> bool:
        """Initialise a delta from the weight of its base layer, or as a delta of a tied weight was.

        A default start that can do without the weight does so where it cannot be read. Weights on the meta
        device leave the delta as it is, and False is returned.

        Raises:
            ValueError: If the weight is needed and cannot be read, or cannot be started from.
        """
        try:
            weight = layer.get_base_weight()
        except NotImplementedError as error:
            if not delta.needs_weight and config.init_weights is True:
                return True
            raise ValueError(_unreadable(layer)) from error
        self.bar.update()
        if weight.is_meta:
            return False
        stored = layer.get_base_layer().weight  # kept, so that no other weight takes its address
        key = (stored.data_ptr(), stored.stride(), layer.ops.shape, str(delta.rank))
        if key in self._known:
            delta.copy_frozen(self._known[key][0])
        else:
            delta.reset_from_weight(layer.ops.to_layout(weight).float())
            self._known[key] = (delta, stored)
        return True

    def close(self) -> None:
        """Finish the progress bar, and forget the weights."""
        self.bar.close()
        self._known.clear()


def check_weight(base: nn.Module) -> None:
    """Raise unless a start from the weight of an unquantised layer is possible.

    Raises:
        ValueError: If the weight is zero or not finite.
    """
    weight = base.weight.detach()
    if weight.is_meta:
        return
    if not torch.isfinite(weight).all():
        raise ValueError("the weight has NaN or infinite values; load a sound checkpoint, or exclude it")
    if not weight.any():
        raise ValueError(
            "the weight is zero, which has no singular vectors; load a checkpoint, or exclude it"
        )


def _unreadable(layer: SubspaceLayer) -> str:
    name = type(layer.get_base_layer()).__name__
    return (
        f"the weight of {name} cannot be read, and this start is computed from it; exclude the module, or "
        "load the base model unquantised or quantised otherwise"
    )

"""Adapters initialized from the base weights, each distinct weight once."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peft_subspace.base_weights.quantization import unreadable
from peft_subspace.core.delta import Update
from peft_subspace.runtime.progress import bar
from peft_subspace.tuner.config import SubspaceConfig


class WeightStarts:
    """Initializations of one adapter's updates, with a progress bar if they take more than two seconds.

    Args:
        total: Number of initializations to come.
    """

    def __init__(self, total: int = 0) -> None:
        self.bar = bar(total, "decomposing weights")
        self._known: dict[Any, tuple[Update, Tensor]] = {}

    def start(self, delta: Update, layer: Any, config: SubspaceConfig) -> bool:
        """Initialize an update from the weight of its base layer, or as that of a tied weight was.

        A default initialization that can do without the weight does so where it cannot be read. Weights on
        the meta device leave the update as it is, and False is returned.

        Raises:
            ValueError: If the weight is needed and cannot be read, or cannot be started from.
        """
        with layer.base_weight.whole():
            try:
                weight = layer.get_base_weight()
            except NotImplementedError as error:
                if delta.can_do_without_weight(config):
                    return True
                raise ValueError(unreadable(layer.get_base_layer())) from error
            return self._start_from(weight, delta, layer, config)

    def _start_from(self, weight: Tensor, delta: Update, layer: Any, config: SubspaceConfig) -> bool:
        self.bar.update()
        if weight.is_meta:
            return False
        lower = [name for name in config.lower_adapters if name in layer.deltas]
        stored = layer.base_weight.stored  # kept, so that no other weight takes its address
        # Gathered weights have an address for a while only; offloaded ones, and those made of others, none.
        where = getattr(stored, "ds_id", stored.data_ptr() or id(stored))
        key = (where, stored.stride(), delta.spec.unnamed())
        if lower:
            delta.reset_from_weight(layer.with_updates(weight, lower))
        elif key in self._known:
            delta.copy_frozen(self._known[key][0])
        else:
            delta.reset_from_weight(layer.with_updates(weight, ()))
            self._known[key] = (delta, stored)
        return True

    def close(self) -> None:
        """Finish the progress bar, and forget the weights."""
        self.bar.close()
        self._known.clear()

"""Adapters started from the base weights, each distinct weight once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from peft_subspace.base_weights.quantization import unreadable
from peft_subspace.base_weights.weight import whole_weight
from peft_subspace.core.delta import Delta
from peft_subspace.runtime.progress import bar
from peft_subspace.tuner.config import SubspaceConfig

if TYPE_CHECKING:
    from peft_subspace.tuner.layer import SubspaceLayer


class WeightStarts:
    """Starts of one adapter's deltas, with a progress bar if they take more than two seconds.

    Args:
        total: Number of starts to come.
    """

    def __init__(self, total: int = 0) -> None:
        self.bar = bar(total, "decomposing weights")
        self._known: dict[Any, tuple[Delta, Tensor]] = {}

    def start(self, delta: Delta, layer: SubspaceLayer, config: SubspaceConfig) -> bool:
        """Initialise a delta from the weight of its base layer, or as a delta of a tied weight was.

        A default start that can do without the weight does so where it cannot be read. Weights on the meta
        device leave the delta as it is, and False is returned.

        Raises:
            ValueError: If the weight is needed and cannot be read, or cannot be started from.
        """
        with whole_weight(layer.get_base_layer()):
            try:
                weight = layer.get_base_weight()
            except NotImplementedError as error:
                if delta.can_do_without_weight(config):
                    return True
                raise ValueError(unreadable(layer.get_base_layer())) from error
            return self._start_from(weight, delta, layer, config)

    def _start_from(self, weight: Tensor, delta: Delta, layer: SubspaceLayer, config: SubspaceConfig) -> bool:
        self.bar.update()
        if weight.is_meta:
            return False
        beneath = layer.beneath(config)
        stored = layer.base_parameter  # kept, so that no other weight takes its address
        # Gathered weights have an address for a while only; offloaded ones, and those made of others, none.
        where = getattr(stored, "ds_id", stored.data_ptr() or id(stored))
        key = (where, stored.stride(), layer.ops.shape, str(delta.rank))
        if beneath:
            delta.reset_from_weight(layer.with_updates(weight, beneath))
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

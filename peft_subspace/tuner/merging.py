"""Updates summed into the base weight of a tuner layer, and taken out again bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge

from peft_subspace.core.modes import lasting
from peft_subspace.runtime.engines import check_whole
from peft_subspace.runtime.progress import count_step


@lasting()
def merge(layer: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """Add `ΔW` of the given (default: all active) adapters to the base weight; see `SubspaceLayer.merge`."""
    names = [name for name in check_adapters_to_merge(layer, adapter_names) if name in layer.deltas]
    if not names:
        return
    layer.check_merge()
    check_whole(layer.base_weight.stored, "merging")
    if safe_merge:
        check_finite(layer, names)
    layer.base_weight.restore()
    weight = layer.get_base_weight()
    updates = (layer.exact_update(name) for name in [*layer.merged_adapters, *names])
    total = sum(updates, start=weight.float())
    try:
        layer.base_weight.write(total.to(weight.dtype))
    except Exception:
        unmerge(layer)
        raise
    layer.merged_adapters.extend(names)
    count_step()


@lasting()
def unmerge(layer: Any) -> None:
    """Put the base weight back, bit for bit."""
    layer.base_weight.restore()
    layer.base_weight.forget()
    layer.merged_adapters.clear()


def merge_permanently(layer: Any, adapter_name: str) -> None:
    """Add an adapter's update to the base weight for good, summed in fp32."""
    merge(layer, adapter_names=[adapter_name])
    layer.base_weight.forget()
    layer.merged_adapters.clear()


def check_finite(layer: Any, names: Iterable[str]) -> None:
    """Raise unless the updates of some adapters are finite.

    Raises:
        ValueError: In the words of PEFT.
    """
    for name in names:
        if not torch.isfinite(layer.exact_update(name)).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")

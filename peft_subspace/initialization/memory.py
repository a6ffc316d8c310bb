"""Memory that sums of gradients need, and groups of layers that fit into it together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from peft_subspace.core.validation import invalid
from peft_subspace.tuner.layer import SubspaceLayer


def groups_within(
    max_memory: int, layers: Mapping[str, SubspaceLayer], adapter_name: str, input_bytes: Mapping[str, int]
) -> list[list[str]]:
    """Split layers into consecutive groups whose sums and inputs fit into memory together.

    The new adapter tensors, and what an SVD needs, are set aside first.

    Args:
        max_memory: Most bytes to use.
        layers: The layers, by module name.
        adapter_name: Adapter that gets new tensors.
        input_bytes: Bytes of the inputs that are kept for a layer's gradient.

    Raises:
        ValueError: If the memory is too little for one of the layers.
    """
    sums = {name: 4 * prod(layer.kind.shape.dims) for name, layer in layers.items()}
    results = sum(_state_bytes(layer.deltas[adapter_name]) for layer in layers.values())
    aside = results + max(sums[name] + 2 * input_bytes.get(name, 0) for name in sums)
    needed = {name: sums[name] + input_bytes.get(name, 0) for name in sums}
    largest = max(needed, key=lambda name: needed[name])
    if aside + needed[largest] > max_memory:
        raise invalid(
            "max_memory", max_memory, f"bytes are too few for {largest!r}; give {aside + needed[largest]}"
        )
    groups: list[list[str]] = [[]]
    used = aside
    for name, size in needed.items():
        if used + size > max_memory:
            groups.append([])
            used = aside
        groups[-1].append(name)
        used += size
    return groups


@torch.no_grad()
def measured_input_bytes(layers: Mapping[str, SubspaceLayer], run: Callable[[], Any]) -> dict[str, int]:
    """Bytes of each layer's inputs in one forward pass, which are kept until its gradient is taken.

    Layers that are called with one tensor in turn, such as the projections of an attention, share it.

    Args:
        layers: The layers, by module name.
        run: Function that runs the forward pass.
    """
    kept: dict[str, int] = {}
    last: list[Tensor | None] = [None]

    def watch(name: str, x: Tensor) -> None:
        if x is not last[0]:
            kept[name] = kept.get(name, 0) + x.nbytes
        last[0] = x

    handles = [
        layer.get_base_layer().register_forward_pre_hook(lambda _, args, name=name: watch(name, args[0]))
        for name, layer in layers.items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return kept


def batch_numel(batch: Any) -> int:
    """Number of entries of all tensors of a batch."""
    if isinstance(batch, Tensor):
        return batch.numel()
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return sum(batch_numel(part) for part in parts)


def _state_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())

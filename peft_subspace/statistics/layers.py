"""Which layers are watched, and sums that are still empty, as wide as memory allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from peft import LoraConfig
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from peft_subspace.core.names import in_base
from peft_subspace.core.validation import invalid
from peft_subspace.statistics.moment import SecondMoment
from peft_subspace.statistics.record import GRADIENTS, INPUTS, OUTPUT_GRADIENTS, Statistics
from peft_subspace.tuner.layer import SubspaceLayer
from peft_subspace.tuner.target import Target
from peft_subspace.tuner.targets import analyze_targets, include_all_linear_layers

_LEAST_WIDTH = 8

Watched = SubspaceLayer | Target
"""A layer with adapters, or a target without."""


def watched_layers(model: nn.Module, target_modules: list[str] | str | None) -> dict[str, Watched]:
    """Layers by their names in the base model.

    Raises:
        TypeError: If a layer was named that multiplies no rows of inputs.
        ValueError: If there are none.
    """
    found: dict[str, Watched] = {}
    if target_modules is None:
        adapted = [(n, m) for n, m in model.named_modules() if isinstance(m, SubspaceLayer)]
        found = {in_base(name): layer for name, layer in adapted if _has_rows(layer)}
    if found:
        return found
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config: Any = LoraConfig(target_modules=target_modules or INCLUDE_LINEAR_LAYERS_SHORTHAND)
    include_all_linear_layers(config, base)
    for name, target in analyze_targets(base, config):
        if _has_rows(target):
            found[name] = target
        elif target_modules is not None:
            raise TypeError(
                f"{name}: {type(target.module).__name__} has no rows of inputs that could be gathered; "
                "leave it out of target_modules"
            )
    if not found:
        raise ValueError(f"target_modules={target_modules!r} match no layer of {type(base).__name__}")
    return found


def _has_rows(layer: Watched) -> bool:
    # a layer with a forward of its own alone knows what it makes of its input
    return layer.kind.has_rows and not layer.kind.has_custom_forward


def empty_sums(
    layers: Mapping[str, Watched],
    inputs: bool | str,
    gradients: bool,
    max_memory: int | str | None,
    device: torch.device | str,
) -> Statistics:
    """Moments of no rows, as wide as memory allows."""
    sizes = {
        INPUTS: {name: layer.kind.shape.columns for name, layer in layers.items() if inputs},
        OUTPUT_GRADIENTS: {
            name: layer.kind.shape.out_features for name, layer in layers.items() if gradients
        },
    }
    sizes[GRADIENTS] = sizes[OUTPUT_GRADIENTS]
    whole = [
        size for kind, of in sizes.items() for size in of.values() if (kind, inputs) != (INPUTS, "norms")
    ]
    limit = None if max_memory is None else _width_within(convert_file_size_to_int(max_memory), whole)
    sums = Statistics()
    for kind, of in sizes.items():
        for name, size in of.items():
            width = None if limit is None or size <= 2 * limit else limit
            width = 0 if (kind, inputs) == (INPUTS, "norms") else width
            getattr(sums, kind)[name] = SecondMoment.empty(size, width, device)
    return sums


def _width_within(max_memory: int, sizes: list[int]) -> int | None:
    """Largest width of sketches for which sums of these sizes fit into memory; None if all fit whole.

    Raises:
        ValueError: If even narrow ones do not fit.
    """

    def needed(width: int) -> int:
        return sum(4 * size * min(size, 2 * width) for size in sizes)

    width = max(sizes, default=0)
    if needed(width) <= max_memory:
        return None
    low = _LEAST_WIDTH
    if needed(low) > max_memory:
        raise invalid(
            "max_memory", max_memory, f"bytes are too few; give at least {needed(low)}, or fewer layers"
        )
    while width - low > 1:
        middle = (low + width) // 2
        low, width = (middle, width) if needed(middle) <= max_memory else (low, middle)
    return low

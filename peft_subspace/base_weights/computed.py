"""Weights that a module makes of other tensors: weight norm, spectral norm, pruning, any parametrization.

Such a weight is written through its right inverse: the tensors that it is made of get values that make the
wanted weight. Where there are none, or where they make another weight, nothing can be written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

_STEPS = 100
"""Relative error, in steps of its dtype, up to which a weight is taken for the wanted one."""


@dataclass
class ComputedWeight:
    """A weight that is made of other tensors.

    Attributes:
        made_by: What makes it, for messages.
        sources: The tensors that it is made of.
        make: Makes the weight of values for them.
        invert: Returns values for them that make a weight; raises where it cannot.
    """

    made_by: str
    sources: list[Tensor]
    make: Callable[..., Tensor]
    invert: Callable[[Tensor], tuple[Tensor, ...]]

    @torch.no_grad()
    def values_for(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Values of the sources that make `weight`.

        Raises:
            TypeError: If there are none.
        """
        try:
            values = self.invert(weight)
            error = (self.make(*values) - weight).float().norm()
            if error <= _STEPS * torch.finfo(weight.dtype).eps * weight.float().norm():
                return values
        except (AttributeError, NotImplementedError, RuntimeError, ValueError):
            pass  # parametrizations say so in many ways
        raise TypeError(
            f"its weight is made by {self.made_by}, and nothing that goes in makes W + ΔW, so that adapters "
            "cannot be merged into it; serve the adapter unmerged, or make the weight permanent before it is "
            "adapted (torch.nn.utils.parametrize.remove_parametrizations, prune.remove, remove_spectral_norm)"
        )


def computed_weight(module: nn.Module, name: str) -> ComputedWeight | None:
    """How a module makes a weight; None for a parameter of its own."""
    if name in module._parameters:
        return None
    if parametrize.is_parametrized(module, name):
        return _parametrized(getattr(module.parametrizations, name))
    return _hooked(module, name) if isinstance(vars(module).get(name), Tensor) else None


def _parametrized(steps: Any) -> ComputedWeight:
    names = ["original"] if steps.is_tensor else [f"original{i}" for i in range(steps.ntensors)]
    # A copy, for in training some change what they keep, and some do so when they are inverted.
    still, tried = copy.deepcopy(steps).eval(), copy.deepcopy(steps).eval()

    def make(*values: Tensor) -> Tensor:
        weight = still[0](*values)
        for step in list(still)[1:]:
            weight = step(weight)
        return weight

    def invert(weight: Tensor) -> tuple[Tensor, ...]:
        value: Any = weight
        for step in reversed(list(tried)):
            value = step.right_inverse(value)
        return (value,) if isinstance(value, Tensor) else tuple(value)

    made_by = ", ".join(type(step).__name__.lstrip("_") for step in steps)
    return ComputedWeight(made_by, [getattr(steps, name) for name in names], make, invert)


def _hooked(module: nn.Module, name: str) -> ComputedWeight:
    """Weight that the older functions of `torch.nn.utils` compute before each call of the module."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if _computes(hook) == name]
    norms = [hook for hook in hooks if isinstance(hook, WeightNorm)]
    if norms:
        axis = norms[0].dim
        return ComputedWeight(
            "weight_norm",
            [getattr(module, f"{name}_g"), getattr(module, f"{name}_v")],
            lambda length, direction: torch._weight_norm(direction, length, axis),
            lambda weight: (torch.norm_except_dim(weight, 2, axis), weight),
        )

    def nothing(*values: Tensor) -> Any:
        raise NotImplementedError

    made_by = ", ".join(type(hook).__name__ for hook in hooks) or "its module"
    return ComputedWeight(made_by, [], nothing, nothing)


def _computes(hook: Any) -> str | None:
    """Name of the tensor that a hook of `torch.nn.utils` computes."""
    return getattr(hook, "name", None) or getattr(hook, "_tensor_name", None)

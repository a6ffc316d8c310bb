"""What stands in place of a layer: a chain of factors, or the layer itself with an updated weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from peft_subspace.core.chain import multiply
from peft_subspace.core.shapes import WeightShape


@dataclass
class Branch:
    """One active adapter at work: its chain, scaled, and the dropout on its input (or None)."""

    factors: tuple[Tensor, ...]
    dropout: nn.Module | None = None

    @classmethod
    def scaled(cls, factors: tuple[Tensor, ...], scaling: float, dropout: nn.Module | None) -> Branch:
        """Scale the chain by its smallest factor, the cheapest place to do it."""
        if scaling != 1:
            sizes = [factor.numel() for factor in factors]
            small = sizes.index(min(sizes))
            factors = (*factors[:small], factors[small] * scaling, *factors[small + 1 :])
        return cls(factors, dropout)

    def drop(self, x: Tensor) -> Tensor:
        """Input of the branch."""
        return x if self.dropout is None else self.dropout(x)

    @property
    def drops(self) -> bool:
        """Whether dropout is at work now."""
        return self.dropout is not None and self.dropout.training


class LayerKind:
    """A chain in place of one kind of layer.

    Attributes:
        shape: Shape of the weight as the methods see it.
        linear: Whether `ΔW` is a matrix that acts on the last axis of the input.
        dropout_cls: Dropout that suits the branch's input, None where nothing can be dropped.
        has_custom_forward: Whether the layer has a forward of its own. Only the layer itself then knows what an
            updated weight does (it pads by the size of its input, standardises the weight, …), so it is
            called with one.
    """

    linear = False
    dropout_cls: type[nn.Module] | None = nn.Dropout

    def __init__(self, shape: WeightShape, *, has_custom_forward: bool = False) -> None:
        self.shape = shape
        self.has_custom_forward = has_custom_forward

    def to_layout(self, delta: Tensor) -> Tensor:
        """Rearrange `ΔW`, `(out, in, *kernel)`, as the layer stores its weight (or back)."""
        return delta

    def from_layout(self, weight):
        return self.to_layout(weight)

    def forward(self, base, branches, x, args, kwargs, *, whole, cast):
        if whole:
            result = self.merged_forward(base, branches, x, *args, **kwargs)
            if result is not None:
                return result
        result = base(x, *args, **kwargs)
        inner = base
        while hasattr(inner, "base_layer"):
            inner = inner.base_layer
        for branch in branches:
            result = self.add(result, inner, branch, cast(x, branch.factors[-1].dtype))
        return result

    def add_branch(self, result, base, branch, x):
        return self.add(result, base, branch, x)

    def add(self, result: Tensor, base: nn.Module, branch: Branch, x: Tensor) -> Tensor:
        """Return the layer's `result` plus what the branch makes of its input `x`."""
        raise NotImplementedError

    def merged_forward(
        self, base: nn.Module, branches: Sequence[Branch], x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor | None:
        """Run the layer once with `W + ΔW`, or return None to ask for separate branches."""
        if self.has_custom_forward and not any(branch.drops for branch in branches):
            return _call_updated(base, self, branches, x, *args, **kwargs)
        return None

    def _add_by_calling(self, result: Tensor, base: nn.Module, branch: Branch, x: Tensor) -> Tensor:
        x = branch.drop(x)
        x = x.to(base.weight.dtype) if x.is_floating_point() else x
        return (result + (_call_updated(base, self, [branch], x) - base(x))).to(result.dtype)

    def add_weight_gradient(self, total: Tensor, base: nn.Module, x: Tensor, grad_output: Tensor) -> None:
        """Add the gradient of the layer's weight to `total`, `(out, in, *kernel)` in fp32.

        It is made of the layer's input and the gradient of its output, and the weight need not be readable;
        only layers that do more than their kind are called once more, and differentiated.
        """
        if not self.has_custom_forward:
            return self._add_outer_products(total, base, x, grad_output)
        weight = base.weight.detach().requires_grad_()
        with torch.enable_grad():
            x = x.to(weight.dtype) if x.is_floating_point() else x
            y = functional_call(base, {"weight": weight}, (x,))
        (gradient,) = torch.autograd.grad(y, weight, grad_output.to(y.dtype))
        total.add_(self.to_layout(gradient))
        return None

    def _add_outer_products(self, total: Tensor, base: nn.Module, x: Tensor, grad_output: Tensor) -> None:
        raise NotImplementedError


def _has_hooks(base: nn.Module) -> bool:
    """Whether calling the layer does more than its forward: hooks, or a forward replaced by accelerate."""
    return bool(base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base))


def _sums_exactly(base: nn.Module, branches: Sequence[Branch], x: Tensor) -> bool:
    """Whether `W + ΔW` loses nothing: in less than fp32 the sum would round `ΔW` to the steps of `W`."""
    dtypes = {x.dtype, base.weight.dtype, *(factor.dtype for branch in branches for factor in branch.factors)}
    return dtypes <= {torch.float32} or dtypes <= {torch.float64}


def updated_weight(weight: Tensor, ops: LayerKind, branches: Sequence[Branch]) -> Tensor:
    """`W + ΔW` of some branches, laid out as the layer stores `W`, in its dtype."""
    dtype = weight.dtype
    if weight.is_meta and not branches[0].factors[0].is_meta:
        raise RuntimeError(
            "the weight is offloaded, and the adapter of this layer needs it in memory; give its module a "
            "device in device_map, or merge the adapter first"
        )
    for branch in branches:
        # Flat, for an axis of size one can have strides that convolutions take for another memory format.
        delta = ops.to_layout(multiply(branch.factors)).reshape(-1)
        weight = weight + delta.view(weight.shape)
    return weight.to(dtype)


def _call_updated(
    base: nn.Module, ops: LayerKind, branches: Sequence[Branch], x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    weight = updated_weight(base.weight, ops, branches)
    return functional_call(base, {"weight": weight}, (x, *args), kwargs)

"""What stands in place of a layer: the layer itself, with branches beside it or with an updated weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from peft_subspace.core.chain import multiply
from peft_subspace.core.modes import must_be_plain
from peft_subspace.core.shapes import WeightShape
from peft_subspace.layers.calls import call_with, has_hooks, innermost, outputs_in, plus_change
from peft_subspace.layers.costs import Route
from peft_subspace.layers.stacked import Form


@dataclass
class Branch:
    """One active adapter in a forward pass: its chain, scaled, and the dropout on its input (or None)."""

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

    def apply_dropout(self, x: Tensor) -> Tensor:
        """Input of the branch."""
        return x if self.dropout is None else self.dropout(x)

    @property
    def dropout_active(self) -> bool:
        """Whether dropout changes the input now."""
        return self.dropout is not None and self.dropout.training


class LayerKind:
    """A kind of layer, and what a chain does in its place. An instance holds plain data only.

    A kind decides for its branches by which route they go (`costs.py`, asked once per forward pass), and
    follows it: either the layer is called and each branch is added to its result (`add_branch`), or the layer
    is run once with `W + ΔW` (`run_updated`).

    Attributes:
        shape: Shape of the weight as the methods see it.
        linear: Whether `ΔW` is a matrix that acts on the last axis of the input.
        has_rows: Whether the weight, seen as a matrix, multiplies rows that are made of the input.
        dropout_cls: Dropout that suits the branch's input, None where nothing can be dropped.
        has_custom_forward: Whether the layer has a forward of its own. Only the layer itself then knows what
            an updated weight does (it pads by the size of its input, standardizes the weight, …), so it is
            called with one.
    """

    linear = False
    has_rows = False
    dropout_cls: type[nn.Module] | None = nn.Dropout

    def __init__(self, shape: WeightShape, *, has_custom_forward: bool = False) -> None:
        self.shape = shape
        self.has_custom_forward = has_custom_forward

    def to_layout(self, delta: Tensor) -> Tensor:
        """Rearrange `ΔW`, `(out, in, *kernel)`, as the layer stores its weight."""
        return delta

    def from_layout(self, weight: Tensor) -> Tensor:
        """Rearrange a weight as the layer stores it to `(out, in, *kernel)`."""
        return weight

    def is_plain(self, base: nn.Module) -> bool:
        """Whether a layer makes of its weight and input what its kind makes of them, and no more."""
        return not self.has_custom_forward

    def forward(
        self,
        layer: nn.Module,
        branches: Sequence[Branch],
        x: Tensor,
        args: tuple,
        kwargs: dict[str, Any],
        *,
        whole: bool,
        cast: Callable[[Tensor, torch.dtype], Tensor],
    ) -> Tensor:
        """Run a layer with some branches.

        Args:
            layer: The layer, or another adapter's wrapper around it.
            branches: The branches, at least one.
            x: Input of the layer.
            args: Further arguments of its forward.
            kwargs: The same, by name.
            whole: Whether `layer` is the layer itself, with a weight that can be added to.
            cast: Function of a branch's input and the dtype of its factors.
        """
        free = whole and not any(branch.dropout_active for branch in branches)
        if self.has_custom_forward:
            if free:
                return call_updated(layer, self, branches, x, *args, **kwargs)
            routes: Sequence[Route | None] = [None] * len(branches)
        else:
            base = innermost(layer)
            free = free and not has_hooks(base) and not must_be_plain()
            routes = self.routes(base, branches, x, free)
            if routes[0] is not None and routes[0].startswith("updated"):
                return self.run_updated(base, branches, x, routes[0])
        result = layer(x, *args, **kwargs)
        base = innermost(layer)
        for branch, route in zip(branches, routes, strict=True):
            result = self.add_branch(result, base, branch, cast(x, branch.factors[-1].dtype), route)
        return result

    def add_branch(
        self, result: Tensor, base: nn.Module, branch: Branch, x: Tensor, route: Route | None = None
    ) -> Tensor:
        """Return the layer's `result` plus what one branch makes of its input `x`.

        Without a `route` the cheapest one is taken.
        """
        if self.has_custom_forward:
            x = branch.apply_dropout(x)
            x = x.to(base.weight.dtype) if x.is_floating_point() else x
            return tree_map(plus_change, result, call_updated(base, self, [branch], x), base(x))
        route = route or self.routes(base, [branch], x, free=False)[0]
        return self.add(result, base, branch, branch.apply_dropout(x), route)

    def routes(self, base: nn.Module, branches: Sequence[Branch], x: Tensor, free: bool) -> Sequence[Route]:
        """Route of each branch; if one is of an updated layer, all are. `free`: whether that is possible."""
        raise NotImplementedError

    def add(self, result: Tensor, base: nn.Module, branch: Branch, x: Tensor, route: Route) -> Tensor:
        """`add_branch` by a given route, for an input after dropout."""
        raise NotImplementedError

    def run_updated(self, base: nn.Module, branches: Sequence[Branch], x: Tensor, route: Route) -> Tensor:
        """Run the layer once with `W + ΔW`."""
        raise NotImplementedError

    def add_each(
        self,
        result: Tensor,
        base: nn.Module,
        branches: Sequence[Branch],
        counts: Sequence[int],
        x: Tensor,
        cast: Callable[[Tensor, torch.dtype], Tensor],
    ) -> Tensor:
        """`add_branch` for several adapters, each on the next `counts` samples of `x`; chains are thin."""
        counts = list(counts)
        parts = zip(branches, result.split(counts), x.split(counts), strict=True)
        return torch.cat(
            [self.add_branch(r, base, b, cast(part, b.factors[-1].dtype)) for b, r, part in parts]
        )

    def stackable(self, factors: tuple[Tensor, ...]) -> Form | None:
        """A chain as `add_stacked` takes it with others on a first axis; None where each goes by itself."""
        return None

    def add_stacked(self, result: Tensor, base: nn.Module, stacked: Form, x: Tensor) -> Tensor:
        """`add_branch` for several adapters, each on as many samples of `x`, which come in their order."""
        raise NotImplementedError

    def add_weight_gradient(self, total: Tensor, base: nn.Module, x: Tensor, *grad_outputs: Tensor) -> None:
        """Add the gradient of the layer's weight to `total`, `(out, in, *kernel)` in fp32.

        It is made of the layer's input and the gradient of its output, and the weight need not be readable;
        only layers that do more than their kind, and may return several tensors, are called once more.
        """
        if not self.has_custom_forward:
            self.add_outer_products(total, base, x, *grad_outputs)
            return
        weight = base.weight.detach().requires_grad_()
        with torch.enable_grad():
            x = x.to(weight.dtype) if x.is_floating_point() else x
            y = call_with(base, "weight", weight, (x,), {})
        found = outputs_in(y)
        gradients = [gradient.to(y.dtype) for gradient, y in zip(grad_outputs, found, strict=True)]
        (gradient,) = torch.autograd.grad(found, weight, gradients)
        total.add_(self.from_layout(gradient))

    def add_outer_products(self, total: Tensor, base: nn.Module, x: Tensor, grad_output: Tensor) -> None:
        """`add_weight_gradient` for layers that do what their kind does."""
        raise NotImplementedError

    def input_rows(self, base: nn.Module, x: Tensor) -> Tensor:
        """Rows `(positions, n)` that the weight, as a matrix `(m, n)`, multiplies, where `has_rows`."""
        raise NotImplementedError


def sums_exactly(base: nn.Module, branches: Sequence[Branch], x: Tensor) -> bool:
    """Whether `W + ΔW` loses nothing: in less than fp32 the sum would round `ΔW` to the steps of `W`."""
    dtypes = {x.dtype, base.weight.dtype, *(factor.dtype for branch in branches for factor in branch.factors)}
    return dtypes <= {torch.float32} or dtypes <= {torch.float64}


def updated_weight(weight: Tensor, kind: LayerKind, branches: Sequence[Branch]) -> Tensor:
    """`W + ΔW` of some branches, laid out as the layer stores `W`, in its dtype."""
    dtype = weight.dtype
    if weight.is_meta and not branches[0].factors[0].is_meta:
        raise RuntimeError(
            "the weight is offloaded, and the adapter of this layer needs it in memory; give its module a "
            "device in device_map, or merge the adapter first"
        )
    for branch in branches:
        # Flat, for an axis of size one can have strides that convolutions take for another memory format.
        delta = kind.to_layout(multiply(branch.factors)).reshape(-1)
        weight = weight + delta.view(weight.shape)
    return weight.to(dtype)


def call_updated(
    base: nn.Module, kind: LayerKind, branches: Sequence[Branch], x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Call a layer with `W + ΔW` in the place of its weight."""
    weight = updated_weight(base.weight, kind, branches)
    return call_with(base, "weight", weight, (x, *args), kwargs)

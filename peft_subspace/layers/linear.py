"""A chain in place of a linear layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_subspace.core.chain import multiply, split
from peft_subspace.layers.base import Branch, LayerKind, sums_exactly
from peft_subspace.layers.calls import call_with, takes_gradient
from peft_subspace.layers.costs import Route, branch_route, is_narrow, is_thin, linear_routes
from peft_subspace.layers.kernels.linear import update_linear
from peft_subspace.layers.stacked import Form, add_product


class LinearKind(LayerKind):
    """`nn.Linear`, and quantized layers that stand for one."""

    linear = has_rows = True

    def is_plain(self, base: nn.Module) -> bool:
        """Try a forward of its own with a random weight and input: Falcon's, say, is that of `nn.Linear`."""
        if super().is_plain(base):
            return True
        if base.weight.is_meta:  # there is nothing to compare
            return False
        generator = torch.Generator().manual_seed(0)
        shapes = (base.weight.shape, (2, self.shape.in_features))
        weight, x = (torch.randn(shape, generator=generator).to(base.weight) for shape in shapes)
        with torch.no_grad():
            try:
                found = call_with(base, "weight", weight, (x,), {})
            except (TypeError, ValueError, RuntimeError):  # it wants an input of another kind
                return False
            expected = F.linear(x, self.from_layout(weight), base.bias)
        if not takes_gradient(found) or found.shape != expected.shape:
            return False
        error = (found - expected).float().norm() / expected.float().norm()
        return bool(error <= 4 * torch.finfo(weight.dtype).eps)

    def routes(self, base: nn.Module, branches: Sequence[Branch], x: Tensor, free: bool) -> Sequence[Route]:
        """Beside the layer, or in a product with `W + ΔW` where that is exact and cheaper to train."""
        exact = free and not torch.is_autocast_enabled(x.device.type) and sums_exactly(base, branches, x)
        return linear_routes([branch.factors for branch in branches], count_rows(x), exact=exact)

    def add(self, result: Tensor, base: nn.Module, branch: Branch, x: Tensor, route: Route) -> Tensor:
        """Apply the factors from right to left."""
        return add_chain(result, branch.factors, x, route)

    def run_updated(self, base: nn.Module, branches: Sequence[Branch], x: Tensor, route: Route) -> Tensor:
        """Multiply once by `W + ΔW`."""
        weight = self.from_layout(base.weight)
        dense = [branch.factors[0] for branch in branches if len(branch.factors) == 1]
        pairs = [split(branch.factors) for branch in branches if len(branch.factors) > 1]
        weight = sum(dense, start=weight)
        if not pairs:
            return F.linear(x, weight, base.bias)
        lefts, rights = zip(*pairs, strict=True)
        return update_linear(x, weight, base.bias, torch.cat(lefts, dim=1), torch.cat(rights))

    def add_each(
        self,
        result: Tensor,
        base: nn.Module,
        branches: Sequence[Branch],
        counts: Sequence[int],
        x: Tensor,
        cast: Callable[[Tensor, torch.dtype], Tensor],
    ) -> Tensor:
        """Send each adapter's rows through its factors, in as few calls as possible."""
        per_sample = count_rows(x) // len(x)
        sizes = [count * per_sample for count in counts]
        plain = not torch.is_autocast_enabled(x.device.type)
        totals = result.reshape(-1, result.shape[-1]).split(sizes)
        sums = []
        for branch, total, rows in zip(branches, totals, x.flatten(0, -2).split(sizes), strict=True):
            first, *rest = branch.factors
            hidden = rows if rows.dtype == first.dtype else cast(rows, first.dtype)
            for factor in reversed(rest):
                hidden = torch.mm(hidden, factor.t())
            if plain and total.dtype == hidden.dtype == first.dtype:
                sums.append(torch.addmm(total, hidden, first.t()))
            else:
                sums.append((total + torch.mm(hidden, first.t())).to(total.dtype))
        return torch.cat(sums).view(result.shape)

    def stackable(self, factors: tuple[Tensor, ...]) -> Form | None:
        """The chain or, where that is smaller, `(out, r)` and `(r, in)`; None if `ΔW` is smaller still."""
        if self.has_custom_forward or not is_thin(self.shape, factors):
            return None
        return factors if is_narrow(self.shape, factors) else split(factors)

    def add_stacked(self, result: Tensor, base: nn.Module, stacked: Form, x: Tensor) -> Tensor:
        """Multiply each adapter's rows by its factors."""
        left, *rest = stacked
        hidden = x.reshape(len(left), -1, x.shape[-1])
        for factor in reversed(rest):
            hidden = torch.bmm(hidden, factor.transpose(1, 2))
        return add_product(result, hidden, left)

    def add_outer_products(self, total: Tensor, base: nn.Module, x: Tensor, grad_output: Tensor) -> None:
        """Add `gᵀ x`."""
        total.addmm_(grad_output.flatten(0, -2).T.float(), x.flatten(0, -2).float())

    def input_rows(self, base: nn.Module, x: Tensor) -> Tensor:
        """One row for each position."""
        return x.reshape(-1, x.shape[-1])


class TransposedKind(LinearKind):
    """A layer that stores its weight as `(in, out)`."""

    def to_layout(self, delta: Tensor) -> Tensor:
        """Transpose."""
        return delta.transpose(0, 1)

    def from_layout(self, weight: Tensor) -> Tensor:
        """Transpose."""
        return weight.transpose(0, 1)


class Conv1DKind(TransposedKind):
    """The `Conv1D` of transformers, a linear layer."""


def count_rows(x: Tensor) -> int:
    """Rows that a linear layer multiplies."""
    return x.numel() // x.shape[-1]


def add_chain(result: Tensor, factors: tuple[Tensor, ...], x: Tensor, route: Route | None = None) -> Tensor:
    """`result + x Fnᵀ … F1ᵀ`, the last product and the sum in one call where dtypes allow."""
    route = route or branch_route(factors, count_rows(x))
    if route != "chain":
        factors = split(factors) if route == "pair" else (multiply(split(factors)),)
    for factor in reversed(factors[1:]):
        x = F.linear(x, factor)
    first = factors[0]
    if result.dtype == x.dtype == first.dtype and not torch.is_autocast_enabled(x.device.type):
        rows, hidden = result.reshape(-1, first.shape[0]), x.reshape(-1, first.shape[1])
        return torch.addmm(rows, hidden, first.T).view_as(result)
    return (result + F.linear(x, first)).to(result.dtype)

"""A chain in place of a linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_subspace.core.chain import shorten, split
from peft_subspace.layers.base import Branch, LayerKind, _has_hooks, _sums_exactly
from peft_subspace.layers.kernels.linear import update_linear, update_pays


class LinearOps(LayerKind):
    """`nn.Linear`, and quantised layers that stand for one."""

    linear = True

    def add(self, result: Tensor, base: nn.Module, branch: Branch, x: Tensor) -> Tensor:
        """Apply the factors from right to left."""
        if self.has_custom_forward:
            return self._add_by_calling(result, base, branch, x)
        return _add_chain(result, branch.factors, branch.drop(x))

    def merged_forward(
        self, base: nn.Module, branches: Sequence[Branch], x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor | None:
        """Multiply once by `W + ΔW`, where that is exact and cheaper to train than the factors."""
        if self.has_custom_forward or not self.linear or any(branch.drops for branch in branches):
            return super().merged_forward(base, branches, x, *args, **kwargs)
        tokens = x.numel() // x.shape[-1]
        if not all(update_pays(branch.factors, tokens) for branch in branches):
            return None
        autocast = torch.is_autocast_enabled(x.device.type)
        if autocast or _has_hooks(base) or not _sums_exactly(base, branches, x):
            return None
        weight = self.to_layout(base.weight)
        dense = [branch.factors[0] for branch in branches if len(branch.factors) == 1]
        pairs = [split(branch.factors) for branch in branches if len(branch.factors) > 1]
        weight = sum(dense, start=weight)
        if not pairs:
            return F.linear(x, weight, base.bias)
        lefts, rights = zip(*pairs, strict=True)
        return update_linear(x, weight, base.bias, torch.cat(lefts, dim=1), torch.cat(rights))

    def _add_outer_products(self, total: Tensor, base: nn.Module, x: Tensor, grad_output: Tensor) -> None:
        total.addmm_(grad_output.flatten(0, -2).T.float(), x.flatten(0, -2).float())


class _TransposedOps(LinearOps):
    """A layer that stores its weight as `(in, out)`."""

    def to_layout(self, delta: Tensor) -> Tensor:
        """Transpose."""
        return delta.transpose(0, 1)


class Conv1DOps(_TransposedOps):
    """The `Conv1D` of transformers, a linear layer."""


def _add_chain(result: Tensor, factors: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """`result + x Fnᵀ … F1ᵀ`, the last product and the sum in one call where dtypes allow."""
    factors = shorten(factors, x.numel() // x.shape[-1])
    for factor in reversed(factors[1:]):
        x = F.linear(x, factor)
    first = factors[0]
    if result.dtype == x.dtype == first.dtype and not torch.is_autocast_enabled(x.device.type):
        rows, hidden = result.reshape(-1, first.shape[0]), x.reshape(-1, first.shape[1])
        return torch.addmm(rows, hidden, first.T).view_as(result)
    return (result + F.linear(x, first)).to(result.dtype)

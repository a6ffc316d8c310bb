"""A chain in place of a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_subspace.core.chain import chain_cost, multiply, narrowest_rank, split
from peft_subspace.core.shapes import WeightShape
from peft_subspace.layers.base import Branch, LayerKind, _has_hooks, _sums_exactly, updated_weight
from peft_subspace.layers.kernels.convolution import convolve_depthwise, convolve_pair, is_slow_depthwise

# Convolutions with few channels on one side are this much slower per multiplication than dense ones, and a
# weight is updated in the time of this many samples per rank (examples/benchmarks/convolution.py).
_THIN = 3.5


_FEW = 64


class ConvOps(LayerKind):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`, of any stride, padding, dilation, groups and padding mode."""

    def __init__(self, shape: WeightShape, *, has_custom_forward: bool = False) -> None:
        super().__init__(shape, has_custom_forward=has_custom_forward)
        # Neighbouring pixels say the same: dropping single ones drops nothing, so whole channels are dropped.
        self.dropout_cls = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)[len(shape.kernel_size) - 1]

    def add(self, result: Tensor, base: nn.Module, branch: Branch, x: Tensor) -> Tensor:
        """Run 1×1 → kernel → 1×1, or one convolution with `ΔW` where that is cheaper."""
        if self._is_single(x):
            return self.add(result[None], base, branch, x[None])[0]
        if self.has_custom_forward:
            return self._add_by_calling(result, base, branch, x)
        x = branch.drop(x)
        if self._prefers_factors(base, branch, x, dense_passes=3):
            return self._add_factored(result, base, branch.factors, x)
        return (result + base._conv_forward(x, multiply(branch.factors), None)).to(result.dtype)

    def merged_forward(
        self, base: nn.Module, branches: Sequence[Branch], x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor | None:
        """Convolve once with `W + ΔW`, where that is exact and no factored branch is cheaper."""
        if self.has_custom_forward or any(branch.drops for branch in branches):
            return super().merged_forward(base, branches, x, *args, **kwargs)
        if not _sums_exactly(base, branches, x) or _has_hooks(base):
            return None
        if is_slow_depthwise(base, x):
            return convolve_depthwise(base, x, updated_weight(base.weight, self, branches))
        if self.shape.groups > 1 or self._is_single(x):
            return base._conv_forward(x, updated_weight(base.weight, self, branches), base.bias)
        rank = sum(narrowest_rank(branch.factors) for branch in branches)
        few = self._positions(base, x)[1] < _FEW * rank
        if few and all(self._prefers_factors(base, branch, x, dense_passes=1) for branch in branches):
            return None
        if 2 * _THIN * rank * (self.shape.out_features + self.shape.columns) < prod(self.shape.dims):
            lefts, rights = zip(*(split(branch.factors) for branch in branches), strict=True)
            return convolve_pair(base, x, torch.cat(lefts, dim=1), torch.cat(rights))
        return base._conv_forward(x, updated_weight(base.weight, self, branches), base.bias)

    def _is_single(self, x: Tensor) -> bool:
        """Whether the input is one sample without a batch axis."""
        return x.ndim == 1 + len(self.shape.kernel_size)

    def _positions(self, base: nn.Module, x: Tensor) -> tuple[int, int]:
        """Positions, over all samples, at which the layer reads its input and writes its output."""
        inputs = x.numel() // x.shape[-1 - len(self.shape.kernel_size)]
        return inputs, inputs // prod(base.stride)

    def _add_outer_products(self, total: Tensor, base: nn.Module, x: Tensor, grad_output: Tensor) -> None:
        if self._is_single(x):
            x, grad_output = x[None], grad_output[None]
        weight = base.weight.detach().float().requires_grad_()
        with torch.enable_grad():
            y = base._conv_forward(x.float(), weight, None)
        (gradient,) = torch.autograd.grad(y, weight, grad_output.float())
        total.add_(gradient)

    def _prefers_factors(self, base: nn.Module, branch: Branch, x: Tensor, dense_passes: int) -> bool:
        """Whether three passes through the factors are cheaper than `dense_passes` dense convolutions."""
        if self.shape.groups > 1:
            return False
        inputs, outputs = self._positions(base, x)
        thin = self._factored_cost(branch.factors, inputs, outputs)
        return 3 * _THIN * thin < dense_passes * outputs * prod(self.shape.dims)

    def _factored_cost(self, factors: Sequence[Tensor], inputs: int, outputs: int) -> int:
        joint = _kernel_at(factors)
        return outputs * chain_cost(factors[: joint + 1]) + inputs * chain_cost(factors[joint + 1 :])

    def _add_factored(self, result: Tensor, base: nn.Module, factors: Sequence[Tensor], x: Tensor) -> Tensor:
        if prod(self.shape.kernel_size) == 1:  # a kernel that is a matrix too joins its neighbours
            factors = split(factors)
        joint = _kernel_at(factors)
        for factor in reversed(factors[joint + 1 :]):
            x = _pointwise(x, factor)
        x = base._conv_forward(x, factors[joint], None)
        for factor in reversed(factors[1:joint]):
            x = _pointwise(x, factor)
        return _add_pointwise(result, x, factors[0]) if joint else (result + x).to(result.dtype)


def _pointwise(x: Tensor, factor: Tensor) -> Tensor:
    """1×1 convolution of `x`, `(…, channels, *spatial)`, with a matrix `(out, channels)`."""
    axes = x.ndim - 2
    if x.is_contiguous():
        # For a factor that requires gradients matmul computes in another order, even where none are recorded.
        factor = factor if torch.is_grad_enabled() else factor.detach()
        return torch.matmul(factor, x.flatten(2)).unflatten(2, x.shape[2:])
    convolve = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    return convolve(x, factor.reshape(*factor.shape, *[1] * axes))


def _add_pointwise(result: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """`result` plus a 1×1 convolution, in one call where layouts and dtypes allow."""
    same = result.dtype == x.dtype == factor.dtype and not torch.is_autocast_enabled(x.device.type)
    if same and result.is_contiguous() and x.is_contiguous():
        batch = factor.expand(len(x), -1, -1)
        return torch.baddbmm(result.flatten(2), batch, x.flatten(2)).view_as(result)
    return (result + _pointwise(x, factor)).to(result.dtype)


def _kernel_at(factors: Sequence[Tensor]) -> int:
    """Position of the factor that carries the kernel axes."""
    return next(i for i, factor in enumerate(factors) if factor.ndim > 2)

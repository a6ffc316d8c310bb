"""A chain in place of a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_subspace.core.chain import kernel_at, multiply, split
from peft_subspace.core.shapes import WeightShape
from peft_subspace.layers.base import Branch, LayerKind, sums_exactly, updated_weight
from peft_subspace.layers.costs import Route, convolution_routes, depthwise_gradient_pays, is_thin
from peft_subspace.layers.kernels.convolution import convolve_depthwise, convolve_pair, padded
from peft_subspace.layers.stacked import Form, side_by_side, under_each_other


class _AnyConvKind(LayerKind):
    """A convolution, transposed or not."""

    def __init__(self, shape: WeightShape, *, has_custom_forward: bool = False) -> None:
        super().__init__(shape, has_custom_forward=has_custom_forward)
        # Neighboring pixels say the same: dropping single ones drops nothing, so whole channels are dropped.
        self.dropout_cls = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)[len(shape.kernel_size) - 1]

    def convolve(self, base: nn.Module, x: Tensor, weight: Tensor, like: Tensor) -> Tensor:
        """Convolve with another weight and without bias; the output has the size of another tensor."""
        raise NotImplementedError

    def add_outer_products(self, total: Tensor, base: nn.Module, x: Tensor, grad_output: Tensor) -> None:
        """Add what autograd makes of one more convolution."""
        if self._is_single(x):
            x, grad_output = x[None], grad_output[None]
        weight = base.weight.detach().float().requires_grad_()
        with torch.enable_grad():
            y = self.convolve(base, x.float(), weight, grad_output)
        (gradient,) = torch.autograd.grad(y, weight, grad_output.float())
        total.add_(self.from_layout(gradient))

    def _is_single(self, x: Tensor) -> bool:
        """Whether the input is one sample without a batch axis."""
        return x.ndim == 1 + len(self.shape.kernel_size)


class ConvKind(_AnyConvKind):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`, of any stride, padding, dilation, groups and padding mode."""

    has_rows = True

    def routes(self, base: nn.Module, branches: Sequence[Branch], x: Tensor, free: bool) -> Sequence[Route]:
        """Three convolutions beside the layer, one with `ΔW` beside it, or one with `W + ΔW`."""
        exact = free and sums_exactly(base, branches, x)
        if exact and self._has_slow_gradient(base, x):
            return ["updated_depthwise"] * len(branches)
        inputs = x.numel() // x.shape[-1 - len(self.shape.kernel_size)]
        outputs = inputs // prod(base.stride)
        chains = [branch.factors for branch in branches]
        single = self._is_single(x)
        return convolution_routes(self.shape, chains, inputs, outputs, exact=exact, single=single)

    def add(self, result: Tensor, base: nn.Module, branch: Branch, x: Tensor, route: Route) -> Tensor:
        """Run 1×1 → kernel → 1×1, or one convolution with `ΔW`."""
        if self._is_single(x):
            return self.add(result[None], base, branch, x[None], route)[0]
        if route == "chain":
            return self._add_factored(result, base, branch.factors, x)
        return (result + base._conv_forward(x, multiply(branch.factors), None)).to(result.dtype)

    def run_updated(self, base: nn.Module, branches: Sequence[Branch], x: Tensor, route: Route) -> Tensor:
        """Convolve once with `W + ΔW`."""
        if route == "updated_pair":
            lefts, rights = zip(*(split(branch.factors) for branch in branches), strict=True)
            return convolve_pair(base, x, torch.cat(lefts, dim=1), torch.cat(rights))
        weight = updated_weight(base.weight, self, branches)
        if route == "updated_depthwise":
            return convolve_depthwise(base, x, weight)
        return base._conv_forward(x, weight, base.bias)

    def stackable(self, factors: tuple[Tensor, ...]) -> Form | None:
        """`(out, r)` and `(r, in, *kernel)` if they are smaller than `ΔW`, else `ΔW`."""
        if self.has_custom_forward:
            return None
        pair = self.shape.groups == 1 and is_thin(self.shape, factors)
        return split(factors) if pair else (multiply(factors),)

    def add_stacked(self, result: Tensor, base: nn.Module, stacked: Form, x: Tensor) -> Tensor:
        """Convolve once, with the adapters side by side as groups of channels."""
        count, kernel = len(stacked[0]), stacked[-1]
        x, padding = padded(base, side_by_side(x, count))
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.shape.kernel_size) - 1]
        y = convolve(x, kernel.flatten(0, 1), None, base.stride, padding, base.dilation, count * base.groups)
        y = under_each_other(y, count)
        if len(stacked) == 2:
            hidden = y.unflatten(0, (count, -1)).flatten(3)
            y = torch.matmul(stacked[0][:, None], hidden).view(result.shape)
        return (result + y).to(result.dtype)

    def convolve(self, base: nn.Module, x: Tensor, weight: Tensor, like: Tensor) -> Tensor:
        """Convolve as the layer does; its output has one size."""
        return base._conv_forward(x, weight, None)

    def input_rows(self, base: nn.Module, x: Tensor) -> Tensor:
        """One row for each place of the kernel, and for each group: they share the columns of the weight."""
        axes = len(self.shape.kernel_size)
        x, padding = padded(base, x[None] if self._is_single(x) else x)
        x = F.pad(x, [size for size in reversed(padding) for _ in range(2)])
        for axis, (kernel, stride, step) in enumerate(
            zip(self.shape.kernel_size, base.stride, base.dilation, strict=True), start=2
        ):
            x = x.unfold(axis, step * (kernel - 1) + 1, stride)[..., ::step]
        windows = x.unflatten(1, (base.groups, -1)).movedim(2, 2 + axes)  # channels before the kernel's axes
        return windows.reshape(-1, self.shape.columns)

    def _has_slow_gradient(self, base: nn.Module, x: Tensor) -> bool:
        """Whether `convolve_depthwise` is meant for this layer and input."""
        kernel = self.shape.kernel_size
        return (
            len(kernel) == 2
            and x.device.type == "cpu"
            and x.ndim == 4
            and base.groups == base.in_channels == base.out_channels
            and depthwise_gradient_pays(kernel)
            and base.dilation == (1, 1)
            and not torch.compiler.is_compiling()  # the strides of its products cannot be traced
        )

    def _add_factored(self, result: Tensor, base: nn.Module, factors: Sequence[Tensor], x: Tensor) -> Tensor:
        if prod(self.shape.kernel_size) == 1:  # a kernel that is a matrix too joins its neighbors
            factors = split(factors)
        joint = kernel_at(factors)
        for factor in reversed(factors[joint + 1 :]):
            x = _pointwise(x, factor)
        x = base._conv_forward(x, factors[joint], None)
        for factor in reversed(factors[1:joint]):
            x = _pointwise(x, factor)
        return _add_pointwise(result, x, factors[0]) if joint else (result + x).to(result.dtype)


class TransposedConvKind(_AnyConvKind):
    """`nn.ConvTranspose1d`, `nn.ConvTranspose2d`, `nn.ConvTranspose3d`.

    The layer stores `(in, out / groups, *kernel)`, of which the update is `(out / groups, in, *kernel)`.
    """

    def from_layout(self, weight: Tensor) -> Tensor:
        """Put the outputs first."""
        return weight.transpose(0, 1)

    def to_layout(self, delta: Tensor) -> Tensor:
        """Put the inputs first."""
        return delta.transpose(0, 1)

    def routes(self, base: nn.Module, branches: Sequence[Branch], x: Tensor, free: bool) -> Sequence[Route]:
        """One convolution with `ΔW`, beside the layer: the size of its output is known there."""
        return ["dense"] * len(branches)

    def add(self, result: Tensor, base: nn.Module, branch: Branch, x: Tensor, route: Route) -> Tensor:
        """Convolve with `ΔW`."""
        weight = self.to_layout(multiply(branch.factors)).contiguous()
        return (result + _convolve_transposed(base, x, weight, result)).to(result.dtype)

    def stackable(self, factors: tuple[Tensor, ...]) -> Form | None:
        """`ΔW` as the layer stores it."""
        return None if self.has_custom_forward else (self.to_layout(multiply(factors)),)

    def add_stacked(self, result: Tensor, base: nn.Module, stacked: Form, x: Tensor) -> Tensor:
        """Convolve once, with the adapters side by side as groups of channels."""
        (kernel,) = stacked
        x = side_by_side(x, len(kernel))
        y = _convolve_transposed(base, x, kernel.flatten(0, 1), result, len(kernel) * base.groups)
        return (result + under_each_other(y, len(kernel))).to(result.dtype)

    def convolve(self, base: nn.Module, x: Tensor, weight: Tensor, like: Tensor) -> Tensor:
        """Convolve to the size of `like`, of which several are possible."""
        return _convolve_transposed(base, x, weight, like)


def _convolve_transposed(
    base: nn.Module, x: Tensor, weight: Tensor, like: Tensor, groups: int | None = None
) -> Tensor:
    """Transposed convolution without bias, whose output has the size of another tensor."""
    axes = weight.ndim - 2
    size = list(like.shape[-axes:])
    padding = base._output_padding(x, size, base.stride, base.padding, base.kernel_size, axes, base.dilation)
    convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]
    groups = groups or base.groups
    return convolve(x, weight, None, base.stride, base.padding, padding, groups, base.dilation)


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
        batch = factor.expand(x.shape[0], -1, -1)
        return torch.baddbmm(result.flatten(2), batch, x.flatten(2)).view_as(result)
    return (result + _pointwise(x, factor)).to(result.dtype)

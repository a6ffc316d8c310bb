"""One convolution with an updated weight, `conv(x, W + L·R)`, whose gradients cost what `L` and `R` cost.

Autograd alone would make the gradient of the whole weight in each step, which takes as long as the forward
pass, to project it onto a few factors afterwards. Two cases are cheaper (examples/benchmarks/convolution.py):
thin factors get their gradients from thin convolutions, and a depthwise convolution with a large kernel, for
which CPUs have no fast weight gradient, gets it by matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input


def convolve_pair(base: Any, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Convolve as `base`, ungrouped, would with `W + L·R`: `left` `(out, r)`, `right` `(r, in, *kernel)`."""
    x, padding = padded(base, x)
    settings = (base.stride, padding, base.dilation)
    return _PairConvolution.apply(x, base.weight, base.bias, left, right, settings)


def convolve_depthwise(base: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Convolve as `base`, depthwise, would with another weight."""
    x, padding = padded(base, x)
    return _DepthwiseConvolution.apply(x, weight, base.bias, base.stride, padding)


def padded(base: Any, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Pad the input where the convolution itself cannot; return it with the padding that is left to do."""
    if base.padding_mode == "zeros" and not isinstance(base.padding, str):
        return x, base.padding
    mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
    return F.pad(x, base._reversed_padding_repeated_twice, mode), (0,) * len(base.stride)


class _PairConvolution(torch.autograd.Function):
    """`conv(x, W + L·R) + b`: dense convolutions forward and back to `x`, thin ones for `L` and `R`."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, settings: tuple
    ) -> Tensor:
        return _convolution(x, _updated(weight, left, right), bias, settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, _, left, right, ctx.settings = inputs
        ctx.save_for_backward(x, weight, left, right)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, left, right = ctx.saved_tensors
        of_x = of_weight = of_bias = of_left = of_right = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            of_x, of_weight = _convolution_backward(
                gradient, x, _updated(weight, left, right), ctx.settings, ctx.needs_input_grad[:2]
            )
        if ctx.needs_input_grad[2]:
            of_bias = gradient.transpose(0, 1).flatten(1).sum(1)
        if ctx.needs_input_grad[3]:
            hidden = _convolution(x, right, None, ctx.settings)
            of_left = torch.bmm(gradient.flatten(2), hidden.flatten(2).transpose(1, 2)).sum(0)
        if ctx.needs_input_grad[4]:
            to_hidden = torch.matmul(left.T, gradient.flatten(2)).unflatten(2, gradient.shape[2:])
            of_right = _convolution_backward(to_hidden, x, right, ctx.settings, (False, True))[1]
        return of_x, of_weight, of_bias, of_left, of_right, None


def _updated(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return weight + torch.matmul(left, right.flatten(1)).view_as(weight)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple) -> Tensor:
    """Ungrouped convolution of any number of axes."""
    stride, padding, dilation = settings
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), 1)


def _convolution_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, settings: tuple, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of an ungrouped convolution with respect to its input and weight, those that are wanted."""
    stride, padding, dilation = settings
    no_padding = [0] * len(stride)
    return torch.ops.aten.convolution_backward(
        *(gradient, x, weight, None, stride, padding, dilation, False, no_padding, 1, [*wanted, False])
    )[:2]


class _DepthwiseConvolution(torch.autograd.Function):
    """`nn.functional.conv2d` of equal in- and output channels and as many groups."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding, groups=len(weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, _, ctx.stride, ctx.padding = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = conv2d_input(x.shape, weight, gradient, ctx.stride, ctx.padding, groups=len(weight))
        if ctx.needs_input_grad[1]:
            of_weight = _weight_gradient(x, gradient, weight.shape[2:], ctx.stride, ctx.padding)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 2, 3))
        return of_x, of_weight, of_bias, None, None


def _weight_gradient(
    x: Tensor, gradient: Tensor, kernel: torch.Size, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """Weight gradient `D[c, 0, u, v] = Σ_nhw x[n, c, s h + u, s w + v] g[n, c, h, w]`.

    For each row `u` of the kernel, one product over samples and rows, `Xᵀ G` of shape
    `(width, out_width)` per channel, holds all columns `v` as the sums of its diagonals.
    """
    channels, out_height, out_width = gradient.shape[1:]
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0])).transpose(0, 1)
    columns = gradient.transpose(0, 1).reshape(channels, -1, out_width)
    rows = []
    for u in range(kernel[0]):
        shifted = x[:, :, u : u + stride[0] * (out_height - 1) + 1 : stride[0]]
        products = torch.bmm(shifted.flatten(1, 2).transpose(1, 2), columns)
        step, start = products.stride(), products.storage_offset()
        diagonal = (step[0], step[1] * stride[1] + step[2])
        sums = [
            products.as_strided((channels, out_width), diagonal, start + v * step[1]).sum(1)
            for v in range(kernel[1])
        ]
        rows.append(torch.stack(sums, dim=1))
    return torch.stack(rows, dim=1)[:, None]

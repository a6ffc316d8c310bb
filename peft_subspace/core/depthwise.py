"""Depthwise convolution with a large kernel, whose weight gradient is taken by matrix products.

On CPUs the usual weight gradient of such a layer costs several times its forward and input gradient together
(examples/benchmarks/convolution.py), and an adapter that is trained through `W + ΔW` needs it in every step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

_SMALLEST_KERNEL = 5  # below, the usual weight gradient is faster


def suits(base: nn.Module, x: Tensor) -> bool:
    """Whether `convolve` is correct and faster for this layer and input."""
    return (
        isinstance(base, nn.Conv2d)
        and x.device.type == "cpu"
        and x.ndim == 4
        and base.groups == base.in_channels == base.out_channels
        and min(base.kernel_size) >= _SMALLEST_KERNEL
        and base.dilation == (1, 1)
        and base.padding_mode == "zeros"
        and not isinstance(base.padding, str)
    )


def convolve(base: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve `x`, `(batch, channels, height, width)`, depthwise with `weight` as `base` would."""
    return _DepthwiseConvolution.apply(x, weight, bias, tuple(base.stride), tuple(base.padding))


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

"""One linear layer with an updated weight, `x (W + L·R)ᵀ`, for chains of which a part is frozen.

Sending the input through a chain of large frozen factors costs more than the layer itself, forward and back.
Adding the chain up costs a product per step instead of one per token; but autograd would then make the
gradient of the whole weight to project it onto the trained factor. `update_linear` does neither: dense
products with `W + L·R` forward and back to the input, thin ones to `L` and `R`, and nothing of the weight's
size is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def update_linear(x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """`x (W + L·R)ᵀ + b`: `W (out, in)`, `L (out, r)`, `R (r, in)`."""
    # In rows: of more axes the product is a view, and no one may change a view that a function returns.
    rows = _UpdatedLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias, left, right)
    return rows.view(*x.shape[:-1], len(weight))


class _UpdatedLinear(torch.autograd.Function):
    """Keeps its arguments only, of which `x` is `(N, in)`; the sum is made once more on the way back."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
        return F.linear(x, torch.addmm(weight, left, right), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, _, left, right = inputs
        ctx.save_for_backward(x, weight, left, right)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, left, right = ctx.saved_tensors
        of_x = of_weight = of_bias = of_left = of_right = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ torch.addmm(weight, left, right)
        if ctx.needs_input_grad[1]:
            of_weight = gradient.T @ x
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum(0)
        if ctx.needs_input_grad[3]:
            of_left = gradient.T @ (x @ right.T)
        if ctx.needs_input_grad[4]:
            of_right = (gradient @ left).T @ x
        return of_x, of_weight, of_bias, of_left, of_right

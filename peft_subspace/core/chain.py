"""The algebra of a chain of matrices: its product, its narrowest joint, what it costs to apply."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def multiply(factors: Sequence[Tensor]) -> Tensor:
    """Product of a chain, `(out, in, *kernel)`; at most one factor may carry kernel axes."""
    joint = kernel_at(factors)
    if 0 < joint < len(factors) - 1:  # its inputs first, for axes change places there, which takes copies
        return multiply([*factors[:joint], multiply(factors[joint:])])
    product = factors[0]
    for factor in factors[1:]:
        factor = factor.to(product.dtype)  # autocast lowers the dtype of products
        if product.ndim > 2:  # (a, b, *kernel) · (b, c): contract b and put c in its place
            product = torch.tensordot(product, factor, dims=([1], [0])).movedim(-1, 1)
        else:
            flat = product @ factor.flatten(1)  # `tensordot` takes twice the calls
            product = flat if factor.ndim == 2 else flat.unflatten(1, factor.shape[1:])
    return product


def split(factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Multiply a chain up into two factors, `(out, r)` and `(r, in, *kernel)`, at its narrowest joint.

    In a convolution's chain the kernel stays on the right, so that the left factor is a matrix.
    """
    joint = narrowest(factors)
    if joint == 0:  # nothing stands left of the kernel, or the chain is one matrix
        eye = torch.eye(factors[0].shape[0], dtype=factors[0].dtype, device=factors[0].device)
        return eye, multiply(factors)
    return multiply(factors[:joint]), multiply(factors[joint:])


def chain_cost(factors: Sequence[Tensor]) -> int:
    """Multiplications to send one row through a chain, one factor after the other."""
    return sum(factor.numel() for factor in factors)


def product_cost(factors: Sequence[Tensor]) -> int:
    """Multiplications to `split` a chain of matrices."""
    joint = narrowest(factors)
    halves = factors[:joint], factors[joint:]
    return sum(half[0].shape[0] * factor.numel() for half in halves for factor in half[1:])


def narrowest_rank(factors: Sequence[Tensor]) -> int:
    """Rank of the pair that `split` makes of a chain."""
    return factors[narrowest(factors)].shape[0]


def narrowest(factors: Sequence[Tensor]) -> int:
    """Number of factors left of the narrowest joint; 0 if no joint leaves the kernel on its right."""
    ranks = [factor.shape[0] for factor in factors[1 : kernel_at(factors) + 1]]
    return 1 + ranks.index(min(ranks)) if ranks else 0


def kernel_at(factors: Sequence[Tensor]) -> int:
    """Position of the factor that carries the kernel axes, or of the last one."""
    return next((i for i, factor in enumerate(factors) if factor.ndim > 2), len(factors) - 1)

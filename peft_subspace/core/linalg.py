"""Linear algebra on plain tensors: pure functions, no modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Multiply the axis `mode` of `tensor`, of size `rank`, by `matrix` of shape `(dim, rank)`."""
    matrix = matrix.to(tensor.dtype)  # autocast lowers the dtype of products
    return torch.tensordot(tensor, matrix, dims=([mode], [1])).movedim(-1, mode)


def block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """Place tensors of equal order along the diagonal of a larger one, zeros elsewhere."""
    shape = [sum(sizes) for sizes in zip(*(block.shape for block in blocks), strict=True)]
    result = blocks[0].new_zeros(shape)
    start = [0] * len(shape)
    for block in blocks:
        result[tuple(slice(s, s + size) for s, size in zip(start, block.shape, strict=True))] = block
        start = [s + size for s, size in zip(start, block.shape, strict=True)]
    return result

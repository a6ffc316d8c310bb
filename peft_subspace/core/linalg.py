"""Linear algebra on plain tensors, and generators to draw them with: pure functions, no modules."""

from __future__ import annotations

import hashlib
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


def local_generator(seed: int | None, module_name: str, adapter_name: str) -> torch.Generator:
    """Generator for one adapter on one module: reads the global seed where none is set, and draws nothing."""
    seed = torch.initial_seed() if seed is None else seed
    digest = hashlib.blake2b(f"{seed}/{module_name}/{adapter_name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

"""Linear algebra on plain tensors, and generators to draw them with: pure functions, no modules."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Multiply the axis `mode` of `tensor`, of size `rank`, by `matrix` of shape `(dim, rank)`."""
    matrix = matrix.to(tensor.dtype)  # autocast lowers the dtype of products
    if matrix.numel() == 1:  # as of the kernel modes of a 1×1 convolution
        return tensor * matrix.reshape(())
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


def truncated_svd(
    matrix: Tensor, rank: int, *, exact: bool = False, oversampling: int = 16, iterations: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading `rank` singular triples of a matrix `(m, n)`: `U (m, rank)`, `S (rank,)`, `Vh (rank, n)`, fp32.

    A random block of `rank + oversampling` vectors goes through `iterations` steps of subspace iteration,
    orthonormalised at every product; the generator is local and always the same. Where the block would be
    more than half of the matrix, the SVD is exact.

    Args:
        matrix: Matrix to decompose.
        rank: Number of triples, at most `min(m, n)`.
        exact: Whether to use `torch.linalg.svd` at any size.
        oversampling: Vectors beyond `rank`.
        iterations: Steps of subspace iteration.

    Reference:
        Halko, Martinsson and Tropp, "Finding Structure with Randomness" (arXiv 0909.4061), algorithms 4.4
        and 5.1.
    """
    matrix = matrix.float()
    block = rank + oversampling
    if exact or 2 * block > min(matrix.shape):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U[:, :rank].contiguous(), S[:rank].contiguous(), Vh[:rank].contiguous()
    generator = torch.Generator().manual_seed(0)
    Q = torch.randn(matrix.shape[1], block, generator=generator).to(matrix.device)
    for _ in range(iterations):
        Q = orthonormal(matrix.T @ orthonormal(matrix @ Q))
    Q = orthonormal(matrix @ Q)
    U, S, Vh = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    return (Q @ U)[:, :rank].contiguous(), S[:rank].contiguous(), Vh[:rank].contiguous()


def orthonormal(matrix: Tensor) -> Tensor:
    """Orthonormal columns that span those of `matrix`, `(m, n)` with `m ≥ n`."""
    return torch.linalg.qr(matrix).Q

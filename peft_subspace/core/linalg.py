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


def local_generator(seed: int | None, module_name: str, part: int | str) -> torch.Generator:
    """Generator for a part of what a module gets: reads the global seed where none is set, draws nothing."""
    seed = torch.initial_seed() if seed is None else seed
    digest = hashlib.blake2b(f"{seed}/{module_name}/{part}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def product_svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of `L R` by its factors `(m, r)` and `(r, n)`, in fp64: `min(r, m, n)` triples."""
    one, two = torch.linalg.qr(left.double()), torch.linalg.qr(right.double().T)
    U, S, Vh = torch.linalg.svd(one.R @ two.R.T, full_matrices=False)
    return one.Q @ U, S, Vh @ two.Q.T


def truncated_svd(
    matrix: Tensor, rank: int, *, exact: bool = False, oversampling: int = 16, iterations: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading `rank` singular triples of a matrix `(m, n)`: `U (m, rank)`, `S (rank,)`, `Vh (rank, n)`, fp32.

    A random block of `rank + oversampling` vectors goes through `iterations` steps of subspace iteration,
    orthonormalized at every product; the generator is local and always the same. Where the block would be
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


def draw_orthonormal_(basis: Tensor, generator: torch.Generator) -> None:
    """Fill a matrix `(m, r)`, in place, with random orthonormal columns."""
    basis.copy_(orthonormal(torch.randn(basis.shape, generator=generator)))


def smallest_triples(
    matrix: Tensor, rank: int, *, iterations: int = 16, tolerance: float = 1e-13
) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest `rank` singular triples of a matrix `(m, n)`, fp32: `U (m, rank)`, `S`, `Vh (rank, n)`.

    Block inverse iteration in float64: one LU factorization, then `X ← A⁻¹ A⁻ᵀ X`, orthonormalized at every
    product, on `2 · rank + 14` vectors until `‖A v − s u‖` and `‖Aᵀ u − s v‖` are below `tolerance · ‖A‖_F`
    for every triple. From random vectors this is fast where the smallest values lie apart, as in most square
    matrices. Where they lie close together, as in matrices that are not square, it starts from the
    eigenvectors of `AᵀA`, which one step then rids of the squared condition number. A matrix that is not
    square is first brought to its triangle. The generator is local and always the same. Where the block would
    be more than an eighth of the matrix, or neither start converges, the SVD is a full one in float64.

    Raises:
        ValueError: If the matrix is zero or not finite.

    Reference:
        Golub and Van Loan, "Matrix Computations", 8.2 (orthogonal iteration), on the inverse.
    """
    A = matrix.double()
    norm = A.norm()
    if not torch.isfinite(norm):
        raise ValueError("the weight has NaN or infinite values; load a sound checkpoint")
    if norm == 0:
        raise ValueError("the weight is zero, so it has no singular vectors; load it first, or exclude it")
    if A.shape[0] < A.shape[1]:
        U, S, Vh = smallest_triples(A.T, rank, iterations=iterations, tolerance=tolerance)
        return Vh.T.contiguous(), S, U.T.contiguous()
    found, block = None, 2 * rank + 14
    if 8 * block <= A.shape[1]:
        tall = A.shape[0] > A.shape[1]
        R = torch.linalg.qr(A, mode="r").R if tall else A
        factors = _factorize(R)
        for start in (_eigenvectors,) if tall else (_random_vectors, _eigenvectors):
            found = _inverse_iteration(R, factors, start(R, block), rank, iterations, tolerance * norm)
            if found is not None:
                break
        if found is not None and tall:
            left, S, Vh = found
            # A v / s is inaccurate for the tiniest s; they need the rest of the QR.
            found = (A @ Vh.T / S if S.min() > 1e-6 * norm else torch.linalg.qr(A).Q @ left, S, Vh)
    U, S, Vh = found or torch.linalg.svd(A, full_matrices=False)
    return U[:, -rank:].float().contiguous(), S[-rank:].float(), Vh[-rank:].float().contiguous()


def _random_vectors(A: Tensor, block: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return orthonormal(torch.randn(len(A), block, generator=generator, dtype=A.dtype).to(A.device))


def _eigenvectors(A: Tensor, block: int) -> Tensor:
    """Eigenvectors of the smallest eigenvalues of `AᵀA`."""
    return torch.linalg.eigh(A.T @ A).eigenvectors[:, :block]


def _inverse_iteration(
    A: Tensor, factors: tuple[Tensor, Tensor], X: Tensor, rank: int, iterations: int, tolerance: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Smallest triples of a square matrix, given its LU; None if they do not converge."""
    for _ in range(iterations):
        Z = orthonormal(torch.linalg.lu_solve(*factors, X, adjoint=True))
        X = orthonormal(torch.linalg.lu_solve(*factors, Z))
        U, S, Vh = torch.linalg.svd(Z.T @ A @ X)
        left, S, right = (Z @ U)[:, -rank:], S[-rank:], X @ Vh[-rank:].T
        residual = torch.stack([(A @ right - left * S).norm(dim=0), (A.T @ left - right * S).norm(dim=0)])
        if residual.max() < tolerance:
            return left, S, right.T
    return None


def _factorize(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """LU factorization of a matrix that may be singular; pivots of zero are moved by a rounding error."""
    LU, pivots, _ = torch.linalg.lu_factor_ex(matrix)
    diagonal = LU.diagonal()
    tiny = diagonal.abs().max() * torch.finfo(matrix.dtype).eps
    diagonal.copy_(torch.where(diagonal.abs() < tiny, tiny, diagonal))
    return LU, pivots

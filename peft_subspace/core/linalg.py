"""Linear algebra on plain tensors, and generators to draw them with: pure functions, no modules."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_BLOCKS_FROM = 512
"""Columns from which a product in blocks is faster than one that computes everything twice."""


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


def gram(matrix: Tensor) -> Tensor:
    """`XᵀX (d, d)` of `X (N, d)`; of two blocks off the diagonal, which are equal, one is multiplied."""
    if matrix.shape[1] < _BLOCKS_FROM:
        return matrix.T @ matrix
    left, right = matrix.tensor_split(2, 1)
    cross = left.T @ right
    return torch.cat([torch.cat([gram(left), cross], 1), torch.cat([cross.T, gram(right)], 1)])


def leading_rows(matrix: Tensor, count: int) -> Tensor:
    """Leading right singular vectors of a matrix `(m, n)` as rows `(count, n)`; zeros where it has fewer."""
    rows = truncated_svd(matrix, min(count, *matrix.shape))[2]
    return torch.cat([rows, rows.new_zeros(count - len(rows), rows.shape[1])])


def orthonormal(matrix: Tensor) -> Tensor:
    """Orthonormal columns that span those of `matrix`, `(m, n)` with `m ≥ n`."""
    return torch.linalg.qr(matrix).Q


def column_basis(matrix: Tensor) -> Tensor:
    """Orthonormal basis `(m, k)` of the columns of a matrix, without rounding: 1e-6 of the largest."""
    U, S, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    return U[:, : max(1, int((S / S[0] > 1e-6).sum()))].to(matrix)


def complement(matrix: Tensor) -> Tensor:
    """Orthonormal basis `(m, m − k)` of what is orthogonal to the columns of a matrix `(m, k)`."""
    return torch.linalg.qr(matrix, mode="complete").Q[:, matrix.shape[1] :]


def correction(residual: Tensor, squares: Tensor, rest: Tensor, values: Tensor) -> Tensor:
    """`Z` for which `X + Y Z` are eigenvectors of `AᵀA` to second order, given some to first order.

    The residual comes of products with `A` alone, and so is free of what the Gram matrix has lost.

    Args:
        residual: `Aᵀ(A X) − X Λ`, `(n, p)`.
        squares: The diagonal of `Λ`, `(p,)`: squared norms of the columns of `A X`.
        rest: The other eigenvectors `Y (n, n − p)`.
        values: Their eigenvalues.
    """
    return rest.T @ residual / (squares - values[:, None])


def draw_orthonormal_(basis: Tensor, generator: torch.Generator) -> None:
    """Fill a matrix `(m, r)`, in place, with random orthonormal columns."""
    basis.copy_(orthonormal(torch.randn(basis.shape, generator=generator)))


def smallest_triples(
    matrix: Tensor, rank: int, *, iterations: int = 16, tolerance: float = 1e-13
) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest `rank` singular triples of a matrix `(m, n)`, fp32: `U (m, rank)`, `S`, `Vh (rank, n)`.

    Found on blocks of `2 · rank + 14` vectors, in float64, until `‖A v − s u‖` and `‖Aᵀ u − s v‖` are below
    `tolerance · ‖A‖_F` for every triple. In a square matrix the smallest values lie apart, so that inverse
    iteration from random vectors is fast: one LU factorization, then `X ← A⁻¹ A⁻ᵀ X`. In one that is not
    square they lie close together and far from zero, so that eigenvectors of `AᵀA` in single precision come
    near, and corrections in double precision do the rest. Where that does not converge, inverse iteration
    starts from eigenvectors of `AᵀA` in float64, which one step rids of the squared condition number. The
    generator is local and always the same. Where the block would be more than an eighth of the matrix, or
    nothing converges, the SVD is a full one in float64.

    Raises:
        ValueError: If the matrix is zero or not finite.

    Reference:
        Golub and Van Loan, "Matrix Computations", 8.2 (orthogonal iteration), on the inverse; Davidson (J.
        Comput. Phys. 17, 1975) for the corrections.
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
        if A.shape[0] > A.shape[1]:
            found = _corrected(A, block, rank, iterations, tolerance * norm)
        found = found or _iterated(A, block, rank, iterations, tolerance * norm)
    U, S, Vh = found or torch.linalg.svd(A, full_matrices=False)
    return U[:, -rank:].float().contiguous(), S[-rank:].float(), Vh[-rank:].float().contiguous()


Triples = tuple[Tensor, Tensor, Tensor]


def _corrected(A: Tensor, block: int, rank: int, iterations: int, tolerance: Tensor) -> Triples | None:
    """Smallest triples of a tall matrix, from eigenvectors in single precision; None if none converge."""
    single, before = A.float(), torch.inf
    values, vectors = torch.linalg.eigh(single.T @ single)
    X, rest = vectors[:, :block].double(), vectors[:, block:]
    for _ in range(iterations):
        left, S, Vh = torch.linalg.svd(A @ (X := orthonormal(X)), full_matrices=False)
        X = X @ Vh.T
        residual = (left.T.contiguous() @ A).T - X * S
        largest = float(residual[:, -rank:].norm(dim=0).max())
        if largest < tolerance:
            return left, S, X.T
        if largest > before / 4:
            return None
        before = largest
        step = correction((residual * S).float(), S.float().square(), rest, values[block:])
        X = X + (rest @ step.nan_to_num(0.0, 0.0, 0.0)).double()
    return None


def _iterated(A: Tensor, block: int, rank: int, iterations: int, tolerance: Tensor) -> Triples | None:
    """Smallest triples by inverse iteration; None if no start converges."""
    tall = A.shape[0] > A.shape[1]
    R = torch.linalg.qr(A, mode="r").R if tall else A
    factors, found = _factorize(R), None
    for start in (_eigenvectors,) if tall else (_random_vectors, _eigenvectors):
        found = found or _inverse_iteration(R, factors, start(R, block), rank, iterations, tolerance)
    if found is None or not tall:
        return found
    left, S, Vh = found
    # A v / s is inaccurate for the tiniest s; they need the rest of the QR.
    return A @ Vh.T / S if S.min() > 1e-6 * A.norm() else torch.linalg.qr(A).Q @ left, S, Vh


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
        AX = A @ X
        U, S, Vh = torch.linalg.svd(Z.T @ AX)
        left, S, right = (Z @ U)[:, -rank:], S[-rank:], Vh[-rank:] @ X.T
        first, second = AX @ Vh[-rank:].T - left * S, left.T.contiguous() @ A - right * S[:, None]
        if max(first.norm(dim=0).max(), second.norm(dim=1).max()) < tolerance:
            return left, S, right
    return None


def _factorize(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """LU factorization of a matrix that may be singular; pivots of zero are moved by a rounding error."""
    LU, pivots, _ = torch.linalg.lu_factor_ex(matrix)
    diagonal = LU.diagonal()
    tiny = diagonal.abs().max() * torch.finfo(matrix.dtype).eps
    diagonal.copy_(torch.where(diagonal.abs() < tiny, tiny, diagonal))
    return LU, pivots

"""Leading singular directions of a matrix, and projections onto a few directions or away from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_subspace.core.linalg import complement, correction, orthonormal
from peft_subspace.core.modes import is_transformed

_SMALLEST = 1e-6
"""Singular values below this part of the largest are lost in the Gram matrix, which squares them."""

_CORRECTED = 1e-3
"""A correction of this norm leaves an error of its square, 1e-6, in all directions together."""

_ROUNDED = 2e-6
"""What rounding may leave of a direction on the wrong side of the cut."""


def singular_bases(matrix: Tensor, count: int, outside: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    """For either side of a matrix `(m, n)`: a basis of `count` leading singular directions, or of the rest.

    In single precision where that finds the directions to 1e-6, which is told by how far one correction of
    them goes; else by `singular_vectors`.

    Args:
        matrix: Matrix to decompose.
        count: Number `k` of leading directions.
        outside: Whether to return the complement, `(m, m − k)` and `(n, n − k)`, of the left and of the right
            ones.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return singular_bases(matrix.T, count, outside[::-1])[::-1]
    matrix = matrix.cpu() if matrix.device.type == "mps" else matrix  # mps has no decompositions
    found = _single_precision(matrix, count)
    if found is None:
        left, right = singular_vectors(matrix, count)
        return complement(left) if outside[0] else left, complement(right) if outside[1] else right
    leading, rest = found
    image = matrix.T @ leading
    return rest if outside[0] else leading, complement(image) if outside[1] else orthonormal(image)


def _single_precision(matrix: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """Leading left singular vectors and the others; None where single precision is not enough."""
    products = (
        "less" if torch.is_autocast_enabled(matrix.device.type) else torch.get_float32_matmul_precision()
    )
    if matrix.dtype != torch.float32 or products != "highest":
        return None
    matrix = matrix.clone()  # kernels round by alignment, and weights that are read from a file lie anywhere
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    rest, leading = vectors.tensor_split([len(values) - count], dim=1)
    image, values = matrix.T @ leading, values[: len(values) - count]
    squares = image.square().sum(0)
    step = correction(matrix @ image - leading * squares, squares, rest, values)
    sizes = (squares * squares.mean()).sqrt() / len(matrix) ** 0.5  # of what is rounded in an inner product
    rounded = torch.finfo(matrix.dtype).eps * (sizes / (squares - values[:, None])).norm()
    if rounded < _ROUNDED * count**0.5 and step.norm() < _CORRECTED:
        return leading + rest @ step, rest - leading @ step.T
    return None


def singular_vectors(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Orthonormal bases `(m, count)`, `(n, count)` of the leading left and right singular vectors.

    From the eigenvectors of the smaller Gram matrix in double precision: several times faster than an SVD in
    fp32, and closer, for there close singular values on both sides of the cut mix what is protected with what
    is not. Where singular values that count all but vanish, it is an SVD in double precision.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return singular_vectors(matrix.T, count)[::-1]
    matrix = (matrix.cpu() if matrix.device.type == "mps" else matrix).double()  # mps has no float64
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    if count and values[-count] <= _SMALLEST**2 * values[-1]:
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :count], right[:count].T
    left = vectors[:, len(vectors) - count :].flip(1)
    return left, orthonormal(matrix.T @ left)


def project(matrix: Tensor, basis: Tensor, within: bool, *, rows: bool = False) -> Tensor:
    """`P M (d, c)` or `(I − P) M` for the projection `P = B Bᵀ` of an orthonormal basis `B (d, k)`.

    With `rows` it is `M P (c, d)` or `M (I − P)`. The result is contiguous, as if it came from a file.
    """
    # a compiler chooses layouts itself, and tracing a function of one's own makes it warn
    plain = torch.compiler.is_compiling() or is_transformed()
    formula = _project if plain else _Projection.apply
    result: Tensor = formula(matrix, basis, within, rows)
    return result


def _project(matrix: Tensor, basis: Tensor, within: bool, rows: bool) -> Tensor:
    if rows:
        coordinates = matrix @ basis
        return coordinates @ basis.T if within else torch.addmm(matrix, coordinates, basis.T, alpha=-1)
    coordinates = (matrix.T @ basis).T
    return basis @ coordinates if within else torch.addmm(matrix, basis, coordinates, alpha=-1)


class _Projection(torch.autograd.Function):
    """`_project` with its gradient, which is the same projection.

    Autograd would take its two products in another memory layout, in which thin matrices need up to twice
    the time.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, basis: Tensor, within: bool, rows: bool) -> Tensor:
        ctx.save_for_backward(basis)
        ctx.within, ctx.rows = within, rows
        return _project(matrix, basis, within, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (basis,) = ctx.saved_tensors
        return project(gradient, basis, ctx.within, rows=ctx.rows), None, None, None

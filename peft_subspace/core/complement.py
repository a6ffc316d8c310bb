r"""Orthogonal complements of `k` directions in `O(d k)` memory: pure functions on tensors.

For orthonormal `H (d, k)` there is a symmetric orthogonal matrix `Q = I − Y Yᵀ`, a block reflection with
`YᵀY = 2I`, whose first `k` columns span `H`. Its other columns are an orthonormal basis of the complement, so
that `Y (d, k)` stands for `H⊥ (d, d − k)`. It is the compact WY form of `k` Householder reflections with the
triangle in the middle absorbed.

Reference:
    Schreiber and Parlett, "Block Reflectors: Theory and Computation" (SIAM J. Numer. Anal. 25, 1988).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_subspace.core.linalg import complement, orthonormal
from peft_subspace.core.projection import project


@dataclass(frozen=True)
class Side:
    """Directions that are kept in the narrower of two forms, `(d, min(k, d − k))`: they or their complement.

    Attributes:
        size: Dimension `d` of the space.
        count: Number `k` of directions.
        reflects: Whether the kept basis, of the directions or of their complement, is kept as a reflection.
    """

    size: int
    count: int
    reflects: bool

    @property
    def by_complement(self) -> bool:
        """Whether the complement is kept, which is narrower then."""
        return 2 * self.count >= self.size

    def keep(self, basis: Tensor) -> Tensor:
        """Tensor to keep, given the narrower basis: of the directions to protect, or of their complement."""
        return reflection(basis) if self.reflects else basis

    def outside(self, kept: Tensor, matrix: Tensor, *, rows: bool) -> Tensor:
        """`(I − P) M` for a matrix `(d, c)`, or `M (I − P)` for one `(c, d)`; not for reflections."""
        return project(matrix, kept, self.by_complement, rows=rows)

    def lift(self, kept: Tensor, coordinates: Tensor) -> Tensor:
        """Vectors `(d, c)` with the given coordinates `(d − k, c)` in the complement."""
        return kept @ coordinates if self.by_complement else lift(kept, coordinates)

    def inside(self, kept: Tensor, matrix: Tensor) -> Tensor:
        """`P M` for a matrix `(d, c)`, in double precision on the way."""
        return project(matrix.double(), self.directions(kept), True).to(matrix)

    def directions(self, kept: Tensor) -> Tensor:
        """The directions `(d, k)`, orthonormal in double precision."""
        kept = kept.double()
        if self.reflects:
            kept = reflect(kept, torch.eye(*kept.shape, dtype=kept.dtype, device=kept.device))
        kept = orthonormal(kept)
        return complement(kept) if self.by_complement else kept


def reflection(leading: Tensor) -> Tensor:
    """`Y (d, k)` of the block reflection whose first `k` columns span the orthonormal `H (d, k)`.

    With the polar factor `S` of the first `k` rows of `H`, `(I − Y Yᵀ) H = −E₁ S`.
    """
    count = leading.shape[1]
    left, cosines, right = torch.linalg.svd(leading[:count])
    shifted = leading.clone()
    shifted[:count] += left @ right
    return shifted @ (right.T / (1 + cosines).sqrt())


def lift(reflector: Tensor, coordinates: Tensor) -> Tensor:
    """`H⊥ Z (d, c)` from coordinates `Z (d − k, c)`, by the reflection that stands for `H⊥`."""
    k = reflector.shape[1]
    return torch.addmm(F.pad(coordinates, (0, 0, k, 0)), reflector, reflector[k:].T @ coordinates, alpha=-1)


def reflect(reflector: Tensor, matrix: Tensor) -> Tensor:
    """`(I − Y Yᵀ) M`."""
    return torch.addmm(matrix, reflector, reflector.T @ matrix, alpha=-1)

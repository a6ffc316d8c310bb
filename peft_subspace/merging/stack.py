"""The updates of several sources on one weight, `τ_t = L_t R_t`, and what can be told from their factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from peft_subspace.core.linalg import product_svd

_SUPPORT = 1e-5
"""Part of the largest singular value below which a direction counts as rounding."""


class Stack:
    """Updates `τ_t (m, n)` of one weight, as factors `L_t (m, r_t)` and `R_t (r_t, n)`.

    A convolution's kernel is part of `n`.

    Args:
        lefts: The left factors.
        rights: The right factors.
    """

    def __init__(self, lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> None:
        self.lefts, self.rights = list(lefts), list(rights)

    def __len__(self) -> int:
        return len(self.lefts)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight."""
        return len(self.lefts[0]), self.rights[0].shape[1]

    @property
    def ranks(self) -> list[int]:
        """Number of columns of each left factor."""
        return [left.shape[1] for left in self.lefts]

    def left(self) -> Tensor:
        """`[L_1 … L_T]`, `(m, R)`."""
        return torch.cat(self.lefts, dim=1)

    def right(self, coefficients: Tensor | None = None) -> Tensor:
        """`[c_1 R_1; …; c_T R_T]`, `(R, n)`, for coefficients of the sources or of all `R` components."""
        right = torch.cat(self.rights)
        if coefficients is None:
            return right
        if len(coefficients) == len(self) and len(self) != len(right):
            ranks = torch.tensor(self.ranks, device=coefficients.device)
            coefficients = coefficients.repeat_interleave(ranks)
        return coefficients[:, None].to(right) * right

    def gram(self) -> Tensor:
        """Inner products `⟨τ_i, τ_j⟩ = Σ (L_iᵀ L_j) ⊙ (R_i R_jᵀ)`, `(T, T)`."""
        if sum(self.ranks) <= min(self.shape):  # in one product, whose blocks are summed
            left, right = self.left(), self.right()
            products = (left.T @ left) * (right @ right.T)
            owner = torch.arange(len(self), device=left.device).repeat_interleave(
                torch.tensor(self.ranks, device=left.device)
            )
            sums = products.new_zeros(len(self), len(owner)).index_add_(0, owner, products)
            return sums.new_zeros(len(self), len(self)).index_add_(1, owner, sums)
        rows = [
            torch.stack([((a.T @ c) * (b @ d.T)).sum() for c, d in zip(self.lefts, self.rights, strict=True)])
            for a, b in zip(self.lefts, self.rights, strict=True)
        ]
        return torch.stack(rows)

    def dense(self, source: int) -> Tensor:
        """`τ_t` of one source."""
        return self.lefts[source] @ self.rights[source]

    def tiles(self, count: int) -> Iterator[tuple[slice, Tensor]]:
        """Rows of all updates, `(T, count, n)`, a few at a time."""
        for start in range(0, self.shape[0], count):
            rows = slice(start, min(start + count, self.shape[0]))
            pairs = zip(self.lefts, self.rights, strict=True)
            yield rows, torch.stack([left[rows] @ right for left, right in pairs])

    def aligned(self) -> tuple[Tensor, Tensor]:
        """`U (m, k)` and coordinates `Uᵀ τ_t`, `(T, k, n)`, in the left singular basis of `[τ_1 … τ_T]`.

        Directions that are rounding are left out.

        Reference:
            Stoica et al., "Model Merging with SVD to Tie the Knots" (arXiv 2410.19735).
        """
        basis, triangle = torch.linalg.qr(self.left().double())
        starts = [0, *torch.tensor(self.ranks).cumsum(0).tolist()]
        pairs = zip(starts, starts[1:], self.rights, strict=False)
        parts = torch.stack([triangle[:, a:b] @ right.double() for a, b, right in pairs])
        values, vectors = torch.linalg.eigh(torch.einsum("tan,tbn->ab", parts, parts))
        kept = values > (_SUPPORT**2) * values[-1].clamp(min=torch.finfo(values.dtype).tiny)
        vectors = vectors[:, kept].flip(1)
        dtype = self.lefts[0].dtype
        return (basis @ vectors).to(dtype), torch.einsum("ak,tan->tkn", vectors, parts).to(dtype)


def singular(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of `L R` by its factors: `U (m, k)`, `σ (k,)`, `Vh (k, n)` without what is rounding."""
    U, S, Vh = product_svd(left, right)  # noqa: N806 - as torch names them
    kept = _SUPPORT * S.max().clamp(min=torch.finfo(S.dtype).tiny) < S
    return U[:, kept].to(left.dtype), S[kept].to(left.dtype), Vh[kept].to(left.dtype)

r"""Effort: `ΔW = U S Vh − U0 S0 Vh0`, where `U0 S0 Vh0` are the smallest singular triples of the base weight.

The adapted weight is then `W + ΔW = W_kept + U S Vh`, where `W_kept` has all larger triples. The changes
`U_change = U − U0`, `S_change = S − S0` and `Vh_change = Vh − Vh0` are trained; they start at zero, and

    ΔW = [U_change S0 + U S_change, U0 S0] · [Vh; Vh_change],

so `ΔW` is exactly zero at first, nothing cancels later, and weight decay pulls toward the base weight.

A convolution's kernel is part of the input axis: `Vh (r, in / groups, *kernel)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peft_subspace.core.delta import Combined, Delta, ReadWeight
from peft_subspace.core.linalg import draw_orthonormal_, product_svd, smallest_triples
from peft_subspace.core.shapes import ModuleSpec
from peft_subspace.methods.effort.config import EffortConfig


class EffortDelta(Delta):
    """Parameters `U_change` `(out, r)`, `S_change` `(r,)` and `Vh_change` `(r, in, *kernel)`, all fp32.

    The buffers `U0`, `S0` and `Vh0` hold the initial triples. They are saved with the adapter, because
    the smallest singular vectors differ between machines.

    Reference:
        Yan et al. (arXiv 2411.15633).
    """

    full_precision: ClassVar[tuple[str, ...]] = ("U_change", "S_change", "Vh_change")
    needs_weight: ClassVar[bool] = True

    U_change: nn.Parameter
    S_change: nn.Parameter
    Vh_change: nn.Parameter
    U0: Tensor
    S0: Tensor
    Vh0: Tensor

    def __init__(self, config: EffortConfig, spec: ModuleSpec) -> None:
        super().__init__(config, spec)
        shape, rank = spec.shape, spec.rank
        self.reads_weight = config.init_weights is True
        self._range: Range | None = None
        sizes = {"U": (shape.out_features, rank), "S": (rank,), "Vh": (rank, *shape.dims[1:])}
        for name, size in sizes.items():
            self.register_parameter(f"{name}_change", nn.Parameter(torch.empty(size, dtype=torch.float32)))
            self.register_buffer(f"{name}0", torch.empty(size, dtype=torch.float32))

    @property
    def tail(self) -> tuple[Tensor, Tensor, Tensor]:
        """The trained triples `U`, `S`, `Vh` as they are now."""
        return self.U0 + self.U_change, self.S0 + self.S_change, self.Vh0 + self.Vh_change

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return `[U_change S0 + U S_change, U0 S0]` and `[Vh; Vh_change]`."""
        U, Vh = self.U0 + self.U_change, self.Vh0 + self.Vh_change
        left = [self.U_change * self.S0 + U * self.S_change, self.U0 * self.S0]
        return torch.cat(left, dim=1), torch.cat([Vh, self.Vh_change])

    def reset_parameters(self, init_weights: bool | str, generator: torch.Generator) -> None:
        """Start everything at zero; with `init_weights=False`, at equal triples and changes as large."""
        for tensor in (*self.parameters(), *self.buffers()):
            tensor.data.zero_()
        if init_weights is not False:
            return
        draw_orthonormal_(self.U0, generator)
        draw_orthonormal_(self.Vh0.flatten(1).T, generator)
        # The update has seven terms of equal norm: three of S0, and four, as all vectors are √2 long, of S.
        rows, columns = self.shape.out_features, self.shape.columns
        self.S0.fill_(self.random_std * (rows * columns / (7 * len(self.S0))) ** 0.5)
        self.U_change.data.normal_(0.0, rows**-0.5, generator=generator)
        self.Vh_change.data.normal_(0.0, columns**-0.5, generator=generator)
        self.S_change.data.normal_(generator=generator).mul_(self.S0)

    def check_weight(self, weight: Tensor) -> None:
        """Raise unless the weight has singular vectors.

        Raises:
            ValueError: If it is zero or not finite.
        """
        super().check_weight(weight)
        if not weight.any():
            raise ValueError(
                "the weight is zero, which has no singular vectors; load a checkpoint, or exclude it"
            )

    def reset_from_weight(self, weight: Tensor) -> None:
        """Take the smallest singular triples of the weight.

        Raises:
            ValueError: If the weight is zero or not finite.
        """
        U, S, Vh = smallest_triples(weight.flatten(1), len(self.S0))
        self.U0.copy_(U)
        self.S0.copy_(S)
        self.Vh0.copy_(Vh.view_as(self.Vh0))
        self._range = None

    def penalty(self, weight: ReadWeight) -> dict[str, Tensor]:
        """Both losses by name, those that have a weight."""
        losses = {"orthogonality": self.orthogonality_loss, "energy": self.energy_loss}
        return {
            name: losses[name](lambda: weight().flatten(1)) for name, w in self.penalty_weights.items() if w
        }

    def orthogonality_loss(self, weight: ReadWeight) -> Tensor:
        """`‖ÛᵀÛ − I‖² + ‖V̂ᵀV̂ − I‖²` with `Û = [U_kept, U]` and `V̂` likewise, `min(m, n)` columns each.

        `weight` returns the base weight `(m, n)`, the kernel folded into `n`. It is called once, and only
        where `m ≠ n`: on the longer side the kept vectors do not span the whole complement of the trained
        ones, so an orthonormal basis of the weight's range there is held, or of what lies beyond the range if
        that is narrower. It has `max(m, n) · min(m, n, |m − n|)` numbers and is not saved: a QR of the weight
        gives it again.
        """
        rows, columns = self.shape.out_features, self.shape.columns
        if rows != columns and self._range is None:
            matrix = weight() if rows > columns else weight().T
            self._range = Range.of(matrix, self.S0.dtype)
        left = _departure(self.U0, self.U_change, self._range if rows > columns else None)
        start, change = self.Vh0.flatten(1).T, self.Vh_change.flatten(1).T
        return left + _departure(start, change, self._range if rows < columns else None)

    def energy_loss(self, weight: ReadWeight) -> Tensor:
        """`|‖W + ΔW‖² − ‖W‖²| = |2 ⟨W, ΔW⟩ + ‖ΔW‖²|`, where `weight` returns the base weight `(m, n)`.

        At the kink, where `ΔW` changes nothing, as at initialization, the subgradient is zero.
        """
        L, R = (factor.flatten(1) for factor in self.factors())
        with torch.no_grad():
            W = weight().to(L.dtype)
            WR, LW = W @ R.T, L.T @ W
        # The value is ⟨L, W Rᵀ⟩, its gradients W Rᵀ and Lᵀ W; the weight itself need not stay for backward.
        inner = (L * WR).sum() + (R * LW).sum() - (L * WR).sum().detach()
        return (2 * inner + ((L.T @ L) * (R @ R.T)).sum()).abs()

    @classmethod
    def concatenate(cls, deltas: Sequence[EffortDelta], weights: Sequence[float]) -> Combined:
        """Put the triples side by side, `S` and `S0` weighted.

        If there are more than the weight has singular values, an SVD of the sum brings them down to that.
        """
        total = sum(len(delta.S0) for delta in deltas)
        if total > deltas[0].shape.full_rank:
            lefts, rights = zip(*(delta.factors() for delta in deltas), strict=True)
            weighted = [weight * left for weight, left in zip(weights, lefts, strict=True)]
            return cls.product(torch.cat(weighted, dim=1), torch.cat(rights), deltas)
        state = {}
        for name in ("U_change", "U0", "S_change", "S0", "Vh_change", "Vh0"):
            parts = [getattr(delta, name) for delta in deltas]
            if name[0] == "S":
                parts = [weight * part for weight, part in zip(weights, parts, strict=True)]
            state[name] = torch.cat(parts, dim=int(name[0] == "U"))
        return {"rank_pattern": total}, state

    @classmethod
    def product(cls, left: Tensor, right: Tensor, deltas: Sequence[EffortDelta]) -> Combined:
        """Triples of the product, all of it in `S_change`: `U0 S_change Vh0` with `S0 = 0`."""
        U, S, Vh = (t.float() for t in product_svd(left, right.flatten(1)))
        start = {"U0": U, "S0": torch.zeros_like(S), "Vh0": Vh.reshape(-1, *right.shape[1:])}
        changes = {f"{name[:-1]}_change": torch.zeros_like(tensor) for name, tensor in start.items()}
        return {"rank_pattern": len(S)}, {**start, **changes, "S_change": S}


@dataclass
class Range:
    """Range of a tall matrix `(m, n)`: an orthonormal `basis` of it, or of its complement."""

    basis: Tensor
    complement: bool

    @classmethod
    def of(cls, matrix: Tensor, dtype: torch.dtype) -> Range:
        """Take the narrower of the two bases, from a QR in float64."""
        m, n = matrix.shape
        complement = m < 2 * n
        Q = torch.linalg.qr(matrix.double(), mode="complete" if complement else "reduced").Q
        return cls((Q[:, n:] if complement else Q).to(dtype).contiguous(), complement)

    def norm_within(self, X: Tensor) -> Tensor:
        """Squared norm of the part of the columns of `X` that lies in the range."""
        self.basis = self.basis.to(X)
        inner = self.basis.T @ X
        return (X - self.basis @ inner if self.complement else inner).square().sum()


def _departure(start: Tensor, change: Tensor, all_triples: Range | None) -> Tensor:
    """`‖X̂ᵀX̂ − I‖²` of `X̂ = [X_kept, X]` with `X = start + change`, all but `change` orthonormal.

    The blocks are `XᵀX − I` and, twice, `X_keptᵀ X`, in which `start` drops out, so that nothing cancels.
    `all_triples` is the range of kept and trained ones together, `None` if that is the whole space.
    """
    change = change.to(start.dtype)  # a trainer may store parameters in less
    overlap = start.T @ change
    beyond = change - start @ overlap
    cross = beyond.square().sum() if all_triples is None else all_triples.norm_within(beyond)
    return (overlap + overlap.T + change.T @ change).square().sum() + 2 * cross

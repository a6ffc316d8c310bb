r"""Continual SVD: `ΔW`, such as `U_⊥ Z V_⊥ᵀ`, which leaves leading directions of `W (m, n)` alone, exactly.

With the `k` leading directions `U_h (m, k)`, `V_h (n, k)` of the weight's SVD and orthonormal complements
`U_⊥ (m, m − k)`, `V_⊥ (n, n − k)`, one of four constraints holds for all values of the trained tensors,
whatever the optimiser does with them:

=========  ==============================  =========================  ====================================
           what holds                      `r=None`                   `r`
=========  ==============================  =========================  ====================================
`both`     `U_hᵀ ΔW = 0`, `ΔW V_h = 0`     `U_⊥ Z V_⊥ᵀ`               `(I−P_U) B · A (I−P_V)`
`core`     `U_hᵀ ΔW V_h = 0`               `[U_⊥ U_h] [Z1; Z2 V_⊥ᵀ]`  `[(I−P_U) B1, B2] [A1; A2 (I−P_V)]`
`input`    `ΔW V_h = 0`                    `Z V_⊥ᵀ`                   `B · A (I−P_V)`
`output`   `U_hᵀ ΔW = 0`                   `U_⊥ Z`                    `(I−P_U) B · A`
=========  ==============================  =========================  ====================================

`P_U = U_h U_hᵀ`, `P_V = V_h V_hᵀ`. The forms without a rank reach every update that the constraint allows.

Of each side the narrower form is kept, `(d, min(k, d − k))`: for a given `r` an orthonormal basis of the head
or of the complement; else a basis of the complement, or the block reflection that stands for it
(`subspaces.py`). The file of `both` therefore takes, per weight and in numbers of 4 bytes,

    (m − k)(n − k)  or  r (m + n),  plus  m · min(k, m − k) + n · min(k, n − k) + 6.

A convolution's kernel is part of the input axis, `n = in / groups · kernel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from peft_subspace.base_weights.fingerprint import FINGERPRINT
from peft_subspace.core.delta import Delta
from peft_subspace.core.shapes import WeightShape
from peft_subspace.core.validation import invalid
from peft_subspace.methods.continual_svd.config import ContinualSVDConfig
from peft_subspace.methods.continual_svd.subspaces import (
    complement,
    lift,
    project,
    reflect,
    reflection,
    singular_vectors,
)


class ContinualSVDDelta(Delta):
    """Update outside protected directions; buffers `U` and `V` hold the two sides.

    All tensors are fp32: in bf16 the bases would not be orthonormal.

    Attributes:
        directions: Number `k` of protected directions.
        closed: Whether the task is finished, so that nothing of it trains.

    Raises:
        ValueError: If nothing would be left to train.

    Reference:
        Nayak et al. (arXiv 2504.07097); Farajtabar et al. (arXiv 1910.07104) for protecting inputs only.
    """

    reads_weight = True
    needs_weight = True
    on_embeddings = False
    full_precision: ClassVar[tuple[str, ...]] = ("Z", "Z1", "Z2", "A", "B", "A1", "A2", "B1", "B2")

    def __init__(
        self, config: ContinualSVDConfig, shape: WeightShape, rank: tuple[int | None, float]
    ) -> None:
        super().__init__(config, shape, rank)
        r, preserve = rank
        m, n = shape.out_features, shape.columns
        self.sizes, self.directions = (m, n), directions(preserve, min(m, n))
        self.constraint, self.low_rank, self.closed = config.constraint, r is not None, config.closed
        for name, sizes in self._trained_sizes(r).items():
            self.register_parameter(name, nn.Parameter(torch.empty(sizes, dtype=torch.float32)))
        for side, size in (("U", m), ("V", n)):
            if self._keeps(side):
                width = min(self.directions, size - self.directions)
                self.register_buffer(side, torch.zeros(size, width, dtype=torch.float32))
        self.register_buffer("fingerprint", torch.zeros(FINGERPRINT, dtype=torch.float32))

    def _trained_sizes(self, r: int | None) -> dict[str, tuple[int, int]]:
        (m, n), k, core = self.sizes, self.directions, self.constraint == "core"
        if r is not None:
            pairs = ("1", "2") if core else ("",)
            return {f"{name}{i}": size for i in pairs for name, size in (("B", (m, r)), ("A", (r, n)))}
        if core:
            return {"Z1": (m - k, n), "Z2": (k, n - k)}
        return {"Z": (m - k if self._keeps("U") else m, n - k if self._keeps("V") else n)}

    def _keeps(self, side: str) -> bool:
        """Whether directions of the outputs, `"U"`, or of the inputs, `"V"`, are protected."""
        return self.constraint != {"U": "input", "V": "output"}[side]

    def factors(self) -> tuple[Tensor, ...]:
        """Return the chain of the constraint and form, multiplied up where a side is kept as a reflection."""
        device = next(self.parameters()).device.type
        with torch.autocast(device, enabled=False):  # a projection in less than fp32 would leak
            *left, right = self._low_rank_chain() if self.low_rank else self._full_chain()
        return *left, right.unflatten(1, self.shape.dims[1:])

    def _low_rank_chain(self) -> tuple[Tensor, Tensor]:
        trained = self._trained()
        if self.constraint == "core":
            left = torch.cat([self._outside("U", trained["B1"]), trained["B2"]], dim=1)
            return left, torch.cat([trained["A1"], self._outside("V", trained["A2"])])
        left, right = trained["B"], trained["A"]
        left = self._outside("U", left) if self._keeps("U") else left
        return left, self._outside("V", right) if self._keeps("V") else right

    def _trained(self) -> dict[str, Tensor]:
        """Parameters in the precision of the bases, also where a trainer has stored them in less."""
        dtype = self.fingerprint.dtype
        return {name: parameter.to(dtype) for name, parameter in self.named_parameters()}

    def _full_chain(self) -> tuple[Tensor, ...]:
        trained = self._trained()
        if self.constraint == "core":
            rows = trained["Z1"], self._from_complement("V", trained["Z2"].T).T
            stacked = torch.cat(rows if self._is_complement("U") else rows[::-1])
            return (reflect(self.U, stacked),)
        middle = trained["Z"]
        left: tuple[Tensor, ...] = ()
        right: tuple[Tensor, ...] = ()
        if self._keeps("U"):
            if self._is_complement("U"):
                left = (self.U,)
            else:
                middle = lift(self.U, middle)
        if self._keeps("V"):
            if self._is_complement("V"):
                right = (self.V.T,)
            else:
                middle = lift(self.V, middle.T).T
        return *left, middle, *right

    def _is_complement(self, side: str) -> bool:
        """Whether a side is kept by its complement rather than by its head, which is wider then."""
        size = self.sizes[side == "V"]
        return 2 * self.directions >= size

    def _outside(self, side: str, matrix: Tensor) -> Tensor:
        """`(I − P_U) M` or `M (I − P_V)`, from an orthonormal basis of the head or of its complement."""
        basis, within = getattr(self, side), self._is_complement(side)
        if side == "U":
            return project(matrix, basis, within)
        return project(matrix.T, basis, within).T

    def _from_complement(self, side: str, coordinates: Tensor) -> Tensor:
        """Vectors with the given coordinates in the complement."""
        tensor: Tensor = getattr(self, side)
        return tensor @ coordinates if self._is_complement(side) else lift(tensor, coordinates)

    def reset_parameters(self, init_weights: bool | str, generator: torch.Generator) -> None:
        """Start at `ΔW = 0` with random `A`, or at random if `init_weights` is False."""
        for name, parameter in self.named_parameters():
            if init_weights is False:
                parameter.data.normal_(generator=generator)
            elif name[0] == "A":
                parameter.data.normal_(std=self.sizes[1] ** -0.5, generator=generator)
            else:
                parameter.data.zero_()

    def reset_from_weight(self, weight: Tensor) -> None:
        """Take the leading singular directions of the weight as those to protect."""
        heads = singular_vectors(weight.flatten(1), self.directions)
        for side, head in zip("UV", heads, strict=True):
            if self._keeps(side):
                getattr(self, side).copy_(self._kept_form(side, head))

    def _kept_form(self, side: str, head: Tensor) -> Tensor:
        """The buffer of one side, given the orthonormal directions to protect."""
        basis = complement(head) if self._is_complement(side) else head
        reflects = (self.constraint == "core" and side == "U") or not self._is_complement(side)
        return reflection(basis) if reflects and not self.low_rank else basis

    def leading(self, side: str, matrix: Tensor) -> Tensor:
        """`P M` in double precision, what of a matrix `(d, c)` lies in a side's protected directions."""
        kept, matrix = getattr(self, side).double(), matrix.double()
        width = kept.shape[1]
        if not self.low_rank and (
            (self.constraint == "core" and side == "U") or not self._is_complement(side)
        ):
            kept = reflect(kept, torch.eye(len(kept), width, dtype=kept.dtype, device=kept.device))
        inside = kept @ (kept.T @ matrix)
        return matrix - inside if self._is_complement(side) else inside

    @classmethod
    def concatenate(
        cls, deltas: Sequence[ContinualSVDDelta], weights: Sequence[float]
    ) -> tuple[tuple[int | None, float], dict[str, Tensor]]:
        """Put the factors side by side, or add the coordinates up, where all protect the same directions.

        Raises:
            ValueError: If the adapters protect different directions.
        """
        first = deltas[0]
        frozen, trained = dict(first.named_buffers()), [dict(delta.named_parameters()) for delta in deltas]
        for other in deltas[1:]:
            same = other.low_rank == first.low_rank and other.constraint == first.constraint
            if not (same and all(torch.equal(getattr(other, name), frozen[name]) for name in frozen)):
                raise ValueError(
                    "the adapters protect different directions, so no adapter of this method is their sum; "
                    "merge them one by one, or export each with peft_subspace.lora_state_dict and combine "
                    "those"
                )
        state = {}
        for name in trained[0]:
            parts = [tensors[name] for tensors in trained]
            if name[0] != "A":
                parts = [weight * part for weight, part in zip(weights, parts, strict=True)]
            state[name] = torch.cat(parts, dim=int(name[0] == "B")) if first.low_rank else sum(parts)
        rank = sum(delta.rank[0] for delta in deltas) if first.low_rank else None
        return (rank, first.directions), {**state, **frozen}


def directions(preserve: float, limit: int) -> int:
    """Number of directions that `preserve` means for a weight with `limit` singular values.

    Raises:
        ValueError: If none would be left to train.
    """
    if isinstance(preserve, int) and preserve >= limit:
        raise invalid(
            "preserve",
            preserve,
            f"must be below {limit}, the smaller dimension of the weight, to leave something to train; lower "
            "it, or give a fraction such as preserve=0.5",
        )
    return preserve if isinstance(preserve, int) else int(preserve * limit + 1e-9)

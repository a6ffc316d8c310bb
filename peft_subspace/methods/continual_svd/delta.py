r"""Continual SVD: `ΔW`, such as `U_⊥ Z V_⊥ᵀ`, which leaves leading directions of `W (m, n)` alone, exactly.

With the `k` leading directions `U_h (m, k)`, `V_h (n, k)` of the weight's SVD and orthonormal complements
`U_⊥ (m, m − k)`, `V_⊥ (n, n − k)`, one of four constraints holds for all values of the trained tensors,
whatever the optimizer does with them:

=========  ==============================  =========================  ====================================
           what holds                      `r=None`                   `r`
=========  ==============================  =========================  ====================================
`both`     `U_hᵀ ΔW = 0`, `ΔW V_h = 0`     `U_⊥ Z V_⊥ᵀ`               `(I−P_U) B · A (I−P_V)`
`core`     `U_hᵀ ΔW V_h = 0`               `[U_⊥ U_h] [Z1; Z2 V_⊥ᵀ]`  `[(I−P_U) B1, B2] [A1; A2 (I−P_V)]`
`input`    `ΔW V_h = 0`                    `Z V_⊥ᵀ`                   `B · A (I−P_V)`
`output`   `U_hᵀ ΔW = 0`                   `U_⊥ Z`                    `(I−P_U) B · A`
=========  ==============================  =========================  ====================================

`P_U = U_h U_hᵀ`, `P_V = V_h V_hᵀ`. The forms without a rank reach every update that the constraint allows.

For each side the narrower form is kept, `(d, min(k, d − k))`: for a given `r` an orthonormal basis of the
protected directions or of their complement; else a basis of the complement, or the block reflection that
stands for it (`subspaces.py`). The file of `both` therefore takes, per weight and in numbers of 4 bytes,

    (m − k)(n − k)  or  r (m + n),  plus  m · min(k, m − k) + n · min(k, n − k) + 6.

A convolution's kernel is part of the input axis, `n = in / groups · kernel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from peft_subspace.core.delta import Combined, Delta
from peft_subspace.core.projection import singular_vectors

from .config import PROTECTED, ContinualSVDConfig, ContinualSVDSpec
from .subspaces import Side, reflect


class ContinualSVDDelta(Delta):
    """Update outside protected directions; buffers `U` and `V` hold the two sides.

    All tensors are fp32: in bf16 the bases would not be orthonormal.

    Attributes:
        sides: What is protected of the outputs, `"U"`, and of the inputs, `"V"`.
        directions: Number `k` of protected directions.

    Reference:
        Nayak et al. (arXiv 2504.07097); Farajtabar et al. (arXiv 1910.07104) for protecting inputs only.
    """

    reads_weight = True
    needs_weight = True
    on_embeddings = False
    full_precision: ClassVar[tuple[str, ...]] = ("Z", "Z1", "Z2", "A", "B", "A1", "A2", "B1", "B2")

    def __init__(self, config: ContinualSVDConfig, spec: ContinualSVDSpec) -> None:
        super().__init__(config, spec)
        self.constraint, self.directions = config.constraint, spec.directions
        self.low_rank, core = spec.rank > 0, config.constraint == "core"
        m, n, k = spec.shape.out_features, spec.shape.columns, spec.directions
        self.sides: dict[str, Side] = {}
        for name, size in (("U", m), ("V", n)):
            if name in PROTECTED[config.constraint]:
                reflects = not self.low_rank and (2 * k < size or (core and name == "U"))
                self.sides[name] = Side(size, k, reflects)
                self.register_buffer(name, torch.zeros(size, min(k, size - k), dtype=torch.float32))
        sizes = {"Z": (m - k * ("U" in self.sides), n - k * ("V" in self.sides))}
        if core:
            sizes = {"Z1": (m - k, n), "Z2": (k, n - k)}
        if self.low_rank:
            pairs = ("1", "2") if core else ("",)
            sizes = {
                f"{x}{i}": size for i in pairs for x, size in (("B", (m, spec.rank)), ("A", (spec.rank, n)))
            }
        for name, shape in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32)))

    def factors(self) -> tuple[Tensor, ...]:
        """Return the chain of the constraint and form, multiplied up where a side is kept as a reflection."""
        dtype = (
            self.fingerprint.dtype
        )  # that of the bases, also where a trainer has stored parameters in less
        trained = {name: parameter.to(dtype) for name, parameter in self.named_parameters()}
        with torch.autocast(self.fingerprint.device.type, enabled=False):  # in less than fp32 it would leak
            *left, right = self._low_rank_chain(**trained) if self.low_rank else self._full_chain(**trained)
        return *left, right.unflatten(1, self.shape.dims[1:])

    def _low_rank_chain(self, **trained: Tensor) -> tuple[Tensor, Tensor]:
        if self.constraint == "core":
            left = torch.cat([self._outside("U", trained["B1"]), trained["B2"]], dim=1)
            return left, torch.cat([trained["A1"], self._outside("V", trained["A2"].T).T])
        return self._outside("U", trained["B"]), self._outside("V", trained["A"].T).T

    def _full_chain(self, **trained: Tensor) -> tuple[Tensor, ...]:
        sides = self.sides
        if self.constraint == "core":
            rows = trained["Z1"], sides["V"].lift(self.V, trained["Z2"].T).T
            return (reflect(self.U, torch.cat(rows if sides["U"].by_complement else rows[::-1])),)
        chain = [trained["Z"]]
        if "U" in sides:
            chain = [self.U, *chain] if sides["U"].by_complement else [sides["U"].lift(self.U, chain[0])]
        if "V" in sides:
            *left, last = chain
            by_complement = sides["V"].by_complement
            chain = [*chain, self.V.T] if by_complement else [*left, sides["V"].lift(self.V, last.T).T]
        return tuple(chain)

    def _outside(self, side: str, matrix: Tensor) -> Tensor:
        """`(I − P) M` for the protected directions of a side, `M` itself if none are."""
        return self.sides[side].outside(getattr(self, side), matrix) if side in self.sides else matrix

    def leading(self, side: str, matrix: Tensor) -> Tensor:
        """`P M` in double precision, what of a matrix `(d, c)` lies in a side's protected directions."""
        return self.sides[side].leading(getattr(self, side), matrix)

    def reset_parameters(self, init_weights: bool | str, generator: torch.Generator) -> None:
        """Start at `ΔW = 0` with random `A`, or at random if `init_weights` is False."""
        for name, parameter in self.named_parameters():
            if init_weights is False:
                parameter.data.normal_(generator=generator)
            elif name[0] == "A":
                parameter.data.normal_(std=self.shape.columns**-0.5, generator=generator)
            else:
                parameter.data.zero_()

    def reset_from_weight(self, weight: Tensor) -> None:
        """Take the leading singular directions of the weight as those to protect."""
        leading = dict(zip("UV", singular_vectors(weight.flatten(1), self.directions), strict=True))
        for name, side in self.sides.items():
            getattr(self, name).copy_(side.keep(leading[name]))

    @classmethod
    def concatenate(cls, deltas: Sequence[ContinualSVDDelta], weights: Sequence[float]) -> Combined:
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
        rank = sum(delta.spec.rank for delta in deltas) if first.low_rank else None
        return {"rank_pattern": rank, "preserve_pattern": first.directions}, {**state, **frozen}

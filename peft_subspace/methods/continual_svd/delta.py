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
stands for it (`core/complement.py`). The projected factors make the same update without these, so that the
file of `both` takes, per weight and in numbers of 4 bytes,

    r (m + n) + 6,  or  (m − k)(n − k) + m · min(k, m − k) + n · min(k, n − k) + 6.

A convolution's kernel is part of the input axis, `n = in / groups · kernel`.

Directions may be those that old data use instead of the weight's: then `k` differs between the sides, and the
file has them, for no weight tells them again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

from peft_subspace.core.chain import multiply
from peft_subspace.core.complement import Side, reflect
from peft_subspace.core.delta import Combined, Delta
from peft_subspace.core.linalg import complement, leading_rows
from peft_subspace.core.projection import singular_bases

from .config import PROTECTED, ContinualSVDConfig, ContinualSVDSpec

CONFINED = {"B": "U", "B1": "U", "A": "V", "A2": "V"}
"""Factors that are confined, and the side whose protected directions they are kept out of."""


class ContinualSVDDelta(Delta):
    """Update outside protected directions; buffers `U` and `V` hold the two sides.

    All tensors are fp32: in bf16 the bases would not be orthonormal.

    Attributes:
        sides: What is protected of the outputs, `"U"`, and of the inputs, `"V"`.
        free: Numbers of directions that are not protected, by side.
        directions: Largest number `k` of protected directions of the two.
        names: Names of the factors, of which `freeze_a` leaves `A` frozen.

    Reference:
        Nayak et al. (arXiv 2504.07097); Farajtabar et al. (arXiv 1910.07104) for protecting inputs only.
    """

    reads_weight = True
    needs_weight = True
    can_keep_zeros = False
    full_precision: ClassVar[tuple[str, ...]] = ("Z", "Z1", "Z2", "A", "B", "A1", "A2", "B1", "B2")

    def __init__(self, config: ContinualSVDConfig, spec: ContinualSVDSpec) -> None:
        super().__init__(config, spec)
        self.constraint, self.directions = config.constraint, max(spec.outputs, spec.inputs)
        self.reads_weight, self.awaits = config.directions == "weight", config.awaits
        self.low_rank, core = spec.rank > 0, config.constraint == "core"
        m, n = spec.shape.out_features, spec.shape.columns
        self.sides, self.free = dict[str, Side](), {"U": m, "V": n}
        for name in PROTECTED[config.constraint]:
            size, k = (m, spec.outputs) if name == "U" else (n, spec.inputs)
            self.free[name] -= k
            reflects = not self.low_rank and (2 * k < size or (core and name == "U"))
            self.sides[name] = Side(size, k, reflects)
            kept = torch.zeros(size, min(k, size - k), dtype=torch.float32)
            self.register_frozen(name, kept, training_only=self.low_rank and self.reads_weight)
        rows, columns = self.free.values()
        sizes = {"Z1": (rows, n), "Z2": (m - rows, columns)} if core else {"Z": (rows, columns)}
        self.reach = sum(a * b for a, b in sizes.values())
        if self.low_rank:
            shapes = {"B": (m, spec.rank), "A": (spec.rank, n)}
            sizes = {f"{x}{i}": shape for i in ("12" if core else ("",)) for x, shape in shapes.items()}
        self.names, self.from_gradient = tuple(sizes), ("A", "B") if config.freeze_a else ()
        for name, shape in sizes.items():
            tensor = torch.empty(shape, dtype=torch.float32)
            if config.freeze_a and name == "A":
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor))

    def factors(self) -> tuple[Tensor, ...]:
        """Return the chain of the constraint and form, multiplied up where a side is kept as a reflection."""
        state = {name: getattr(self, name) for name in (*self.names, *self.sides)}
        with torch.autocast(self.fingerprint.device.type, enabled=False):  # in less than fp32 it would leak
            *left, right = (self._low_rank_chain if self.low_rank else self._full_chain)(state)
        return *left, right.unflatten(1, self.shape.dims[1:])

    def inference_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the factors outside the protected directions; those of a lean update already are."""
        # In the precision of the bases, also where a trainer has stored parameters in less.
        kept = {n: t.to(self.fingerprint.dtype) for n, t in super().inference_state(state).items()}
        for name, side in CONFINED.items():
            if name in kept and state.get(side) is not None:
                kept[name] = self.sides[side].outside(state[side], kept[name], rows=side == "V")
        return kept

    def _low_rank_chain(self, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        factors = self.inference_state(state)
        if self.constraint == "core":
            return torch.cat([factors["B1"], factors["B2"]], 1), torch.cat([factors["A1"], factors["A2"]])
        return factors["B"], factors["A"]

    def _full_chain(self, state: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        trained, sides = self.inference_state(state), self.sides
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

    def reset_parameters(self, init_weights: bool | str, generator: torch.Generator) -> None:
        """Start at `ΔW = 0` with random `A`, or at random if `init_weights` is False."""
        drawn = self.random_std * (self.shape.columns / self.spec.rank if self.low_rank else 1) ** 0.5
        for name in self.names:
            std = self.shape.columns**-0.5 if name[0] == "A" else drawn if init_weights is False else 0.0
            getattr(self, name).data.normal_(std=std, generator=generator)

    def speed(self) -> float:
        """Return `√p` of the `p` dimensions that the constraint allows; `A` spans `r / n` of them."""
        return (self.reach * (self.spec.rank / self.shape.columns if self.low_rank else 1)) ** 0.5

    def reset_from_weight(self, weight: Tensor) -> None:
        """Take the leading singular directions of the weight as those to protect."""
        outside = [name in self.sides and self.sides[name].by_complement for name in "UV"]
        bases = singular_bases(weight.flatten(1), self.directions, (outside[0], outside[1]))
        self._keep({name: basis for name, basis in zip("UV", bases, strict=True) if name in self.sides})

    def state_from_gradient(
        self, gradient: Tensor, learning_rate: float, scaling: float
    ) -> dict[str, Tensor]:
        """Return, for a frozen `A`, leading right singular vectors of the unprotected gradient; `B = 0`."""
        rest = gradient.flatten(1)
        for name, side in self.sides.items():
            rest = side.outside(getattr(self, name), rest, rows=name == "V")
        return {"A": leading_rows(rest, self.spec.rank), "B": gradient.new_zeros(self.trained_shapes["B"])}

    def protect(self, directions: Mapping[str, Tensor]) -> None:
        """Set orthonormal directions `(d, ≥ k)` by side, of which the first `k` are to be protected."""
        chosen = {name: directions[name][:, : side.count] for name, side in self.sides.items()}
        self._keep({n: complement(c) if self.sides[n].by_complement else c for n, c in chosen.items()})

    def _keep(self, bases: Mapping[str, Tensor]) -> None:
        for name, basis in bases.items():
            getattr(self, name).copy_(self.sides[name].keep(basis))
        self.awaits = None

    @classmethod
    def concatenate(cls, deltas: Sequence[ContinualSVDDelta], weights: Sequence[float]) -> Combined:
        """Put the factors side by side, or add the coordinates up, where all protect the same directions.

        Raises:
            ValueError: If the adapters protect different directions.
        """
        first, lean = deltas[0], any(delta.lean for delta in deltas)
        states = [delta.inference_state(s) if lean else s for delta in deltas for s in (delta.state_dict(),)]
        frozen = {n: states[0][n] for n in ("fingerprint", *first.sides) if n in states[0]}
        for other, tensors in zip(deltas, states, strict=True):
            same = other.low_rank == first.low_rank and other.constraint == first.constraint
            if not (same and all(torch.equal(tensors[name], frozen[name]) for name in frozen)):
                raise ValueError(
                    "the adapters protect different directions, so no adapter of this method is their sum; "
                    "merge them one by one, or combine what peft_subspace.lora_state_dict makes of each"
                )
        state: dict[str, Tensor] = {}
        for n in first.names:
            parts = [tensors[n] for tensors in states]
            if n[0] != "A":
                parts = [weight * part for weight, part in zip(weights, parts, strict=True)]
            state[n] = torch.cat(parts, int(n[0] == "B")) if first.low_rank else torch.stack(parts).sum(0)
        rank = sum(delta.spec.rank for delta in deltas) if first.low_rank else None
        kept = [first.sides[name].count if name in first.sides else 0 for name in "UV"]
        return {"rank_pattern": rank, "preserve_pattern": kept}, {**state, **frozen}

    @classmethod
    def product(cls, left: Tensor, right: Tensor, deltas: Sequence[ContinualSVDDelta]) -> Combined:
        """Take the part of the product that is outside the directions that all adapters protect.

        Raises:
            ValueError: If they protect different ones, or were loaded without.
        """
        if any(delta.lean for delta in deltas):
            rule = "this takes the directions that the adapters protect; load them with is_trainable=True"
            raise ValueError(rule)
        first, right = deltas[0], right.flatten(1)
        entries, state = cls.concatenate(deltas, [0.0] * len(deltas))
        if first.low_rank:
            inside = first.sides["U"].inside(first.U, left) if "B2" in state else left
            parts = {"B": left, "B1": left, "B2": inside, **dict.fromkeys(("A", "A1", "A2"), right)}
            taken = {name: parts.get(name, tensor) for name, tensor in state.items()}
            return {**entries, "rank_pattern": left.shape[1]}, taken
        # The chain is linear in coordinates of an orthonormal basis, which its adjoint gives.
        found: Any = vjp(lambda z: multiply(functional_call(first, z, (lambda: left,))), first.trained)
        return entries, {**state, **found[1]((left @ right).view(first.shape.dims))[0]}

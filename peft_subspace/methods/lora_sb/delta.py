r"""LoRA-SB: `ΔW = s · B R A` with frozen orthonormal `B (out, r)`, `A (r, in)` and a trained `R (r, r)`.

The bases are the leading singular vectors of the first step that full fine-tuning would take,
`−η · sign(g) ≈ B diag(S) A` with the mean gradient `g` of the base weight, and `R` starts at `diag(S) / s`.
`ΔW` is therefore not zero at first; the base weight itself is never changed. With `BᵀB = A Aᵀ = I` and
`s = 1` the gradient of `R` is the best approximation of `g` within the two subspaces.

A convolution's kernel is part of the input axis: `A (r, in / groups, *kernel)`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from peft_subspace.core.delta import Combined, Delta
from peft_subspace.core.linalg import draw_orthonormal_, product_svd, truncated_svd
from peft_subspace.core.shapes import ModuleSpec
from peft_subspace.methods.lora_sb.config import LoRASBConfig


class LoRASBDelta(Delta):
    """Update in fixed subspaces: buffers `B` `(out, r)` and `A` `(r, in, *kernel)`, parameter `R` `(r, r)`.

    All are fp32: in bf16 the bases would not be orthonormal, and a small step of `R` would be rounded away.

    Reference:
        Ponkshe et al. (arXiv 2411.19557), the update approximation; Bałazy et al. (arXiv 2405.17604) for
        bases from the weight.
    """

    from_gradient = ("R", "A", "B")
    full_precision: ClassVar[tuple[str, ...]] = ("R",)

    R: nn.Parameter
    A: Tensor
    B: Tensor

    def __init__(self, config: LoRASBConfig, spec: ModuleSpec) -> None:
        super().__init__(config, spec)
        shape, rank = spec.shape, spec.rank
        self.reads_weight = config.init_weights is not False
        self.expects_gradient = config.init_weights is True
        self.exact_svd = config.exact_svd
        self.R = nn.Parameter(torch.empty(rank, rank, dtype=torch.float32))
        self.register_buffer("A", torch.empty(rank, *shape.dims[1:], dtype=torch.float32))
        self.register_buffer("B", torch.empty(shape.out_features, rank, dtype=torch.float32))

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return `B`, `R` and `A`, in one precision, also where a trainer has stored `R` in less."""
        return self.B, self.R.to(self.B.dtype), self.A

    def reset_parameters(self, init_weights: bool | str, generator: torch.Generator) -> None:
        """Draw orthonormal bases; start `R` at zero, or at random if `init_weights` is False."""
        draw_orthonormal_(self.B, generator)
        draw_orthonormal_(self.A.flatten(1).T, generator)
        if init_weights is False:
            norm = self.random_std * (self.shape.out_features * self.shape.columns) ** 0.5
            self.R.data.normal_(0.0, norm / self.spec.rank, generator=generator)
        else:
            self.R.data.zero_()

    def speed(self) -> float:
        """Return `√(r²)`: the bases keep lengths."""
        return float(self.spec.rank)

    def reset_from_weight(self, weight: Tensor) -> None:
        """Take the leading singular vectors of the weight as bases, LoRA-XS; `R` stays zero."""
        U, _, Vh = truncated_svd(weight.flatten(1), self.spec.rank, exact=self.exact_svd)
        self.B.copy_(U)
        self.A.copy_(Vh.view_as(self.A))

    def on_training_step(self, adapter_name: str) -> bool:
        """Warn if no gradient has been taken, though the config expects that."""
        if self.expects_gradient and not self.initialized:
            warnings.warn(
                f"adapter {adapter_name!r} trains in bases taken from the base weight, because no gradient "
                "initialization has run; call peft_subspace.initialize_from_gradient before training, add "
                "peft_subspace.GradientInitCallback to the Trainer, or choose these bases with "
                'init_weights="svd"',
                stacklevel=5,
            )
        return False

    def state_from_gradient(
        self, gradient: Tensor, learning_rate: float, scaling: float
    ) -> dict[str, Tensor]:
        """Return `B diag(S) A`, the truncated SVD of `−η · sign(g)`, with `R = diag(S) / s`."""
        step = gradient.flatten(1).sign_().neg_()
        U, S, Vh = truncated_svd(step, self.spec.rank, exact=self.exact_svd)
        return {"R": torch.diag(S * (learning_rate / scaling)), "A": Vh.view_as(self.A), "B": U}

    @classmethod
    def average(cls, deltas: Sequence[LoRASBDelta], weights: Sequence[float]) -> Combined:
        """Average `R`, which is exact where all bases are equal.

        Raises:
            ValueError: If they are not.
        """
        first, *others = deltas
        for other in others:
            same = first.R.shape == other.R.shape
            if not (same and torch.equal(first.B, other.B) and torch.equal(first.A, other.A)):
                raise ValueError(
                    "the adapters have different bases, or ranks, so no average of R is the average of their "
                    "updates; use combination_type='cat', or start the adapters from one initialization"
                )
        total = sum(
            (weight * delta.R for delta, weight in zip(deltas, weights, strict=True)),
            start=torch.zeros_like(first.R),
        )
        return {"rank_pattern": len(total)}, {"R": total, "A": first.A, "B": first.B}

    @classmethod
    def product(cls, left: Tensor, right: Tensor, deltas: Sequence[LoRASBDelta]) -> Combined:
        """Take the singular vectors for the bases, and the singular values for `R`."""
        U, S, Vh = (t.float() for t in product_svd(left, right.flatten(1)))
        A = Vh.reshape(-1, *right.shape[1:])
        return {"rank_pattern": len(S)}, {"R": torch.diag(S), "A": A, "B": U}

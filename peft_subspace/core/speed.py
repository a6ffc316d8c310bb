r"""How fast AdamW moves an update, from shapes alone: the rule by which LoRA's learning rate is everyone's.

The first step of AdamW moves each parameter `θ_p` by the learning rate `η`, up or down. Over
independent signs, and over the initialization, the update `ΔW` moves by

    E‖δΔW‖² = η² v²,   v² = Σ_p E‖∂ΔW/∂θ_p‖²,

and `v` is its speed. PEFT's LoRA with its defaults, `r = α = 8`, starts with `B (m, 8)` at zero and the
entries of `A (8, n)` uniform in `±1/√n`, so that `v² = 8 m · n · 1/(3 n) = 8 m / 3`. An update with a speed
`v` of its own moves as fast when it is scaled by `√(8 m / 3) / v`.

| update | `v²` at first |
|---|---|
| orthonormal frames around a trained matrix of `p` numbers: LoRA-SB, Continual SVD | `p` |
| `B (m, r)` at zero before `r` rows of squared length `ρ`: FLoRA, MoS, Continual SVD with `r` | `m r ρ` |
"""

from __future__ import annotations

from math import sqrt

from peft_subspace.core.shapes import WeightShape

_DEFAULT_RANK = 8  # of PEFT's LoRA, and its `lora_alpha`


def scaling_as_fast_as_lora(shape: WeightShape, speed: float | None) -> float:
    """Return `√(8 m / 3) / v` for an update of speed `v`; 1 if that is unknown."""
    return sqrt(_DEFAULT_RANK * shape.out_features / 3) / speed if speed else 1.0

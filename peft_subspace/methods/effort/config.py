"""Configuration of Effort."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft_subspace.core.validation import check_number
from peft_subspace.tuner.config import SubspaceConfig


@dataclass
class EffortConfig(SubspaceConfig):
    """Configuration of `EffortModel`: the smallest singular triples of a weight train, the rest is kept.

    `r` counts the triples that train. The released code counts those that are kept, `min(out, in) - r`.

    What trains is stored as the change of the triples, so that weight decay pulls toward the base model, as
    with LoRA, and never erases a part of its weights.

    Args:
        r: Number of trained triples. It is lowered on layers of a smaller rank, `min(out, in · kernel)`.
        orthogonality_weight: `λ1`, the weight of `‖ÛᵀÛ − I‖² + ‖V̂ᵀV̂ − I‖²` in the loss, averaged over the
            layers, where `Û` and `V̂` are the kept singular vectors and the trained ones side by side.
        energy_weight: `λ2`, the weight of `|‖W + ΔW‖² − ‖W‖²|` in the loss, averaged over the layers.

    In training, both are added to the loss that the model returns. Where that loss is not used, as with
    `compute_loss_func`, label smoothing, and the trainers of TRL, give the Trainer
    `peft_subspace.RegularizationCallback()`, or add `peft_subspace.regularization_loss(model)`.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field has a value that no layer could take.

    Reference:
        Yan et al., "Orthogonal Subspace Decomposition for Generalizable AI-Generated Image Detection" (arXiv
        2411.15633).
    """

    peft_type_name: ClassVar[str] = "EFFORT"
    bounded_rank: ClassVar[bool] = True
    values_of_sums: ClassVar[Mapping[str, Any]] = {
        **SubspaceConfig.values_of_sums,
        "orthogonality_weight": 0.0,
    }

    r: int = field(default=1)
    orthogonality_weight: float = field(default=0.0)
    energy_weight: float = field(default=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("orthogonality_weight", self.orthogonality_weight, minimum=0.0)
        check_number("energy_weight", self.energy_weight, minimum=0.0)

    @property
    def penalty_weights(self) -> dict[str, float]:
        """`λ1` and `λ2` by the names of their losses."""
        return {"orthogonality": self.orthogonality_weight, "energy": self.energy_weight}

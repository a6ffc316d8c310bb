"""Methods from the literature as settings of Continual SVD."""

from __future__ import annotations

from typing import Any

from peft_subspace.core.validation import check_choice
from peft_subspace.methods.continual_svd.config import ContinualSVDConfig

PRESETS: dict[str, dict[str, Any]] = {
    "gpm": {"directions": "inputs", "energy": 0.95, "preserve": 0},
    "fot": {"directions": "inputs", "energy": 0.95, "preserve": 0},
    "coso": {"directions": "gradients", "energy": 0.98, "preserve": 0},
    "keep-lora": {
        "directions": "weight+inputs",
        "energy": 0.99,
        "weight_energy": 0.85,
        "r": 16,
        "freeze_a": True,
    },
}
"""Options by name."""


def preset(name: str, **options: Any) -> ContinualSVDConfig:
    """Config with the settings of a method from the literature, of which any option may be another.

    - `"gpm"`, `"fot"`: no update on what the inputs of earlier tasks span, `ΔW V_h = 0`; 95 % of their
      energy. FOT sums `XᵀX` of its clients for it: `Statistics` add up.
    - `"coso"`: no update of what the gradients of earlier tasks span, `U_hᵀ ΔW = 0`; 98 % of their energy.
    - `"keep-lora"`: `B A` of rank 16 outside the weight's leading input directions (85 % of its energy; for
      text encoders the authors take 20 %) and those of earlier tasks' inputs (99 %). `B` trains; `A` is
      frozen at the leading directions of the task's gradient, which `peft_subspace.initialize_from_gradient`
      takes once it is known what to protect: after `protect`, or `next_task`.

    Args:
        name: Name of the method.
        options: Fields of `ContinualSVDConfig`.

    Raises:
        ValueError: If there is no such method, or an option is wrong.

    Reference:
        Saha et al. (GPM, arXiv 2103.09762), Bakman et al. (FOT, arXiv 2309.01289), Cheng et al. (CoSO, arXiv
        2505.11816), KeepLoRA (arXiv 2601.19659).
    """
    check_choice("name", name, PRESETS)
    return ContinualSVDConfig(**{**PRESETS[name], **options})

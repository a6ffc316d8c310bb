"""Configuration of LoRA-SB."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peft_subspace.core.validation import check_flag
from peft_subspace.tuner.branch_config import DropoutConfig


@dataclass
class LoRASBConfig(DropoutConfig):
    """Configuration of `LoRASBModel`: `r²` trainable parameters between two frozen orthonormal bases.

    The bases are meant to come from the first gradients of full fine-tuning:
    `peft_subspace.initialize_from_gradient` after `get_peft_model`, or `peft_subspace.GradientInitCallback`
    in a Trainer. Until then they come from the base weight.

    Args:
        r: Rank of the update. It is lowered on layers of a smaller rank, `min(out, in · kernel)`.
        dropout: Probability of dropping an entry (a channel, in a convolution) of the branch's input.
        init_weights: Bases before any gradient is known. `"svd"`: the leading singular vectors of the base
            weight, with `R = 0`, which is LoRA-XS. `True`: the same, with a warning if training starts
            without a gradient initialization. `False`: random bases and a random `R`.
        exact_svd: Whether bases come from a full SVD instead of randomized subspace iteration; slower by one
            or two orders of magnitude on large weights.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field has a value that no layer could take.

    Reference:
        Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient
        Low-Rank Fine-Tuning" (arXiv 2411.19557).
    """

    peft_type_name: ClassVar[str] = "LORASB"
    init_choices: ClassVar[tuple[str, ...]] = ("svd",)
    bounded_rank: ClassVar[bool] = True

    r: int = field(default=32)
    exact_svd: bool = field(default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("exact_svd", self.exact_svd)

"""Configuration of FLoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft_subspace.core.shapes import ModuleSpec, WeightShape
from peft_subspace.core.validation import check_counts, check_number, invalid
from peft_subspace.tuner.branch_config import ScaledConfig


@dataclass(frozen=True)
class FLoRASpec(ModuleSpec):
    """What FLoRA is asked for on one weight.

    Attributes:
        mode_ranks: Ranks of the modes `in, out, *kernel`.
    """

    mode_ranks: tuple[int, ...] = ()


@dataclass
class FLoRAConfig(ScaledConfig):
    """Configuration of `FLoRAModel`: a Tucker-decomposed update for weights of any number of axes.

    Args:
        r: Rank of the input and output modes, or one rank per mode, `[in, out, *kernel]`, of which the
            kernel's may be left out. A rank above its dimension is lowered to it. Stacked experts
            (`target_parameters`) are one more mode in the place of the kernel: `[in, out, experts]`.
        kernel_r: Rank of the kernel modes of a convolution, one for all or a list, or of the mode of stacked
            experts; `None` for full size.
        alpha: Numerator of the scaling `alpha / r` (of a list, `r[0]`, before any lowering), as LoRA has it;
            `None` leaves that to `scaling`.
        scale: Name of `scaling` in files of version 0.1.
        dropout: Probability of dropping an entry (a channel, in a convolution) of the branch's input.
        init_weights: Initialization of the factors and of the core, of which one is zero, so that the update
            is. `"zero_output"`, the default, `True`, starts the output's factor at zero, as LoRA does, and
            draws all else from N(0, 1/fan_in), so that every factor of the chain keeps the variance of its
            input, whatever the width; it takes LoRA's learning rates. The three of the authors have a core of
            zeros, and factors from U(-1/√rank, 1/√rank) (`"kaiming_uniform"`), N(0, 1/(2 · rank))
            (`"kaiming_normal"`) or N(0, 0.02²) (`"normal"`), at other learning rates, with
            `scaling="paper"`. Compared in examples/benchmarks/flora_inits.py and quality.py. `False` starts
            nothing at zero.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field has a value that no layer could take.

    Reference:
        Si et al., "Maintaining Structural Integrity in Parameter Spaces for Parameter Efficient Fine-tuning"
        (arXiv 2405.14739).
    """

    peft_type_name: ClassVar[str] = "FLORA"
    init_choices: ClassVar[tuple[str, ...]] = ("kaiming_uniform", "kaiming_normal", "normal", "zero_output")
    values_of_sums: ClassVar[Mapping[str, Any]] = {**ScaledConfig.values_of_sums, "scale": None}

    r: int | list[int] = field(default=8)
    kernel_r: int | list[int] | None = field(default=None)
    scale: float | None = field(default=None)

    def __post_init__(self) -> None:
        if self.scale is not None:
            check_number("scale", self.scale)
            self.scaling = self.scale
        super().__post_init__()
        if self.kernel_r is not None:
            check_counts("kernel_r", self.kernel_r)

    def check_rank(self, name: str, rank: Any) -> None:
        """Accept a whole number, or a list of at least two."""
        if isinstance(rank, list | tuple) and len(rank) < 2:
            raise invalid(name, rank, "must have a rank for each mode, [in, out, *kernel], or be one number")
        check_counts(name, rank)

    def spec_for(self, module_name: str, shape: WeightShape) -> FLoRASpec:
        """Ranks of all modes, none above its dimension.

        Raises:
            ValueError: If the number of ranks does not fit the number of modes.
        """
        rank, dims = self.rank_for(module_name), shape.modes
        wanted = [rank, rank] if isinstance(rank, int) else [*rank]
        if len(wanted) == 2 < len(dims):
            kernel_r = dims[2:] if self.kernel_r is None else self.kernel_r
            wanted += [kernel_r] * (len(dims) - 2) if isinstance(kernel_r, int) else kernel_r
        if len(wanted) != len(dims):
            given = f"gives {len(wanted)} ranks for a weight of {len(dims)} modes {dims} (in, out, *kernel)"
            rule = f"with kernel_r={self.kernel_r!r} {given}; give {len(dims)} ranks, or one number"
            raise invalid("r", rank, rule)
        ranks = tuple(map(min, wanted, dims))
        return FLoRASpec(module_name, shape, min(ranks[:2]), ranks != tuple(wanted), ranks)

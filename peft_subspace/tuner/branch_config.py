"""Configuration fields of methods whose branch has dropout, or a scaling `alpha / r`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft_subspace.core.delta import Update
from peft_subspace.core.validation import check_number, invalid
from peft_subspace.tuner.config import SubspaceConfig
from peft_subspace.tuner.config_checks import check_patterned
from peft_subspace.tuner.patterns import look_up


@dataclass
class DropoutConfig(SubspaceConfig):
    """Fields of methods whose branch has dropout on its input.

    Args:
        dropout: Probability of dropping an entry (a channel, in a convolution) of the branch's input.
    """

    values_of_sums: ClassVar[Mapping[str, Any]] = {**SubspaceConfig.values_of_sums, "dropout": 0.0}

    dropout: float = field(default=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("dropout", self.dropout, minimum=0.0, maximum=1.0)
        if self.dropout and self.target_parameters:
            raise invalid(
                "dropout",
                self.dropout,
                "needs the input of a layer, and target_parameters are updated without it; set dropout=0",
            )


@dataclass
class ScaledConfig(DropoutConfig):
    """Fields of methods whose branch has a tunable scaling, too.

    Args:
        alpha: Numerator of the scaling `alpha / r`, as LoRA has it; `None`, and a number in `scaling`, leave
            that to `scaling`.
        alpha_pattern: `alpha` of single modules, by name or regular expression.
    """

    values_of_sums: ClassVar[Mapping[str, Any]] = {
        **DropoutConfig.values_of_sums,
        "alpha": None,
        "alpha_pattern": {},
    }

    paper_alpha: ClassVar[float] = 8

    alpha: float | None = field(default=None)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None:
            check_number("alpha", self.alpha)
        for key, alpha in check_patterned(self, "alpha_pattern"):
            check_number(f"alpha_pattern[{key!r}]", alpha)

    def scaling_for(self, update: Update) -> float:
        """`alpha / r` of one module where an `alpha` is set; `r` as configured, before any lowering."""
        name = update.spec.name
        alpha = look_up(self.alpha_pattern, name, self.alpha)
        by_speed = self.scaling == "auto" and alpha is None and update.speed() is not None
        if by_speed or not isinstance(self.scaling, str):
            return super().scaling_for(update)
        rank = self.rank_for(name)
        return (self.paper_alpha if alpha is None else alpha) / (rank if isinstance(rank, int) else rank[0])

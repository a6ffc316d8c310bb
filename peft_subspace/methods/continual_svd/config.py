"""Configuration of Continual SVD."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft_subspace.core.shapes import ModuleSpec, WeightShape
from peft_subspace.core.validation import (
    check_choice,
    check_count,
    check_flag,
    check_number,
    check_share,
    invalid,
)
from peft_subspace.tuner.branch_config import DropoutConfig
from peft_subspace.tuner.config import written_by_library
from peft_subspace.tuner.config_checks import check_patterned
from peft_subspace.tuner.history import HISTORIES
from peft_subspace.tuner.patterns import look_up

PROTECTED = {"both": "UV", "core": "UV", "input": "V", "output": "U"}
"""Sides of which directions are protected, by constraint: outputs, `U`, and inputs, `V`."""

SOURCES = {"weight": "UV", "inputs": "V", "gradients": "U", "weight+inputs": "V"}
"""Sides of which there are directions, by where they come from."""


@dataclass(frozen=True)
class ContinualSVDSpec(ModuleSpec):
    """What Continual SVD is asked for on one weight.

    Attributes:
        outputs: Number of directions of outputs, `U`, to protect.
        inputs: Number of those of inputs, `V`.
    """

    outputs: int = 0
    inputs: int = 0


def check_preserve(name: str, value: Any) -> None:
    """Raise unless `value` is a number of directions, one for each side, or a fraction of them below 1."""
    if isinstance(value, int | list):
        for count in value if isinstance(value, list) and len(value) == 2 else [value]:
            check_count(name, count, minimum=0)
    else:
        check_number(name, value, minimum=0.0, maximum=1.0)


@dataclass
class ContinualSVDConfig(DropoutConfig):
    """Configuration of `ContinualSVDModel`: updates that leave the leading singular directions alone.

    The SVD of each weight gives the `k` directions to protect on either side, and the update is confined to
    the rest by construction. Trainable parameters for a weight `(m, n)`:

    | `constraint` | what holds | `r=None` | `r` |
    |---|---|---|---|
    | `"both"` | `U_hᵀ ΔW = 0` and `ΔW V_h = 0` | `(m − k)(n − k)` | `r (m + n)` |
    | `"core"` | `U_hᵀ ΔW V_h = 0` | `m n − k²` | `2 r (m + n)` |
    | `"input"` | `ΔW V_h = 0` | `m (n − k)` | `r (m + n)` |
    | `"output"` | `U_hᵀ ΔW = 0` | `(m − k) n` | `r (m + n)` |

    PEFT's OSF with `effective_rank=k` trains the updates of `"both"`, by `(min(m, n) − k)(m + n + 1)`
    numbers.

    Args:
        r: Rank of the update; `None` for the whole complement. It may exceed what the constraint leaves.
        preserve: Directions to protect: a number below `min(m, n)`, or a fraction of `min(m, n)`, rounded
            down. Zero protects nothing.
        preserve_pattern: `preserve` of single modules, by name or regular expression; two numbers are for
            outputs and inputs. With directions from data it is written by `peft_subspace.continual`.
        constraint: What is protected. `"both"`: inputs and outputs, as the authors' code and PEFT's OSF do.
            `"core"`: the map from the leading inputs to the leading outputs only, which is the paper's
            formula. `"input"` or `"output"`: one side, and what `"both"` is where the directions have one.
        directions: Where the directions come from. `"weight"`: the leading ones of its SVD. `"inputs"`: those
            that old data use, of `"input"`. `"gradients"`: those of the gradients on old data, of `"output"`.
            `"weight+inputs"`: the leading ones of the weight, then those that old data use, of `"input"`. All
            but `"weight"` start with `protect` or `next_task` of `peft_subspace.continual`; with
            `preserve=0` a first task protects nothing.
        energy: Part of the squared norm of the data that their directions hold.
        weight_energy: Part of the weight's squared norm that its directions hold, for `"weight+inputs"`.
        freeze_a: Whether of `B A` only `B` trains, `r m` numbers. `A` stays at random rows, or, after
            `peft_subspace.initialize_from_gradient`, at the leading directions of the task's gradient outside
            what is protected, as in KeepLoRA. Needs `r`, and another constraint than `"core"`.
        dropout: Probability of dropping an entry (a channel, in a convolution) of the branch's input; for a
            given `r` only.
        init_weights: `True`: start at the base model. `False`: start at a random update of the allowed kind.
        earlier_tasks: Written by the library: tasks that this one follows, with how each was kept.
        closed: Written by the library: whether the task is finished, so that the adapter stays frozen when
            active.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field has a value that no layer could take.

    Reference:
        Nayak et al., "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning"
        (arXiv 2504.07097).
    """

    peft_type_name: ClassVar[str] = "CONTINUALSVD"

    r: int | None = field(default=None)
    preserve: float = field(default=0.5)
    preserve_pattern: dict[str, float] = field(default_factory=dict)
    constraint: str = field(default="both")
    directions: str = field(default="weight")
    energy: float = field(default=0.95)
    weight_energy: float = field(default=0.85)
    freeze_a: bool = field(default=False, kw_only=True)
    earlier_tasks: dict[str, str] = field(default_factory=dict, kw_only=True, repr=False)
    closed: bool = written_by_library(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_preserve("preserve", self.preserve)
        for key, preserve in check_patterned(self, "preserve_pattern"):
            check_preserve(f"preserve_pattern[{key!r}]", preserve)
        for name in ("closed", "freeze_a"):
            check_flag(name, getattr(self, name))
        check_choice("constraint", self.constraint, PROTECTED)
        check_choice("directions", self.directions, SOURCES)
        for name in ("energy", "weight_energy"):
            check_share(name, getattr(self, name))
        own = {"U": "output", "V": "input"}.get(SOURCES[self.directions], self.constraint)
        if self.constraint not in ("both", own):
            rule = f"must be {own!r} with directions={self.directions!r}"
            raise invalid("constraint", self.constraint, rule)
        self.constraint = own
        if self.dropout and self.r is None:
            raise invalid("dropout", self.dropout, "needs a rank; set r, such as r=16, or dropout=0.0")
        if self.freeze_a and (self.r is None or own == "core"):
            raise invalid("freeze_a", True, "needs a rank, such as r=16, and another constraint than 'core'")
        for task, history in check_patterned(self, "earlier_tasks"):
            check_choice(f"earlier_tasks[{task!r}]", history, HISTORIES)

    def check_rank(self, name: str, rank: Any) -> None:
        """Raise unless `rank` is None or a positive whole number."""
        if rank is not None:
            check_count(name, rank)

    @property
    def awaits(self) -> tuple[str, str] | None:
        """What has to come before training, and how: directions from data, unless a file has them."""
        given = self.initialized if self.preserve_pattern else not self.preserve
        if self.directions == "weight" or given:
            return None
        how = "call peft_subspace.continual.protect(model, statistics), or set preserve=0 for a first task"
        return f"protects directions={self.directions!r} of old data, which are not known", how

    @property
    def frozen(self) -> bool:
        """Whether the task is finished."""
        return self.closed

    @property
    def earlier(self) -> dict[str, str]:
        """Tasks that this one follows."""
        return self.earlier_tasks

    def spec_for(self, module_name: str, shape: WeightShape) -> ContinualSVDSpec:
        """Rank and protected directions of one module.

        Raises:
            ValueError: If nothing would be left to train.
        """
        of_weight, limit = self.directions == "weight", shape.full_rank
        preserve = look_up(self.preserve_pattern, module_name, self.preserve if of_weight else 0)
        preserve = int(preserve * limit + 1e-9) if isinstance(preserve, float) else preserve
        counts = preserve if isinstance(preserve, list) else [preserve] * 2
        limits = [limit] * 2 if of_weight else [shape.out_features, shape.columns]
        for count, most in zip(counts, limits, strict=True):
            if count >= most:
                rule = f"must be below {most} to leave something to train; lower it, or give a fraction"
                raise invalid("preserve", count, rule)
        return ContinualSVDSpec(module_name, shape, self.rank_for(module_name) or 0, False, *counts)

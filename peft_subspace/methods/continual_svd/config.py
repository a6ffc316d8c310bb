"""Configuration of Continual SVD."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft_subspace.core.validation import check_count, check_flag, check_number, invalid
from peft_subspace.tuner.config import SubspaceConfig
from peft_subspace.tuner.patterns import look_up

CONSTRAINTS = ("both", "core", "input", "output")


HISTORIES = ("merge", "stack")


def check_preserve(name: str, value: Any) -> None:
    """Raise unless `value` is a number of directions, or a fraction of them below 1."""
    if isinstance(value, int):
        check_count(name, value, minimum=0)
    else:
        check_number(name, value, minimum=0.0, maximum=1.0)


@dataclass
class ContinualSVDConfig(SubspaceConfig):
    """Configuration of `ContinualSVDModel`: updates that leave the leading singular directions alone.

    The SVD of each weight gives the `k` directions to protect on either side, and the update is confined to
    the rest by construction. Trained numbers of a weight `(m, n)`:

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
        preserve_pattern: `preserve` of single modules, by name or regular expression.
        constraint: What is protected. `"both"`: inputs and outputs, as the authors' code and PEFT's OSF do.
            `"core"`: the map from the leading inputs to the leading outputs only, which is the paper's
            formula. `"input"` or `"output"`: one side.
        dropout: Probability of dropping an entry (a channel, in a convolution) of the branch's input; for a
            given `r` only.
        init_weights: `True`: start at the base model. `False`: start at a random update of the allowed kind.
        earlier_tasks: Tasks that this one follows, with how each was kept. Filled in by `next_task`.
        closed: Whether the task is finished, so that the adapter stays frozen when active. Filled in by
            `next_task`.

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
    dropout: float = field(default=0.0)
    earlier_tasks: dict[str, str] = field(default_factory=dict)
    closed: bool = field(default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_preserve("preserve", self.preserve)
        for key, preserve in self._patterns("preserve_pattern"):
            check_preserve(f"preserve_pattern[{key!r}]", preserve)
        check_flag("closed", self.closed)
        if self.constraint not in CONSTRAINTS:
            raise invalid("constraint", self.constraint, f"must be one of {CONSTRAINTS}")
        check_number("dropout", self.dropout, minimum=0.0, maximum=1.0)
        if self.dropout and self.r is None:
            raise invalid("dropout", self.dropout, "needs a rank; set r, such as r=16, or dropout=0.0")
        for task, history in self._patterns("earlier_tasks"):
            if history not in HISTORIES:
                raise invalid(f"earlier_tasks[{task!r}]", history, f"must be one of {HISTORIES}")

    def check_rank(self, name: str, rank: Any) -> None:
        """Raise unless `rank` is None or a positive whole number."""
        if rank is not None:
            check_count(name, rank)

    def rank_for(self, module_name: str) -> tuple[int | None, float]:
        """Rank of one module, and what to preserve of its weight."""
        preserve = look_up(self.preserve_pattern, module_name, self.preserve)
        return super().rank_for(module_name), preserve

"""Configuration of an adapter that holds an edit."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import ClassVar

from peft_subspace.core.shapes import ModuleSpec, WeightShape
from peft_subspace.core.validation import check_choice, check_count, invalid
from peft_subspace.tuner.config import SubspaceConfig
from peft_subspace.tuner.config_checks import check_patterned

FORMS = ("chain", "dense", "sparse")


@dataclass
class EditConfig(SubspaceConfig):
    """Configuration of `EditModel`, whose adapters the functions of `peft_subspace.edits` make.

    Args:
        r: Rank of a chain, or number of sparse entries, where `sizes` has none.
        form: `"chain"`, two factors; `"dense"`, a matrix; `"sparse"`, entries at flat positions.
        sizes: Written by the library: ranks, or numbers of entries, by module.
    """

    peft_type_name: ClassVar[str] = "EDIT"

    form: str = field(default="chain")
    sizes: dict[str, int] = field(default_factory=dict, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("form", self.form, FORMS)
        for name, size in check_patterned(self, "sizes"):
            check_count(f"sizes[{name!r}]", size)

    @property
    def frozen(self) -> bool:
        """True: nothing of an edit trains."""
        return True

    def spec_for(self, module_name: str, shape: WeightShape) -> ModuleSpec:
        """Rank, or number of entries, of one module."""
        size = self.sizes.get(module_name, self.rank_for(module_name))
        limit = prod(shape.dims) if self.form == "sparse" else shape.full_rank
        if self.form != "dense" and size > limit:
            raise invalid("sizes", size, f"exceeds {limit}, the most that a weight of shape {shape.dims} has")
        return ModuleSpec(module_name, shape, size)

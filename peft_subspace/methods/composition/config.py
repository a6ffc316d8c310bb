"""Configuration of a composition."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peft_subspace.core.shapes import ModuleSpec, WeightShape
from peft_subspace.core.validation import check_number, invalid
from peft_subspace.tuner.config import SubspaceConfig

GRANULARITIES = ("task", "module", "component")


@dataclass(frozen=True)
class CompositionSpec(ModuleSpec):
    """What a composition is asked for on one weight.

    Attributes:
        ranks: Components that come from each source.
    """

    ranks: tuple[int, ...] = ()


@dataclass
class CompositionConfig(SubspaceConfig):
    """Configuration of `CompositionModel`, whose adapters `peft_subspace.compose` makes.

    Args:
        r: Components of each module, where no adapter gives them.
        per: What has a coefficient of its own: `"task"`, each adapter; `"module"`, each adapter in each
            module; `"component"`, each component, a rank-one term, of each adapter.
        start: Value of all coefficients at first: 0 is the base model (aTLAS), 0.3 is AdaMerging's.
        init_weights: `False` starts at random coefficients.
        adapters: Written by the library: what the adapters that are composed were called.
        ranks: Written by the library: components of each adapter, by module.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field has a value that no layer could take.

    Reference:
        Zhang et al., "Knowledge Composition using Task Vectors with Learned Anisotropic Scaling" (arXiv
        2407.02880); Yang et al., "AdaMerging" (arXiv 2310.02575).
    """

    peft_type_name: ClassVar[str] = "COMPOSITION"

    per: str = field(default="module")
    start: float = field(default=0.0)
    adapters: list[str] = field(default_factory=list, kw_only=True, repr=False)
    ranks: dict[str, list[int]] = field(default_factory=dict, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("start", self.start)
        if self.per not in GRANULARITIES:
            raise invalid("per", self.per, f"must be one of {GRANULARITIES}")

    def spec_for(self, module_name: str, shape: WeightShape) -> CompositionSpec:
        """Components of one module."""
        count = max(1, len(self.adapters))
        ranks = tuple(self.ranks.get(module_name, [self.rank_for(module_name)] * count))
        return CompositionSpec(module_name, shape, sum(ranks), ranks=ranks)

"""Configuration of a composition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft_subspace.core.shapes import ModuleSpec, WeightShape
from peft_subspace.core.validation import check_choice, check_count, check_number, invalid
from peft_subspace.tuner.config import SubspaceConfig

GRANULARITIES = ("task", "module", "component")
MASKS = (None, "structured", "entries")


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
        mask: What has a trained mask, which all adapters share: `"structured"`, rows, columns and components,
            so that the update keeps its rank; `"entries"`, each entry of the weight, for small models.
        temperature: Below 1, the lower the nearer are trained masks to zero and one.
        init_weights: `False` starts at random coefficients.
        adapters: Written by the library: what the adapters that are composed were called.
        ranks: Written by the library: components of each adapter, by module.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field has a value that no layer could take.

    Reference:
        Zhang et al., "Knowledge Composition using Task Vectors with Learned Anisotropic Scaling" (arXiv
        2407.02880); Yang et al., "AdaMerging" (arXiv 2310.02575); Tang et al., "Concrete Subspace Learning
        based Interference Elimination for Multi-task Model Fusion" (arXiv 2312.06173) for masks.
    """

    peft_type_name: ClassVar[str] = "COMPOSITION"

    per: str = field(default="module")
    start: float = field(default=0.0)
    mask: str | None = field(default=None, kw_only=True)
    temperature: float = field(default=0.5, kw_only=True)
    adapters: list[str] = field(default_factory=list, kw_only=True, repr=False)
    ranks: dict[str, list[int]] = field(default_factory=dict, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("start", self.start)
        check_entries(self.adapters, self.ranks)
        check_number("temperature", self.temperature, minimum=1e-3)
        check_choice("per", self.per, GRANULARITIES)
        check_choice("mask", self.mask, MASKS)

    def of_sum(self, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """One adapter with a coefficient for each component, and no masks."""
        ranks = {module: values["ranks"] for module, values in entries.items()}
        changes = {"per": "component", "mask": None, "adapters": ["sum"], "ranks": ranks}
        return {**self.values_of_sums, **changes}

    def spec_for(self, module_name: str, shape: WeightShape) -> CompositionSpec:
        """Components of one module."""
        count = max(1, len(self.adapters))
        ranks = tuple(self.ranks.get(module_name, [self.rank_for(module_name)] * count))
        return CompositionSpec(module_name, shape, sum(ranks), ranks=ranks)


def check_entries(adapters: Any, ranks: Any) -> None:
    """Raise unless the adapters are names, and the ranks a number for each of them in each module.

    Raises:
        TypeError: If they are of another type.
        ValueError: If a rank is below 1, or their number is another one.
    """
    if not isinstance(adapters, list) or not all(isinstance(name, str) for name in adapters):
        raise invalid("adapters", adapters, "must be a list of names", TypeError)
    if not isinstance(ranks, dict) or not all(isinstance(entry, list) for entry in ranks.values()):
        raise invalid("ranks", ranks, "must map modules to lists of ranks", TypeError)
    for module, entry in ranks.items():
        if len(entry) != len(adapters):
            raise invalid(
                f"ranks[{module!r}]", entry, f"must have a rank for each of {len(adapters)} adapters"
            )
        for rank in entry:
            check_count(f"ranks[{module!r}]", rank, maximum=2**20)

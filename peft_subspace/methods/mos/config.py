"""Configuration of MoS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft_subspace.core.shapes import ModuleSpec, WeightShape
from peft_subspace.core.validation import check_count, check_flag, invalid
from peft_subspace.tuner.branch_config import ScaledConfig
from peft_subspace.tuner.config_checks import check_patterned
from peft_subspace.tuner.patterns import look_up

from .sharing import assign_slices


@dataclass
class MoSConfig(ScaledConfig):
    """Configuration of `MoSModel`: low-rank updates assembled from shards of pools that modules share.

    Modules of one type and shape form a group with two pools, whose size is that of LoRA at rank
    `equivalent_r`; each module's factors, of rank `r`, are put together from rows of them. The method's four
    strategies can be switched off: subset selection and pair dissociation by their fields, vector sharding by
    `shards_per_vector=1`, shard privatization by `private_r=0`. With `r = private_r = equivalent_r` the
    update is a LoRA.

    Args:
        r: Rank of each module's update. It is lowered where a group is too small to offer as many vectors.
        equivalent_r: Budget: rank of the LoRA that has as many trainable numbers.
        private_r: Rank, out of `r`, of which the shards are a module's own. `None` takes half the smaller of
            `equivalent_r` and `r`, or less where `r` needs more to be shared.
        shards_per_vector: Parts into which a vector of the factors is cut; must divide the input and output
            width. `None` takes the largest divisor of each width up to 4.
        subset_selection: Whether a module uses a part of the shared vectors; if False it uses all of them,
            and has as high a rank as that makes.
        pair_dissociation: Whether the shards of both factors are chosen independently.
        group_pattern: Group of single modules, by name or regular expression, in place of their type: the
            name without its numbers, such as `layers.self_attn.q_proj`. Shapes are kept apart in any case.
        alpha: Numerator of the scaling `alpha / r`, as LoRA has it; `None` leaves that to `scaling`.
        dropout: Probability of dropping an entry (a channel, in a convolution) of the branch's input.
        init_weights: `True` starts pool A at random, uniform in ±1/√(input width), and pool B at zero, so
            that the update is zero too. `False` starts pool B at random as well.
        seed: Seed of the pools' start and of the choice of shards. `None` follows `torch.manual_seed` for the
            former and counts as 0 for the latter.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field has a value that no layer could take.

    Reference:
        Wang et al., "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards"
        (arXiv 2410.00938).
    """

    peft_type_name: ClassVar[str] = "MOSHARDS"
    paper_alpha: ClassVar[float] = 16

    r: int = field(default=16)
    equivalent_r: int = field(default=4)
    private_r: int | None = field(default=None)
    shards_per_vector: int | None = field(default=None)
    subset_selection: bool = field(default=True)
    pair_dissociation: bool = field(default=True)
    group_pattern: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("equivalent_r", self.equivalent_r)
        if self.shards_per_vector is not None:
            check_count("shards_per_vector", self.shards_per_vector)
        if self.private_r is not None:
            self._check_private()
        for name in ("subset_selection", "pair_dissociation"):
            check_flag(name, getattr(self, name))
        for key, group in check_patterned(self, "group_pattern"):
            if not isinstance(group, str) or not group.isidentifier():
                rule = "must be made of letters, digits and underscores, like 'qk'"
                raise invalid(f"group_pattern[{key!r}]", group, rule)

    def specs(self, shapes: Mapping[str, WeightShape]) -> dict[str, ModuleSpec]:
        """Form groups among the targeted modules and give each module its slice of the pools."""
        return dict(assign_slices(self, shapes))

    def of_sum(self, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """A rank for all, and every vector a module's own."""
        most = max(values["rank_pattern"] for values in entries.values())
        fixed = {"rank_pattern": {}, **dict.fromkeys(("r", "equivalent_r", "private_r"), most)}
        return {**self.values_of_sums, **fixed}

    def group_for(self, module_name: str) -> str | None:
        """Group that `group_pattern` gives one module, `None` if it gives none."""
        return look_up(self.group_pattern, module_name, None)

    def _check_private(self) -> None:
        check_count("private_r", self.private_r, minimum=0)
        ranks = {"r": self.r} | {f"rank_pattern[{key!r}]": r for key, r in self.rank_pattern.items()}
        for name, limit in {"equivalent_r": self.equivalent_r, **ranks}.items():
            if self.private_r > limit:
                rule = f"must be at most {name}={limit}; lower private_r to {limit}, or raise {name}"
                raise invalid("private_r", self.private_r, rule)

"""Who shares with whom: groups of modules, and what each module gets of its group's pools."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

from peft_subspace.core.shapes import ModuleSpec, WeightShape
from peft_subspace.core.validation import invalid
from peft_subspace.tuner.patterns import is_named

Kind = tuple[tuple[str, ...], tuple[int, ...]]
"""What makes modules a group: their type, as parts of a name, and the axes of their weight."""


@dataclass(frozen=True)
class MoSSpec(ModuleSpec):
    """What one module gets of its group's pools.

    Attributes:
        group: Name of its group.
        members: Modules in the group, `L`.
        position: The module's place among them, `k`.
        equivalent_r: Vectors that each member adds to the pools, `e`.
        private_r: Vectors that no other member uses, `p`.
        shards: Shards per vector, `l`, of the pools A and B.
    """

    group: str = ""
    members: int = 1
    position: int = 0
    equivalent_r: int = 1
    private_r: int = 0
    shards: tuple[int, int] = (1, 1)

    @property
    def shared_vectors(self) -> int:
        """Vectors of a pool that all members choose from, `(e − p) · L`."""
        return (self.equivalent_r - self.private_r) * self.members

    @property
    def pool_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of the pools A and B, `(e · L · l, width / l)`."""
        (a, b), vectors = self.shards, self.equivalent_r * self.members
        return (vectors * a, self.shape.columns // a), (vectors * b, self.shape.out_features // b)


def assign_slices(config: Any, shapes: Mapping[str, WeightShape]) -> dict[str, MoSSpec]:
    """Form groups and give every module its share.

    Raises:
        ValueError: If a module's width cannot be cut as the config asks for, or its group is too small for
            the rank. The message names the module.
    """
    group_of, members = _groups(config, shapes), defaultdict[str, list[str]](list)
    for name, group in group_of.items():
        members[group].append(name)
    return {n: _slice(config, n, shapes[n], group, members[group]) for n, group in group_of.items()}


def _groups(config: Any, shapes: Mapping[str, WeightShape]) -> dict[str, str]:
    """Name of each module's group."""
    kinds: dict[str, Kind] = {}
    for name, shape in shapes.items():
        chosen = config.group_for(name)
        kind = (chosen,) if chosen else tuple(part for part in name.split(".") if not part.isdigit())
        kinds[name] = (kind or ("layers",), shape.dims)
    labels = {kind: _label(kind, set(kinds.values())) for kind in set(kinds.values())}
    return {name: labels[kind] for name, kind in kinds.items()}


def _label(kind: Kind, kinds: Collection[Kind]) -> str:
    """Shortest end of a type that tells it from the others, such as `q_proj`, with the shape if none does."""
    path, dims = kind
    for parts in range(1, len(path) + 1):
        label = "_".join(path[-parts:])
        if sum("_".join(other[-parts:]) == label for other, _ in kinds) == 1:
            return label
    return "_".join(path) + "_" + "x".join(str(dim) for dim in dims)


def _slice(config: Any, name: str, shape: WeightShape, group: str, members: list[str]) -> MoSSpec:
    count, shards = len(members), _shards(config, name, (shape.columns, shape.out_features))
    rank, private_r, lowered = _ranks(config, name, group, count)
    place = (group, count, members.index(name))
    return MoSSpec(name, shape, rank, lowered, *place, config.equivalent_r, private_r, shards)


def _ranks(config: Any, name: str, group: str, members: int) -> tuple[int, int, bool]:
    """Rank and private rank of one module, made to fit its group, and whether the rank was lowered."""
    e, p, wanted = config.equivalent_r, config.private_r, config.rank_for(name)
    given = wanted != type(config).r
    if p is None:
        p = min(e, wanted) // 2
        if given and members > 1:  # the most that leaves r − p ≤ (e − p) · L
            p = max(0, min(p, (e * members - wanted) // (members - 1)))
    most = p + (e - p) * members
    named = is_named(config.rank_pattern, name)
    if (wanted > most and named) or (given and wanted < most and not config.subset_selection):
        rule = (
            f"must be {'at most' if config.subset_selection else 'all of'} the {most} vectors that "
            f"equivalent_r={e} and private_r={p} offer {name!r}, one of {members} modules in group "
            f"{group!r}; set r, or its rank_pattern, to {most}, or change equivalent_r"
        )
        raise invalid("r", wanted, rule)
    return (min(wanted, most) if config.subset_selection else most), p, wanted > most


def _shards(config: Any, name: str, widths: tuple[int, int]) -> tuple[int, int]:
    common = gcd(*widths)
    if config.shards_per_vector is None:
        # Without pair dissociation both factors take the same rows, so they are cut alike.
        a, b = (_largest_divisor(width if config.pair_dissociation else common) for width in widths)
        return a, b
    shards = config.shards_per_vector
    if common % shards:
        fitting = [str(n) for n in range(1, min(common, 64) + 1) if common % n == 0]
        rule = f"must divide the input width {widths[0]} and the output width {widths[1]} of {name!r}"
        raise invalid("shards_per_vector", shards, f"{rule}; try {', '.join(fitting)}, or None")
    return shards, shards


def _largest_divisor(width: int, limit: int = 4) -> int:
    return next(n for n in range(limit, 0, -1) if width % n == 0)

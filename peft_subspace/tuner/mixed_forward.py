"""A tuner layer's forward pass with one adapter per sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peft_subspace.layers.base import Branch
from peft_subspace.layers.costs import picks_adapters
from peft_subspace.layers.stacked import Form, select
from peft_subspace.tuner.kept import keep
from peft_subspace.tuner.mixed_batch import MixedBatch


@torch.compiler.disable
def forward_mixed_batch(
    layer: Any, batch: MixedBatch, x: Tensor, args: tuple, kwargs: dict[str, Any]
) -> Tensor:
    """Run the base layer of a tuner layer once, and each sample's adapter on its rows.

    Samples of one adapter are put together, and adapters that are stacked in a row go through one product.

    Raises:
        ValueError: If adapters are merged, or there is not one name for each sample.
    """
    if layer.merged:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(batch.names_for(len(x))):
        rows.setdefault(name, []).append(row)
    result = layer.base_layer(x, *args, **kwargs)
    here = [name for name in rows if name in layer.deltas]
    if not here:
        return result
    if not isinstance(result, Tensor):
        raise ValueError(
            f"adapter_names cannot be used where {type(layer.get_base_layer()).__name__} returns several "
            "tensors; run the samples of each adapter by themselves, after set_adapter"
        )
    calls = list(_calls(layer, here, rows, batch, x.device.type))
    order = [row for names, _ in calls for name in names for row in rows[name]]
    order += [row for name in rows if name not in layer.deltas for row in rows[name]]
    sorts = order != sorted(order)
    if sorts:
        x, result = x[batch.index(order, x.device)], result[batch.index(order, result.device)]
    parts, start = [], 0
    for names, add in calls:
        counts = [len(rows[name]) for name in names]
        stop = start + sum(counts)
        parts.append(add(result[start:stop], x[start:stop], counts))
        start = stop
    result = torch.cat([*parts, result[start:]]) if start < len(order) or len(parts) > 1 else parts[0]
    return result[batch.index(_inverse(order), result.device)] if sorts else result


Add = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
"""Adds adapters, each on as many samples as are given, to the result of a layer for an input."""


def _calls(
    layer: Any, names: list[str], rows: dict[str, list[int]], batch: MixedBatch, device: str
) -> Iterator[tuple[list[str], Add]]:
    """Adapters that are applied together, and how."""
    steady = [name for name in names if not _gets_gradient(layer, name)]
    kept = keep(layer, steady, batch.stamps)
    places = {name: kept.places[name] for name in steady if name in kept.places}
    for group in _groups(places, {name: len(rows[name]) for name in places}, picks_adapters(device)):
        yield group, partial(_add_stacked, layer, select(kept.stacked, [places[name] for name in group]))
    each = [name for name in steady if name in kept.branches]
    if each:
        yield each, partial(_add_each, layer, [kept.branches[name] for name in each])
    for name in names:
        if name not in places and name not in each:
            yield [name], partial(_add_one, layer, name)


def _groups(places: dict[str, int], counts: dict[str, int], picks: bool) -> list[list[str]]:
    """Stacked adapters with as many samples each, that follow each other unless they may be picked."""
    groups: list[list[str]] = []
    for name in sorted(places, key=lambda n: (counts[n], places[n])):
        last = groups[-1][-1] if groups else name
        follows = places[name] == places[last] + 1 or picks
        if counts[name] == counts[last] and name != last and follows:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def _add_stacked(layer: Any, stacked: Form, result: Tensor, x: Tensor, counts: Sequence[int]) -> Tensor:
    return layer.kind.add_stacked(result, layer.get_base_layer(), stacked, layer.cast(x, stacked[-1].dtype))


def _add_each(
    layer: Any, branches: Sequence[Branch], result: Tensor, x: Tensor, counts: Sequence[int]
) -> Tensor:
    return layer.kind.add_each(result, layer.get_base_layer(), branches, counts, x, layer.cast)


def _add_one(layer: Any, name: str, result: Tensor, x: Tensor, counts: Sequence[int]) -> Tensor:
    branch = layer.branch(name)
    return layer.kind.add_branch(
        result, layer.get_base_layer(), branch, layer.cast(x, branch.factors[-1].dtype)
    )


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _gets_gradient(layer: Any, name: str) -> bool:
    """Whether a gradient is to pass through an adapter, which what is kept cannot."""
    if not torch.is_grad_enabled():
        return False
    delta = layer.deltas[name]
    return any(p.requires_grad for module in delta.parts for p in module.parameters())

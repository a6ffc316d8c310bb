"""A method applied to the updates of one weight, in weight space or in aligned coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_subspace.merging.methods import METHODS, Coefficients, Entries, Factors
from peft_subspace.merging.stack import Stack

TILE_BYTES = 2**28
"""Default of the memory for tiles of entries."""


def compute(
    stack: Stack,
    method: str,
    weights: Sequence[float],
    generators: Sequence[torch.Generator],
    scale: float,
    space: str,
    tile_bytes: int,
    options: Mapping[str, Any],
) -> tuple[Tensor, Tensor] | Tensor:
    """The merged update: factors `(m, k)` and `(k, n)` where it has such, else its entries `(m, n)`."""
    known = torch.tensor(weights, dtype=stack.lefts[0].dtype, device=stack.lefts[0].device)
    result = METHODS[method](stack, known, generators, **options)
    if isinstance(result, Coefficients):
        return stack.left(), scale * stack.right(result.values.to(known))
    if isinstance(result, Factors):
        return scale * result.left, result.right
    if space == "aligned":
        basis, coordinates = stack.aligned()
        limits = [result.limits(rows) if result.limits else None for rows in coordinates]
        return scale * basis, result.merge(coordinates, limits)
    return scale * _by_entries(stack, result, tile_bytes)


def check(
    stack: Stack,
    method: str,
    weights: Sequence[float],
    generators: Sequence[torch.Generator],
    options: Mapping[str, Any],
) -> None:
    """Raise what the options of a method would raise, for functions of entries on one row of the updates."""
    result = METHODS[method](stack, torch.tensor(weights, dtype=stack.lefts[0].dtype), generators, **options)
    if isinstance(result, Entries):
        limit = result.limits(stack.dense(0)) if result.limits else None
        result.merge(next(stack.tiles(1))[1], [limit] * len(stack))


def _by_entries(stack: Stack, entries: Entries, tile_bytes: int) -> Tensor:
    rows, columns = stack.shape
    limits = [entries.limits(stack.dense(source)) if entries.limits else None for source in range(len(stack))]
    count = max(1, tile_bytes // (4 * columns * len(stack)))
    result = stack.lefts[0].new_empty(rows, columns)
    for place, tile in stack.tiles(count):
        result[place] = entries.merge(tile, limits)
    return result

"""What a merge will take, told without writing anything."""

from __future__ import annotations

import time
from dataclasses import dataclass

from peft_subspace.merging.driver import Merge

_NUMBER = 4  # bytes, in fp32


@dataclass
class Plan:
    """Prediction for a merge.

    Attributes:
        ranks: Rank of each module in the LoRA: that of the exact sum, or the one to cut to.
        shapes: Rows and columns of each module.
        lora_bytes: Size of the tensors of the LoRA.
        peak_bytes: Memory beyond what Python and torch take: the largest module with its tiles, and the LoRA.
        seconds: Time on this machine, from merging one module of middle size.
    """

    ranks: dict[str, int]
    shapes: dict[str, tuple[int, int]]
    lora_bytes: int
    peak_bytes: int
    seconds: float


def plan(merge: Merge, rank: int | None = None) -> Plan:
    """Predict ranks, bytes, peak memory and time; reads the factors, and merges one module."""
    ranks, shapes, held = {}, {}, []
    for module, stack in merge.stacks():
        m, n = shapes[module] = stack.shape
        ranks[module] = sum(stack.ranks) if rank is None else min(rank, m, n)
        factors = sum(t.numel() for t in (*stack.lefts, *stack.rights))
        held.append(_NUMBER * (factors + m * n) + min(merge.tile_bytes, _NUMBER * m * n * len(stack)))
    widest = max(ranks.values())  # all modules of a LoRA get the rank of the largest
    lora = _NUMBER * widest * sum(m + n for m, n in shapes.values())
    sizes = {module: m * n for module, (m, n) in shapes.items()}
    middle = sorted(sizes, key=sizes.__getitem__)[len(sizes) // 2]
    started = time.perf_counter()
    if rank is None:
        merge.update(middle)
    else:
        merge.factors(middle, rank)
    seconds = (time.perf_counter() - started) * sum(sizes.values()) / sizes[middle]
    merge.report.clear()
    return Plan(ranks, shapes, lora, lora + max(held), seconds)

"""First batches of a data loader, read in such a way that the loader stays as it was, and their weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from accelerate.utils import find_batch_size

from peft_subspace.initialization.evaluating import restored_generators
from peft_subspace.runtime import distributed as processes


@dataclass
class Batches:
    """Batches, and the weights of their losses.

    Attributes:
        items: What a loss function takes.
        weights: Weight of the loss of each item.
        total: What the weighted sum is divided by, over all processes.
    """

    items: list[Any]
    weights: list[float]
    total: float

    @classmethod
    def of_samples(cls, dataloader: Iterable[Any], num_batches: int | None, device: torch.device) -> Batches:
        """Read batches whose samples all have the same weight.

        Raises:
            ValueError: If there are none in any process.
        """
        with processes.raise_in_all_processes(device, "reading the batches"):
            items = read_batches(dataloader, num_batches)
            weights = [float(find_batch_size(item) or 1) for item in items]
        return cls(items, weights, sum_over_processes(weights, device))


def sum_over_processes(weights: Iterable[float], device: torch.device) -> float:
    """Sum of the weights of all processes.

    Raises:
        ValueError: If it is zero.
    """
    total = float(processes.total(torch.tensor(float(sum(weights)), device=device)))
    if not total:
        raise ValueError("the dataloader is empty; give it at least one batch")
    return total


def read_batches(dataloader: Iterable[Any], num_batches: int | None) -> list[Any]:
    """Read the first batches of a loader, or all if `num_batches` is None, and restore the loader's state."""
    with _restored_loader(dataloader):
        iterator = iter(dataloader)
        batches = list(islice(iterator, num_batches))
        if hasattr(iterator, "close"):
            iterator.close()
        # accelerate's loaders sign off only if they are read to the end
        active = getattr(getattr(dataloader, "gradient_state", None), "dataloader_references", ())
        if any(loader is dataloader for loader in active):
            getattr(dataloader, "end", lambda: None)()
    return batches


@contextmanager
def _restored_loader(dataloader: Any) -> Iterator[None]:
    """Context manager that restores a loader's generators, and the counters from which it seeds itself."""
    parts = list(_parts(dataloader))
    counters = [
        (part, name, vars(part)[name])
        for part in parts
        for name in ("epoch", "iteration")
        if isinstance(vars(part).get(name), int)
    ]
    generators = {vars(part).get("generator") for part in parts}
    states = [(g, g.get_state()) for g in generators if isinstance(g, torch.Generator)]
    try:
        with restored_generators():
            yield
    finally:
        for part, name, value in counters:
            setattr(part, name, value)
        for generator, state in states:
            generator.set_state(state)


def _parts(dataloader: Any) -> Iterator[Any]:
    """The loader, its samplers, and the loaders and samplers inside them."""
    found, seen = [dataloader], set()
    while found:
        part = found.pop()
        if hasattr(part, "__dict__") and id(part) not in seen:
            seen.add(id(part))
            found += [vars(part).get(name) for name in ("base_dataloader", "sampler", "batch_sampler")]
            yield part

"""First batches of a data loader, read in such a way that the loader stays as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch

from peft_subspace.initialization.evaluating import restored_generators


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

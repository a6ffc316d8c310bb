"""Run a model on a loader's batches and leave both as they were."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from peft_subspace.base_weights.weight import unpack_codes
from peft_subspace.tuner.layer import SubspaceLayer


def read_batches(dataloader: Iterable[Any], num_batches: int | None) -> list[Any]:
    """First batches of a loader, which is left as if nobody had read it."""
    with _restored_loader(dataloader):
        iterator = iter(dataloader)
        batches = list(islice(iterator, num_batches))
        if hasattr(iterator, "close"):
            iterator.close()
        # accelerate's loaders sign off when they are read to the end, and only then
        active = getattr(getattr(dataloader, "gradient_state", None), "dataloader_references", ())
        if any(loader is dataloader for loader in active):
            getattr(dataloader, "end", lambda: None)()
    return batches


@contextmanager
def evaluating(model: nn.Module, layers: Sequence[SubspaceLayer], adapter_name: str) -> Iterator[None]:
    """Evaluate a model without one adapter and with nothing trained; everything is put back after."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    active = [(layer, layer._active_adapter) for layer in layers]
    try:
        for module, training in modes:
            # Gradient checkpointing works in training mode only, which its module alone may keep.
            module.training = training and getattr(module, "gradient_checkpointing", False) is True
            if hasattr(module, "support_avx512bf16_for_cpu"):  # evaluating, it would repack its weight
                unpack_codes(module)
                module.training = True
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for layer in layers:
            others = [name for name in layer.active_adapters if name != adapter_name]
            layer._active_adapter = others if adapter_name in layer.active_adapters else []
        with restored_generators():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for layer, names in active:
            layer._active_adapter = names


@contextmanager
def restored_generators() -> Iterator[None]:
    """Put the global random generators of torch, numpy and Python back."""
    cpu, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    accelerator = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        if accelerator:
            torch.cuda.set_rng_state_all(accelerator)


@contextmanager
def _restored_loader(dataloader: Any) -> Iterator[None]:
    """Put back a loader's generators, and the counters from which it seeds itself."""
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
    """A loader, its samplers, and the loaders and samplers inside them."""
    found, seen = [dataloader], set()
    while found:
        part = found.pop()
        if hasattr(part, "__dict__") and id(part) not in seen:
            seen.add(id(part))
            found += [vars(part).get(name) for name in ("base_dataloader", "sampler", "batch_sampler")]
            yield part

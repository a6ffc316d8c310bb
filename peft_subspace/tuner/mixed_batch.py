"""One adapter per sample: the names reach the layers through hooks for one run of the model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

names_at_work: ContextVar[bool] = ContextVar("names_at_work", default=False)
"""Whether the model runs with one adapter per sample."""


def check_adapter_names(adapter_names: Any, known: Collection[str], *, training: bool) -> None:
    """Raise unless `adapter_names` can be one adapter for each sample."""
    if training:
        raise ValueError("adapter_names cannot be used in training mode; call eval() first")
    if not isinstance(adapter_names, list | tuple):
        raise TypeError(f"adapter_names={adapter_names!r} must be a list with one adapter name per sample")
    unknown = sorted(set(adapter_names) - set(known) - {"__base__"})
    if unknown:
        raise ValueError(
            f"adapter_names has unknown adapters {unknown}; the model has {sorted(known)}, and '__base__' "
            "for none"
        )


def forward_mixed_batch(
    layer: Any, x: Tensor, args: tuple, adapter_names: Sequence[str], kwargs: dict[str, Any]
) -> Tensor:
    """Run the base layer of a tuner layer once, and each sample's adapter on its rows.

    Raises:
        ValueError: If adapters are merged, or there is not one name for each sample.
    """
    if layer.merged:
        raise ValueError(
            "adapter_names cannot be used while adapters are merged; call unmerge_adapter() first"
        )
    if len(adapter_names) != len(x):
        raise ValueError(
            f"adapter_names has {len(adapter_names)} entries for a batch of {len(x)}; give one name per "
            "sample"
        )
    result = layer.base_layer(x, *args, **kwargs)
    for name in dict.fromkeys(adapter_names):
        if name in layer.deltas:
            rows = torch.tensor([i for i, n in enumerate(adapter_names) if n == name], device=x.device)
            branch = layer.branch(name)
            inputs = layer.cast(x[rows], branch.factors[-1].dtype)
            part = layer.kind.add_branch(result[rows], layer.get_base_layer(), branch, inputs)
            result = result.index_copy(0, rows, part)
    return result


@contextmanager
def adapter_names_passed(
    model: nn.Module, kinds: tuple[type[nn.Module], ...], adapter_names: Sequence[str], beams: int
) -> Iterator[None]:
    """Pass the names to all modules of the given kinds; for beam search, once per beam."""
    encoder = _encoder_prefix(model)
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            # Beam search repeats the samples for the decoder only.
            repeats = 1 if encoder is not None and name.startswith(encoder) else beams
            names = [n for n in adapter_names for _ in range(repeats)]
            hook = partial(_pass_adapter_names, adapter_names=names)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    token = names_at_work.set(True)
    try:
        yield
    finally:
        names_at_work.reset(token)
        for handle in handles:
            handle.remove()


def _encoder_prefix(model: nn.Module) -> str | None:
    """Prefix of the names of an encoder's modules, None for models without one of their own."""
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
    return next((f"{name}." for name, module in model.named_modules() if name and module is encoder), None)


def _pass_adapter_names(
    module: nn.Module, args: tuple, kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[tuple, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}

"""One adapter per sample: the names reach the layers through hooks for one run of the model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


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
    try:
        yield
    finally:
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

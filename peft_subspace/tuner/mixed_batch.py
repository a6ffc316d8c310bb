"""One adapter per sample: the layers find the names in a context, each thread in its own.

Errors that PEFT's layers have as well begin in PEFT's words, for whoever looks for these.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_subspace.tuner.history import with_history
from peft_subspace.tuner.kept import Stamps


@dataclass
class MixedBatch:
    """A batch with one adapter per sample, while a model runs with it.

    Attributes:
        names: The adapter of each sample, `"__base__"` for none.
        repeats: Rows that `generate` makes of each sample.
        modules: Those of the model's modules that the names are meant for.
        stamps: What `kept.keep` notes of shared modules.
        indices: Rows as a tensor, by their device.
    """

    names: Sequence[str]
    repeats: int = 1
    modules: Collection[nn.Module] = ()
    stamps: dict[int, Stamps] = field(default_factory=dict)
    indices: dict[tuple, Tensor] = field(default_factory=dict)

    def names_for(self, rows: int) -> Sequence[str]:
        """Names of the adapters of as many rows.

        Raises:
            ValueError: If there is not one name for each sample.
        """
        count = len(self.names)
        if rows == count:
            return self.names
        if rows == count * self.repeats:  # those of a sample follow each other
            return [name for name in self.names for _ in range(self.repeats)]
        message = (
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{count} entries for a batch of {rows}; give one name per sample"
        )
        if count and rows % count == 0:
            message += (
                f", or, if the model makes {rows // count} rows of each of {count} prompts, run the prompts "
                "of each adapter by themselves, after set_adapter"
            )
        raise ValueError(message)

    def index(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """Rows as a tensor."""
        key = (*rows, device)
        if key not in self.indices:
            self.indices[key] = torch.tensor(rows, device=device)
        return self.indices[key]


_at_work: ContextVar[MixedBatch | None] = ContextVar("mixed_batch", default=None)
_lock = threading.Lock()
_count = 0
running = False
"""Whether any thread runs a mixed batch. What was compiled without one is not used then: this is guarded."""


@torch.compiler.disable  # which cannot read a context
def batch_for(module: nn.Module) -> MixedBatch | None:
    """The mixed batch that a module's model runs with in this thread, if it does."""
    batch = _at_work.get()
    return batch if batch is not None and module in batch.modules else None


def check_adapter_names(adapter_names: Any, known: Collection[str], *, training: bool) -> None:
    """Raise unless `adapter_names` can be one adapter for each sample."""
    if training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode; call eval() first")
    if not isinstance(adapter_names, list | tuple):
        raise TypeError(f"adapter_names={adapter_names!r} must be a list with one adapter name per sample")
    unknown = sorted(set(adapter_names) - set(known) - {"__base__"})
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; adapter_names can name "
            f"{sorted(known)}, and '__base__' for none"
        )


def check_whole_adapters(adapter_names: Any, configs: Mapping[str, Any], *, training: bool) -> None:
    """Raise, too, if an adapter works together with others, which a row of its own would leave out."""
    check_adapter_names(adapter_names, configs, training=training)
    for name in set(adapter_names) & set(configs):
        if (needed := with_history(configs, name)) != [name]:
            raise ValueError(
                f"adapter_names cannot give {name!r} the adapters that it builds on, {needed}; use "
                f"set_adapter({name!r}), one of them per batch"
            )


@contextmanager
def mixed_batch(
    model: nn.Module, kind: type[nn.Module], adapter_names: Sequence[str], options: dict[str, Any]
) -> Iterator[None]:
    """Have the layers of a kind, and modules that adapters train in full, use one adapter per sample.

    Args:
        model: The base model.
        kind: Class of the tuner layers.
        adapter_names: Name of each sample's adapter.
        options: Arguments of the model, or of `generate`.
    """
    modules = set(_parts(model, kind))
    for module in modules:
        hooks = module._forward_pre_hooks.values()
        if isinstance(module, AuxiliaryTrainingWrapper) and _pass_adapter_names not in hooks:
            module.register_forward_pre_hook(_pass_adapter_names, with_kwargs=True)
    token = _at_work.set(MixedBatch(tuple(adapter_names), _repeats(options), modules))
    _note(1)
    try:
        yield
    finally:
        _note(-1)
        _at_work.reset(token)


def _note(change: int) -> None:
    global _count, running
    with _lock:
        _count += change
        running = _count > 0


def _parts(module: nn.Module, kind: type[nn.Module]) -> Iterator[nn.Module]:
    """Tuner layers and wrappers of PEFT's; what is inside of the former, of many adapters, is passed over."""
    if isinstance(module, kind | AuxiliaryTrainingWrapper):
        yield module
    for child in [module.base_layer] if isinstance(module, kind) else module.children():
        yield from _parts(child, kind)


def _repeats(options: dict[str, Any]) -> int:
    """Rows that `generate` makes of a sample."""
    config = options.get("generation_config")
    counts = [options.get(n) or getattr(config, n, None) for n in ("num_beams", "num_return_sequences")]
    return max(count or 1 for count in counts)


def _pass_adapter_names(
    module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Hook that stays: one that comes and goes would be another thread's, too."""
    batch = batch_for(module) if running else None
    if batch is None:
        return None
    names = batch.names_for(len(args[0])) if args else batch.names
    return args, {**kwargs, "adapter_names": names}

"""Modules that an adapter trains in full, such as heads: which one is at work where several adapters are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


def set_heads(
    model: nn.Module,
    names: Sequence[str],
    earlier: Mapping[str, Collection[str]],
    frozen: Collection[str] = (),
) -> None:
    """Activate the heads of several adapters; of a sequence, those of the adapter that is listed last.

    Args:
        model: The model.
        names: Active adapters.
        earlier: By adapter, those that it follows.
        frozen: Adapters whose heads do not train.

    Raises:
        ValueError: If adapters that do not follow each other have heads in one module. Nothing is changed.
    """
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    heads = [_head(module, names, earlier) for module in wrappers]
    for module, head in zip(wrappers, heads, strict=True):
        module.set_adapter(head, inference_mode=any(name in frozen for name in head))


def _head(module: Any, names: Sequence[str], earlier: Mapping[str, Collection[str]]) -> list[str]:
    """The adapter, if any, whose head works in a module."""
    here = [name for name in names if name in module._get_available_adapters()]
    last = here[-1:]
    others = [n for n in here[:-1] if all(n not in earlier[m] and m not in earlier[n] for m in last)]
    if names:
        module.check_set_adapter([*others, *last] or names)  # raises if there are two
    return last

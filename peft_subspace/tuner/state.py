"""Keys of an adapter's tensors in a model and in a file, and checks of tensors that PEFT is about to load."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from peft_subspace.base_weights.fingerprint import is_same
from peft_subspace.base_weights.weight import BaseWeight
from peft_subspace.core.delta import Update
from peft_subspace.core.errors import error_context
from peft_subspace.core.names import BASE, in_base
from peft_subspace.core.state import check_shapes, check_values_of
from peft_subspace.layers.base import LayerKind
from peft_subspace.runtime.progress import progress
from peft_subspace.tuner import callers
from peft_subspace.tuner.declared import check_declared
from peft_subspace.tuner.lean import by_start
from peft_subspace.tuner.places import aliases
from peft_subspace.tuner.plan import Plan
from peft_subspace.tuner.shared import shared_containers

_values_checked: ContextVar[bool] = ContextVar("values_checked", default=False)


@contextmanager
def values_checked() -> Iterator[None]:
    """Context manager in which the values of what PEFT loads, and the base weights, are known."""
    token = _values_checked.set(True)
    try:
        yield
    finally:
        _values_checked.reset(token)


def check_loaded(
    model: nn.Module,
    config: Any,
    adapter_name: str,
    own: Mapping[str, Tensor],
    layers: Mapping[str, Any],
    prefix: str,
    state: Mapping[str, Tensor],
) -> None:
    """Raise unless tensors, by their keys in the model, may be loaded into an adapter.

    Args:
        model: The model.
        config: Config of the adapter.
        adapter_name: The adapter.
        own: Tensors of the model by key.
        layers: What `layers_of` returns.
        prefix: Prefix of the method.
        state: Tensors to be loaded.

    Raises:
        ValueError: Naming the first tensor that is unfit.
    """
    here = [key for key in state if key in own]
    ours = {key for key in here if f".{prefix}" in f".{key}"}
    others = [key for key in here if key not in ours]
    if callers.reads_file():
        if layers and not ours:
            raise ValueError(
                f"the file has no tensor of adapter {adapter_name!r}; it is another method's, or for other "
                "modules: load it on the base model that it was trained on, or give key_mapping="
            )
        check_declared(model, config, others)
    check_shapes({key: own[key] for key in ours}, {key: tuple(state[key].shape) for key in ours})
    if not callers.ignores_mismatched_sizes():
        check_shapes({k: own[k] for k in others}, {k: tuple(state[k].shape) for k in others})
    if _values_checked.get():
        return
    for key in here if callers.reads_file() else ours:
        check_values_of(key, state[key], own[key].dtype)
    updates = {key: layer.deltas[adapter_name] for key, layer in layers.items()}
    check_values(updates, {key: state[key] for key in ours})
    check_base({key: (layer.base_weight, layer.kind) for key, layer in layers.items()}, state, prefix)


def layers_of(model: nn.Module, layer_cls: Any, adapter_name: str) -> dict[str, Any]:
    """Layers that have an adapter, by the prefix of its keys in the model."""
    return {
        f"{name}.{layer_cls.prefix}delta.{adapter_name}": layer
        for name, layer in model.named_modules()
        if isinstance(layer, layer_cls) and adapter_name in layer.deltas
    }


def without_misfits(
    own: Mapping[str, Tensor], layers: Iterable[str], prefix: str, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors without those of updates of other shapes in the model; PEFT looks after heads and the like."""
    adapters = {key: tensor for key, tensor in own.items() if f".{prefix}" in f".{key}"}
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    wrong = mismatched(layers, adapters, shapes)
    if wrong:
        warnings.warn(
            f"ignore_mismatched_sizes=True leaves out {len(wrong)} tensors, such as {min(wrong)}, of updates "
            "with other shapes in the file than the base model needs; their modules stay as initialized",
            stacklevel=2,
        )
    return {key: tensor for key, tensor in state.items() if key not in wrong}


def check_updates(plan: Plan, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise unless tensors of a file may be loaded into the updates of a plan for `model`.

    Raises:
        ValueError: Naming the first update with an unfit tensor.
    """
    planned = plan.by_key(model)
    check_values({key: item.update for key, item in planned.items()}, state)
    weights = {}
    for key, item in planned.items():
        target = item.target
        weights[key] = target.base_weight, target.kind
    check_base(weights, state, plan.prefix)


def in_dtypes_of(own: Mapping[str, Tensor], prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those of adapters in the dtypes that they have in the model, which PEFT may replace."""
    return {
        key: tensor.to(own[key].dtype) if key in own and f".{prefix}" in f".{key}" else tensor
        for key, tensor in state.items()
    }


def without_aliases(model: nn.Module, kind: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without those of layers under their further names."""
    others = tuple(f"{name}." for name in aliases(model, kind))
    return {key: tensor for key, tensor in state.items() if not (others and key.startswith(others))}


def with_aliases(model: nn.Module, kind: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, and those of layers under their further names as well."""
    result = dict(state)
    for other, first in aliases(model, kind).items():
        start = f"{first}."
        result |= {f"{other}.{k.removeprefix(start)}": t for k, t in state.items() if k.startswith(start)}
    return result


def mismatched(
    starts: Iterable[str], expected: Mapping[str, Tensor], found: Mapping[str, tuple[int, ...]]
) -> set[str]:
    """Keys of tensors that have another shape, with the other tensors of the update that they belong to.

    Args:
        starts: Prefixes of the keys of updates.
        expected: Tensors by key.
        found: Shapes by key, some of which may be missing.
    """
    wrong = {key for key, tensor in expected.items() if found.get(key, tensor.shape) != tuple(tensor.shape)}
    whole = tuple(f"{start}." for start in starts if any(key.startswith(f"{start}.") for key in wrong))
    return wrong | {key for key in found if key in expected and key.startswith(whole)}


def is_optional(key: str) -> bool:
    """Whether a file may leave out a tensor: files of version 0.1 have no fingerprints for most methods."""
    return key.endswith(".fingerprint")


def missing_fingerprints(
    layers: Mapping[str, Any], adapter_name: str, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Fingerprints of no weight, for those that a file leaves out."""
    updates = {start: layer.deltas[adapter_name] for start, layer in layers.items()}
    without = [s for s, u in updates.items() if u.needs_weight and f"{s}.fingerprint" not in state]
    found = by_start((f"{start}." for start in without), state if without else {})
    return {
        f"{start}.fingerprint": torch.zeros_like(updates[start].fingerprint, device="cpu")
        for start in without
        if found[f"{start}."]
    }


def check_values(updates: Mapping[str, Update], state: Mapping[str, Tensor]) -> None:
    """Raise unless the updates, by the prefix of their keys, can take the values of the tensors of `state`.

    Raises:
        ValueError: Naming the first update with an unfit tensor.
    """
    for start, tensors in by_start((f"{key}." for key in updates), state).items():
        key = start.removesuffix(".")
        with error_context(key):
            if tensors:
                updates[key].check_values(tensors)


def check_base(
    weights: Mapping[str, tuple[BaseWeight, LayerKind]], state: Mapping[str, Tensor], prefix: str
) -> None:
    """Raise unless the base weights are those that the adapter was made for.

    Args:
        weights: Base weights and kinds of their layers, by the prefix of a key in `state`.
        state: Tensors of the adapter.
        prefix: Prefix of the method.

    Raises:
        ValueError: Naming the module.
    """
    noted = {key: state[f"{key}.fingerprint"] for key in weights if f"{key}.fingerprint" in state}
    for key, expected in progress(noted.items(), len(noted), "checking base weights"):
        weight, kind = weights[key]
        found = weight.fingerprint(kind.from_layout) if expected.any() else None
        if found is not None and not is_same(found, expected):
            with error_context(in_base(key.partition(f".{prefix}")[0])):
                raise ValueError(
                    "the base weight is not the one whose directions the adapter was made from; load it on "
                    "the model that it was trained on, with the tasks that were merged before it"
                )


def shared_state(
    model: nn.Module, attribute: str | None, adapter_name: str, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Those entries of a model's state that are shared tensors of an adapter."""
    starts = tuple(f"{name}.{adapter_name}." for name, _ in shared_containers(model, attribute))
    return {key: tensor for key, tensor in state.items() if key.startswith(starts)}


def shared_keys(model: nn.Module, attribute: str | None, adapter_name: str) -> dict[str, str]:
    """Keys of an adapter's shared tensors in the model by their keys in a file."""
    keys = {}
    for name, container in shared_containers(model, attribute):
        for tensor in container[adapter_name].state_dict() if adapter_name in container else ():
            key = f"{name}.{adapter_name}.{tensor}"
            keys[f"{BASE}{attribute}.{tensor}"] = key
    return keys


def at_root(key: str, attribute: str | None) -> str:
    """Key in a file of what is at the root, if it is a shared tensor's that a mapping of names has moved."""
    _, found, tensor = f".{key}".rpartition(f".{attribute}.")
    return f"{BASE}{attribute}.{tensor}" if attribute and found else key


def saved_key(key: str, attribute: str | None) -> str:
    """Key in a file, given that in the model without the adapter's name."""
    held_by_tuner = key.startswith(f"base_model.{attribute}.")
    return f"{BASE}{key.removeprefix('base_model.')}" if held_by_tuner else key

"""Whose a tensor of a model is: told by the module that holds it, because names of adapters are arbitrary.

PEFT takes each key in which another adapter's name is a part of the path for that adapter's, also where a
module or a tensor has that name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import chain
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_subspace.tuner.shared import shared_containers

_FSDP = "_fsdp_wrapped_module."


def admit(name: Any, configs: Mapping[str, Any]) -> None:
    """Check the name of a new adapter, and give its config the number that seeds its initialization.

    Raises:
        ValueError: If it has a dot, or `nn.ModuleDict` itself has an attribute of this name.
    """
    if (
        not isinstance(name, str)
        or not name
        or "." in name
        or hasattr(nn.ModuleDict, name)
        or name == "training"
    ):
        raise ValueError(
            f"adapter_name={name!r} cannot be the name of a module in torch; choose one without dots that is "
            "no attribute of nn.ModuleDict"
        )
    others = [getattr(config, "number", -1) for other, config in configs.items() if other != name]
    configs[name].number = max(others, default=-1) + 1


def update_starts(
    model: nn.Module, layer_cls: Any, attribute: str | None, names: Iterable[str]
) -> tuple[str, ...]:
    """Prefixes of the keys of some adapters' updates, and of what they share, in a model."""
    names, found = list(names), []
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, layer_cls):
            found += [f"{path}.{layer_cls.prefix}delta.{name}." for name in names if name in module.deltas]
    found += [f"{path}.{name}." for path, _ in shared_containers(model, attribute) for name in names]
    return tuple(start.removeprefix(_FSDP) for start in found)


def count_trained(layers: Mapping[str, Any], adapter_name: str) -> int:
    """Numbers that an adapter trains in its layers, and in what these share."""
    parts = {part for layer in layers.values() for part in layer.deltas[adapter_name].parts}
    return sum(p.numel() for p in {parameter for part in parts for parameter in part.parameters()})


def owner_test(
    model: nn.Module, layer_cls: Any, attribute: str | None, names: Collection[str]
) -> Callable[[str], bool]:
    """Function that tells whether a key is of one of these adapters, heads and trained tokens included."""
    starts = update_starts(model, layer_cls, attribute, names)
    others = {
        f"{path.removeprefix(_FSDP)}.{key}"
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, AuxiliaryTrainingWrapper)
        for name in names
        for key in module.adapter_state_dict_load_map(name).values()
    }
    return lambda key: key in others or key.startswith(starts)


def restore_dropped(
    model: nn.Module, state: dict[str, Tensor], names: Collection[str], is_theirs: Callable[[str], bool]
) -> None:
    """Add to a model's state what PEFT has left out of it because of other adapters' names.

    Args:
        model: The model.
        state: Its tensors by key, without those in whose keys a name is a part of the path.
        names: Names of the other adapters.
        is_theirs: Function that tells whether a key is of one of them.
    """

    def lacks(key: str) -> bool:
        parts = key.removeprefix(_FSDP).split(".")[1:]
        return (
            key not in state and not set(names).isdisjoint(parts) and not is_theirs(key.removeprefix(_FSDP))
        )

    tensors = chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    if any(lacks(key) for key, _ in tensors):
        state.update({key: tensor for key, tensor in model.state_dict().items() if lacks(key)})

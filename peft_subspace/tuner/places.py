"""Where modules are in a model: their paths below wrapped modules, what is around them, their other names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn


def wrapper_places(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Where in a model the wrapper of each named module or parameter is, or will be."""
    modules = {name for name, _ in model.named_modules()}
    names = list(names)
    wrapped: dict[str, list[str]] = {}
    for name in names:
        if name not in modules:
            wrapped.setdefault(name.rpartition(".")[0], []).insert(0, name)  # the last one is outermost
    places = {}
    for name in names:
        owner = name if name in modules else name.rpartition(".")[0]
        depth = 0 if name in modules else wrapped[owner].index(name)
        places[name] = _inside(owner, wrapped) + ".base_layer" * depth
    return places


def _inside(name: str, wrapped: Mapping[str, list[str]]) -> str:
    """Path to a module below others, of which some are wrapped."""
    parts, path = name.split("."), ""
    for count, part in enumerate(parts, start=1):
        path += f".{part}"
        if count < len(parts):
            path += ".base_layer" * len(wrapped.get(".".join(parts[:count]), ()))
    return path[1:]


_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def surroundings(modules: Mapping[str, nn.Module], name: str) -> tuple[str, list[nn.Module]]:
    """Last part of a module's name, and the modules around it, of a model's modules by their names.

    A module in a list goes by the name of the list.
    """
    parts = [part for part in name.split(".") if part != "base_layer"]
    around = [modules[".".join(parts[:count])] for count in range(len(parts))]
    while len(parts) > 1 and type(around[-1]) in _LISTS:
        parts.pop()
        around.pop()
    return parts[-1], around


def shared_places(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Modules that a model has under several names: the modules that have them, and their names there."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, child in module._modules.items():
            if child is not None:
                places.setdefault(child, []).append((module, name))
    return {child: found for child, found in places.items() if len(found) > 1}


def aliases(model: nn.Module, kind: type[nn.Module]) -> dict[str, str]:
    """First name of each module of a kind by its other names."""
    first: dict[nn.Module, str] = {}
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kind) and first.setdefault(module, name) != name:
            found[name] = first[module]
    return found

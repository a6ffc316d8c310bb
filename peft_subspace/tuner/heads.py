"""Modules that an adapter trains in full, such as heads: which one is at work where several adapters are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from peft_subspace.core.errors import error_context
from peft_subspace.core.linalg import local_generator
from peft_subspace.core.validation import invalid
from peft_subspace.heads import make_head
from peft_subspace.tuner.declared import base_name


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


def planned_heads(model: nn.Module, config: Any) -> dict[str, nn.Module]:
    """Heads that a config names, on the meta device, by the names of the modules whose place they take.

    Raises:
        ValueError: If the model has no such module, or that is no linear layer.
    """
    found: dict[str, nn.Module] = {}
    for name, entry in config.heads.items():
        places = [
            (n, m) for n, m in model.named_modules() if n.endswith(name) and base_name(f"{n}.") == f"{n}."
        ]
        if not places:
            raise invalid(
                "heads", name, f"names no module of {type(model).__name__}; name the classifier that it has"
            )
        for place, module in places:
            features = getattr(getattr(module, "original_module", module), "in_features", None)
            with error_context(f"heads[{name!r}]"):
                if not isinstance(features, int):
                    raise ValueError(
                        f"{place} is {type(module).__name__}, and a head takes the place of a linear layer; "
                        "name the last layer in it"
                    )
                with torch.device("meta"):
                    found[place] = make_head(entry, features)
    return found


def put_heads(model: nn.Module, heads: Mapping[str, nn.Module], config: Any, adapter_name: str) -> None:
    """Put heads that were planned where PEFT has put copies of the model's own."""
    head: Any
    for name, head in heads.items():
        wrapper: Any = model.get_submodule(name)
        copied = wrapper.modules_to_save[adapter_name]
        first = next(copied.parameters())
        if not first.is_meta:
            head.to_empty(device=first.device)
            head.reset_parameters(local_generator(config.seed, name, config.number))
        head.requires_grad_(first.requires_grad)
        wrapper.modules_to_save[adapter_name] = head


def grow_head(model: nn.Module, name: str, classes: int, adapter_name: str = "default") -> None:
    """Add classes to the `EquiangularHead` of an adapter; what trains, and its optimizer, stay as they are.

    Models of transformers compute their loss with `num_labels`, which is the caller's to set.

    Args:
        model: Model with the adapter.
        name: Name of the head in the adapter's config.
        classes: Number of classes from now on.
        adapter_name: The adapter.

    Raises:
        ValueError: If there is no such head, or it has more classes already. Nothing is changed then.
    """
    configs: Any = getattr(model, "peft_config", {})
    entries = configs[adapter_name].heads if adapter_name in configs else {}
    if entries.get(name, {}).get("kind") != "equiangular":
        growing = sorted(key for key, entry in entries.items() if entry["kind"] == "equiangular")
        raise invalid("name", name, f"must be one of {growing}, the equiangular heads of {adapter_name!r}")
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and path.endswith(name):
            module.modules_to_save[adapter_name].grow(classes)
    entries[name]["classes"] = classes

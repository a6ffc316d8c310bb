"""Which modules and parameters of a model a config targets."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_quantization_kwargs
from torch import nn

from peft_subspace.base_weights.quantization import quantization_of
from peft_subspace.core.errors import error_context
from peft_subspace.layers.choose import UnknownLayerError
from peft_subspace.layers.parameter import is_vector
from peft_subspace.layers.usage import usage_of
from peft_subspace.tuner.config import SubspaceConfig
from peft_subspace.tuner.layer import SubspaceLayer
from peft_subspace.tuner.parameter_layer import ParameterLayer
from peft_subspace.tuner.places import surroundings
from peft_subspace.tuner.target import (
    Target,
    analyze_module,
    analyze_parameter,
    analyze_use,
    without_adapters,
)

_VISION: dict[str, Any] = {
    "vit": ["q_proj", "v_proj", "query", "value"],  # names before and after transformers 5
    "dinov2": ["q_proj", "v_proj", "query", "value"],
    "clip_vision_model": ["q_proj", "v_proj"],
    "resnet": ["convolution"],
    "mobilenet_v2": ["convolution"],
    "convnext": ["dwconv", "pwconv1", "pwconv2"],
}

_MADE_BY = re.compile(r"(^|\.)parametrizations\.\w+\.\d+$")

DEFAULT_TARGETS = ChainMap(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, _VISION)
"""Modules to adapt by type of model: PEFT's own table, as it is now, and vision models that it lacks."""


def targeted_parameters(model: nn.Module, config: SubspaceConfig) -> Iterator[tuple[str, nn.Module, str]]:
    """Parameters that PEFT will hand over: full name, module and name in it, in PEFT's order.

    Raises:
        TypeError: If one is parametrized.
        ValueError: If one belongs to the model itself, or to a module that is adapted as a whole.
    """
    targets = tuple(config.target_parameters or ())
    if not targets:
        return
    endings = tuple(f".{target}" for target in targets)
    for module_name, module in model.named_modules():
        if ".base_layer" in module_name:
            continue
        for name in getattr(module, "parametrizations", ()):
            if f".{module_name}.{name}".endswith(endings):
                raise TypeError(
                    f"{module_name}.{name}: it is parametrized, and a parametrization makes it anew at every "
                    "use; name the module in target_modules, or remove the parametrization before"
                )
        base = without_adapters(module)
        for name, _ in base.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}"
            if full_name in targets or full_name.endswith(endings):
                with error_context(full_name):
                    _check_owner(config, module_name, module)
                yield full_name, base, name


def _check_owner(config: SubspaceConfig, name: str, module: nn.Module) -> None:
    if not name:
        raise ValueError("the model itself cannot be wrapped; leave it out of target_parameters")
    adapted = isinstance(module, BaseTunerLayer) and not isinstance(module, ParameterLayer)
    if adapted or is_targeted(config, name):
        raise ValueError(
            "its module is adapted as a whole; leave the module out of target_modules, or the parameter out "
            "of target_parameters"
        )


def weight_name(name: str, layer: SubspaceLayer) -> str:
    """Full name of the weight that a layer adapts: of a parameter its own, else its module's."""
    if not isinstance(layer, ParameterLayer):
        return name
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return f"{name}.{layer.parameter_name}"


def include_all_linear_layers(config: SubspaceConfig, model: nn.Module) -> None:
    """Replace the shorthand "all-linear" in place.

    PEFT leaves out quantized layers that are no `nn.Linear`. Layers that are never called are left out here:
    what the model makes of their weights is no linear layer's output, and LoRA could not serve an export.
    """
    given = config.target_modules
    _maybe_include_all_linear_layers(config, model)
    if config.target_modules is given:
        return
    modules, found = dict(model.named_modules()), set(config.target_modules or ())
    dead = {name for name in found if usage_of(*surroundings(modules, name)) == (False, True)}
    dead |= {name for name in found if _is_held_by_compiler(name, modules[name])}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    more = {
        name
        for name, module in _outermost(modules)
        if not isinstance(module, nn.Linear | nn.Embedding) and module is not head and quantization_of(module)
    }
    config.target_modules = sorted((more | found) - dead)


def is_targeted(peft_config: Any, key: str) -> bool | re.Match[str] | None:
    """PEFT's test of a module's name; what makes a weight of other tensors, named `"0"`, never passes it."""
    return not _MADE_BY.search(key) and BaseTuner._check_target_module_exists(peft_config, key)


def targets(modules: Mapping[str, nn.Module], config: SubspaceConfig) -> Iterator[tuple[str, nn.Module]]:
    """Those of a model's modules that PEFT will hand over for replacement."""
    for name, module in _outermost(modules):
        if is_targeted(config, name):
            yield name, module


def _outermost(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Modules, of a model's, that lie in no tuner layer, but for those of one with adapted parameters."""
    inside: tuple[str, ...] = ()
    for name, module in modules.items():
        if not name or name.startswith(inside or ("\0",)):
            continue
        if isinstance(module, ParameterLayer):
            inside = (*inside, *(f"{name}.{own}" for own in module._modules if own != "base_layer"))
        elif isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
        if not name.endswith(".base_layer"):
            yield name, module


def analyze_targets(model: nn.Module, config: SubspaceConfig) -> Iterator[tuple[str, Target]]:
    """Weights that a config targets, by the names of their modules or parameters, in PEFT's order.

    A module of no known kind is adapted by its parts: the parameters that it calls weights, and the layers in
    it that it reads and never calls.

    Raises:
        TypeError: If a targeted module's type cannot be adapted.
        ValueError: If one of a module's parameters is adapted.
    """
    backend_kwargs, modules = get_quantization_kwargs(model), dict(model.named_modules())
    for name, module in targets(modules, config):
        with error_context(name):
            try:
                target = analyze_module(module, **backend_kwargs)
            except UnknownLayerError:
                parts = _analyze_parts(name, without_adapters(module), surroundings(modules, name))
                if not parts:
                    raise
                yield from parts.items()
                continue
            if isinstance(module, ParameterLayer):
                raise ValueError(
                    "another adapter adapts a parameter of it; load the adapters into separate models, or "
                    "leave the module out of target_modules"
                )
            if _is_held_by_compiler(name, module):
                raise TypeError(
                    "torch.compile holds this layer itself, so an adapter in its place would never run; "
                    "adapt the model before the layer is compiled, or compile the layer with layer.compile()"
                )
            yield name, analyze_use(target, *surroundings(modules, name))
    for name, owner, parameter_name in targeted_parameters(model, config):
        with error_context(name):
            around = surroundings(modules, name.removesuffix(f".{parameter_name}"))
            yield name, analyze_use(analyze_parameter(owner, parameter_name), *around)


def _analyze_parts(name: str, base: nn.Module, around: tuple[str, Sequence[nn.Module]]) -> dict[str, Target]:
    parts = {}
    for own, parameter in base.named_parameters(recurse=False):
        if "weight" in own and not is_vector(parameter):
            target = analyze_use(analyze_parameter(base, own), *around)
            parts[f"{name}.{own}"] = replace(target, part_of=name)
    for own, child in base.named_children():
        if usage_of(own, [base]) == (False, True):
            parts[f"{name}.{own}"] = replace(analyze_use(analyze_module(child), own, [base]), part_of=name)
    return parts


def _is_held_by_compiler(name: str, module: nn.Module) -> bool:
    """Whether `torch.compile` was given the layer: it calls that, whatever is in its place later."""
    return name.rpartition(".")[2] == "_orig_mod" and not isinstance(module, BaseTunerLayer)


def check_same_parameters(model: nn.Module, names: set[str]) -> None:
    """Raise unless a new adapter adapts, of each module, the parameters that others adapt, or none.

    The wrappers of one module, and those of modules inside it, are nested, and so are an adapter's keys.

    Raises:
        ValueError: Naming one that only some adapters adapt.
    """
    theirs = {weight_name(n, m) for n, m in model.named_modules() if isinstance(m, ParameterLayer)}
    for name in sorted(names ^ theirs):
        others = theirs if name in names else names
        if any(_are_nested(name, other) for other in others):
            raise ValueError(
                f"target_parameters must be those of the other adapters, {sorted(theirs)}, and {name} is in "
                "one of them only; load the adapters into separate models"
            )


def _are_nested(name: str, other: str) -> bool:
    """Whether the module of one parameter is that of another, or inside it."""
    first, second = (f"{n.rpartition('.')[0]}." for n in (name, other))
    return first.startswith(second) or second.startswith(first)

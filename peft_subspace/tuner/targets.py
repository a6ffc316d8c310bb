"""Which modules and parameters of a model a config targets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from peft_subspace.base_weights.quantization import quantization_of
from peft_subspace.core.errors import error_context
from peft_subspace.tuner.config import SubspaceConfig
from peft_subspace.tuner.layer import SubspaceLayer
from peft_subspace.tuner.parameter_layer import ParameterLayer

DEFAULT_TARGETS: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING | {
    "vit": ["q_proj", "v_proj", "query", "value"],  # names before and after transformers 5
    "dinov2": ["q_proj", "v_proj", "query", "value"],
    "clip_vision_model": ["q_proj", "v_proj"],
    "resnet": ["convolution"],
    "mobilenet_v2": ["convolution"],
    "convnext": ["dwconv", "pwconv1", "pwconv2"],
}
"""Modules to adapt by type of model: PEFT's own table, and vision models that it lacks."""


def targeted_parameters(model: nn.Module, config: SubspaceConfig) -> Iterator[tuple[str, nn.Module, str]]:
    """Parameters that PEFT will hand over: full name, module and name in it, in PEFT's order.

    Raises:
        ValueError: If one belongs to the model itself, or to a module that is adapted as a whole.
    """
    targets = tuple(config.target_parameters or ())
    if not targets:
        return
    endings = tuple(f".{target}" for target in targets)
    for module_name, module in model.named_modules():
        if ".base_layer" in module_name:
            continue
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
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
    if adapted or BaseTuner._check_target_module_exists(config, name):
        raise ValueError(
            "its module is adapted as a whole; leave the module out of target_modules, or the parameter out "
            "of target_parameters"
        )


def check_same_parameters(model: nn.Module, config: SubspaceConfig, others: Iterable[SubspaceConfig]) -> None:
    """Raise unless all adapters with `target_parameters` adapt the same ones: their wrappers are nested.

    Raises:
        ValueError: Naming one that only some of them adapt.
    """
    names = {name for name, _, _ in targeted_parameters(model, config)}
    for other in others:
        theirs = {name for name, _, _ in targeted_parameters(model, other)}
        if names and theirs and names != theirs:
            raise ValueError(
                f"target_parameters={config.target_parameters!r} must be those of the other adapters, "
                f"{other.target_parameters!r}, and {min(names ^ theirs)} is in one of them only; load the "
                "adapters into separate models"
            )


def weight_name(name: str, layer: SubspaceLayer) -> str:
    """Full name of the weight that a layer adapts: of a parameter its own, else its module's."""
    if not isinstance(layer, ParameterLayer):
        return name
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return f"{name}.{layer.parameter_name}"


def wrapper_places(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Where in a model the wrapper of each named module or parameter is, or will be."""
    modules = {name for name, _ in model.named_modules()}
    siblings: dict[str, list[str]] = {}
    for name in names:
        owner = name if name in modules else name.rpartition(".")[0]
        siblings.setdefault(owner, []).append(name)
    return {
        name: owner + ".base_layer" * depth
        for owner, group in siblings.items()
        for depth, name in enumerate(reversed(group))
    }


def include_all_linear_layers(config: SubspaceConfig, model: nn.Module) -> None:
    """Replace the shorthand "all-linear" in place; PEFT leaves out codes that are in no `nn.Linear`."""
    given = config.target_modules
    _maybe_include_all_linear_layers(config, model)
    if config.target_modules is given:
        return
    head = getattr(model, "get_output_embeddings", lambda: None)()
    more = {
        name
        for name, module in _outermost(model)
        if not isinstance(module, nn.Linear | nn.Embedding) and module is not head and quantization_of(module)
    }
    config.target_modules = sorted(more.union(config.target_modules or ()))


def targets(model: nn.Module, config: SubspaceConfig) -> Iterator[tuple[str, nn.Module]]:
    """Modules that PEFT will hand over for replacement."""
    for name, module in _outermost(model):
        if BaseTuner._check_target_module_exists(config, name):
            yield name, module


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of a model that lie in no tuner layer."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside or ("\0",)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
        yield name, module


def refuse_unreachable(model: nn.Module, name: str) -> None:
    """Raise if adapters of a module would have no effect, or get in the way of others.

    Raises:
        TypeError: If the module's parent never calls it.
        ValueError: If one of its parameters is adapted.
    """
    if isinstance(model.get_submodule(name), ParameterLayer):
        raise ValueError(
            "another adapter adapts a parameter of it; load the adapters into separate models, or leave the "
            "module out of target_modules"
        )
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        raise TypeError(
            "nn.MultiheadAttention reads this layer's weight and never calls it, so an adapter would have "
            "no effect; exclude it with exclude_modules"
        )

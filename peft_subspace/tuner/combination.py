"""New adapters out of existing ones: sums within a method, exactly, and what functions of updates make."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from peft_subspace.core.chain import split
from peft_subspace.core.delta import Combined, Update
from peft_subspace.core.errors import error_context
from peft_subspace.core.validation import check_choice, invalid
from peft_subspace.runtime.progress import progress
from peft_subspace.tuner.config import FORMAT_VERSION, SubspaceConfig
from peft_subspace.tuner.targets import weight_name

SUMS = ("cat", "linear")


@dataclass
class Parts:
    """Updates `L_t R_t` of one weight that are to be combined.

    Attributes:
        lefts: Left factors `(out, r_t)`, scaled.
        rights: Right factors `(r_t, columns)`.
        weights: Weights of the adapters.
        adapters: Their names.
        module: Name of the weight's module.
        options: What the caller chose besides.
    """

    lefts: list[Tensor]
    rights: list[Tensor]
    weights: list[float]
    adapters: list[str]
    module: str
    options: Mapping[str, Any] = field(default_factory=dict)


Combine = Callable[[Parts], tuple[Tensor, Tensor]]

COMBINATIONS: dict[str, Combine] = {}
"""Functions by `combination_type`; what they return has at most the rank of the weight."""

OPTIONS: dict[str, Sequence[str]] = {}
"""Names of their options."""

_OF_PEFT = {"density", "majority_sign_method", "svd_rank", "svd_clamp", "svd_full_matrices", "svd_driver"}
"""Options that PEFT's function takes with every type, whether that uses them or not."""

PROVIDERS: list[str] = []
"""Modules above this one that add to them, imported when an adapter is combined."""


def add_weighted_adapter(
    tuner: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    options: Mapping[str, Any],
) -> None:
    """Add an adapter that is made of others; see `SubspaceModel.add_weighted_adapter`."""
    for provider in PROVIDERS:
        import_module(provider)
    _check(tuner, adapters, weights, adapter_name, combination_type)
    options = _used(combination_type, options)
    total: dict[str, float] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        total[adapter] = total.get(adapter, 0.0) + weight
    layers = {
        name: layer
        for name, layer in tuner.model.named_modules()
        if isinstance(layer, tuner.tuner_layer_cls) and any(adapter in layer.deltas for adapter in adapters)
    }
    entries, states = {}, {}
    for name, layer in progress(layers.items(), len(layers), "combining adapters"):
        chosen = {adapter: weight for adapter, weight in total.items() if adapter in layer.deltas}
        with torch.no_grad(), error_context(f"{name}: adapters {list(chosen)}"):
            entries[weight_name(name, layer)], state = _combined(
                layer, name, chosen, combination_type, options
            )
        first = layer.deltas[next(iter(chosen))]
        states[name] = {**({"fingerprint": first.fingerprint} if first.needs_weight else {}), **state}
    config = _config_of_sum(tuner, tuner.peft_config[adapters[0]], entries)
    if any(layer.deltas[name].lean for layer in layers.values() for name in adapters if name in layer.deltas):
        config = replace(config, inference_mode=True, format_version=FORMAT_VERSION)
    tuner.peft_config[adapter_name] = config
    tuner.inject_adapter(tuner.model, adapter_name)
    with torch.no_grad():
        for name, layer in layers.items():
            layer.deltas[adapter_name].take(states[name])


def _used(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that a type has; others of PEFT's function have no effect there either."""
    known, used = OPTIONS[kind], {}
    for name, value in options.items():
        rule = f"is no option of combination_type={kind!r}, which has {known}"
        if value is not None and name in known:
            used[name] = value
        elif value is not None and name in _OF_PEFT:
            warnings.warn(f"{name}={value!r} {rule}; it has no effect", stacklevel=5)
        elif value is not None:
            raise invalid(name, value, rule)
    return used


def _combined(
    layer: Any, name: str, weights: Mapping[str, float], kind: str, options: Mapping[str, Any]
) -> Combined:
    """Config entries and state of what is made of the adapters of one layer."""
    deltas = [layer.deltas[adapter] for adapter in weights]
    update: type[Update] = type(layer).delta_cls
    form = "average" if kind == "linear" and update.defines("average") else "concatenate"
    if kind in SUMS and update.defines(form) and not options:
        factors = [weight * layer.scaling[adapter] for adapter, weight in weights.items()]
        made: Combined = getattr(update, form)(deltas, factors)
        return made
    pairs = [split([factor.float() for factor in delta(layer.read_weight)]) for delta in deltas]
    lefts = [layer.scaling[adapter] * left for adapter, (left, _) in zip(weights, pairs, strict=True)]
    rights = [right.flatten(1) for _, right in pairs]
    parts = Parts(lefts, rights, list(weights.values()), list(weights), name, options)
    left, right = COMBINATIONS[kind](parts)
    return update.product(left, right.reshape(-1, *pairs[0][1].shape[1:]), deltas)


def _config_of_sum(
    tuner: Any, config: SubspaceConfig, entries: Mapping[str, Mapping[str, Any]]
) -> SubspaceConfig:
    """Config under which a sum is created again on loading.

    Args:
        tuner: The tuner model.
        config: Config of one of the adapters.
        entries: For each module, its value by the name of a pattern.
    """
    modules = {name for name, _ in tuner.model.named_modules()}
    changes: dict[str, Any] = {
        "target_modules": modules.intersection(entries),
        "target_parameters": sorted(set(entries) - modules) or None,
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
        "initialized": True,
    }
    return replace(config, **{**changes, **config.of_sum(entries)})


def _check(
    tuner: Any, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
) -> None:
    missing = [name for name in adapters if name not in tuner.peft_config]
    if missing or not adapters:
        raise ValueError(
            f"adapters={list(adapters)} must name adapters of the model {sorted(tuner.peft_config)}"
        )
    if len(weights) != len(adapters):
        raise ValueError(f"weights={list(weights)} must have one entry for each of adapters={list(adapters)}")
    if adapter_name in tuner.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r} exists already; choose a new name")
    if len({tuner.peft_config[name].keep_zeros for name in adapters}) > 1:
        raise ValueError(
            f"adapters={list(adapters)} differ in keep_zeros, so that no adapter is their sum; merge them "
            "one by one"
        )
    method, update = type(tuner).__name__, tuner.tuner_layer_cls.delta_cls
    export = "export each with peft_subspace.lora_state_dict and combine those"
    check_choice("combination_type", combination_type, (*SUMS, *COMBINATIONS))
    if not update.defines("product") and not (combination_type in SUMS and update.defines("concatenate")):
        raise ValueError(
            f"adapters={list(adapters)} of {method} cannot be combined by {combination_type!r}: no adapter "
            f"of this method is their sum; merge them one by one, or {export}"
        )
    for name in adapters:
        config = tuner.peft_config[name]
        if config.modules_to_save or config.trainable_token_indices or config.bias != "none":
            raise ValueError(
                f"adapter {name!r} trains more than its update (modules_to_save, trainable_token_indices or "
                f"bias), which no weighted adapter can hold; merge the adapters one by one, or {export}"
            )

"""New adapters out of existing ones, exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from peft_subspace.core.errors import error_context
from peft_subspace.runtime.progress import progress
from peft_subspace.tuner.config import FORMAT_VERSION, SubspaceConfig
from peft_subspace.tuner.patterns import patterns_of
from peft_subspace.tuner.targets import weight_name


def add_weighted_adapter(
    tuner: Any, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
) -> None:
    """Add an adapter whose update is a weighted sum; see `SubspaceModel.add_weighted_adapter`."""
    _check(tuner, adapters, weights, adapter_name, combination_type)
    total: dict[str, float] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        total[adapter] = total.get(adapter, 0.0) + weight
    layers = {
        name: layer
        for name, layer in tuner.model.named_modules()
        if isinstance(layer, tuner.tuner_layer_cls) and any(adapter in layer.deltas for adapter in adapters)
    }
    update_cls = tuner.tuner_layer_cls.delta_cls
    combine = update_cls.concatenate if combination_type == "cat" else update_cls.average
    entries, states = {}, {}
    for name, layer in progress(layers.items(), len(layers), "combining adapters"):
        present = [adapter for adapter in total if adapter in layer.deltas]
        deltas = [layer.deltas[adapter] for adapter in present]
        with torch.no_grad(), error_context(f"{name}: adapters {present}"):
            factors = [total[adapter] * layer.scaling[adapter] for adapter in present]
            entries[weight_name(name, layer)], state = combine(deltas, factors)
        noted = {"fingerprint": deltas[0].fingerprint} if deltas[0].needs_weight else {}
        states[name] = {**noted, **state}
    config = _config_of_sum(tuner, tuner.peft_config[adapters[0]], entries)
    if any(layer.deltas[name].lean for layer in layers.values() for name in adapters if name in layer.deltas):
        config = replace(config, inference_mode=True, format_version=FORMAT_VERSION)
    tuner.peft_config[adapter_name] = config
    tuner.inject_adapter(tuner.model, adapter_name)
    for name, layer in layers.items():
        update = layer.deltas[adapter_name]
        update.load_state_dict(update.inference_state(states[name]) if update.lean else states[name])


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
    fields = {field for values in entries.values() for field in values}
    patterns = {
        field: patterns_of({name: values[field] for name, values in entries.items()}) for field in fields
    }
    changes: dict[str, Any] = {
        "target_modules": modules.intersection(entries),
        "target_parameters": sorted(set(entries) - modules) or None,
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
        "initialized": True,
    }
    return replace(config, **{**changes, **config.values_of_sums, **patterns})


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
    method, possible = type(tuner).__name__, tuner.tuner_layer_cls.delta_cls.combinations
    export = "export each with peft_subspace.lora_state_dict and combine those"
    if combination_type not in (possible or ("cat",)):
        raise ValueError(
            f"combination_type={combination_type!r} is not exact for {method}; use 'cat', or merge the "
            f"adapters one by one, or {export}"
        )
    for name in adapters:
        config = tuner.peft_config[name]
        if config.modules_to_save or config.trainable_token_indices or config.bias != "none":
            raise ValueError(
                f"adapter {name!r} trains more than its update (modules_to_save, trainable_token_indices or "
                f"bias), which no weighted adapter can hold; merge the adapters one by one, or {export}"
            )
    if not possible:
        raise ValueError(
            f"adapters={list(adapters)} of {method} cannot be concatenated: no adapter of this method is "
            f"their sum; {export}"
        )

"""New adapters out of existing ones, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner

from peft_subspace.core.errors import error_context
from peft_subspace.runtime.progress import progress
from peft_subspace.tuner.config import SubspaceConfig
from peft_subspace.tuner.patterns import patterns_of
from peft_subspace.tuner.targets import weight_name


class CombiningTuner(BaseTuner):
    """Tuner with `add_weighted_adapter`."""

    peft_config: dict[str, Any]
    tuner_layer_cls: Any

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "cat",
    ) -> None:
        """Add an adapter whose update is `Σ weights[i] · ΔW_i`, exactly.

        Args:
            adapters: Names of existing adapters.
            weights: Their weights, of any sign.
            adapter_name: Name of the new adapter, which saves and loads like any other.
            combination_type: `"cat"`: the chains are concatenated, and ranks add up. `"linear"`, for methods
                with frozen bases: the trained part is averaged, which needs equal bases, and is checked.

        Raises:
            ValueError: If names or weights do not fit, or the result is no adapter of this method.
        """
        self._check_combination(adapters, weights, adapter_name, combination_type)
        scale = dict(zip(adapters, weights, strict=True))
        layers = {
            name: layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, self.tuner_layer_cls)
            and any(adapter in layer.deltas for adapter in adapters)
        }
        delta_cls = self.tuner_layer_cls.delta_cls
        combine = delta_cls.concatenate if combination_type == "cat" else delta_cls.average
        combined = {}
        for name, layer in progress(layers.items(), len(layers), "combining adapters"):
            present = [adapter for adapter in adapters if adapter in layer.deltas]
            with torch.no_grad(), error_context(f"{name}: adapters {present}"):
                combined[name] = combine(
                    [layer.deltas[a] for a in present],
                    [scale[a] * layer.initial_scaling[a] for a in present],
                )
        ranks = {weight_name(name, layers[name]): rank for name, (rank, _) in combined.items()}
        self.peft_config[adapter_name] = self._combined_config(self.peft_config[adapters[0]], ranks)
        self.inject_adapter(self.model, adapter_name)
        for name, layer in layers.items():
            layer.deltas[adapter_name].load_state_dict(combined[name][1])

    def _combined_config(self, config: SubspaceConfig, ranks: dict[str, Any]) -> SubspaceConfig:
        """Config under which the result of `add_weighted_adapter` is created again on loading."""
        modules = {name for name, _ in self.model.named_modules()}
        changes: dict[str, Any] = {
            "target_modules": modules.intersection(ranks),
            "target_parameters": sorted(set(ranks) - modules) or None,
            "rank_pattern": patterns_of(ranks), "alpha_pattern": {}, "scale": 1.0, "exclude_modules": None,
            "layers_to_transform": None, "layers_pattern": None, "dropout": 0.0, "initialized": True,
            "orthogonality_weight": 0.0,
        }  # fmt: skip
        return replace(config, **{k: v for k, v in changes.items() if hasattr(config, k)})

    def _check_combination(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
    ) -> None:
        missing = [name for name in adapters if name not in self.peft_config]
        if missing or not adapters:
            raise ValueError(
                f"adapters={list(adapters)} must name adapters of the model {sorted(self.peft_config)}"
            )
        if len(weights) != len(adapters):
            raise ValueError(
                f"weights={list(weights)} must have one entry for each of adapters={list(adapters)}"
            )
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name={adapter_name!r} exists already; choose a new name")
        remedy = (
            "merge the adapters one by one, or export each with peft_subspace.lora_state_dict and combine "
            "those"
        )
        if combination_type not in self.tuner_layer_cls.delta_cls.combinations:
            raise ValueError(
                f"combination_type={combination_type!r} is not exact for {type(self).__name__}; use 'cat', "
                f"or {remedy}"
            )
        for name in adapters:
            config = self.peft_config[name]
            if config.modules_to_save or config.trainable_token_indices or config.bias != "none":
                raise ValueError(
                    f"adapter {name!r} trains more than its update (modules_to_save, "
                    f"trainable_token_indices or bias), which no weighted adapter can hold; {remedy}"
                )

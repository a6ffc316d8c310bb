"""The tuner model: replaces targeted modules by tuner layers, and what spans all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from logging import getLogger
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .config import SubspaceConfig
from .delta import Delta, WeightShape
from .layer import SubspaceLayer
from .ops import ops_for

logger = getLogger("peft_subspace")

# Vision models that PEFT's own table lacks.
_MORE_TARGETS = {
    "vit": ["q_proj", "v_proj", "query", "value"],  # names before and after transformers 5
    "dinov2": ["q_proj", "v_proj", "query", "value"],
    "clip_vision_model": ["q_proj", "v_proj"],
    "resnet": ["convolution"],
    "mobilenet_v2": ["convolution"],
    "convnext": ["dwconv", "pwconv1", "pwconv2"],
}


class SubspaceModel(BaseTuner):
    """Base of the five tuners.

    Subclasses set `prefix`, `tuner_layer_cls`, and `linear_layer_cls`, the same layer under a name that
    contains `Linear`, by which PEFT recognises adapted linear layers.
    """

    peft_config: dict[str, Any]
    linear_layer_cls: ClassVar[type[SubspaceLayer]]
    tuner_layer_cls: type[SubspaceLayer]
    _ranks: dict[str, Any]
    target_module_mapping: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING | _MORE_TARGETS

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; if that fails, forget its config."""
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            self.peft_config.pop(adapter_name, None)
            raise

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Check every targeted module before the first one is replaced."""
        plan = self.plan(model, peft_config)
        self._ranks = {name: delta.rank for name, delta in plan.items()}
        lowered = [name for name, delta in plan.items() if getattr(delta, "lowered", False)]
        if lowered and peft_config.r != type(peft_config).r:
            logger.warning(
                "r=%s exceeds a dimension in %d of the adapted modules, such as %r, and is lowered to it "
                "there",
                *(peft_config.r, len(lowered), lowered[0]),
            )

    @classmethod
    def plan(cls, model: nn.Module, config: SubspaceConfig) -> dict[str, Delta]:
        """Deltas, on the meta device, that `config` would create on `model`, by module name.

        Raises:
            TypeError: If a targeted module's type cannot be adapted.
            ValueError: If a targeted module cannot hold what the config asks for.
        """
        _maybe_include_all_linear_layers(config, model)  # replaces the shorthand in place
        backend_kwargs = get_quantization_kwargs(model)
        shapes = {}
        for name, module in _targets(model, config):
            with _naming(name):
                _refuse_attention_internals(model, name)
                base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
                quantized = resolve_quantization_backend(base, **backend_kwargs) is not None
                shapes[name] = ops_for(base, quantized=quantized).shape
        known: dict[Any, Delta] = {}
        plan = {}
        for name, rank in cls.ranks(config, shapes).items():
            key = (shapes[name], str(rank))
            if key not in known:
                with _naming(name), torch.device("meta"):
                    known[key] = cls.tuner_layer_cls.delta_cls(config, shapes[name], rank)
            plan[name] = known[key]
        return plan

    @classmethod
    def ranks(cls, config: Any, shapes: dict[str, WeightShape]) -> dict[str, Any]:
        """What each delta takes as its rank, by module name; it may depend on all targeted modules.

        Raises:
            ValueError: If a module cannot hold what the config asks for; the message names it.
        """
        return {name: config.rank_for(name) for name in shapes}

    @classmethod
    def keyed(cls, plan: dict[str, Delta]) -> dict[str, Delta]:
        """Deltas of a plan by the start of their keys in a saved adapter."""
        return {f"base_model.model.{module}.{cls.prefix}delta": delta for module, delta in plan.items()}

    @classmethod
    def expected_state(cls, model: nn.Module, config: SubspaceConfig) -> dict[str, Tensor]:
        """Tensors, on the meta device, that a saved adapter of this config must hold for this base model."""
        return {
            f"{key}.{name}": tensor
            for key, delta in cls.keyed(cls.plan(model, config)).items()
            for name, tensor in delta.state_dict().items()
        }

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        twin = next((n for n, c in self.peft_config.items() if c is peft_config and n != adapter_name), None)
        # Injecting by a state dict's keys reaches modules that were not planned.
        rank = self._ranks.get(current_key, peft_config.rank_for(current_key))
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config, current_key, rank, twin)
            return
        layer = self._wrap(target)
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, peft_config, current_key, rank, twin)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _wrap(self, target: nn.Module) -> SubspaceLayer:
        backend_kwargs = get_quantization_kwargs(self.model)
        layer = self.tuner_layer_cls(target, **backend_kwargs)
        if layer.ops.linear:
            layer.__class__ = self.linear_layer_cls
        return layer

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names`, one per sample, to the tuner layers while the model runs."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        self._check_adapter_names(adapter_names)
        beams = kwargs.get("num_beams") or 1
        encoder = self._encoder()
        handles = []
        for name, module in self.model.named_modules():
            if isinstance(module, self.tuner_layer_cls | AuxiliaryTrainingWrapper):
                # Beam search repeats the samples for the decoder only.
                repeats = 1 if encoder is not None and name.startswith(encoder) else beams
                names = [n for n in adapter_names for _ in range(repeats)]
                hook = partial(_pass_adapter_names, adapter_names=names)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, adapter_names: Any) -> None:
        if self.training:
            raise ValueError("adapter_names cannot be used in training mode; call eval() first")
        if not isinstance(adapter_names, list | tuple):
            raise TypeError(
                f"adapter_names={adapter_names!r} must be a list with one adapter name per sample"
            )
        unknown = sorted(set(adapter_names) - set(self.peft_config) - {"__base__"})
        if unknown:
            raise ValueError(
                f"adapter_names has unknown adapters {unknown}; the model has {sorted(self.peft_config)}, "
                "and '__base__' for none"
            )

    def _encoder(self) -> str | None:
        """Prefix of the encoder's modules, None for models without one of their own."""
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        return next(
            (f"{name}." for name, module in self.model.named_modules() if name and module is encoder), None
        )

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
        for name, layer in layers.items():
            present = [adapter for adapter in adapters if adapter in layer.deltas]
            try:
                with torch.no_grad():
                    combined[name] = combine(
                        [layer.deltas[a] for a in present],
                        [scale[a] * layer.initial_scaling[a] for a in present],
                    )
            except ValueError as error:
                raise ValueError(f"{name}: adapters {present}: {error}") from error
        ranks = {name: rank for name, (rank, _) in combined.items()}
        self.peft_config[adapter_name] = self._combined_config(self.peft_config[adapters[0]], ranks)
        self.inject_adapter(self.model, adapter_name)
        for name, layer in layers.items():
            layer.deltas[adapter_name].load_state_dict(combined[name][1])

    def _combined_config(self, config: SubspaceConfig, ranks: dict[str, Any]) -> SubspaceConfig:
        """Config under which the result of `add_weighted_adapter` is created again on loading."""
        # Patterns match from the end of a name, and the first match counts: longest names first.
        patterns = {re.escape(name): ranks[name] for name in sorted(ranks, key=len, reverse=True)}
        changes: dict[str, Any] = {
            "target_modules": set(ranks), "rank_pattern": patterns, "alpha_pattern": {}, "scale": 1.0,
            "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None, "dropout": 0.0,
            "initialized": True,
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
        remedy = "merge the adapters one by one, or export each with peft_subspace.to_lora and combine those"
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

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check the tensors that PEFT is about to load; if they are unfit, remove the new adapter again."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = model.state_dict()
        layers = {name: m for name, m in model.named_modules() if isinstance(m, cls.tuner_layer_cls)}
        deltas = {
            f"{name}.{cls.prefix}delta.{adapter_name}": layer.deltas[adapter_name]
            for name, layer in layers.items()
            if adapter_name in layer.deltas
        }
        try:
            check_state({key: own[key] for key in remapped if cls.prefix in key and key in own}, remapped)
            check_values(deltas, remapped)
        except ValueError:
            _discard(model, adapter_name, cls)
            raise
        return remapped


def check_shapes(expected: dict[str, Tensor], found: dict[str, tuple[int, ...]]) -> None:
    """Raise unless every expected tensor is found in its shape.

    Raises:
        ValueError: Naming the first tensor that is missing or of another shape.
    """
    remedy = "load the adapter on the base model that it was trained on"
    missing = sorted(set(expected) - set(found))
    if missing:
        raise ValueError(
            f"{len(missing)} tensors that the base model needs are missing, such as {missing[0]}; {remedy}"
        )
    for key, tensor in expected.items():
        if found[key] != tuple(tensor.shape):
            raise ValueError(
                f"{key} has shape {found[key]} in the file, but the base model needs {tuple(tensor.shape)}; "
                f"{remedy}"
            )


def check_state(expected: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Raise unless the tensors of `state` have the expected shapes and finite values.

    Raises:
        ValueError: Naming the first tensor that is unfit.
    """
    check_shapes(expected, {key: tuple(state[key].shape) for key in expected})
    for key in expected:
        if state[key].is_floating_point() and not torch.isfinite(state[key]).all():
            raise ValueError(
                f"{key} has NaN or infinite values in the file; the adapter is broken, train it again"
            )


def check_values(deltas: dict[str, Delta], state: dict[str, Tensor]) -> None:
    """Raise unless the tensors of `state` have values that the deltas, by the start of their keys, can take.

    Raises:
        ValueError: Naming the first delta with an unfit tensor.
    """
    for key, delta in deltas.items():
        tensors = {name: state[f"{key}.{name}"] for name in delta.state_dict() if f"{key}.{name}" in state}
        with _naming(key):
            delta.check_values(tensors)


def _discard(model: nn.Module, adapter_name: str, cls: type[SubspaceModel]) -> None:
    """Take an unfit adapter off a wrapped model; if it was the only one, restore the base model."""
    tuner = next((module for module in model.modules() if isinstance(module, cls)), None)
    if tuner is None:  # injected into a plain model, before and apart from loading
        return
    if set(tuner.peft_config) == {adapter_name}:
        tuner.unload()
    else:
        tuner.delete_adapter(adapter_name)


def _targets(model: nn.Module, config: SubspaceConfig) -> Iterator[tuple[str, nn.Module]]:
    """Modules that PEFT will hand over for replacement."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside or ("\0",)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
        if BaseTuner._check_target_module_exists(config, name):
            yield name, module


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put a name before the message of an error that `plan` or a check raises."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def _refuse_attention_internals(model: nn.Module, name: str) -> None:
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        raise TypeError(
            "nn.MultiheadAttention reads this layer's weight and never calls it, so an adapter would have "
            "no effect; exclude it with exclude_modules"
        )


def _pass_adapter_names(
    module: nn.Module, args: tuple, kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[tuple, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}

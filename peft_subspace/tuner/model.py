"""The tuner model: replaces targeted modules by tuner layers, and what spans all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from math import prod
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_quantization_kwargs
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_subspace.base_weights.quantization import is_readable, quantization_of, unreadable
from peft_subspace.base_weights.weight import keep_codes, tied_parameters, whole_weight
from peft_subspace.core.delta import Delta
from peft_subspace.core.errors import error_context
from peft_subspace.core.shapes import WeightShape
from peft_subspace.core.state import check_state, check_values
from peft_subspace.layers.choose import ops_for
from peft_subspace.layers.embedding import EmbeddingOps
from peft_subspace.layers.experts import parameter_ops
from peft_subspace.runtime.progress import counting
from peft_subspace.tuner.combination import CombiningTuner
from peft_subspace.tuner.config import SubspaceConfig
from peft_subspace.tuner.declared import check_declared
from peft_subspace.tuner.layer import SubspaceLayer
from peft_subspace.tuner.mixed_batch import adapter_names_passed, check_adapter_names
from peft_subspace.tuner.parameter_layer import ParameterLayer
from peft_subspace.tuner.targets import (
    check_same_parameters,
    include_all_linear_layers,
    targeted_parameters,
    targets,
    wrapper_places,
)
from peft_subspace.tuner.weight_start import WeightStarts

logger = getLogger("peft_subspace")


# The largest deltas have five times the numbers of their weight, and sums of some of them accordingly more.
_MOST_TIMES = 64


_MOST_BESIDES = 2**20


# Vision models that PEFT's own table lacks.
_MORE_TARGETS = {
    "vit": ["q_proj", "v_proj", "query", "value"],  # names before and after transformers 5
    "dinov2": ["q_proj", "v_proj", "query", "value"],
    "clip_vision_model": ["q_proj", "v_proj"],
    "resnet": ["convolution"],
    "mobilenet_v2": ["convolution"],
    "convnext": ["dwconv", "pwconv1", "pwconv2"],
}


class SubspaceModel(CombiningTuner):
    """Base of the five tuners.

    Subclasses set `prefix`, `tuner_layer_cls`, and `linear_layer_cls`, the same layer under a name that
    contains `Linear`, by which PEFT recognises adapted linear layers; those that adapt parameters also set
    `parameter_layer_cls`, named `ParamWrapper`, by which PEFT recognises these.
    """

    peft_config: dict[str, Any]
    linear_layer_cls: ClassVar[type[SubspaceLayer]]
    tuner_layer_cls: type[SubspaceLayer]
    parameter_layer_cls: ClassVar[type[ParameterLayer]]
    _ranks: dict[str, Any]
    _tied: set[int]
    _starts: WeightStarts | None = None
    target_module_mapping: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING | _MORE_TARGETS

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; if that fails, forget its config.

        The codes of 4-bit layers stay as they are from then on, in the layers without adapter as well: what
        bitsandbytes makes of them when a CPU evaluates in bf16 passes no gradient on.
        """
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self.peft_config[adapter_name].trained = sum(
                parameter.numel()
                for name, parameter in model.named_parameters()
                if self.prefix in name and f".{adapter_name}." in name
            )
        except Exception:
            self.peft_config.pop(adapter_name, None)
            raise
        finally:
            if self._starts is not None:
                self._starts.close()
                self._starts = None
        for module in model.modules():
            keep_codes(module)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Check every targeted module before the first one is replaced."""
        _refuse_tensor_parallel(model)
        plan = self.plan(model, peft_config)
        check_same_parameters(model, peft_config, self.peft_config.values())
        self._ranks = {name: delta.rank for name, delta in plan.items()}
        reading = [name for name, d in plan.items() if d.reads_weight and not peft_config.initialized]
        for name in reading:
            with error_context(name):
                _check_start(model.get_submodule(name), plan[name], peft_config)
        self._starts = WeightStarts(len(reading))
        self._tied = tied_parameters(model)
        lowered = [name for name, delta in plan.items() if getattr(delta, "lowered", False)]
        if lowered and peft_config.r != type(peft_config).r:
            logger.warning(
                "r=%s exceeds a dimension in %d of the adapted modules, such as %r, and is lowered to it "
                "there",
                *(peft_config.r, len(lowered), lowered[0]),
            )

    @classmethod
    def plan(cls, model: nn.Module, config: SubspaceConfig) -> dict[str, Delta]:
        """Deltas, on the meta device, that `config` would create on `model`, by module or parameter name.

        Raises:
            TypeError: If a targeted module's type cannot be adapted.
            ValueError: If a targeted module cannot hold what the config asks for.
        """
        include_all_linear_layers(config, model)
        backend_kwargs = get_quantization_kwargs(model)
        shapes = {}
        for name, module in targets(model, config):
            with error_context(name):
                _refuse_unreachable(model, name)
                base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
                quantized = quantization_of(base, **backend_kwargs) is not None
                ops = ops_for(base, quantized=quantized)
                if isinstance(ops, EmbeddingOps) and not cls.tuner_layer_cls.delta_cls.on_embeddings:
                    raise TypeError(f"{cls.__name__} adapts no embeddings; exclude it with exclude_modules")
                shapes[name] = ops.shape
        for name, owner, parameter_name in targeted_parameters(model, config):
            with error_context(name):
                shapes[name] = parameter_ops(owner, parameter_name).shape
        known: dict[Any, Delta] = {}
        plan = {}
        for name, rank in cls.ranks(config, shapes).items():
            key = (shapes[name], str(rank))
            if key not in known:
                with error_context(name), torch.device("meta"):
                    known[key] = cls.tuner_layer_cls.delta_cls(config, shapes[name], rank)
            plan[name] = known[key]
        cls._check_size(model, config, plan, shapes)
        return plan

    @classmethod
    def _check_size(
        cls, model: nn.Module, config: Any, plan: dict[str, Delta], shapes: dict[str, WeightShape]
    ) -> None:
        """Raise, before anything is allocated, if an adapter is out of proportion to its weights."""
        size = sum(tensor.numel() for tensor in cls.expected_state(model, plan).values())
        adapted = sum(prod(shape.dims) for shape in shapes.values())
        if size > _MOST_TIMES * adapted + _MOST_BESIDES:
            raise ValueError(
                f"the adapter would have {size} numbers, more than {_MOST_TIMES} times the {adapted} of the "
                f"weights that it adapts; lower its ranks, such as r={config.r!r} or those in rank_pattern"
            )

    @classmethod
    def ranks(cls, config: Any, shapes: dict[str, WeightShape]) -> dict[str, Any]:
        """What each delta takes as its rank, by module name; it may depend on all targeted modules.

        Raises:
            ValueError: If a module cannot hold what the config asks for; the message names it.
        """
        return {name: config.rank_for(name) for name in shapes}

    @classmethod
    def keyed(cls, model: nn.Module, plan: dict[str, Delta]) -> dict[str, Delta]:
        """Deltas of a plan for `model` by the start of their keys in a saved adapter."""
        places = wrapper_places(model, plan)
        return {f"base_model.model.{places[name]}.{cls.prefix}delta": delta for name, delta in plan.items()}

    @classmethod
    def check_base(cls, layers: dict[str, SubspaceLayer], state: dict[str, Tensor]) -> None:
        """Raise unless values that are about to be loaded are for these base weights.

        Args:
            layers: Layers on the base model, by the start of their keys in `state`.
            state: Tensors of the adapter.

        Raises:
            ValueError: Naming the module.
        """

    @classmethod
    def on_base(cls, model: nn.Module, plan: dict[str, Delta]) -> dict[str, SubspaceLayer]:
        """Layers that read the base weights of a plan's modules, by the start of their saved keys."""
        kwargs = get_quantization_kwargs(model)
        modules = {name: module for name, module in model.named_modules() if name in plan}
        layers = {
            name: m if isinstance(m, cls.tuner_layer_cls) else cls.tuner_layer_cls(m, **kwargs)
            for name, m in modules.items()
        }
        keys = dict(zip(plan, cls.keyed(model, plan), strict=True))
        return {keys[name]: layer for name, layer in layers.items()}

    @classmethod
    def expected_state(cls, model: nn.Module, plan: dict[str, Delta]) -> dict[str, Tensor]:
        """Tensors, on the meta device, that a saved adapter must hold for the deltas of a plan."""
        return {
            f"{key}.{name}": tensor
            for key, delta in cls.keyed(model, plan).items()
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
        if parameter_name is not None and current_key not in self._ranks:
            raise ValueError(f"{current_key}: parametrized parameters cannot be adapted; leave it out")
        if isinstance(target, self.tuner_layer_cls) and parameter_name in (None, target.parameter_name):
            target.update_layer(adapter_name, peft_config, current_key, rank, twin, self._starts)
            return
        layer = self._wrap(target, parameter_name)
        layer._active_adapter = adapter_name
        if layer.quantization_backend is None:
            layer.tied = id(layer.base_parameter) in self._tied
        layer.update_layer(adapter_name, peft_config, current_key, rank, twin, self._starts)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _wrap(self, target: nn.Module, parameter_name: str | None) -> SubspaceLayer:
        if parameter_name is not None:
            return self.parameter_layer_cls(target, parameter_name)
        backend_kwargs = get_quantization_kwargs(self.model)
        layer = self.tuner_layer_cls(target, **backend_kwargs)
        if layer.ops.linear:
            layer.__class__ = self.linear_layer_cls
        return layer

    def _check_merge_allowed(self) -> None:
        """Look, before anything is merged, for a layer that adapters cannot be merged into."""
        super()._check_merge_allowed()
        for name, layer in self.model.named_modules():
            if isinstance(layer, self.tuner_layer_cls) and layer.active_here():
                with error_context(name):
                    layer.check_merge()

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: Any) -> None:
        """Put a layer in the place of another.

        PEFT also asks for a `weight`, which not all layers have, and sends the adapter after it, offloaded or
        not.
        """
        setattr(parent, child_name, new_module)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Merge adapters, with a progress bar if it takes more than two seconds."""
        with counting(self._count_layers(), "merging"):
            super().merge_adapter(*args, **kwargs)

    def _unload_and_optionally_merge(
        self, merge: bool = True, progressbar: bool = False, *args: Any, **kwargs: Any
    ) -> nn.Module:
        with counting(self._count_layers(), "merging", hidden=progressbar or not merge):
            return super()._unload_and_optionally_merge(merge, progressbar, *args, **kwargs)

    def _count_layers(self) -> int:
        return sum(isinstance(module, self.tuner_layer_cls) for module in self.model.modules())

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names`, one per sample, to the tuner layers while the model runs."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        check_adapter_names(adapter_names, self.peft_config, training=self.training)
        kinds = (self.tuner_layer_cls, AuxiliaryTrainingWrapper)
        with adapter_names_passed(self.model, kinds, adapter_names, kwargs.get("num_beams") or 1):
            yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check the tensors that PEFT is about to load; if they are unfit, remove the new adapter again."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = model.state_dict()
        layers = {
            f"{name}.{cls.prefix}delta.{adapter_name}": layer
            for name, layer in model.named_modules()
            if isinstance(layer, cls.tuner_layer_cls) and adapter_name in layer.deltas
        }
        here = [key for key in remapped if key in own]
        try:
            check_declared(model, config, [key for key in here if cls.prefix not in key])
            check_state({key: own[key] for key in here if cls.prefix in key}, remapped)
            check_values({key: layer.deltas[adapter_name] for key, layer in layers.items()}, remapped)
            cls.check_base(layers, remapped)
        except ValueError:
            _discard(model, adapter_name, cls)
            raise
        return remapped


def _discard(model: nn.Module, adapter_name: str, cls: type[SubspaceModel]) -> None:
    """Take an unfit adapter off a wrapped model; if it was the only one, restore the base model."""
    tuner = next((module for module in model.modules() if isinstance(module, cls)), None)
    if tuner is None:  # injected into a plain model, before and apart from loading
        return
    if set(tuner.peft_config) == {adapter_name}:
        tuner.unload()
    else:
        tuner.delete_adapter(adapter_name)


def _refuse_tensor_parallel(model: nn.Module) -> None:
    size = getattr(model, "_tp_size", None)  # as transformers notes it
    if size is not None and size > 1:
        raise ValueError(
            f"the model's weights are split over {size} devices (tensor parallelism), for which PEFT shards "
            "adapters of LoRA only; load the model without tp_plan, or use FSDP"
        )


def _check_start(module: nn.Module, delta: Delta, config: SubspaceConfig) -> None:
    """Look, before anything is replaced, for a weight that no start is possible from."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    backend = quantization_of(base)
    if backend is None:
        with whole_weight(base):
            weight = base.weight.detach()
            if not weight.is_meta and weight.dtype.itemsize > 1:
                delta.check_weight(weight)
    elif not is_readable(backend) and not delta.can_do_without_weight(config):
        raise ValueError(unreadable(base))


def _refuse_unreachable(model: nn.Module, name: str) -> None:
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

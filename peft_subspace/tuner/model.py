"""The tuner model: replaces targeted modules by tuner layers, and what spans all of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from peft_subspace.base_weights.repacking import prevent_repacking
from peft_subspace.core.delta import Update
from peft_subspace.core.errors import error_context
from peft_subspace.core.modes import lasting
from peft_subspace.runtime.progress import counting
from peft_subspace.tuner import callers, combination
from peft_subspace.tuner.classes import layer_classes
from peft_subspace.tuner.config import SubspaceConfig
from peft_subspace.tuner.holder import adapted_among, adapted_layers
from peft_subspace.tuner.injection import Injection
from peft_subspace.tuner.layer import SubspaceLayer
from peft_subspace.tuner.mixed_batch import check_whole_adapters, mixed_batch
from peft_subspace.tuner.ownership import admit, count_trained
from peft_subspace.tuner.places import shared_places
from peft_subspace.tuner.plan import Plan, make_plan
from peft_subspace.tuner.registry import register
from peft_subspace.tuner.shared import shared_containers
from peft_subspace.tuner.snapshot import Snapshot
from peft_subspace.tuner.source import check_source
from peft_subspace.tuner.state_hooks import StateHooks
from peft_subspace.tuner.targets import DEFAULT_TARGETS, check_same_parameters, is_targeted


class SubspaceModel(StateHooks):
    """Base of all tuners.

    This makes and registers one:

        class LoRAModel(SubspaceModel, config=LoRAConfig, update=LoRADelta):
            ...

    The layer classes of the method get their names from it: `LoRALayer`, `LoRALinear`, by which PEFT
    recognizes adapted linear layers, and a `ParamWrapper`, by which it recognizes adapted parameters.
    """

    peft_config: dict[str, Any]
    linear_layer_cls: ClassVar[type[SubspaceLayer]]
    parameter_layer_cls: ClassVar[type[SubspaceLayer]]
    after_injection: ClassVar[list[Callable[[SubspaceModel, str, dict[str, SubspaceLayer]], None]]] = []
    """Called, with tuner, adapter name and the layers that have it, when an adapter has been added."""
    target_module_mapping: Any = DEFAULT_TARGETS
    _check_target_module_exists = staticmethod(is_targeted)
    _injection: Any = None

    def __init_subclass__(
        cls, config: type[SubspaceConfig] | None = None, update: type[Update] | None = None, **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        if config is None or update is None:
            return
        cls.prefix = f"{config.peft_type_name.lower()}_"
        name = cls.__name__.removesuffix("Model")
        cls.tuner_layer_cls, cls.linear_layer_cls, cls.parameter_layer_cls = layer_classes(
            cls.__module__, name, cls.prefix, update
        )
        register(config.peft_type_name, config, cls)

    def __init__(
        self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        # PeftModel gives a dict of configs, and keeps the tuner; inject_adapter_in_model gives one config.
        self._stays = isinstance(peft_config, dict)
        self.handles: list[RemovableHandle] = []
        self._merging: list[str] | None = None
        self._places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    @classmethod
    def plan(cls, model: nn.Module, config: SubspaceConfig) -> Plan:
        """What `config` would create on `model`; everything that can be refused is refused here.

        Raises:
            TypeError: If a targeted module's type cannot be adapted.
            ValueError: If a targeted module cannot hold what the config asks for.
        """
        return make_plan(model, config, cls.tuner_layer_cls.delta_cls, cls.prefix, cls.__name__)

    # PEFT adds an adapter by inject_adapter, which calls _prepare_model, then _create_and_replace per target.

    @lasting()
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; if that fails, or PEFT cannot load its tensors afterwards, all is as it was before.

        The packed values of 4-bit layers stay as they are from then on, in the layers without adapter as
        well: what bitsandbytes makes of them when a CPU evaluates in bf16 passes no gradient on.
        """
        held = shared_containers(self, self.shared_attribute())
        flags = [(parameter, parameter.requires_grad) for _, c in held for parameter in c.parameters()]
        before = Snapshot(self, adapter_name)
        try:
            admit(adapter_name, self.peft_config)
            with warnings.catch_warnings():  # PEFT does not look into wrapped modules
                warnings.filterwarnings("ignore", ".* were set but no module was matched", RuntimeWarning)
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._injection.finish(adapter_name)
            for parameter, flag in flags:  # PEFT keeps those of other adapters that are in the base model
                parameter.requires_grad_(flag)
        except Exception:
            before.restore()
            raise
        finally:
            self._places = {}
            if self._injection is not None:
                self._injection.starts.close()
                self._injection = None
        self._before_loading = before if callers.reads_file() else None
        modules = dict(model.named_modules())
        for module in modules.values():
            prevent_repacking(module)
        layers = adapted_among(modules.items(), adapter_name, self.tuner_layer_cls)
        self.peft_config[adapter_name].trained = count_trained(layers, adapter_name)
        for call in self.after_injection:
            call(self, adapter_name, layers)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Plan the adapter, and check every targeted module before the first one is replaced."""
        plan = self.plan(model, peft_config)
        check_same_parameters(model, {n for n, item in plan.modules.items() if item.target.is_parameter})
        if peft_config.source is not None and callers.reads_file():
            check_source(peft_config.source, model, peft_config)
        self._injection = Injection(self, plan, peft_config, self if self._stays else model)
        self._places = shared_places(model)

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
        self._injection.add(adapter_name, target, target_name, parent, current_key, parameter_name)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: Any) -> None:
        """Put a layer in the place of another, under all names that the model has for it.

        PEFT also asks for a `weight`, which not all layers have, and sends the adapter after it at all times.
        """
        setattr(parent, child_name, new_module)
        for module, name in self._places.get(child, ()):
            setattr(module, name, new_module)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Freeze the base model, but not tensors that layers share and its root holds."""
        held = shared_containers(model, self.shared_attribute())
        trained = [p for _, container in held for p in container.parameters() if p.requires_grad]
        super()._mark_only_adapters_as_trainable(model)
        for parameter in trained:
            parameter.requires_grad_(True)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast to fp32, or give all that trains the dtype of the base layer if PEFT is asked not to cast."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        config = self.peft_config[adapter_name]
        runs_as_before = config.format_version == 1 and (config.inference_mode or config.frozen)  # in fp32
        exact = self.tuner_layer_cls.delta_cls.full_precision if runs_as_before else ()
        if autocast_adapter_dtype and self.shared_attribute() is None:  # PEFT has cast all that there is
            return
        layers = list(adapted_layers(self, adapter_name, self.tuner_layer_cls).values())
        for layer in layers[:1] if autocast_adapter_dtype else layers:  # one has all that they share
            layer.cast_trained(adapter_name, torch.float32 if autocast_adapter_dtype else None, exact)

    def _check_merge_allowed(self) -> None:
        """Look, before anything is merged, for a layer that adapters cannot be merged into."""
        super()._check_merge_allowed()
        for name, layer in self.model.named_modules():
            if isinstance(layer, self.tuner_layer_cls):
                with error_context(name):
                    layer.check_merge(self._merging)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters, with a progress bar if it takes more than two seconds."""
        self._merging = adapter_names
        with counting(self._count_layers(), "merging"):
            super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        self._merging = adapter_names
        self._places = shared_places(self.model)
        with counting(self._count_layers(), "merging", hidden=progressbar or not merge):
            model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for holder in (self._modules, model._modules):
            holder.pop(self.shared_attribute(), None)
        for handle in self.handles:
            handle.remove()
        return model

    def _count_layers(self) -> int:
        return sum(isinstance(module, self.tuner_layer_cls) for module in self.model.modules())

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "cat",
        **options: Any,
    ) -> None:
        """Add an adapter that is made of others; scales of run time count in their updates `ΔW_i`.

        Args:
            adapters: Names of existing adapters; the weights of one that is listed twice add up.
            weights: Their weights, of any sign.
            adapter_name: Name of the new adapter, which saves and loads like any other.
            combination_type: `"cat"` or `"linear"`, the exact `Σ weights[i] · ΔW_i`, or another one of PEFT.
            **options: Those of the type, which the guide on merging lists.

        Raises:
            ValueError: If names, weights or options do not fit, or the result is no adapter of this method.
        """
        combination.add_weighted_adapter(self, adapters, weights, adapter_name, combination_type, options)

    def enable_adapter_layers(self) -> None:
        """Enable the adapters; what belongs to frozen ones, such as heads, does not train."""
        super().enable_adapter_layers()
        for name in self.active_adapters:
            if self.peft_config[name].frozen:
                self.set_requires_grad(name, False)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names`, one per sample, to the tuner layers while the model runs."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        check_whole_adapters(adapter_names, self.peft_config, training=self.training)
        with mixed_batch(self.model, self.tuner_layer_cls, adapter_names, kwargs):
            yield

"""One adapter on its way into a model: what was planned, what was checked, what its layers share."""

from __future__ import annotations

import warnings
from logging import getLogger
from typing import Any

from peft.utils import get_quantization_kwargs
from torch import Tensor, nn

from peft_subspace.base_weights.quantization import is_readable, unreadable
from peft_subspace.base_weights.weight import tied_parameters
from peft_subspace.core.errors import error_context
from peft_subspace.core.linalg import local_generator
from peft_subspace.layers.calls import innermost
from peft_subspace.tuner import callers
from peft_subspace.tuner.apart import complete, read_apart
from peft_subspace.tuner.config import SubspaceConfig
from peft_subspace.tuner.heads import planned_heads, put_heads
from peft_subspace.tuner.layer import SubspaceLayer
from peft_subspace.tuner.lean import by_start, layers_by_key
from peft_subspace.tuner.plan import Plan, Planned, plan_module
from peft_subspace.tuner.shared import SharedTensors, hold
from peft_subspace.tuner.weight_start import WeightStarts
from peft_subspace.tuner.zeros import note_zeros

logger = getLogger("peft_subspace")


class Injection:
    """What is known of an adapter before the first module is replaced, after checking every one.

    Args:
        tuner: The tuner model.
        plan: What the config creates.
        config: The config.
        holder: Module that holds the tensors which layers share.

    Attributes:
        starts: Initializations from base weights.

    Raises:
        ValueError: If the model is split by tensor parallelism, or a weight cannot be started from.
    """

    def __init__(self, tuner: Any, plan: Plan, config: SubspaceConfig, holder: nn.Module) -> None:
        self.tuner, self.plan, self.config, self.holder = tuner, plan, config, holder
        _refuse_tensor_parallel(tuner.model)
        reading = [
            n for n, item in plan.modules.items() if item.update.reads_weight and not config.initialized
        ]
        for name in reading:
            with error_context(name):
                _check_start(plan.modules[name], config)
        self.heads = planned_heads(tuner.model, config)
        note_zeros(plan, config)
        self.starts = WeightStarts(len(reading))
        self.apart = self._read_apart()
        self.tied = tied_parameters(tuner.model)
        self._missed = {n for n, item in plan.modules.items() if not item.target.is_parameter}
        self._parts: dict[str, dict[str, Planned]] = {}
        for name, item in plan.modules.items():
            if item.target.part_of is not None:
                self._parts.setdefault(item.target.part_of, {})[name] = item
        of_modules = self._missed or self._parts
        if config.target_modules and plan.modules and not of_modules:
            warnings.warn(f"target_modules={config.target_modules!r} match no module", stacklevel=2)
        if plan.shared is not None and not of_modules:  # PEFT will be iterating over the model's children
            hold(holder, plan.shared_attribute)
        lowered = [f"{name} to {item.spec.rank}" for name, item in plan.modules.items() if item.spec.lowered]
        if lowered and config.r != type(config).r:
            logger.warning(
                "r=%s is more than %d of the adapted modules can hold, and is lowered there: %s%s",
                *(config.r, len(lowered), ", ".join(lowered[:8]), ", …" if len(lowered) > 8 else ""),
            )

    def _read_apart(self) -> dict[str, Tensor] | None:
        """What lies apart from the file that the adapter comes from; None if it comes from elsewhere."""
        config = self.config
        again = sum(config is other for other in self.tuner.peft_config.values()) > 1  # and it will be a copy
        if not config.initialized or config.format_version < 2 or config.source is None or again:
            return None
        if config.frozen_file is None and not any(i.update.training_only for i in self.plan.modules.values()):
            return {}
        return read_apart(self.plan.updates_by_key(self.tuner.model), config.source, config.frozen_file)

    def _add_apart(self, adapter_name: str) -> None:
        """Fill in what the adapter's file leaves out, unless PEFT calls the hook for that when it loads."""
        self.tuner._apart = self.apart if callers.reads_file() else None
        if self.apart is None or callers.reads_file():
            return
        layers = layers_by_key(self.tuner.model, self.tuner.tuner_layer_cls, adapter_name)
        by_key = {saved: layer for (_, saved), layer in layers.items()}
        whole = complete(by_key, adapter_name, self.config, {}, self.apart, new=True)
        for start, tensors in by_start(by_key, whole).items():
            by_key[start].deltas[adapter_name].load_state_dict(tensors, strict=False)

    def _planned(self, name: str, module: nn.Module, parameter_name: str | None) -> Planned:
        """What is planned for a target; injecting by a state dict's keys reaches others as well.

        Raises:
            ValueError: If such a target cannot be adapted by itself.
        """
        if name in self.plan.modules:
            return self.plan.modules[name]
        if parameter_name is not None:
            raise ValueError(f"{name}: parametrized parameters cannot be adapted; leave it out")
        if self.plan.shared is not None:
            raise ValueError(
                f"{name} is in the state dict but not among target_modules, and tensors are shared by all of "
                "these; make target_modules match the state dict"
            )
        update_cls = self.tuner.tuner_layer_cls.delta_cls
        return plan_module(module, name, self.config, update_cls, **get_quantization_kwargs(self.tuner.model))

    def add(
        self,
        adapter_name: str,
        module: nn.Module,
        name: str,
        parent: nn.Module,
        full_name: str,
        parameter_name: str | None = None,
    ) -> None:
        """Add the adapter to a target that PEFT hands over, or to the parts by which it is adapted.

        Args:
            adapter_name: The adapter.
            module: The target, or a wrapper of it.
            name: Its name in `parent`.
            parent: The module that has it.
            full_name: Its name in the model.
            parameter_name: Name in the target of the parameter to adapt.
        """
        self._missed.discard(full_name)
        parts = self._parts.get(full_name, {})
        for part, item in parts.items():
            self._missed.discard(part)
            own = part.rpartition(".")[2]
            if item.target.is_parameter:
                self._add(adapter_name, parent.get_submodule(name), name, parent, item, own)
            else:
                owner = innermost(parent.get_submodule(name))
                self._add(adapter_name, owner.get_submodule(own), own, owner, item)
        if not parts:
            planned = self._planned(full_name, module, parameter_name)
            self._add(adapter_name, module, name, parent, planned, parameter_name)

    def finish(self, adapter_name: str) -> None:
        """Add the adapter inside of wrapped modules, which PEFT does not look into, and what is apart."""
        for full_name in sorted(self._missed):
            path, _, name = full_name.rpartition(".")
            parent = self.tuner.model.get_submodule(path)
            self._add(adapter_name, parent.get_submodule(name), name, parent, self.plan.modules[full_name])
        put_heads(self.tuner.model, self.heads, self.config, adapter_name)
        self._add_apart(adapter_name)

    def _add(
        self,
        adapter_name: str,
        module: nn.Module,
        name: str,
        parent: nn.Module,
        planned: Planned,
        parameter_name: str | None = None,
    ) -> None:
        configs = self.tuner.peft_config
        source = next((n for n, c in configs.items() if c is self.config and n != adapter_name), None)
        layer = found = self._find(module, parameter_name)
        if layer is None:
            layer = self._wrap(module, planned)
            layer._active_adapter = adapter_name
        shared = self._shared_tensors(adapter_name)
        layer.update_layer(adapter_name, self.config, planned.spec, source, self.starts, shared)
        if found is None:
            if adapter_name not in self.tuner.active_adapters:
                layer.requires_grad_(False)
            self.tuner._replace_module(parent, name, layer, module)

    def _find(self, module: Any, parameter_name: str | None) -> SubspaceLayer | None:
        """Tuner layer of a weight among the wrappers of a module."""
        while isinstance(module, self.tuner.tuner_layer_cls):
            if parameter_name in (None, module.parameter_name):
                return module
            module = module.base_layer
        return None

    def _wrap(self, module: nn.Module, planned: Planned) -> SubspaceLayer:
        """Make the tuner layer for a target."""
        target = planned.target
        if target.is_parameter:
            layer_cls = self.tuner.parameter_layer_cls
        else:
            layer_cls = self.tuner.linear_layer_cls if target.kind.linear else self.tuner.tuner_layer_cls
        layer = layer_cls(module, target)
        if target.backend is None:
            layer.base_weight.tied = id(layer.base_weight.stored) in self.tied
        return layer

    def _shared_tensors(self, adapter_name: str) -> SharedTensors | None:
        """Tensors that the layers of each adapter share, those of the new one among them."""
        if self.plan.shared is None:
            return None
        container = hold(self.holder, self.plan.shared_attribute)
        if adapter_name not in container:
            specs = [item.spec for item in self.plan.modules.values()]
            shared: Any = self.tuner.tuner_layer_cls.delta_cls.shared(self.config, specs)
            seed, number = self.config.seed, self.config.number
            shared.reset_parameters(
                self.config.init_weights, lambda name: local_generator(seed, name, number)
            )
            container[adapter_name] = shared
        return container


def _refuse_tensor_parallel(model: nn.Module) -> None:
    size = getattr(model, "_tp_size", None)  # as transformers notes it
    if size is not None and size > 1:
        raise ValueError(
            f"the model's weights are split over {size} devices (tensor parallelism), for which PEFT shards "
            "adapters of LoRA only; load the model without tp_plan, or use FSDP"
        )


def _check_start(planned: Planned, config: SubspaceConfig) -> None:
    """Look, before anything is replaced, for a weight that no initialization is possible from."""
    target = planned.target
    weight = target.base_weight
    if target.backend is None:
        with weight.whole():
            stored = weight.stored.detach()
            if not stored.is_meta and stored.dtype.itemsize > 1:
                planned.update.check_weight(stored)
    elif not is_readable(target.backend) and not planned.update.can_do_without_weight(config):
        raise ValueError(unreadable(target.module))

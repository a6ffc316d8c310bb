"""What a config would create on a model, module by module, before anything of the model is changed."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from peft_subspace.core.delta import Update
from peft_subspace.core.errors import error_context
from peft_subspace.core.names import BASE
from peft_subspace.core.shapes import ModuleSpec
from peft_subspace.core.validation import invalid
from peft_subspace.tuner.config import SubspaceConfig
from peft_subspace.tuner.places import wrapper_places
from peft_subspace.tuner.target import Target, analyze_module
from peft_subspace.tuner.targets import analyze_targets, include_all_linear_layers

# The largest updates have five times the entries of their weight, and sums of some of them accordingly more.
_MOST_TIMES = 64
_MOST_BESIDES = 2**20


@dataclass(frozen=True)
class Planned:
    """One target of a config.

    Attributes:
        target: The weight.
        spec: What the config asks for on it.
        update: The update, on the meta device; modules with equal specs but for their names may share it.
    """

    target: Target
    spec: ModuleSpec
    update: Update


@dataclass(frozen=True)
class Plan:
    """All that a config would create.

    Attributes:
        prefix: Prefix of the method.
        modules: What is planned, by the name of the module or parameter.
        shared: Tensors that the modules share, on the meta device, or None.
    """

    prefix: str
    modules: dict[str, Planned]
    shared: nn.Module | None

    def by_key(self, model: nn.Module) -> dict[str, Planned]:
        """What is planned for `model` by the prefix of its keys in a saved adapter."""
        places = wrapper_places(model, self.modules)
        return {f"{BASE}{places[name]}.{self.prefix}delta": item for name, item in self.modules.items()}

    def updates_by_key(self, model: nn.Module) -> dict[str, Update]:
        """The updates by the prefix, with the point, of their keys in a saved adapter."""
        return {f"{key}.": item.update for key, item in self.by_key(model).items()}

    def expected_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Tensors, on the meta device, that a saved adapter holds."""
        state = {
            f"{key}.{name}": tensor
            for key, item in self.by_key(model).items()
            for name, tensor in item.update.state_dict().items()
        }
        if self.shared is not None:
            start = f"{BASE}{self.shared_attribute}"
            state |= {f"{start}.{name}": tensor for name, tensor in self.shared.state_dict().items()}
        return state

    @property
    def shared_attribute(self) -> str:
        """Name, in the model and in files, of the container of shared tensors."""
        update = next(iter(self.modules.values())).update
        return f"{self.prefix}{update.shared_name}"


def make_plan(
    model: nn.Module, config: SubspaceConfig, update_cls: type[Update], prefix: str, tuner: str
) -> Plan:
    """Analyze the targets of `config` on `model`, and build their updates on the meta device.

    Everything that can be refused is refused here. `"all-linear"` is replaced, in the config, by names.

    Args:
        model: The model without the adapter.
        config: Its configuration.
        update_cls: Update of the method.
        prefix: Prefix of the method.
        tuner: Name of the method's model, for errors.

    Raises:
        TypeError: If a targeted module's type cannot be adapted.
        ValueError: If a targeted module cannot hold what the config asks for, or the adapter is out of
            proportion to its weights.
    """
    include_all_linear_layers(config, model)
    found = dict(analyze_targets(model, config))
    if config.keep_zeros and not update_cls.can_keep_zeros:
        rule = f"would take updates of {tuner} out of the space that they are confined to; use another method"
        raise invalid("keep_zeros", True, rule)
    specs = config.specs({name: target.kind.shape for name, target in found.items()})
    known: dict[ModuleSpec, Update] = {}
    modules = {
        name: Planned(found[name], spec, _on_meta(update_cls, config, spec, known))
        for name, spec in specs.items()
    }
    with torch.device("meta"):
        plan = Plan(prefix, modules, update_cls.shared(config, list(specs.values())) if specs else None)
    _check_size(plan, config)
    return plan


def plan_module(
    module: nn.Module, name: str, config: SubspaceConfig, update_cls: type[Update], **backend_kwargs: Any
) -> Planned:
    """Plan one module by itself, such as PEFT reaches by the keys of a state dict."""
    target = analyze_module(module, **backend_kwargs)
    spec = config.spec_for(name, target.kind.shape)
    return Planned(target, spec, _on_meta(update_cls, config, spec, {}))


def _on_meta(
    update_cls: type[Update], config: SubspaceConfig, spec: ModuleSpec, known: dict[ModuleSpec, Update]
) -> Update:
    """Update on the meta device; specs that differ by name alone have one."""
    key = spec.unnamed()
    if key not in known:
        with error_context(spec.name), torch.device("meta"):
            known[key] = update_cls(config, spec)
    return known[key]


def _check_size(plan: Plan, config: Any) -> None:
    """Raise, before anything is allocated, if an adapter is out of proportion to its weights."""
    updates = [item.update for item in plan.modules.values()]
    sizes = {update: _size(update) for update in {*updates}}
    size = sum(sizes[update] for update in updates) + (_size(plan.shared) if plan.shared is not None else 0)
    adapted = sum(prod(item.spec.shape.dims) for item in plan.modules.values())
    if size > _MOST_TIMES * adapted + _MOST_BESIDES:
        raise ValueError(
            f"the adapter would have {size} numbers, more than {_MOST_TIMES} times the {adapted} of the "
            f"weights that it adapts; lower its ranks, such as r={config.r!r} or those in rank_pattern"
        )


def _size(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())

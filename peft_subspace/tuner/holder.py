"""The adapters of a tuner layer by name: their tensors, which of them are active, where they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from torch import Tensor, nn

from peft_subspace.base_weights.quantization import can_compute_in, stored_tensor
from peft_subspace.base_weights.weight import BaseWeight, offload_hook
from peft_subspace.core.delta import Update
from peft_subspace.core.names import in_base
from peft_subspace.tuner.kept import Kept, release
from peft_subspace.tuner.scaling import ScaledAdapters
from peft_subspace.tuner.shared import SharedTensors

HolderT = TypeVar("HolderT", bound="AdapterHolder")

Watcher = Callable[[Update, str], bool]
"""Called in each training step with an update and its adapter's name, until it returns False."""


class Reach(Protocol):
    """What wants to know which layers take part in a training step."""

    def note(self, layer: AdapterHolder, result: Any) -> None:
        """Take notice of what a layer has computed."""


class AdapterHolder(nn.Module, ScaledAdapters, BaseTunerLayer):
    """Part of a tuner layer: its adapters, under the names by which PEFT finds them."""

    prefix: ClassVar[str]
    delta_cls: ClassVar[type[Update]]
    base_weight: BaseWeight
    kept = Kept()
    _reach: Reach | None = None
    _shared: tuple[SharedTensors, ...] = ()
    """A tuple hides the container from torch: its holder alone moves and saves it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "prefix"):  # a kind of layer, not yet one of a method
            return
        cls.adapter_layer_names = (f"{cls.prefix}delta",)
        cls.other_param_names = (f"{cls.prefix}dropout", "scaling", "initial_scaling")
        if cls.delta_cls.defines("shared"):
            # By this name PEFT switches, counts and reports shared tensors with the others of the adapter.
            attribute = f"{cls.prefix}{cls.delta_cls.shared_name}"
            cls.adapter_layer_names = (*cls.adapter_layer_names, attribute)
            setattr(cls, attribute, property(AdapterHolder._shared_here))

    def __init__(self) -> None:
        super().__init__()
        self.add_module(f"{self.prefix}delta", nn.ModuleDict())
        self.add_module(f"{self.prefix}dropout", nn.ModuleDict())
        self.scaling, self.initial_scaling = {}, {}
        self.merged_adapters: list[str] = []
        self._watchers: dict[str, list[Watcher]] = {}

    @property
    def deltas(self) -> nn.ModuleDict:
        """Updates by adapter name."""
        return getattr(self, f"{self.prefix}delta")

    @property
    def dropouts(self) -> nn.ModuleDict:
        """Dropout on the branch's input by adapter name, for those adapters that have any."""
        return getattr(self, f"{self.prefix}dropout")

    def _shared_here(self) -> nn.ModuleDict:
        """Shared tensors of the adapters that this layer has; where it has all, the container itself."""
        held: Any = self._shared[0] if self._shared else {}
        if self._shared and all(name in self.deltas for name in held):
            return held
        return nn.ModuleDict({name: held[name] for name in self.deltas if name in held})

    def active_here(self) -> list[str]:
        """Active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.deltas]

    def watch(self, adapter_name: str, watcher: Watcher) -> None:
        """Have a function look at an adapter in training steps, until it returns False."""
        self._watchers.setdefault(adapter_name, []).append(watcher)

    def trains(self, adapter_name: str) -> bool:
        """Whether an adapter is active here and has tensors, its own or shared ones, that train."""
        own = [self.deltas[adapter_name], *self._shared_here().values()]
        active = adapter_name in self.active_here() and not self.disable_adapters
        return active and any(p.requires_grad for module in own for p in module.parameters())

    def watch_reach(self, reach: Reach | None) -> None:
        """Have an object note the first training step's results and gradients; None ends that."""
        self._reach = reach

    def noted(self, result: Tensor) -> Tensor:
        """Result of a training step, noted as such where somebody wants to know."""
        if self._reach is not None and self.takes_training_step:
            self._reach.note(self, result)
        return result

    @property
    def takes_training_step(self) -> bool:
        """Whether this forward pass is one of training, and none that is being compiled."""
        return self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def _watch(self) -> None:
        for name in self.active_here():
            # Taken out first, for replicas run at once.
            again = [look for look in self._watchers.pop(name, ()) if look(self.deltas[name], name)]
            if again:
                self._watchers[name] = again

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters; those that are frozen do not train."""
        super().set_adapter(adapter_names, inference_mode)
        for delta in self.deltas.values():
            if delta.frozen:
                delta.requires_grad_(False)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch adapters on or off; merged ones are taken out now, for what is traced must write nothing."""
        if not enabled and self.merged:
            with onload_layer(self):
                self.unmerge()
        super().enable_adapters(enabled)

    def train(self, mode: bool = True) -> AdapterHolder:
        """Set the mode of training; what is kept is of adapters that do not train."""
        if mode or self.training:
            release(self)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterHolder:
        release(self)
        return super()._apply(fn, recurse)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter with what it shares: the other layers are about to lose it too."""
        release(self)
        if self._shared and adapter_name in self._shared[0]:
            del self._shared[0][adapter_name]
        super().delete_adapter(adapter_name)

    def _replicate_for_data_parallel(self) -> AdapterHolder:
        """Replica for one device of `nn.DataParallel`, with the weight that it has there."""
        replica: AdapterHolder = super()._replicate_for_data_parallel()
        replica.base_weight = copy.copy(self.base_weight)
        replica.base_weight.holder = replica
        replica._reach, replica.kept = None, Kept()
        return replica

    def requires_grad_(self, requires_grad: bool = True) -> AdapterHolder:
        """Let all that belongs to the layer train, or freeze it."""
        super().requires_grad_(requires_grad)
        if self._shared:
            self._shared_here().requires_grad_(requires_grad)
        return self

    def adapter_dtype(self, adapter_name: str) -> torch.dtype:
        """Dtype in which an adapter's parameters are stored, those that it shares included."""
        shared = self._shared_here()
        own = [self.deltas[adapter_name], *([shared[adapter_name]] if adapter_name in shared else [])]
        return next((p.dtype for module in own for p in module.parameters()), torch.float32)

    def cast_trained(self, adapter_name: str, dtype: torch.dtype | None, exact: tuple[str, ...] = ()) -> None:
        """Cast what the adapter shares to a dtype; with None, cast that and its own to the base layer's.

        Parameters with the names in `exact` stay as they are.
        """
        shared = [self._shared[0][adapter_name]] if self._shared else []
        if dtype is None:
            dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())[1] or torch.float32
            shared.append(self.deltas[adapter_name])
        for name, parameter in [named for module in shared for named in module.named_parameters()]:
            if name not in exact:
                parameter.data = parameter.data.to(dtype)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move one adapter to where the base layer works; its parameters also take a floating dtype.

        A weight on the meta device takes no adapter with it: it may be offloaded. What layers share leaves
        the host if one of them does.
        """
        if adapter_name not in self.deltas:
            return
        delta = self.deltas[adapter_name]
        tensors = [*delta.parameters(), *delta.buffers()]
        if any(tensor.is_meta for tensor in tensors):
            return
        base = self.get_base_layer()
        base_device, dtype = self._get_base_layer_device_and_dtype(base)
        target: Any = device or base_device
        if target.type == "meta":
            target = getattr(offload_hook(base), "execution_device", None)
        wanted = [(t.device if target is None else target, dtype or t.dtype) for t in tensors]
        if wanted != [(t.device, t.dtype) for t in tensors]:
            delta.to(device=target, dtype=dtype)
        if self._shared and target is not None and torch.device(target).type != "cpu":
            for parameter in self._shared[0][adapter_name].parameters():
                if parameter.device.type == "cpu":
                    parameter.data = parameter.data.to(target)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device, torch.dtype | None]:
        """Device and dtype that an adapter takes from the base layer; no dtype from packed values."""
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        device = device or stored_tensor(base_layer).device
        return device, dtype if dtype is not None and can_compute_in(dtype) else None


def adapted_layers(model: nn.Module, adapter_name: str, kind: type[HolderT]) -> dict[str, HolderT]:
    """Layers of a kind that have an adapter, by their names in the base model."""
    return adapted_among(model.named_modules(), adapter_name, kind)


def adapted_among(
    modules: Iterable[tuple[str, nn.Module]], adapter_name: str, kind: type[HolderT]
) -> dict[str, HolderT]:
    """The same of some modules with their names."""
    return {
        in_base(name): module
        for name, module in modules
        if isinstance(module, kind) and adapter_name in module.deltas
    }

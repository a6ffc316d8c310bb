"""The tuner layer: adapters by name around one base layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import quantization_extra_repr
from torch import Tensor, nn

from peft_subspace.base_weights.quantization import can_compute_in, stored_tensor, unmergeable
from peft_subspace.base_weights.weight import BaseWeight, keep_codes, offload_hook
from peft_subspace.core.chain import multiply
from peft_subspace.core.delta import Update
from peft_subspace.core.names import in_base
from peft_subspace.core.shapes import ModuleSpec
from peft_subspace.layers.base import Branch
from peft_subspace.tuner import merging
from peft_subspace.tuner.config import SubspaceConfig
from peft_subspace.tuner.creation import create_adapter, initialize_deferred
from peft_subspace.tuner.mixed_batch import forward_mixed_batch
from peft_subspace.tuner.scaling import ScaledAdapters
from peft_subspace.tuner.shared import SharedTensors
from peft_subspace.tuner.target import Target, analyze_module
from peft_subspace.tuner.weight_start import WeightStarts

LayerT = TypeVar("LayerT", bound="SubspaceLayer")

Watcher = Callable[[Update, str], bool]
"""Called in each training step with an update and its adapter's name, until it returns False."""


class SubspaceLayer(nn.Module, ScaledAdapters, BaseTunerLayer):
    """A base layer with adapters: `y = base(x) + Σ s · ΔW x`, summed over the active adapters.

    The classes of a method are made by `tuner.registry.method_classes`; the rest follows from its `Update`.

    Args:
        base_layer: The layer to adapt, quantized or not, or another tuner layer around one.
        target: Its weight, as `analyze_module` sees it; by default it is analyzed here.
    """

    prefix: ClassVar[str]
    delta_cls: ClassVar[type[Update]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "prefix"):  # a kind of layer, not yet one of a method
            return
        cls.adapter_layer_names = (f"{cls.prefix}delta",)
        cls.other_param_names = (f"{cls.prefix}dropout", "scaling", "initial_scaling")
        if cls.delta_cls.has_shared():
            # By this name PEFT switches, counts and reports shared tensors with the others of the adapter.
            attribute = f"{cls.prefix}{cls.delta_cls.shared_name}"
            cls.adapter_layer_names = (*cls.adapter_layer_names, attribute)
            setattr(cls, attribute, property(SubspaceLayer._shared_here))

    def __init__(self, base_layer: nn.Module, target: Target | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        target = target or analyze_module(base_layer)
        self.kind = target.kind
        self.parameter_name = target.parameter_name
        self.quantization_backend = target.backend
        self.base_weight = BaseWeight(self, target.parameter_name, target.backend)
        keep_codes(target.module)
        for name in getattr(target.module, "__constants__", ()):  # models read some, such as a stride
            setattr(self, name, getattr(target.module, name))
        self.in_features = self.kind.shape.in_features * self.kind.shape.groups
        self.out_features = self.kind.shape.out_features
        self.add_module(f"{self.prefix}delta", nn.ModuleDict())
        self.add_module(f"{self.prefix}dropout", nn.ModuleDict())
        self.scaling, self.initial_scaling = {}, {}
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self._disable_adapters = False
        self._deferred: dict[str, tuple[SubspaceConfig, str]] = {}
        self._watchers: dict[str, list[Watcher]] = {}
        # A tuple hides the container from torch: its holder alone moves and saves it.
        self._shared: tuple[SharedTensors, ...] = ()

    @property
    def deltas(self) -> nn.ModuleDict:
        """Updates by adapter name."""
        return getattr(self, f"{self.prefix}delta")

    @property
    def dropouts(self) -> nn.ModuleDict:
        """Dropout on the branch's input by adapter name, for those adapters that have any."""
        return getattr(self, f"{self.prefix}dropout")

    def _shared_here(self) -> nn.ModuleDict:
        """Shared tensors of the adapters that this layer has."""
        held: Any = self._shared[0] if self._shared else {}
        return nn.ModuleDict({name: held[name] for name in self.deltas if name in held})

    def update_layer(
        self,
        adapter_name: str,
        config: SubspaceConfig,
        spec: ModuleSpec,
        source: str | None = None,
        starts: WeightStarts | None = None,
        shared: SharedTensors | None = None,
    ) -> None:
        """Create an adapter, initialize it and put it where the base layer is.

        Args:
            adapter_name: Name of the new adapter.
            config: Its configuration.
            spec: What it asks for here.
            source: Existing adapter of the same config object, whose frozen tensors the new one copies.
            starts: Initializations from base weights that the same adapter has had on other layers.
            shared: Tensors that the adapter shares with other layers, by adapter.
        """
        create_adapter(self, adapter_name, config, spec, source, starts, shared)

    def initialized_delta(self, adapter_name: str) -> Update:
        """Update of an adapter; one that was added while the base weight was on meta is initialized now.

        Raises:
            RuntimeError: If the base weight still is on the meta device.
        """
        if self._deferred:
            initialize_deferred(self, adapter_name)
        return self.deltas[adapter_name]

    def watch(self, adapter_name: str, watcher: Watcher) -> None:
        """Have a function look at an adapter in training steps, until it returns False."""
        self._watchers.setdefault(adapter_name, []).append(watcher)

    def _watch(self) -> None:
        for name in [name for name in self.active_here() if name in self._watchers]:
            self._watchers[name] = [look for look in self._watchers[name] if look(self.deltas[name], name)]
            if not self._watchers[name]:
                del self._watchers[name]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters; those that are frozen do not train."""
        super().set_adapter(adapter_names, inference_mode)
        for delta in self.deltas.values():
            if delta.frozen:
                delta.requires_grad_(False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter with what it shares: the other layers are about to lose it too."""
        if self._shared and adapter_name in self._shared[0]:
            del self._shared[0][adapter_name]
        super().delete_adapter(adapter_name)

    def requires_grad_(self, requires_grad: bool = True) -> SubspaceLayer:
        """Let all that belongs to the layer train, or freeze it."""
        super().requires_grad_(requires_grad)
        if self._shared:
            self._shared_here().requires_grad_(requires_grad)
        return self

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move one adapter to where the base layer works; its parameters also take a floating dtype.

        A weight on the meta device takes no adapter with it: it may be offloaded. What layers share leaves
        the host if one of them does.
        """
        if adapter_name not in self.deltas or any(p.is_meta for p in self.deltas[adapter_name].parameters()):
            return
        base = self.get_base_layer()
        base_device, dtype = self._get_base_layer_device_and_dtype(base)
        target: Any = device or base_device
        if target.type == "meta":
            target = getattr(offload_hook(base), "execution_device", None)
        self.deltas[adapter_name].to(device=target, dtype=dtype)
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

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Run the base layer and add the active adapters, or one adapter per sample with `adapter_names`."""
        if adapter_names is not None and not self.disable_adapters:
            return forward_mixed_batch(self, x, args, adapter_names, kwargs)
        branches = self._branches()
        if not branches:
            return self.base_layer(x, *args, **kwargs)
        return self.kind.forward(
            self.base_layer, branches, x, args, kwargs, whole=self._whole, cast=self.cast
        )

    def _branches(self) -> list[Branch]:
        """Active adapters at work; none where only the base layer is to run."""
        if self._watchers and self.takes_training_step:
            self._watch()
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        return [self.branch(name) for name in self.active_here() if name not in self.merged_adapters]

    @property
    def _whole(self) -> bool:
        """Whether the base layer can be run with another weight."""
        return self.quantization_backend is None and not isinstance(self.base_layer, BaseTunerLayer)

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Input of a branch in the dtype of its factors, unless PEFT is asked not to cast."""
        return self._cast_input_dtype(x, dtype) if x.is_floating_point() else x

    def branch(self, adapter_name: str) -> Branch:
        """One adapter at work."""
        dropouts = self.dropouts
        dropout = dropouts[adapter_name] if adapter_name in dropouts else None  # noqa: SIM401 - no dict
        delta = self.initialized_delta(adapter_name)
        if torch.is_grad_enabled() and offload_hook(delta) is not None:
            _check_trainable(delta, adapter_name)
        return Branch.scaled(delta(self.read_weight), self.scaling[adapter_name], dropout)

    @property
    def takes_training_step(self) -> bool:
        """Whether this forward pass is one of training, and none that is being compiled."""
        return self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def get_base_weight(self) -> Tensor:
        """Weight of the base layer as it stores it, dequantized, or read from where it is offloaded.

        Raises:
            NotImplementedError: If its packed values can only be run.
        """
        return self.base_weight.read()

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Set the weight; for a tied one, this layer's alone."""
        self.base_weight.set(weight_data)

    @torch.no_grad()
    def read_weight(self) -> Tensor:
        """Base weight before any merge, `(out, in, *kernel)` in fp32."""
        return self.kind.from_layout(self.base_weight.original().detach()).float()

    def with_updates(self, weight: Tensor, adapters: Iterable[str]) -> Tensor:
        """A base weight plus the updates of some adapters, `(out, in, *kernel)` in fp32."""
        updates = (self.kind.from_layout(self.get_delta_weight(name)) for name in adapters)
        return sum(updates, start=self.kind.from_layout(weight).float())

    def get_delta_weight(self, adapter: str) -> Tensor:
        """`s · ΔW` of one adapter, laid out as the base layer stores its weight."""
        delta = self.initialized_delta(adapter)
        with torch.no_grad():
            product = multiply([factor.float() for factor in delta(self.read_weight)])
        return self.kind.to_layout(product * self.scaling[adapter])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's own conversion can handle the layer; `lora_state_dict` is exact, too."""
        return self.kind.linear

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add `ΔW` of the given (default: all active) adapters to the base weight.

        The sum is taken in fp32, always from the original weight: merging one by one or together is the same.

        Raises:
            ValueError: If `safe_merge` and the update is not finite.
            TypeError: If the base layer's quantization cannot be written. The layer is then unmerged.
        """
        merging.merge(self, safe_merge, adapter_names)

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit."""
        merging.unmerge(self)

    def check_merge(self) -> None:
        """Raise unless adapters can be merged into the base weight.

        Raises:
            TypeError: If the base layer's quantization cannot be written.
        """
        if self.quantization_backend is not None and not self.quantization_backend.supports_merge:
            raise TypeError(unmergeable(self.quantization_backend))

    @property
    def kept_bytes(self) -> int:
        """Bytes that a merged layer keeps to be able to unmerge."""
        return self.base_weight.kept_bytes

    def active_here(self) -> list[str]:
        """Active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.deltas]

    def extra_repr(self) -> str:
        """Name the quantization of the base layer, if it has any."""
        return quantization_extra_repr(self)


def _check_trainable(delta: Update, adapter_name: str) -> None:
    if any(parameter.requires_grad for parameter in delta.parameters()):
        raise RuntimeError(
            f"adapter {adapter_name!r} is offloaded with its base layer, so it cannot be trained; give the "
            "layer a device in device_map, or load with is_trainable=False"
        )


def adapted_layers(model: nn.Module, adapter_name: str, kind: type[LayerT]) -> dict[str, LayerT]:
    """Layers of a kind that have an adapter, by their names in the base model."""
    return {
        in_base(name): module
        for name, module in model.named_modules()
        if isinstance(module, kind) and adapter_name in module.deltas
    }

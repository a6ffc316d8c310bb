"""The tuner layer: adapters by name around one base layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr
from torch import Tensor, nn

from peft_subspace.base_weights.quantization import (
    can_compute_in,
    is_readable,
    quantization_of,
    stored_tensor,
    unmergeable,
    unreadable,
)
from peft_subspace.base_weights.weight import KeptWeight, keep_codes, offload_hook, unpack_codes, write_weight
from peft_subspace.core.chain import multiply
from peft_subspace.core.delta import Delta
from peft_subspace.core.errors import error_context
from peft_subspace.core.linalg import local_generator
from peft_subspace.layers.base import Branch, LayerOps
from peft_subspace.layers.choose import ops_for
from peft_subspace.runtime.progress import count_step
from peft_subspace.tuner.config import SubspaceConfig
from peft_subspace.tuner.weight_start import WeightStarts

LayerT = TypeVar("LayerT", bound="SubspaceLayer")


class SubspaceLayer(nn.Module, BaseTunerLayer):
    """A base layer with adapters: `y = base(x) + Σ s · ΔW x`, summed over the active adapters.

    Subclasses set `prefix` and `delta_cls`; the rest follows from the chain that a `Delta` defines.

    Args:
        base_layer: The layer to adapt, quantised or not.
        backend_kwargs: What `quantization_of` needs besides the layer.

    Attributes:
        tied: Whether other modules have the same weight, so that merging must not change it in place.

    Raises:
        TypeError: If layers of this type cannot be adapted.
        ValueError: If the layer has no weight yet, or groups that do not divide its channels.
    """

    prefix: ClassVar[str]
    delta_cls: ClassVar[type[Delta]]
    parameter_name: str = "weight"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "prefix"):  # of a kind of layer, not yet of a method
            return
        cls.adapter_layer_names = (f"{cls.prefix}delta",)
        cls.other_param_names = (f"{cls.prefix}dropout", "scaling", "initial_scaling")

    def __init__(self, base_layer: nn.Module, **backend_kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        base = self.get_base_layer()
        keep_codes(base)
        self.quantization_backend = quantization_of(base, **backend_kwargs)
        self.ops = self._ops_for(base)
        for name in getattr(base, "__constants__", ()):  # models read some, such as a convolution's stride
            setattr(self, name, getattr(base, name))
        self.in_features = self.ops.shape.in_features * self.ops.shape.groups
        self.out_features = self.ops.shape.out_features
        self.add_module(f"{self.prefix}delta", nn.ModuleDict())
        self.add_module(f"{self.prefix}dropout", nn.ModuleDict())
        self.scaling: dict[str, float] = {}
        self.initial_scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self.tied = False
        self._disable_adapters = False
        self._kept: KeptWeight | None = None
        self._deferred: dict[str, tuple[SubspaceConfig, str]] = {}

    def _ops_for(self, base: nn.Module) -> LayerOps:
        return ops_for(base, quantized=self.quantization_backend is not None)

    @property
    def base_parameter(self) -> Tensor:
        """Parameter of the base layer that is adapted, as it is stored; of a quantised one its codes."""
        base = self.get_base_layer()
        return stored_tensor(base) if self.quantization_backend else getattr(base, self.parameter_name)

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Set the weight; of a tied one, this layer's alone: the others have no adapter to be merged."""
        if self.quantization_backend is not None:
            super().set_base_weight(weight_data)
        elif self.tied:
            parameter = nn.Parameter(weight_data, requires_grad=self.base_parameter.requires_grad)
            setattr(self.get_base_layer(), self.parameter_name, parameter)
        else:
            self.base_parameter.data = weight_data

    @property
    def deltas(self) -> nn.ModuleDict:
        """Deltas by adapter name."""
        return getattr(self, f"{self.prefix}delta")

    @property
    def dropouts(self) -> nn.ModuleDict:
        """Dropout on the branch's input by adapter name, of those adapters that have any."""
        return getattr(self, f"{self.prefix}dropout")

    def update_layer(
        self,
        adapter_name: str,
        config: SubspaceConfig,
        module_name: str,
        rank: Any,
        twin: str | None = None,
        starts: WeightStarts | None = None,
    ) -> None:
        """Create an adapter, initialise it and put it where the base layer is.

        Args:
            adapter_name: Name of the new adapter.
            config: Its configuration.
            module_name: Name of this module in the model.
            rank: What the delta takes as its rank.
            twin: Existing adapter of the same config object, whose frozen tensors the new one copies.
            starts: Starts from base weights that the same adapter has had on other layers.
        """
        delta = self.delta_cls(config, self.ops.shape, rank)
        started = not any(parameter.is_meta for parameter in delta.parameters())
        if started:
            self._reset(delta, adapter_name, config, module_name)
            if twin is not None and twin in self.deltas:
                delta.copy_frozen(self.deltas[twin])
            elif delta.reads_weight and not config.initialized:
                with error_context(module_name):
                    started = (starts or WeightStarts()).start(delta, self, config)
        self._deferred.pop(adapter_name, None)
        if not started and delta.needs_weight and delta.reads_weight:
            self._deferred[adapter_name] = (config, module_name)
        self.deltas[adapter_name] = delta
        dropout = getattr(config, "dropout", 0.0)
        if dropout and self.ops.dropout_cls is not None:
            self.dropouts[adapter_name] = self.ops.dropout_cls(dropout)
        self.scaling[adapter_name] = self.initial_scaling[adapter_name] = config.scaling_for(module_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _reset(self, delta: Delta, adapter_name: str, config: SubspaceConfig, module_name: str) -> None:
        generator = local_generator(config.seed, module_name, adapter_name)
        delta.reset_parameters(config.init_weights, generator)

    def started(self, adapter_name: str) -> Delta:
        """Delta of an adapter; one that was added while the base weight was on the meta device starts now.

        Raises:
            RuntimeError: If the base weight still is.
        """
        delta = self.deltas[adapter_name]
        if adapter_name not in self._deferred or delta.initialized:
            self._deferred.pop(adapter_name, None)
            return delta
        readable = self.quantization_backend is None
        if (self.get_base_weight() if readable else self.base_parameter).is_meta:
            raise RuntimeError(
                f"adapter {adapter_name!r} starts from the base weight, which is on the meta device; load "
                "the base model first"
            )
        config, module_name = self._deferred.pop(adapter_name)
        delta.to_empty(device="cpu")
        self._reset(delta, adapter_name, config, module_name)
        with error_context(module_name):
            WeightStarts().start(delta, self, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        return delta

    def beneath(self, config: Any) -> list[str]:
        """Adapters whose updates are a part of the weight that a new adapter starts from."""
        return []

    def with_updates(self, weight: Tensor, adapters: Iterable[str]) -> Tensor:
        """A base weight plus the updates of some adapters, `(out, in, *kernel)` in fp32."""
        updates = (self.ops.to_layout(self.get_delta_weight(name)) for name in adapters)
        return sum(updates, start=self.ops.to_layout(weight).float())

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move one adapter to where the base layer works; its parameters also take a floating dtype.

        A weight on the meta device takes no adapter with it: it may be offloaded.
        """
        if adapter_name not in self.deltas or any(p.is_meta for p in self.deltas[adapter_name].parameters()):
            return
        base = self.get_base_layer()
        base_device, dtype = self._get_base_layer_device_and_dtype(base)
        target: Any = device or base_device
        if target.type == "meta":
            target = getattr(offload_hook(base), "execution_device", None)
        self.deltas[adapter_name].to(device=target, dtype=dtype)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device, torch.dtype | None]:
        """Device and dtype that an adapter takes from the base layer; no dtype where that holds codes."""
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        device = device or stored_tensor(base_layer).device
        return device, dtype if dtype is not None and can_compute_in(dtype) else None

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Run the base layer and add the active adapters, or one adapter per sample with `adapter_names`."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        active = [n for n in self.active_adapters if n in self.deltas and n not in self.merged_adapters]
        if not active:
            return self.base_layer(x, *args, **kwargs)
        branches = [self._branch(name) for name in active]
        if self.quantization_backend is None and not isinstance(self.base_layer, BaseTunerLayer):
            result = self.ops.merged_forward(self.base_layer, branches, x, *args, **kwargs)
            if result is not None:
                return result
        result = self.base_layer(x, *args, **kwargs)
        for branch in branches:
            result = self._add(result, branch, x)
        return result

    def _branch(self, adapter_name: str) -> Branch:
        dropouts = self.dropouts
        dropout = dropouts[adapter_name] if adapter_name in dropouts else None  # noqa: SIM401 - no dict
        delta = self.started(adapter_name)
        if torch.is_grad_enabled() and offload_hook(delta) is not None:
            _check_trainable(delta, adapter_name)
        return Branch.scaled(delta(), self.scaling[adapter_name], dropout)

    def _add(self, result: Tensor, branch: Branch, x: Tensor) -> Tensor:
        if x.is_floating_point():
            x = self._cast_input_dtype(x, branch.factors[-1].dtype)
        return self.ops.add(result, self.get_base_layer(), branch, x)

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """Run the base layer once, and each sample's adapter on its rows."""
        if self.merged:
            raise ValueError(
                "adapter_names cannot be used while adapters are merged; call unmerge_adapter() first"
            )
        if len(adapter_names) != len(x):
            raise ValueError(
                f"adapter_names has {len(adapter_names)} entries for a batch of {len(x)}; give one name per "
                "sample"
            )
        result = self.base_layer(x, *args, **kwargs)
        for name in dict.fromkeys(adapter_names):
            if name in self.deltas:
                rows = torch.tensor([i for i, n in enumerate(adapter_names) if n == name], device=x.device)
                part = self._add(result[rows], self._branch(name), x[rows])
                result = result.index_copy(0, rows, part)
        return result

    def get_base_weight(self) -> Tensor:
        """Weight of the base layer as it stores it, dequantised, or read from where it is offloaded.

        Raises:
            NotImplementedError: If its codes can only be run.
        """
        base = self.get_base_layer()
        if self.quantization_backend is None:
            hook = offload_hook(base) if self.base_parameter.is_meta else None
            return self.base_parameter.data if hook is None else hook.weights_map[self.parameter_name]
        if not is_readable(self.quantization_backend):
            raise NotImplementedError(unreadable(base))
        unpack_codes(base)
        return super().get_base_weight()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """`s · ΔW` of one adapter, laid out as the base layer stores its weight."""
        delta = self.started(adapter)
        with torch.no_grad():
            product = multiply([factor.float() for factor in delta()])
        return self.ops.to_layout(product * self.scaling[adapter])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's own conversion can handle the layer; `export_lora` is exact, too."""
        return self.ops.linear

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add `ΔW` of the given (default: all active) adapters to the base weight.

        The sum is taken in fp32, always from the original weight: merging one by one or together is the same.

        Raises:
            ValueError: If `safe_merge` and the update is not finite.
            TypeError: If the base layer's quantisation cannot be written. The layer is then unmerged.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.deltas]
        if not names:
            return
        self.check_merge()
        if safe_merge:
            self._check_finite(names)
        kept = self._kept or KeptWeight(self)
        if self.merged:
            kept.restore(self)
        weight = self.get_base_weight()
        total = sum(
            (self.get_delta_weight(name) for name in [*self.merged_adapters, *names]), start=weight.float()
        )
        self._kept = kept
        try:
            write_weight(self, total.to(weight.dtype))
        except Exception:
            self.unmerge()
            raise
        self.merged_adapters.extend(names)
        count_step()

    def check_merge(self) -> None:
        """Raise unless adapters can be merged into the base weight.

        Raises:
            TypeError: If the base layer's quantisation cannot be written.
        """
        if self.quantization_backend is not None and not self.quantization_backend.supports_merge:
            raise TypeError(unmergeable(self.quantization_backend))

    def _check_finite(self, names: Iterable[str]) -> None:
        for name in names:
            if not torch.isfinite(self.get_delta_weight(name)).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit."""
        if self._kept is not None:
            self._kept.restore(self)
        self._kept = None
        self.merged_adapters.clear()

    @property
    def kept_bytes(self) -> int:
        """Bytes that a merged layer keeps to be able to unmerge."""
        return 0 if self._kept is None else self._kept.nbytes()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set one adapter's scaling to its initial value times `scale`."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.initial_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters by `scale`."""
        for name in self.active_here():
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters by `scale`, or put it back to the start."""
        for name in self.active_here():
            self.scaling[name] = self.initial_scaling[name] if scale is None else self.scaling[name] / scale

    def active_here(self) -> list[str]:
        """Active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.deltas]

    def extra_repr(self) -> str:
        """Name the quantisation of the base layer, if it has any."""
        return quantization_extra_repr(self)

    @property
    def takes_training_step(self) -> bool:
        """Whether this forward pass is one of training, and none that is being compiled."""
        return self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _check_trainable(delta: Delta, adapter_name: str) -> None:
    if any(parameter.requires_grad for parameter in delta.parameters()):
        raise RuntimeError(
            f"adapter {adapter_name!r} is offloaded with its base layer, so it cannot be trained; give the "
            "layer a device in device_map, or load with is_trainable=False"
        )


def adapted_layers(model: nn.Module, adapter_name: str, kind: type[LayerT]) -> dict[str, LayerT]:
    """Layers of a kind that have an adapter, by their names in the base model."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, kind) and adapter_name in module.deltas
    }

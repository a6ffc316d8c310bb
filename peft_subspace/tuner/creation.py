"""How a tuner layer gets an adapter: made, initialized, and put where the base layer is."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peft_subspace.core.delta import Update
from peft_subspace.core.errors import error_context
from peft_subspace.core.lean import UNLOADED
from peft_subspace.core.linalg import local_generator
from peft_subspace.core.modes import lasting
from peft_subspace.core.shapes import ModuleSpec
from peft_subspace.runtime.engines import check_no_engine
from peft_subspace.tuner.config import SubspaceConfig
from peft_subspace.tuner.shared import SharedTensors
from peft_subspace.tuner.weight_start import WeightStarts


def create_adapter(
    layer: Any,
    adapter_name: str,
    config: SubspaceConfig,
    spec: ModuleSpec,
    source: str | None,
    starts: WeightStarts | None,
    shared: SharedTensors | None,
) -> None:
    """Create an adapter in a tuner layer; the arguments are those of `SubspaceLayer.update_layer`."""
    delta = layer.delta_cls(config, spec)
    scaling = config.scaling_for(delta)
    delta.random_std /= scaling or 1.0
    layer._deferred.pop(adapter_name, None)
    own, held = _tensors(delta), [] if shared is None else _tensors(shared[adapter_name])
    if any(tensor.is_meta for tensor in (*own, *held)):
        if not all(tensor.is_meta for tensor in own):
            delta.to("meta")  # PEFT leaves parameters to be loaded there, but not the rest
        initialized = False
    else:
        copied = layer.deltas[source] if source is not None and source in layer.deltas else None
        initialized = _initialize(layer, delta, config, copied, starts)
    if not initialized and delta.needs_weight and delta.reads_weight:
        layer._deferred[adapter_name] = (config, spec.name)
    if shared is not None:
        layer._shared = (shared,)
        delta.attach(shared, adapter_name)
    layer.deltas[adapter_name] = delta
    dropout = getattr(config, "dropout", 0.0)
    if dropout and layer.kind.dropout_cls is not None:
        layer.dropouts[adapter_name] = layer.kind.dropout_cls(dropout)
    layer.scaling[adapter_name] = layer.initial_scaling[adapter_name] = scaling
    layer._move_adapter_to_device_of_base_layer(adapter_name)
    layer.set_adapter(layer.active_adapters, inference_mode=config.inference_mode)


@lasting()
def initialize_deferred(layer: Any, adapter_name: str) -> None:
    """Initialize an adapter that was added while the base weight was on the meta device.

    Raises:
        RuntimeError: If the base weight still is, or a training engine has taken over the adapter.
    """
    delta = layer.deltas[adapter_name]
    if adapter_name not in layer._deferred or delta.initialized:
        layer._deferred.pop(adapter_name, None)
        return
    if layer.base_weight.is_meta:
        raise RuntimeError(
            f"adapter {adapter_name!r} starts from the base weight, which is on the meta device; load "
            "the base model first"
        )
    check_no_engine(delta.parameters(), f"what initializes adapter {adapter_name!r} from loaded weights")
    config, _ = layer._deferred.pop(adapter_name)
    delta.to_empty(device="cpu")
    _initialize(layer, delta, config, None, None)
    layer._move_adapter_to_device_of_base_layer(adapter_name)


def _initialize(
    layer: Any,
    delta: Update,
    config: SubspaceConfig,
    copied: Update | None,
    starts: WeightStarts | None,
) -> bool:
    """Fill an update's tensors; returns False if the base weight that they need is not there yet."""
    name = delta.spec.name
    delta.reset_parameters(config.init_weights, local_generator(config.seed, name, config.number))
    there = True
    if copied is not None:
        delta.copy_frozen(copied)
    elif delta.reads_weight and not config.initialized:
        with error_context(name):
            there = (starts or WeightStarts()).start(delta, layer, config)
    elif delta.reads_weight and delta.needs_weight and delta.frozen_in_files:
        delta.awaits = UNLOADED
    if there and delta.needs_weight and delta.reads_weight and not config.initialized:
        found = layer.base_weight.fingerprint(layer.kind.from_layout)
        if found is not None:
            delta.fingerprint.copy_(found)
    return there


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]

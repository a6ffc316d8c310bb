"""The frozen weight of a base layer, quantized or not: read it, write it, put back exactly what was there."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft_subspace.base_weights.computed import ComputedWeight, computed_weight
from peft_subspace.base_weights.fingerprint import fingerprint
from peft_subspace.base_weights.quantization import (
    is_readable,
    nbytes,
    stored_tensor,
    unmergeable,
    unreadable,
)
from peft_subspace.base_weights.repacking import undo_repacking
from peft_subspace.runtime.engines import gathered

# Attributes besides its parameters in which a quantized layer keeps parts of its weight.
_QUANTIZATION_STATE = ("state", "quant_state", "meta")


class BaseWeight:
    """One parameter of the module inside a tuner layer.

    Args:
        holder: The tuner layer, of which `base_layer` and `get_base_layer()` are used: PEFT, quantizers and
            accelerate may put another module there at any time.
        name: Name of the parameter in the module.
        backend: PEFT's backend for quantized weights, None for others.

    Attributes:
        tied: Whether other modules have the same parameter, so that it must not be changed in place.
    """

    def __init__(self, holder: Any, name: str, backend: Any) -> None:
        self.holder, self.name, self.backend = holder, name, backend
        self.tied = False
        self._kept: _Kept | None = None

    @property
    def module(self) -> nn.Module:
        """The module that has the parameter."""
        return self.holder.get_base_layer()

    @property
    def stored(self) -> Tensor:
        """The parameter as it is stored; for a quantized weight its packed values."""
        return stored_tensor(self.module) if self.backend else getattr(self.module, self.name)

    @property
    def computed(self) -> ComputedWeight | None:
        """How the module makes the weight of other tensors; None if it is a parameter."""
        return None if self.backend else computed_weight(self.module, self.name)

    def _refresh(self, weight: Tensor) -> None:
        """Set what a hook would compute before the next call of the module."""
        if self.name in vars(self.module):
            setattr(self.module, self.name, weight)

    @property
    def readable(self) -> bool:
        """Whether the weight can be read, if need be dequantized."""
        return is_readable(self.backend)

    @property
    def is_meta(self) -> bool:
        """Whether the weight is not there yet."""
        return (self.stored if self.backend else self.read()).is_meta

    def read(self) -> Tensor:
        """Weight as the module stores it, dequantized, or read from where it is offloaded.

        Raises:
            NotImplementedError: If its packed values can only be run.
        """
        module = self.module
        if self.backend is None:
            hook = offload_hook(module) if self.stored.is_meta else None
            return self.stored.data if hook is None else hook.weights_map[self.name]
        if not self.readable:
            raise NotImplementedError(unreadable(module))
        undo_repacking(module)
        return self.backend.get_base_weight(module).detach()

    def set(self, weight: Tensor) -> None:
        """Replace the values; for a tied weight this module's alone: no adapter of the others is merged."""
        computed = self.computed
        if self.backend is not None:
            self.backend.set_base_weight(self.holder, weight)
        elif computed is not None:
            for source, value in zip(computed.sources, computed.values_for(weight), strict=True):
                source.data = value
            self._refresh(weight)
        elif self.tied:
            setattr(self.module, self.name, nn.Parameter(weight, requires_grad=self.stored.requires_grad))
        else:
            self.stored.data = weight

    def write(self, weight: Tensor) -> None:
        """Keep what is there, unless something is kept already, and store a weight, quantized as the old one.

        Raises:
            TypeError: If the backend leaves it unquantized, as PEFT's for torchao does with embeddings.
        """
        self._kept = self._kept or _Kept(self)
        base, inner = self.module, self.holder.base_layer
        kind, label = type(getattr(base, "weight", None)), vars(base).get("extra_repr")
        self.set(weight)
        if self.holder.base_layer is not inner:  # HQQ's makes a new layer, without the bias
            base.W_q, base.meta = self.holder.base_layer.W_q, self.holder.base_layer.meta
            self.holder.base_layer = inner
        if label is not None:  # torchao's appends to it each time
            base.extra_repr = label
        if type(getattr(base, "weight", None)) is not kind:
            raise TypeError(unmergeable(self.backend))

    @property
    def written(self) -> bool:
        """Whether an older weight is kept."""
        return self._kept is not None

    @property
    def kept_bytes(self) -> int:
        """Bytes that a kept weight occupies beside the present one."""
        return 0 if self._kept is None else self._kept.nbytes()

    def restore(self) -> None:
        """Put the kept weight back, bit for bit; it stays kept until `forget`.

        Raises:
            RuntimeError: If the weight is offloaded now.
        """
        if self._kept is not None:
            self._kept.restore(self)

    def forget(self) -> None:
        """Keep nothing any more."""
        self._kept = None

    def original(self) -> Tensor:
        """The weight before any was written."""
        if self._kept is None or self._kept.data is None:
            return self.read()
        return self._kept.data

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Have all of the weight here; with DeepSpeed's ZeRO-3 each process keeps a part of it only."""
        with gathered(self.module.parameters(recurse=False)):
            yield

    def fingerprint(self, to_layout: Any) -> Tensor | None:
        """Fingerprint of the weight; None where it cannot be read, or is not there yet."""
        with self.whole():
            try:
                weight = self.read()
            except NotImplementedError:
                return None
            if weight.is_meta or hasattr(weight, "device_mesh"):
                return None
            return fingerprint(to_layout(weight), weight.dtype)


class _Kept:
    """What a base layer held before a merge.

    For an unquantized layer it is the weight, or, if other layers have the same, the parameter; for a
    quantized one its packed values with their constants.
    """

    def __init__(self, weight: BaseWeight) -> None:
        self.data: Tensor | None = None
        self.shared: Tensor | None = None
        computed = weight.computed
        self.sources = [] if computed is None else [(source, source.data) for source in computed.sources]
        if weight.backend is None:
            self.shared = weight.stored if weight.tied else None
            self.data = weight.stored.data if weight.tied else _on_host_if_short(weight.stored.data)
            return
        base = weight.module
        undo_repacking(base)
        self.parameters = dict(base._parameters)
        self.constants = {name: dict(vars(p)) for name, p in base._parameters.items() if p is not None}
        self.state = {name: copy.copy(vars(base)[name]) for name in _QUANTIZATION_STATE if name in vars(base)}

    def restore(self, weight: BaseWeight) -> None:
        """Put the weight back, on the device where the layer is now."""
        if self.data is None:
            self._restore_packed(weight.module)
            return
        for source, data in self.sources:
            source.data = data.to(source.device, source.dtype)
        if self.sources:
            weight._refresh(self.data)
            return
        stored = weight.stored
        if stored.is_meta and not self.data.is_meta:
            raise RuntimeError(
                "the merged weight is offloaded and cannot be unmerged during a forward pass; call "
                "unmerge_adapter() first"
            )
        data = self.data.to(stored.device, stored.dtype)
        if self.shared is not None:
            setattr(weight.module, weight.name, self.shared)
        weight.stored.data = data

    def _restore_packed(self, base: nn.Module) -> None:
        for name, parameter in self.parameters.items():
            if parameter is not None:
                parameter.__dict__.clear()
                parameter.__dict__.update(self.constants[name])
            vars(base).pop(name, None)  # what a failed merge may have left, which would hide it
            base._parameters[name] = parameter
        for name, value in self.state.items():
            setattr(base, name, value)

    def nbytes(self) -> int:
        """Bytes of what is kept."""
        kept = self.parameters.values() if self.data is None else [self.data]
        return sum(nbytes(tensor) for tensor in kept if tensor is not None)


def tied_parameters(model: nn.Module) -> set[int]:
    """Identities of the parameters that several modules have, such as an embedding and its head."""
    seen: set[int] = set()
    tied: set[int] = set()
    for module in model.modules():
        for parameter in {id(p) for p in module._parameters.values() if p is not None}:
            (tied if parameter in seen else seen).add(parameter)
    return tied


def offload_hook(module: nn.Module) -> Any:
    """Hook by which accelerate fetches a module's offloaded tensors before each call, or None."""
    hook: Any = getattr(module, "_hf_hook", None)
    return next((h for h in getattr(hook, "hooks", [hook]) if getattr(h, "offload", False)), None)


def _on_host_if_short(weight: Tensor) -> Tensor:
    """Move a tensor to the host if its accelerator has not twice its size to spare."""
    if weight.device.type == "cuda" and torch.cuda.mem_get_info(weight.device)[0] < 2 * weight.nbytes:
        return weight.cpu()
    return weight

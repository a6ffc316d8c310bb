"""The weight of a base layer, quantised or not: read it, and put back exactly what was there."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn

from peft_subspace.base_weights.quantization import nbytes, unmergeable

if TYPE_CHECKING:
    from peft_subspace.tuner.layer import SubspaceLayer


# Attributes besides its parameters in which a quantised layer keeps parts of its weight.
_QUANTIZATION_STATE = ("state", "quant_state", "meta")


class KeptWeight:
    """What a base layer held before a merge; `restore` puts it back bit for bit.

    Of an unquantised layer it is the weight tensor, or, if other layers have the same, the parameter; of a
    quantised one the codes with their constants.
    """

    def __init__(self, layer: SubspaceLayer) -> None:
        base = layer.get_base_layer()
        self.quantized = layer.quantization_backend is not None
        self.data = torch.empty(0)
        self.shared: Tensor | None = None
        if not self.quantized:
            self.shared = layer.base_parameter if layer.tied else None
            self.data = (
                layer.base_parameter.data if layer.tied else _on_host_if_short(layer.base_parameter.data)
            )
        if self.quantized:
            unpack_codes(base)
            self.parameters = dict(base._parameters)
            self.constants = {name: dict(vars(p)) for name, p in base._parameters.items() if p is not None}
            self.state = {
                name: copy.copy(vars(base)[name]) for name in _QUANTIZATION_STATE if name in vars(base)
            }

    def restore(self, layer: SubspaceLayer) -> None:
        """Put the weight back, on the device where the layer is now.

        Raises:
            RuntimeError: If the weight is offloaded now.
        """
        if not self.quantized:
            weight = layer.base_parameter
            if weight.is_meta and not self.data.is_meta:
                raise RuntimeError(
                    "the merged weight is offloaded and cannot be unmerged during a forward pass; call "
                    "unmerge_adapter() first"
                )
            data = self.data.to(weight.device, weight.dtype)
            if self.shared is not None:
                setattr(layer.get_base_layer(), layer.parameter_name, self.shared)
            layer.base_parameter.data = data
            return
        base = layer.get_base_layer()
        for name, parameter in self.parameters.items():
            if parameter is not None:
                parameter.__dict__.clear()
                parameter.__dict__.update(self.constants[name])
            vars(base).pop(name, None)  # what a failed merge may have left, which would hide it
            base._parameters[name] = parameter
        for name, value in self.state.items():
            setattr(base, name, value)

    def nbytes(self) -> int:
        """Bytes that the kept weight occupies beside the merged one."""
        tensors = [p for p in self.parameters.values() if p is not None] if self.quantized else [self.data]
        return sum(nbytes(tensor) for tensor in tensors)


def write_weight(layer: SubspaceLayer, weight: Tensor) -> None:
    """Store a weight in the base layer, quantised as the one that is there.

    Raises:
        TypeError: If the backend leaves it unquantised, as PEFT's for torchao does with embeddings.
    """
    base, beneath = layer.get_base_layer(), layer.base_layer
    kind, label = type(getattr(base, "weight", None)), vars(base).get("extra_repr")
    layer.set_base_weight(weight)
    if layer.base_layer is not beneath:  # HQQ's makes a new layer, without the bias
        base.W_q, base.meta = layer.base_layer.W_q, layer.base_layer.meta
        layer.base_layer = beneath
    if label is not None:  # torchao's appends to it each time
        base.extra_repr = label
    if type(getattr(base, "weight", None)) is not kind:
        raise TypeError(unmergeable(layer.quantization_backend))


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


@contextmanager
def whole_weight(base: nn.Module) -> Iterator[None]:
    """Have all of a layer's weight here; with DeepSpeed's ZeRO-3 each process keeps a part of it only."""
    with gather_params_ctx(list(base.parameters(recurse=False)), modifier_rank=None):
        yield


def unpack_codes(base: nn.Module) -> None:
    """Undo the repacking of 4-bit codes that bitsandbytes does in place when a CPU evaluates in bf16.

    Dequantising repacked codes gives garbage. Asking the layer for its state makes bitsandbytes undo it, but
    for the order of scales that are not quantised themselves; and all scales stay rounded to bf16.
    """
    quant_state: Any = getattr(getattr(base, "weight", None), "quant_state", None)
    if getattr(quant_state, "packing_format_for_cpu", False):
        base.state_dict()
        if not quant_state.nested:
            quant_state.absmax = quant_state.absmax.T.reshape(-1).float()


def keep_codes(base: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit codes, which loses precision and cannot be trained on."""
    if hasattr(base, "support_avx512bf16_for_cpu"):
        unpack_codes(base)
        base.support_avx512bf16_for_cpu = False


def _on_host_if_short(weight: Tensor) -> Tensor:
    """Move a tensor to the host if its accelerator has not twice its size to spare."""
    if weight.device.type == "cuda" and torch.cuda.mem_get_info(weight.device)[0] < 2 * weight.nbytes:
        return weight.cpu()
    return weight

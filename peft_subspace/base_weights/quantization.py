"""What can be done with the weight of a base layer: PEFT's backends, and what to do where PEFT has none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from math import prod
from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, QuantizationBackend, TorchaoBackend
from torch import Tensor, nn


class UnknownBackend(ForwardOnlyQuantizationBackend):
    """A format that PEFT does not know: the layer can be run, and differentiated by its input."""


class ComposedBackend(QuantizationBackend):
    """A weight that is one tensor made of others, to whose data nothing can be assigned.

    Args:
        base: The layer; one of quanto has `freeze`, which quantizes a weight as the layer is set up to.
    """

    layer_type = "linear"

    def __init__(self, base: nn.Module) -> None:
        self.backend_name = type(base.weight).__name__
        self.supports_merge = hasattr(base, "freeze")

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        """The weight, dequantized."""
        weight: Any = base_layer.weight
        return weight.dequantize()

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        """Quantize a weight again.

        Raises:
            TypeError: If the layer cannot.
        """
        base = peft_layer.get_base_layer()
        if not self.supports_merge:
            raise TypeError(unmergeable(self))
        trains = base.weight.requires_grad
        base.weight = nn.Parameter(weight_data, requires_grad=False)
        base.freeze()
        base.weight.requires_grad_(trains)


def quantization_of(
    base: nn.Module, get_apply_tensor_subclass: Callable[[], Any] | None = None
) -> QuantizationBackend | None:
    """Backend for the weight of a base layer; None if the weight is not quantized.

    PEFT decides, with three additions. Weights of torchao can be adapted, but not merged into, where the
    settings that they were quantized with are unknown, or differ by the layer's name. A weight that is one
    tensor made of others, as quanto's, can be read, and written by a layer that can quantize it again. And a
    layer that PEFT does not know is taken for a linear one that can only be run, if it says how many features
    it has and keeps tensors of integers or 8-bit floats.

    Args:
        base: The layer.
        get_apply_tensor_subclass: What PEFT's `get_quantization_kwargs` finds on a model: a function that
            returns torchao's settings.
    """
    settings = get_apply_tensor_subclass
    backend = resolve_quantization_backend(base, get_apply_tensor_subclass=settings or (lambda: None))
    if isinstance(backend, TorchaoBackend) and (settings is None or hasattr(settings(), "fqn_to_config")):
        backend.supports_merge = False
    if backend is None and _is_made_of_others(getattr(base, "weight", None)):
        return ComposedBackend(base)
    if backend is None and linear_sizes(base) and _runs_on_packed_weights(base):
        return UnknownBackend(type(base).__name__)
    return backend


def is_readable(backend: QuantizationBackend | None) -> bool:
    """Whether weights of a backend can be dequantized."""
    return not isinstance(backend, ForwardOnlyQuantizationBackend)


def unreadable(base: nn.Module) -> str:
    """Say that the weight of a layer cannot be dequantized, and what to do where it is needed."""
    return (
        f"the weight of {type(base).__name__} cannot be read, and it is needed here; exclude the module, "
        "load the base model unquantized or quantized otherwise, or start the adapter on the unquantized "
        "model, save it and load it here"
    )


def unmergeable(backend: QuantizationBackend | None) -> str:
    """Say that adapters cannot be merged into the weights of a backend, and what to do."""
    remedy = "serve the adapter unmerged, or export it with peft_subspace.export_lora"
    if isinstance(backend, TorchaoBackend):
        remedy = f"quantize linear layers only, by transformers' TorchAoConfig with one setting, or {remedy}"
    name = getattr(backend, "backend_name", "these")
    return f"{name} weights cannot be rewritten, so adapters cannot be merged into them; {remedy}"


def linear_sizes(base: nn.Module) -> tuple[int, int] | None:
    """Sizes `(in, out)` that a layer of an unknown type gives under one of the usual names."""
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        in_features, out_features = (getattr(base, name, None) for name in names)
        if isinstance(in_features, int) and isinstance(out_features, int):
            return in_features, out_features
    return None


def quantized_sizes(base: nn.Module) -> tuple[int, int]:
    """Sizes `(in, out)` of a quantized linear layer."""
    in_features, out_features = linear_sizes(base) or _get_in_out_features(base)
    return int(in_features or 0), int(out_features or 0)


def stored_tensor(base: nn.Module) -> Tensor:
    """Tensor that a layer keeps its weight, or a part of it, in.

    Raises:
        TypeError: If it has none.
    """
    named = (getattr(base, name, None) for name in ("weight", "W_q", "qweight"))
    for tensor in chain(named, _tensors(base)):
        if isinstance(tensor, Tensor):
            return tensor
    raise TypeError(f"{type(base).__name__} has no tensors, so that nothing says where its adapter belongs")


def _is_made_of_others(weight: Any) -> bool:
    """Whether a weight is a tensor made of others; not a part of one that processes share."""
    return hasattr(weight, "__tensor_flatten__") and not hasattr(weight, "device_mesh")


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor; of a tensor that is made of others, theirs."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def _tensors(base: nn.Module) -> Iterator[Tensor]:
    return chain(base.parameters(recurse=False), base.buffers(recurse=False))


def _runs_on_packed_weights(base: nn.Module) -> bool:
    """Whether a layer has packed quantized weights in place of its weight."""
    if isinstance(base, nn.Linear):  # cast to 8 bits as a whole, it needs no scales
        return type(base).forward is not nn.Linear.forward and not can_compute_in(base.weight.dtype)
    size = prod(linear_sizes(base) or ())
    tensors = [tensor for tensor in _tensors(base) if not tensor.is_complex()]
    weights = [t for t in tensors if can_compute_in(t.dtype) and t.numel() == size]
    return not weights and not all(can_compute_in(tensor.dtype) for tensor in tensors)


def can_compute_in(dtype: torch.dtype) -> bool:
    """Whether numbers of a type stand for themselves, not as integers and 8-bit floats for scaled ones."""
    return dtype.is_floating_point and dtype.itemsize > 1

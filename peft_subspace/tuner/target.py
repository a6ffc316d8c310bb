"""A weight that can be adapted, analyzed once: what kind of layer has it, and how it is stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_subspace.base_weights.computed import computed_weight
from peft_subspace.base_weights.quantization import quantization_of, quantized_sizes
from peft_subspace.base_weights.weight import BaseWeight
from peft_subspace.layers.base import LayerKind
from peft_subspace.layers.choose import kind_of
from peft_subspace.layers.parameter import parameter_kind
from peft_subspace.layers.usage import usage_of


@dataclass(frozen=True)
class Target:
    """A weight of a model, analyzed once.

    Attributes:
        module: The module that has it, without adapters.
        parameter_name: Its name there.
        kind: What an update does in place of the module.
        backend: PEFT's backend if the weight is quantized.
        is_parameter: Whether the module is called as it is, with an updated parameter.
        is_read: Whether the model is known to compute with the weight by itself.
        part_of: Name of the targeted module that is adapted by its parts, of which this is one.
    """

    module: nn.Module
    parameter_name: str
    kind: LayerKind
    backend: Any
    is_parameter: bool = False
    is_read: bool = False
    part_of: str | None = None

    @property
    def base_layer(self) -> nn.Module:
        """The module, as a tuner layer calls it."""
        return self.module

    def get_base_layer(self) -> nn.Module:
        """The module, as a tuner layer gives it."""
        return self.module

    @property
    def base_weight(self) -> BaseWeight:
        """The weight, to be looked at before there is a tuner layer."""
        return BaseWeight(self, self.parameter_name, self.backend)


def without_adapters(module: nn.Module) -> nn.Module:
    """The module inside a tuner layer, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def analyze_module(module: nn.Module, **backend_kwargs: Any) -> Target:
    """Analyze the weight of a module, or of the one inside a tuner layer.

    Args:
        module: The module.
        backend_kwargs: What PEFT's `get_quantization_kwargs` finds on the model.

    Raises:
        TypeError: If no method can adapt layers of this type.
        ValueError: If the layer has no weight yet, or groups that do not divide its channels.
    """
    base = without_adapters(module)
    backend = quantization_of(base, **backend_kwargs)
    kind = kind_of(base, sizes=quantized_sizes(base) if backend else None)
    if kind.has_custom_forward and computed_weight(base, "weight") is not None:
        raise TypeError(
            f"{type(base).__name__} has a forward of its own and a weight made of other tensors, so that it "
            "cannot be called with another one; make the weight permanent, or exclude it by exclude_modules"
        )
    return Target(base, "weight", kind, backend)


def analyze_use(target: Target, name: str, around: Sequence[nn.Module]) -> Target:
    """Add how a model uses the weight of a module.

    Args:
        target: The weight.
        name: Name of the module in the one that has it.
        around: That module, and those around it.

    Raises:
        TypeError: If the model reads packed values and never calls the module.
    """
    called, read = usage_of(name, around, target.parameter_name)
    if read and not called and target.backend is not None:
        raise TypeError(
            "the model reads this weight, which is quantized, and never calls the layer, so an adapter would "
            "have no effect; load the base model unquantized, or exclude the module with exclude_modules"
        )
    return replace(target, is_read=True) if read and target.backend is None else target


def analyze_parameter(owner: nn.Module, name: str) -> Target:
    """Analyze a parameter of a module that is called as it is.

    Raises:
        TypeError: If the parameter is quantized.
        ValueError: If it is a vector.
    """
    return Target(owner, name, parameter_kind(owner, name), None, is_parameter=True)

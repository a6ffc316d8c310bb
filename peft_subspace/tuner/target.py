"""A weight that can be adapted, analyzed once: what kind of layer has it, and how it is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_subspace.base_weights.quantization import quantization_of, quantized_sizes
from peft_subspace.layers.base import LayerKind
from peft_subspace.layers.choose import kind_of
from peft_subspace.layers.experts import parameter_kind


@dataclass(frozen=True)
class Target:
    """A weight of a model, analyzed once.

    Attributes:
        module: The module that has it, without adapters.
        parameter_name: Its name there.
        kind: What an update does in place of the module.
        backend: PEFT's backend if the weight is quantized.
        is_parameter: Whether the module is called as it is, with an updated parameter.
    """

    module: nn.Module
    parameter_name: str
    kind: LayerKind
    backend: Any
    is_parameter: bool = False

    @property
    def base_layer(self) -> nn.Module:
        """The module, as a tuner layer calls it."""
        return self.module

    def get_base_layer(self) -> nn.Module:
        """The module, as a tuner layer gives it."""
        return self.module


def analyze_module(module: nn.Module, **backend_kwargs: Any) -> Target:
    """Analyze the weight of a module, or of the one inside a tuner layer.

    Args:
        module: The module.
        backend_kwargs: What PEFT's `get_quantization_kwargs` finds on the model.

    Raises:
        TypeError: If no method can adapt layers of this type.
        ValueError: If the layer has no weight yet, or groups that do not divide its channels.
    """
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    backend = quantization_of(base, **backend_kwargs)
    return Target(base, "weight", kind_of(base, sizes=quantized_sizes(base) if backend else None), backend)


def analyze_parameter(owner: nn.Module, name: str) -> Target:
    """Analyze a parameter of a module that is called as it is.

    Raises:
        TypeError: If the parameter is quantized.
        ValueError: If it has not two or three axes.
    """
    return Target(owner, name, parameter_kind(owner, name), None, is_parameter=True)

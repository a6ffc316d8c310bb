"""Adapters on a parameter that is no layer's weight, such as the stacked weights of fused experts.

PEFT finds such parameters by `target_parameters` and has the module that owns one wrapped; if several are in
one module, each wrapper wraps the one before. The module's forward is its own: it is called with `W + ΔW` in
the place of the parameter, and whoever reads the parameter from outside is given `W + ΔW` too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_subspace.layers.calls import call_with
from peft_subspace.tuner.layer import SubspaceLayer
from peft_subspace.tuner.target import Target

_OWN = ("_hf_hook", "_old_forward")
"""What accelerate puts on a module; it must not be found on the wrapper as well."""


class ParameterLayer(SubspaceLayer):
    """A module with adapters on one of its parameters, the `target`'s; all else is read from the module."""

    def __init__(self, base_layer: nn.Module, target: Target | None = None) -> None:
        super().__init__(base_layer, target)
        stored = self.base_weight.stored
        # Lists of parameters that the module keeps, as recurrent layers do.
        self._lists = [
            name
            for name, value in vars(self.get_base_layer()).items()
            if isinstance(value, list) and any(entry is stored for entry in value)
        ]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _OWN or name.startswith("__") or "base_layer" not in self._modules:
                raise  # what Python asks for, such as how to copy, is no matter of the module's
        if name == self.parameter_name:
            return self.updated_weight()
        return getattr(self.base_layer, name)

    @property
    def weight(self) -> Tensor:
        """The parameter, if that is its name, else what the module inside calls so."""
        return self.updated_weight() if self.parameter_name == "weight" else self.base_layer.weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with the updated parameter.

        Raises:
            ValueError: In a batch with one adapter per sample: the samples share one call of the module.
            RuntimeError: If the parameter is offloaded: its module fetches it too late to be updated.
        """
        self.refuse_mixed_batch("with target_parameters")
        branches = self._branches()
        if not branches:
            return self.base_layer(*args, **kwargs)
        weight = self.add_updates(branches)
        if not self._lists:
            return call_with(self.base_layer, self._path, weight, args, kwargs)
        with _replaced(self._lists, self.get_base_layer(), self.base_weight.stored, weight):
            return call_with(self.base_layer, self._path, weight, args, kwargs)

    @property
    def _path(self) -> str:
        """Name of the parameter in `base_layer`, which may be another wrapper."""
        depth, module = 0, self.base_layer
        while isinstance(module, SubspaceLayer):
            depth, module = depth + 1, module.base_layer
        return "base_layer." * depth + self.parameter_name

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return self.base_weight.stored.device, self.base_weight.stored.dtype

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Take this wrapper, those inside it and those of layers inside the module off."""
        layer: Any = self
        while isinstance(layer, SubspaceLayer):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, SubspaceLayer) and not isinstance(module, BaseTunerLayer):
                    if merge:
                        child.merge(safe_merge=safe_merge, adapter_names=adapter_names)
                    setattr(module, name, child.get_base_layer())
        return layer

    def extra_repr(self) -> str:
        """Name the parameter: wrappers of one module differ by it."""
        return f"parameter_name={self.parameter_name!r}"


@contextmanager
def _replaced(names: list[str], module: nn.Module, parameter: Tensor, weight: Tensor) -> Iterator[None]:
    """Put a weight in the place of a parameter in lists that a module keeps."""
    lists = [getattr(module, name) for name in names]
    places = [(entries, i) for entries in lists for i, entry in enumerate(entries) if entry is parameter]
    for entries, i in places:
        entries[i] = weight
    try:
        yield
    finally:
        for entries, i in places:
            entries[i] = parameter

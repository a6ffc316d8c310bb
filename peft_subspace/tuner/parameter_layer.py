"""Adapters on a parameter that is no layer's weight, such as the stacked weights of fused experts.

PEFT finds such parameters by `target_parameters` and has the module that owns one wrapped; if several are in
one module, each wrapper wraps the one before. The module's forward is its own: it is called with `W + ΔW` in
the place of the parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from peft_subspace.layers.base import updated_weight
from peft_subspace.tuner.layer import SubspaceLayer


class ParameterLayer(SubspaceLayer):
    """A module with adapters on one of its parameters, the `target`'s."""

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """Call the module with the updated parameter.

        Raises:
            ValueError: If `adapter_names` are given: the samples share one call of the module.
            RuntimeError: If the parameter is offloaded: its module fetches it too late to be updated.
        """
        if adapter_names is not None and not self.disable_adapters:
            raise ValueError(
                f"adapter_names cannot be used with target_parameters: {self.parameter_name!r} is one weight "
                "for all samples of a batch; run the samples of each adapter by themselves"
            )
        branches = self._branches()
        if not branches:
            return self.base_layer(*args, **kwargs)
        weight = updated_weight(self.base_weight.stored, self.kind, branches)
        return functional_call(self.base_layer, {self._path: weight}, args, kwargs)

    @property
    def _path(self) -> str:
        """Name of the parameter in `base_layer`, which may be another wrapper."""
        depth, module = 0, self.base_layer
        while hasattr(module, "base_layer"):
            depth, module = depth + 1, module.base_layer
        return "base_layer." * depth + self.parameter_name

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return self.base_weight.stored.device, self.base_weight.stored.dtype

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Take this wrapper and those inside it off the module."""
        layer: Any = self
        while isinstance(layer, SubspaceLayer):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer

    def extra_repr(self) -> str:
        """Name the parameter: wrappers of one module differ by it."""
        return f"parameter_name={self.parameter_name!r}"

"""LoRA-SB: a small trained matrix between frozen bases taken from the first gradients."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from peft_subspace.core.layer import SubspaceLayer
from peft_subspace.core.model import SubspaceModel
from peft_subspace.core.registry import register

from .config import LoRASBConfig
from .delta import LoRASBDelta


class LoRASBLayer(SubspaceLayer):
    """Layer with LoRA-SB adapters."""

    prefix = "lorasb_"
    delta_cls = LoRASBDelta


class LoRASBLinear(LoRASBLayer):
    """Linear layer with LoRA-SB adapters."""


class LoRASBModel(SubspaceModel):
    """Model with LoRA-SB adapters."""

    prefix = "lorasb_"
    tuner_layer_cls = LoRASBLayer
    linear_layer_cls = LoRASBLinear

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Before the first training step, say so if the bases still come from the base weight."""
        training = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if training and not getattr(self, "_start_checked", False):
            self._start_checked = True
            self._warn_of_default_start()
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def _warn_of_default_start(self) -> None:
        layers = [layer for layer in self.modules() if isinstance(layer, LoRASBLayer)]
        for name in self.active_adapters:
            deltas = [layer.deltas[name] for layer in layers if name in layer.deltas]
            started = any(delta.initialized for delta in deltas)
            if deltas and not started and self.peft_config[name].init_weights is True:
                warnings.warn(
                    f"adapter {name!r} trains in bases taken from the base weight, because no gradient "
                    "initialisation has run; call peft_subspace.initialize_from_gradient before training, "
                    "add peft_subspace.GradientInitCallback to the Trainer, or choose this start with "
                    'init_weights="svd"',
                    stacklevel=2,
                )


register("LORASB", LoRASBConfig, LoRASBModel)

__all__ = ["LoRASBConfig", "LoRASBDelta", "LoRASBLayer", "LoRASBModel"]

"""LoRA-SB: a small trained matrix between frozen bases taken from the first gradients."""

from __future__ import annotations

import warnings
from itertools import islice
from typing import Any

from torch import Tensor, nn

from peft_subspace.tuner.layer import SubspaceLayer, adapted_layers
from peft_subspace.tuner.model import SubspaceModel
from peft_subspace.tuner.registry import register

from .config import LoRASBConfig
from .delta import LoRASBDelta


class LoRASBLayer(SubspaceLayer):
    """Layer with LoRA-SB adapters.

    Attributes:
        unstarted: Adapters for which this layer, the first that has them, looks out for training without a
            gradient initialisation.
    """

    prefix = "lorasb_"
    delta_cls = LoRASBDelta

    def __init__(self, base_layer: nn.Module, **backend_kwargs: Any) -> None:
        super().__init__(base_layer, **backend_kwargs)
        self.unstarted: set[str] = set()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer and add the active adapters."""
        if self.unstarted and self.takes_training_step:
            self._warn_of_default_start()
        return super().forward(x, *args, **kwargs)

    def _warn_of_default_start(self) -> None:
        for name in self.unstarted & set(self.active_adapters):
            self.unstarted.remove(name)
            if name in self.deltas and not self.deltas[name].initialized:
                warnings.warn(
                    f"adapter {name!r} trains in bases taken from the base weight, because no gradient "
                    "initialisation has run; call peft_subspace.initialize_from_gradient before training, "
                    "add peft_subspace.GradientInitCallback to the Trainer, or choose this start with "
                    'init_weights="svd"',
                    stacklevel=3,
                )


class LoRASBLinear(LoRASBLayer):
    """Linear layer with LoRA-SB adapters."""


class LoRASBModel(SubspaceModel):
    """Model with LoRA-SB adapters."""

    prefix = "lorasb_"
    tuner_layer_cls = LoRASBLayer
    linear_layer_cls = LoRASBLinear

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, and have a layer look out for training without a gradient initialisation."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if self.peft_config[adapter_name].init_weights is True:
            layers = adapted_layers(model, adapter_name, LoRASBLayer).values()
            for layer in islice(layers, 1):
                layer.unstarted.add(adapter_name)


register("LORASB", LoRASBConfig, LoRASBModel)

__all__ = ["LoRASBConfig", "LoRASBDelta", "LoRASBLayer", "LoRASBModel"]

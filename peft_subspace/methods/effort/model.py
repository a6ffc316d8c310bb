"""Layers and model of Effort."""

from __future__ import annotations

import warnings
from itertools import islice
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peft_subspace.methods.effort.delta import EffortDelta
from peft_subspace.training.penalties import add_to_loss
from peft_subspace.tuner.layer import SubspaceLayer, adapted_layers
from peft_subspace.tuner.model import SubspaceModel


class EffortLayer(SubspaceLayer):
    """Layer with Effort adapters."""

    prefix = "effort_"
    delta_cls = EffortDelta

    def __init__(self, base_layer: nn.Module, **backend_kwargs: Any) -> None:
        super().__init__(base_layer, **backend_kwargs)
        self.watched: dict[str, int] = {}

    def watch(self, adapter_name: str) -> None:
        """Warn once if the adapter trains and its regularisers do not."""
        self.watched[adapter_name] = -1

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer and add the active adapters."""
        if self.watched and self.takes_training_step:
            self._check_watched()
        return super().forward(x, *args, **kwargs)

    def _check_watched(self) -> None:
        for name in [name for name in self.watched if name in self.active_adapters]:
            delta = self.deltas[name]
            version = delta.U_change._version
            if self.watched[name] < 0:
                self.watched[name] = version
            if self.watched[name] == version:
                continue
            del self.watched[name]
            if delta.penalized_at is None:
                warnings.warn(
                    f"adapter {name!r} has taken a step without its orthogonality_weight and energy_weight: "
                    "the loss that the model returns, if it does, was not used for it; add "
                    "peft_subspace.RegularizationCallback() to the Trainer, or "
                    "peft_subspace.regularization_loss(model) to the loss",
                    stacklevel=3,
                )


class EffortLinear(EffortLayer):
    """Linear layer with Effort adapters."""


class EffortModel(SubspaceModel):
    """Model with Effort adapters, whose regularisers are added to the loss that the model returns."""

    prefix = "effort_"
    tuner_layer_cls = EffortLayer
    linear_layer_cls = EffortLinear

    _regularizing: RemovableHandle | None = None

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; if it is regularised, let the model add that to its loss, and a layer watch it."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if self.peft_config[adapter_name].regularized:
            layers = adapted_layers(model, adapter_name, EffortLayer).values()
            for layer in islice(layers, 1):
                layer.watch(adapter_name)
            if add_to_loss not in model._forward_hooks.values():
                self._regularizing = model.register_forward_hook(add_to_loss, with_kwargs=True)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        if self._regularizing is not None:
            self._regularizing.remove()
        return super()._unload_and_optionally_merge(*args, **kwargs)

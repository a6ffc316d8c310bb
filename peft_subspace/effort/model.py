"""Layers and model of Effort, and how its regularisers reach the loss that a model returns."""

from __future__ import annotations

import warnings
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_subspace.core.layer import SubspaceLayer
from peft_subspace.core.model import SubspaceModel

from .delta import EffortDelta
from .regularization import regularization_loss, regularized_layers, share_of_step


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
        if self.watched and self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
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
            if delta.penalized_at < 0:
                warnings.warn(
                    f"adapter {name!r} has taken a step without its orthogonality_weight and energy_weight: "
                    "the loss of the model was not used, or the adapter was added without a PeftModel; add "
                    "peft_subspace.RegularizationCallback() to the Trainer, or "
                    "peft_subspace.regularization_loss(model) to the loss",
                    stacklevel=3,
                )


class EffortLinear(EffortLayer):
    """Linear layer with Effort adapters."""


class EffortModel(SubspaceModel):
    """Model with Effort adapters; in training it adds their regularisers to the loss that it returns."""

    prefix = "effort_"
    tuner_layer_cls = EffortLayer
    linear_layer_cls = EffortLinear

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, and let one of its layers watch that its regularisers are used."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if self.peft_config[adapter_name].regularized:
            layers = (m for m in model.modules() if isinstance(m, EffortLayer) and adapter_name in m.deltas)
            next(layers).watch(adapter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; in training, add the regularisers to a `loss` among its outputs.

        With `num_items_in_batch`, by which the loss is one part of a step's, so is their weight.
        """
        outputs = super().forward(*args, **kwargs)
        if not (self.training and torch.is_grad_enabled() and isinstance(outputs, MutableMapping)):
            return outputs
        if isinstance(outputs.get("loss"), Tensor) and regularized_layers(self.model):
            penalty = regularization_loss(self.model) * share_of_step(self.model, kwargs)
            loss = outputs["loss"]
            outputs["loss"] = loss + penalty.to(loss.device, loss.dtype)
        return outputs

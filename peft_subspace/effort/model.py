"""Layers and model of Effort."""

from __future__ import annotations

from peft_subspace.core.layer import SubspaceLayer
from peft_subspace.core.model import SubspaceModel

from .delta import EffortDelta


class EffortLayer(SubspaceLayer):
    """Layer with Effort adapters."""

    prefix = "effort_"
    delta_cls = EffortDelta


class EffortLinear(EffortLayer):
    """Linear layer with Effort adapters."""


class EffortModel(SubspaceModel):
    """Model with Effort adapters."""

    prefix = "effort_"
    tuner_layer_cls = EffortLayer
    linear_layer_cls = EffortLinear

"""Effort: the smallest singular triples of a weight train, all larger ones stay."""

from peft_subspace.core.registry import register

from .config import EffortConfig
from .delta import EffortDelta
from .model import EffortLayer, EffortModel
from .regularization import RegularizationCallback, regularization_loss

register("EFFORT", EffortConfig, EffortModel)

__all__ = [
    "EffortConfig",
    "EffortDelta",
    "EffortLayer",
    "EffortModel",
    "RegularizationCallback",
    "regularization_loss",
]

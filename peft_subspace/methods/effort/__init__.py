"""Effort: the smallest singular triples of a weight train, all larger ones stay."""

from peft_subspace.tuner.registry import register

from .config import EffortConfig
from .delta import EffortDelta
from .model import EffortLayer, EffortModel

register("EFFORT", EffortConfig, EffortModel)

__all__ = ["EffortConfig", "EffortDelta", "EffortLayer", "EffortModel"]

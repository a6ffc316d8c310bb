"""Effort: the smallest singular triples of a weight train, all larger ones stay."""

from peft_subspace.tuner.model import SubspaceModel

from .config import EffortConfig
from .delta import EffortDelta


class EffortModel(SubspaceModel, config=EffortConfig, update=EffortDelta):
    """Model with Effort adapters, whose regularizers are added to the loss that the model returns."""


__all__ = ["EffortConfig", "EffortDelta", "EffortModel"]

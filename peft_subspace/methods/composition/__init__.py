"""Learned merges: coefficients that train before the frozen updates of other adapters."""

from peft_subspace.tuner.model import SubspaceModel

from .config import CompositionConfig
from .delta import CompositionDelta


class CompositionModel(SubspaceModel, config=CompositionConfig, update=CompositionDelta):
    """Model with compositions of other adapters."""


__all__ = ["CompositionConfig", "CompositionDelta", "CompositionModel"]

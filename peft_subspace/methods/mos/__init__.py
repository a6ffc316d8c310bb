"""MoS: low-rank matrices assembled from shards of pools that modules share."""

from peft_subspace.tuner.model import SubspaceModel

from .config import MoSConfig
from .delta import MoSDelta


class MoSModel(SubspaceModel, config=MoSConfig, update=MoSDelta):
    """Model with MoS adapters."""


__all__ = ["MoSConfig", "MoSDelta", "MoSModel"]

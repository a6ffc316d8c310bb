"""MoS: low-rank updates assembled from shards of pools that modules share."""

from peft_subspace.tuner.registry import register

from .config import MoSConfig
from .delta import MoSDelta
from .model import MoSLayer, MoSModel

register("MOSHARDS", MoSConfig, MoSModel)

__all__ = ["MoSConfig", "MoSDelta", "MoSLayer", "MoSModel"]

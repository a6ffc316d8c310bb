"""Names for authors of methods: what a method derives from, and the function that registers it."""

from .core.delta import Delta
from .core.shapes import WeightShape
from .tuner.config import ScaledConfig, SubspaceConfig
from .tuner.layer import SubspaceLayer
from .tuner.model import SubspaceModel
from .tuner.registry import register

__all__ = [
    "Delta",
    "ScaledConfig",
    "SubspaceConfig",
    "SubspaceLayer",
    "SubspaceModel",
    "WeightShape",
    "register",
]

"""Names for authors of methods: what a method derives from."""

from .core.delta import Delta, Update
from .core.shapes import ModuleSpec, WeightShape
from .tuner.branch_config import DropoutConfig, ScaledConfig
from .tuner.config import SubspaceConfig
from .tuner.layer import SubspaceLayer
from .tuner.model import SubspaceModel

__all__ = [
    "Delta",
    "DropoutConfig",
    "ModuleSpec",
    "ScaledConfig",
    "SubspaceConfig",
    "SubspaceLayer",
    "SubspaceModel",
    "Update",
    "WeightShape",
]

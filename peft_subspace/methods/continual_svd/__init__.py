"""Continual SVD: task after task, outside the directions in which the model already knows something."""

from peft_subspace.tuner.registry import register

from .config import ContinualSVDConfig
from .delta import ContinualSVDDelta
from .model import ContinualSVDLayer, ContinualSVDModel

register("CONTINUALSVD", ContinualSVDConfig, ContinualSVDModel)

__all__ = ["ContinualSVDConfig", "ContinualSVDDelta", "ContinualSVDLayer", "ContinualSVDModel"]

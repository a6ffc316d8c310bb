"""Continual SVD: task after task, outside the directions in which the model already knows something."""

from .config import ContinualSVDConfig
from .delta import ContinualSVDDelta
from .model import ContinualSVDModel

__all__ = ["ContinualSVDConfig", "ContinualSVDDelta", "ContinualSVDModel"]

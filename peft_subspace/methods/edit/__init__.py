"""Frozen updates that hold edits of weights; `peft_subspace.edits` makes them."""

from peft_subspace.tuner.model import SubspaceModel

from .config import EditConfig
from .delta import EditDelta


class EditModel(SubspaceModel, config=EditConfig, update=EditDelta):
    """Model with edits."""


__all__ = ["EditConfig", "EditDelta", "EditModel"]

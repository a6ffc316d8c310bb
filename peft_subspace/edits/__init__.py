"""Edits of weights as adapters: each can be switched off, scaled, stacked, merged and shared."""

from peft_subspace.methods.edit import EditConfig, EditDelta, EditModel

from .contrast import prune_by_contrast
from .curvature import edit_by_curvature, sampled_loss
from .facts import Fact, insert_facts

__all__ = [
    "EditConfig",
    "EditDelta",
    "EditModel",
    "Fact",
    "edit_by_curvature",
    "insert_facts",
    "prune_by_contrast",
    "sampled_loss",
]

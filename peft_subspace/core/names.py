"""Names of tensors and modules: in a base model, in a wrapped one, in a file."""

from __future__ import annotations

IN_BASE = "base_model.model."
"""Start of the names of the base model's parts in a wrapped model, and of all keys in files."""


def in_base(name: str) -> str:
    """Name in the base model of a module or tensor of a wrapped one."""
    return name.removeprefix(IN_BASE)

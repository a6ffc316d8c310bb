"""Names of modules: in the base model, and as they begin in a model wrapped by PEFT and in its files."""

from __future__ import annotations

BASE = "base_model.model."
"""Path from a `PeftModel` to the base model, with which every key of an adapter's file begins."""


def in_base(name: str) -> str:
    """Name of a module or tensor in the base model, given its name in the wrapped or in the base model."""
    return name.removeprefix(BASE)


def saved_key(name: str) -> str:
    """Key in an adapter's file, and name in the wrapped model, of what has this name in the base model."""
    return f"{BASE}{name}"

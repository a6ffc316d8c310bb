"""Adapters that follow each other, as those of tasks do: which of them work together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HISTORIES = ("merge", "stack")
"""How an adapter may be kept for the next one: in the base weights, or as it is, below it."""


def with_history(configs: Mapping[str, Any], name: str) -> list[str]:
    """An adapter, last, and those that it works with: adapters below it, and, if it is merged, the newest.

    Args:
        configs: Configurations of the adapters that a model has, by name.
        name: One of them.
    """
    followers = [other for other, config in configs.items() if config.earlier.get(name) == "merge"]
    if followers:
        return [*(other for other in with_history(configs, followers[-1]) if other != name), name]
    return [*(other for other in configs[name].lower_adapters if other in configs), name]

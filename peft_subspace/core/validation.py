"""Checks of single values, all in one style: the field, its value, the rule and the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

_LARGEST = 2.0**127  # fp32 holds it


def check_flag(name: str, value: Any) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise invalid(name, value, "must be True or False", TypeError)


def invalid(name: str, value: Any, rule: str, error: type[Exception] = ValueError) -> Exception:
    """Return the error for a field: its name, its value, the rule it breaks and what to do instead."""
    shown = repr(value)
    return error(f"{name}={shown if len(shown) < 200 else f'{shown[:200]}…'} {rule}")


def check_count(name: str, value: Any, *, minimum: int = 1, maximum: int = 2**31 - 1) -> None:
    """Raise unless `value` is a whole number from `minimum` to `maximum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise invalid(name, value, f"must be a whole number, such as {name}={max(minimum, 8)}", TypeError)
    if value < minimum:
        raise invalid(name, value, f"must be at least {minimum}; try {name}={max(minimum, 8)}")
    if value > maximum:
        raise ValueError(f"{name} must be at most {maximum}; try {name}={max(minimum, 8)}")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise unless `value` is one of `choices`."""
    known = tuple(choices)  # in which, unlike in a set or dict, anything may be looked for
    if value not in known:
        raise invalid(name, value, f"must be one of {known}")


def check_counts(name: str, value: Any) -> None:
    """Raise unless `value` is a positive whole number, or a list of some."""
    for entry in value if isinstance(value, list | tuple) else [value]:
        check_count(name, entry)


def check_number(name: str, value: Any, *, minimum: float = -math.inf, maximum: float = math.inf) -> None:
    """Raise unless `value` is a finite number with `minimum <= value < maximum`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise invalid(name, value, f"must be a number, such as {name}={max(minimum, 0.0):g}", TypeError)
    if not (abs(value) <= _LARGEST and minimum <= value < maximum):
        raise invalid(name, value, f"must be finite, at least {minimum:g} and below {maximum:g}")


def check_share(name: str, value: Any) -> None:
    """Raise unless `value` is a part of a whole, `0 < value <= 1`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise invalid(name, value, f"must be a number, such as {name}=0.95", TypeError)
    if not 0 < value <= 1:
        raise invalid(name, value, "must be above 0 and at most 1")

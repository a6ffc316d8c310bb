"""Module names and regular expressions in a config: what fits, and what is refused."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib import import_module
from typing import Any

MOST_ENTRIES = 100_000
"""Entries that a list or mapping of names may have."""


_MOST_WAYS = 10**8


_NAME_LENGTH = 64


_MOST_CHARACTERS = 10_000


_parser: Any = import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")


def look_up(patterns: Mapping[str, Any], module_name: str, default: Any) -> Any:
    """Value of the first pattern, a name's end or a regular expression, that fits a module."""
    return next((value for key, value in patterns.items() if _fitting(key).match(module_name)), default)


def is_named(patterns: Mapping[str, Any], module_name: str) -> bool:
    """Whether the pattern that counts for a module is its name, or the end of it, and no expression."""
    key = next((key for key in patterns if _fitting(key).match(module_name)), None)
    return key is not None and f".{module_name}".endswith(f".{key}")


def patterns_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Patterns by which `look_up` finds the value of each module by its full name.

    A pattern fits the end of a name, and the first one counts: longest names first.
    """
    return {re.escape(name): values[name] for name in sorted(values, key=len, reverse=True)}


@lru_cache(maxsize=MOST_ENTRIES)
def _fitting(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def check_patterns(name: str, patterns: Iterable[str], *, embedded: bool = True) -> None:
    """Raise unless all are regular expressions, and the time to match them with module names is bounded.

    Python's matcher tries the ways in which a text can be dealt out to the repetitions and alternatives of a
    pattern, one after the other. There are 10¹⁹ of them for `(a+)+b` and a name of 64 letters; a config from
    a stranger could so stop a program for good.

    Args:
        name: Field of the config.
        patterns: Its patterns.
        embedded: Whether they are put inside another pattern, where they cannot set flags.

    Raises:
        ValueError: Naming the field and the pattern.
    """
    ways = 0
    for pattern in patterns:
        try:
            if len(pattern) > _MOST_CHARACTERS:
                raise OverflowError(f"it has {len(pattern)} characters")
            re.compile(f"({pattern})" if embedded else pattern)
            ways += _ways(_parser.parse(pattern))
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{name}={pattern[:80]!r} is no regular expression that can be used ({error}); correct it"
            ) from error
        if ways > _MOST_WAYS:
            raise ValueError(
                f"{name}={pattern[:80]!r} could take very long to match: it can fit a name in more than "
                f"{_MOST_WAYS:.0e} ways; avoid repetitions within repetitions, such as (a+)+, and more than "
                "four of them in a row, or list the names"
            )


def _ways(parsed: Any) -> int:
    """Upper bound, up to `_MOST_WAYS`, on the ways in which the matcher can go through a pattern."""
    total = 1
    for operation, argument in parsed:
        kind = str(operation)
        if kind.endswith("REPEAT"):
            low, high, body = argument
            high = min(int(high), max(int(low), _NAME_LENGTH))
            total *= (high - low + 1) * _ways(body) ** min(high, _NAME_LENGTH)
        elif kind == "BRANCH":
            total *= sum(_ways(body) for body in argument[1])
        elif kind == "GROUPREF_EXISTS":
            total *= sum(_ways(body) for body in argument[1:] if body)
        elif kind in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
            total *= _ways(argument[-1])
        elif kind == "ATOMIC_GROUP":
            total *= _ways(argument)
        total = min(total, _MOST_WAYS + 1)
    return total

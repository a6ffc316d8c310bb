"""Tables of cases that one test goes through, where a test for each would only repeat its preparation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest


def failing(rows: Iterable[Any] | Mapping[str, Any], check: Callable[..., Any]) -> dict[str, str]:
    """Rows for which `check(*row)` fails, with what it says; the others do not hide them.

    Rows of a mapping are named by its keys, and others by themselves.
    """
    named = rows if isinstance(rows, Mapping) else {f"{row}": row for row in rows}
    assert named
    said = {name: _failure(check, row if isinstance(row, tuple) else (row,)) for name, row in named.items()}
    return {name: failure for name, failure in said.items() if failure}


def _failure(check: Callable[..., Any], row: tuple) -> str:
    try:
        check(*row)
    except (Exception, pytest.fail.Exception) as error:
        return f"{type(error).__name__}: {error}"
    return ""

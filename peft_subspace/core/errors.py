"""Where an error happened: the name of a module before its message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def error_context(name: str) -> Iterator[None]:
    """Put a name before the message of an error that is raised inside."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error

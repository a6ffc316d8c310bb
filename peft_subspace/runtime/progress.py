"""Progress bars that appear only where a step takes long."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from tqdm.auto import tqdm

from peft_subspace.runtime import distributed as processes

T = TypeVar("T")

DELAY = 2.0
"""Seconds after which a step shows its progress."""

_counting: ContextVar[Any] = ContextVar("counting", default=None)


def bar(total: int, description: str, *, hidden: bool = False) -> Any:
    """Bar of `total` steps, which the first process shows if they take more than two seconds."""
    hidden = hidden or total < 2 or processes.rank() != 0
    return tqdm(total=total, desc=description, delay=DELAY, disable=hidden)


def progress(items: Iterable[T], total: int, description: str, *, hidden: bool = False) -> Iterator[T]:
    """Iterate over the items and show a `bar`."""
    with bar(total, description, hidden=hidden) as shown:
        for item in items:
            yield item
            shown.update()


@contextmanager
def counting(total: int, description: str, *, hidden: bool = False) -> Iterator[None]:
    """Context manager that shows a `bar` for a loop of another library, whose steps call `count_step`."""
    with bar(total, description, hidden=hidden) as shown:
        token = _counting.set(shown)
        try:
            yield
        finally:
            _counting.reset(token)


def count_step() -> None:
    """Count one step of the loop that runs inside `counting`, if there is one."""
    shown = _counting.get()
    if shown is not None:
        shown.update()

"""Atomic replacement of files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Context manager that yields a temporary path to write to, and at the end moves that file to `path`.

    The temporary file has the name of `path` and lies in a folder of its own beside it. If the block raises
    or is interrupted, `path` stays as it was. Several processes may write the same file at once; the last one
    wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", suffix=".part", dir=path.parent) as folder:
        partial = Path(folder) / path.name
        yield partial
        partial.replace(path)

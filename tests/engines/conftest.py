"""Real engines, each in an environment of its own, by `make engine-NAME`; skipped without their packages."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.engine)
            _skip_without_package(item)


def _skip_without_package(item: pytest.Item) -> None:
    engine = item.path.stem.removeprefix("test_")
    package = getattr(item.module, "PACKAGE", engine)
    if find_spec(package) is None:
        target = f"make engine-{engine.replace('_', '-')}"
        item.add_marker(pytest.mark.skip(reason=f"{package} is not installed; run `{target}`"))

"""Settings of the test run, and the parametrization that all contract tests share."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import hypothesis
import pytest
import torch

from layers import CASES, SETTINGS, LayerCase
from methods import METHODS, Method

pytest_plugins = ["feature_report"]

torch.set_num_threads(1)

ARGUMENTS = {"method": METHODS, "case": CASES, "setting": SETTINGS}

for name, examples in {"some": 30, "many": 300}.items():
    hypothesis.settings.register_profile(
        name, max_examples=examples, derandomize=True, database=None, deadline=None
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-layers",
        nargs="?",
        const="all",
        choices=["all", "rest"],
        help="run every test with all methods, layers and settings, or only what runs by no other call",
    )


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("many" if config.getoption("--all-layers") else "some")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test for each method, layer and setting that it names among its arguments.

    The marks `where` and `typical` leave some out; what the test says with `parametrize` is its own.
    """
    own = {name for mark in metafunc.definition.iter_markers("parametrize") for name in _names(mark.args[0])}
    names = [name for name in ARGUMENTS if name in metafunc.fixturenames and name not in own]
    if not names:
        return
    qualities = [item for mark in metafunc.definition.iter_markers("where") for item in mark.kwargs.items()]
    mark = (
        None
        if metafunc.config.getoption("--all-layers")
        else metafunc.definition.get_closest_marker("typical")
    )
    rows = []
    for values in product(*(ARGUMENTS[name] for name in names)):
        row = dict(zip(names, values, strict=True))
        if (
            _is_possible(**row)
            and all(getattr(row[name], quality) for name, quality in qualities)
            and (mark is None or _is_typical(*mark.args, **row))
        ):
            rows.append(pytest.param(*values, id="-".join(map(str, values))))
    metafunc.parametrize(names, rows)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without `--all-layers`, leave out what need not run each time."""
    wanted = config.getoption("--all-layers")
    if wanted == "all":
        return
    typical = set(_typical(items))
    if wanted == "rest":
        kept = [item for item in items if item not in typical or item.get_closest_marker("generated")]
    else:
        kept = [item for item in items if item in typical]
    config.hook.pytest_deselected(items=list(set(items).difference(kept)))
    items[:] = kept


def _typical(items: Sequence[pytest.Item]) -> Iterator[pytest.Item]:
    """What runs each time: methods take turns where a test has enough other arguments for each to have one.

    Typical methods, and all methods on typical layers, run with every argument, each of the others with the
    arguments whose turn it is.
    """
    tests: dict[Any, dict[str, list[pytest.Item]]] = {}
    for item in items:
        mark, method = item.get_closest_marker("typical"), _argument(item, "method")
        asked = {name: _argument(item, name) for name in ("method", "case", "setting")}
        if mark and not _is_typical(*mark.args, **asked):
            continue
        if isinstance(method, Method):
            rest = item.callspec.id.replace(str(method), "", 1)
            tests.setdefault((item.path, item.originalname), {}).setdefault(rest, []).append(item)
        else:
            yield item
    for rows in tests.values():
        in_turn = [row for row in rows.values() if not _is_typical_layer(row[0])]
        yield from (item for row in rows.values() if _is_typical_layer(row[0]) for item in row)
        for turn, row in enumerate(in_turn):
            others = [item for item in row if not _argument(item, "method").is_typical]
            if others and len(in_turn) >= len(others):
                others.pop(turn % len(others))  # whose turn it is
                yield from (item for item in row if item not in others)
            else:
                yield from row


def _is_typical_layer(item: pytest.Item) -> bool:
    case, setting = _argument(item, "case"), _argument(item, "setting")
    return isinstance(case, LayerCase) and case.is_typical and setting in (None, SETTINGS[0])


def _argument(item: pytest.Item, name: str) -> Any:
    return item.callspec.params.get(name) if hasattr(item, "callspec") else None


def _names(argument: str | Sequence[str]) -> list[str]:
    return [name.strip() for name in argument.split(",")] if isinstance(argument, str) else list(argument)


def _is_possible(method=None, setting=None, **_) -> bool:
    """Whether the setting differs from the others."""
    return not (method and setting and method.stays_fp32 and setting.needs_cast)


def _is_typical(what, method=None, case=None, setting=None, **_) -> bool:
    if what == "methods":
        return method is None or method.is_typical
    if what == "layers":
        return all(value is None or value.is_typical for value in (case, setting))
    return setting == SETTINGS[0] or (case.is_typical and setting.is_typical)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)

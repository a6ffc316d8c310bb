"""Settings of the test run, and the parametrization that all contract tests share."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

from collections.abc import Sequence
from itertools import product

import hypothesis
import pytest
import torch

from layers import CASES, SETTINGS
from methods import METHODS

pytest_plugins = ["feature_report"]

torch.set_num_threads(1)

ARGUMENTS = {"method": METHODS, "case": CASES, "setting": SETTINGS}

for name, examples in {"some": 30, "many": 300}.items():
    hypothesis.settings.register_profile(
        name, max_examples=examples, derandomize=True, database=None, deadline=None
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-layers", action="store_true", help="run typical tests, too, on all layers and settings"
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
    typical = metafunc.definition.get_closest_marker("typical")
    if metafunc.config.getoption("--all-layers"):
        typical = None
    rows = []
    for values in product(*(ARGUMENTS[name] for name in names)):
        row = dict(zip(names, values, strict=True))
        if (
            _is_possible(**row)
            and all(getattr(row[name], quality) for name, quality in qualities)
            and (typical is None or _is_typical(*typical.args, **row))
        ):
            rows.append(pytest.param(*values, id="-".join(map(str, values))))
    metafunc.parametrize(names, rows)


def _names(argument: str | Sequence[str]) -> list[str]:
    return [name.strip() for name in argument.split(",")] if isinstance(argument, str) else list(argument)


def _is_possible(method=None, case=None, setting=None) -> bool:
    """Whether the method takes such layers, and the setting differs from the others."""
    if method and case and case.kind not in method.kinds:
        return False
    return not (method and setting and method.stays_fp32 and setting.needs_cast)


def _is_typical(what, method=None, case=None, setting=None) -> bool:
    if what == "layers":
        return all(value is None or value.is_typical for value in (case, setting))
    if what == "layers or methods":  # every route on every kind of layer, but not by every method
        return case.is_typical or method.is_typical
    return setting == SETTINGS[0] or (case.is_typical and setting.is_typical)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)

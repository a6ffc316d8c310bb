"""Settings of the test run, and the parametrisation that all contract tests share."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch
from layers import CASES, SETTINGS
from methods import METHODS

pytest_plugins = ["feature_report"]

torch.set_num_threads(1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test for each method, layer and setting that it names among its arguments.

    `case` is every layer, `lora_case` every layer whose update has the form of a LoRA.
    """
    names = metafunc.fixturenames
    cases = next((name for name in ("case", "lora_case") if name in names), None)
    if "method" in names and cases:
        pairs = [
            pytest.param(method, case, id=f"{method}-{case}")
            for method in METHODS
            for case in CASES
            if case.kind in method.kinds and (cases == "case" or case.has_lora_form)
        ]
        metafunc.parametrize(("method", cases), pairs)
    elif "method" in names:
        metafunc.parametrize("method", METHODS, ids=str)
    if "setting" in names:
        metafunc.parametrize("setting", SETTINGS, ids=str)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)

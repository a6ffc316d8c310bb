"""Adapters damaged at random: refused with a clear error or loaded, and never anything else."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzzing import Adapter, attempt, configs, files, sound

pytestmark = [pytest.mark.feature("adapters from strangers"), pytest.mark.timeout(600)]

OPTIONS = {
    "deadline": 10_000,
    "database": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


def fuzz(strategy: st.SearchStrategy[Adapter], examples: int) -> None:
    @settings(max_examples=examples, **OPTIONS)
    @given(strategy)
    def run(adapter):
        attempt(adapter)

    run()


def test_sound_adapter_is_loaded(method):
    assert attempt(sound(method))


def test_configs(method):
    fuzz(configs(method), 40)


def test_files(method):
    fuzz(files(method), 40)


@pytest.mark.slow
def test_more_configs(method):
    fuzz(configs(method), 200)


@pytest.mark.slow
def test_more_files(method):
    fuzz(files(method), 200)

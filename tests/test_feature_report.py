"""The table of features says what the tests found, whichever part of them has run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.slow  # each run of pytest takes seconds to begin

TESTS = """
import pytest

pytestmark = pytest.mark.feature("module's row")

def test_of_the_module(method):
    pass

@pytest.mark.feature("good")
def test_good(method):
    pass

@pytest.mark.feature("bad")
@pytest.mark.feature("good")
@pytest.mark.parametrize("case", [1, 2])
def test_bad(method, case, record_property):
    record_property("no", "it records this, but fails")
    assert method == "a" or case == 1

@pytest.mark.feature("mixed")
def test_refuses(method, record_property):
    if method == "b":
        record_property("no", "rule")
    elif method == "c":
        record_property("not run", "no library")

@pytest.mark.feature("mixed")
def test_works(method):
    pass

@pytest.mark.feature("skipped")
def test_skipped(method):
    if method != "b":
        pytest.skip("no such thing")

@pytest.fixture
def broken(method):
    if method == "a":
        raise OSError

@pytest.mark.feature("broken")
def test_with_broken_setup(broken, method):
    pass

@pytest.mark.feature("without a method")
def test_without_a_method():
    pass

@pytest.mark.parametrize("kind", [pytest.param(1, marks=pytest.mark.feature("one")), 2])
def test_of_kinds(method, kind):
    pass
"""
CONFTEST = f"""
import sys

sys.path.insert(0, {str(Path(__file__).parent)!r})
pytest_plugins = ["feature_report"]

def pytest_generate_tests(metafunc):
    if "method" in metafunc.fixturenames:
        metafunc.parametrize("method", ["a", "b", "c"])
"""


@pytest.fixture
def run(pytester):
    """Runs pytest on a folder of tests, and returns the table that it writes."""
    pytester.makeini("[pytest]\nmarkers = feature(name): row")
    pytester.makeconftest(CONFTEST)

    def run(*arguments, tests=TESTS):
        path = pytester.makepyfile(test_sample=tests)
        pytester.runpytest_inprocess("-q", "--features", "out/table.json", *arguments)
        return json.loads((path.parent / "out" / "table.json").read_text())

    return run


def entries(table):
    return {row: {m: e["entry"] for m, e in methods.items()} for row, methods in table.items()}


EXPECTED = {
    "module's row": {"a": "yes", "b": "yes", "c": "yes"},
    "good": {"a": "no", "b": "failed", "c": "failed"},
    "bad": {"a": "no", "b": "failed", "c": "failed"},
    "mixed": {"a": "yes", "b": "no", "c": "not run"},
    "skipped": {"b": "yes"},
    "broken": {"a": "failed", "b": "yes", "c": "yes"},
    "one": {"a": "yes", "b": "yes", "c": "yes"},
}


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["one-process", "xdist"])
def test_table_holds_what_the_tests_found_in_order(run, workers):
    table = run(*workers)
    assert entries(table) == EXPECTED
    assert [*table] == [*EXPECTED]
    assert table["mixed"]["b"] == {"entry": "no", "reason": "rule"}
    assert table["mixed"]["c"] == {"entry": "not run", "reason": "no library"}
    assert table["bad"]["b"]["reason"] == "test_sample.py::test_bad[b-2]"
    assert table["mixed"]["a"]["reason"] == ""


def test_partial_run_replaces_what_it_found_and_forgets_rows_without_tests(run):
    run()
    table = run("-k", "test_works and not c", tests=TESTS.replace('"one"', '"renamed"'))
    expected = {row: methods for row, methods in EXPECTED.items() if row != "one"}
    expected["mixed"] = {"a": "yes", "b": "yes", "c": "not run"}
    assert entries(table) == expected
    assert [*table] == [*expected]

"""What the tests found of each feature and method, as a file: `pytest --features FILE`.

A test counts that is marked with `@pytest.mark.feature("row")` and has an argument `method`; the mark on a
test itself replaces those of its module. The entry is "yes" if all such tests pass. A test that asserts a
refusal says `record_property("no", reason)`, one that ran a stand-in `record_property("not run", reason)`.

A run of some tests replaces the entries that it has found, and leaves the others in the file, but for rows
that are named in no test any more. Rows stand in the order in which the tests name them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

ENTRIES = ("failed", "no", "not run", "yes")  # the first that any test gives counts


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--features", metavar="FILE", help="write which features the tests found to work")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--features")
    if path and not hasattr(config, "workerinput"):  # the workers of xdist only send reports
        config.pluginmanager.register(FeatureReport(Path(path), config.rootpath))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        method = getattr(item, "callspec", None) and item.callspec.params.get("method")
        if method is not None:
            item.user_properties += [("feature", row) for row in _rows(item)] + [("method", str(method))]


def _rows(item: pytest.Item) -> list[str]:
    own = [mark.args[0] for mark in item.own_markers if mark.name == "feature"]
    return own or [mark.args[0] for mark in item.iter_markers("feature")]


class FeatureReport:
    """Collects the outcomes of a session and adds them to a file at its end."""

    def __init__(self, path: Path, root: Path) -> None:
        self.path, self.root = path, root
        self.found: dict[str, dict[str, dict[str, list[str]]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        for row in dict.fromkeys(value for key, value in report.user_properties if key == "feature"):
            outcomes = self.found.setdefault(row, {}).setdefault(properties["method"], {})
            if report.failed:
                outcomes.setdefault("failed", []).append(report.nodeid)
            elif report.when == "call" and report.passed:
                entry = next((entry for entry in ENTRIES if entry in properties), "yes")
                outcomes.setdefault(entry, []).append(properties.get(entry, ""))

    def pytest_sessionfinish(self) -> None:
        table = json.loads(self.path.read_text()) if self.path.is_file() else {}
        for row, methods in self.found.items():
            entries = {method: _entry(outcomes) for method, outcomes in methods.items() if outcomes}
            table[row] = {**table.get(row, {}), **entries}
        places = _places(self.root, table)
        rows = [row for row in table if table[row] and (row in places or row in self.found)]
        rows.sort(key=lambda row: places.get(row, ("~", 0)))
        table = {row: dict(sorted(table[row].items())) for row in rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")


def _entry(outcomes: dict[str, list[str]]) -> dict[str, str]:
    entry = next(entry for entry in ENTRIES if entry in outcomes)
    reasons = dict.fromkeys(reason for reason in outcomes[entry] if reason)
    return {"entry": entry, "reason": "; ".join(sorted(reasons))}


def _places(root: Path, rows: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Where each row is first named in the tests: the file's name, and the position in it."""
    files = sorted([*root.glob("*.py"), *root.glob("tests/*.py"), *root.glob("tests/engines/*.py")])
    texts = [(file.name, file.read_text()) for file in files]
    places = {}
    for row in rows:
        named = (json.dumps(row, ensure_ascii=False), repr(row))
        found = [(name, text.index(n)) for name, text in texts for n in named if n in text]
        if found:
            places[row] = min(found)
    return places

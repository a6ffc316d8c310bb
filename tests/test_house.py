"""How the package's lines are counted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import house

SOURCE = '''\
"""A docstring of a module,

over several lines.
"""

from __future__ import annotations

import functools
from os.path import (  # a comment inside of an import
    basename,
    dirname,
)

# A comment.
TEXT = """a string that is no docstring

over three lines"""  # counted: 3


@functools.cache  # counted: 1
def first(a, b=1):  # counted: 1
    """One line."""
    import math

    # A comment inside of the function.
    return (  # counted: 4
        basename(a)
        + dirname(b)
    )


class Second:  # counted: 1
    """A docstring of a class."""

    value = 1  # counted: 1
    "a string after a value"  # counted: 1

    async def third(self):  # counted: 1
        """A docstring,

        over several lines.
        """

        def inner():  # counted: 1
            return 1  # counted: 1

        return inner  # counted: 1
'''


def package(root: Path, **files: str) -> Path:
    """Write a package of five methods' folders, with these files in that of FLoRA."""
    for method in house.METHODS:
        place = root / house.PACKAGE / "methods" / method
        place.mkdir(parents=True)
        (place / "__init__.py").write_text('"""A method."""\n\nVALUE = 1\n')
    for name, text in files.items():
        (root / house.PACKAGE / "methods/flora" / f"{name}.py").write_text(text)
    return root


def test_code_lines_are_without_imports_docstrings_comments_and_blank_lines():
    assert house.code_lines(SOURCE) == 3 + 1 + 1 + 4 + 1 + 1 + 1 + 1 + 1 + 1 + 1


@pytest.mark.parametrize(
    ("line", "lines"),
    [
        ("", 0),
        ("import os; VALUE = 1", 1),
        ('def f(): "a docstring on the line of its function"', 1),
        ('VALUE = f"""{1}\n\n{2}"""', 3),
        ('"""Ä docstring."""', 0),
        ("if True:\n    import os", 1),
    ],
)
def test_code_lines_of_one_statement(line, lines):
    assert house.code_lines(line) == lines


def test_a_function_runs_from_def_to_its_last_line_without_its_docstring():
    assert dict(house.functions(SOURCE)) == {"first": 8, "Second.third": 6, "Second.third.inner": 2}


def test_limits_hold_for_a_small_package_and_the_offence_of_a_long_function_is_named(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["house.py", str(package(tmp_path, small=SOURCE))])
    monkeypatch.setitem(house.CODE_LINES, "flora", 80)
    assert house.main() == 0
    assert "methods/flora, code lines" in capsys.readouterr().out

    file = tmp_path / house.PACKAGE / "methods/flora" / "small.py"
    body = "    value = 1\n" * house.FUNCTION_LINES
    file.write_text(f"def fits():\n{body[:-14]}def does_not():\n{body}")
    assert house.main() == 1
    offenses = [line for line in capsys.readouterr().out.splitlines() if "limit" in line]
    name = f"{house.PACKAGE}/methods/flora/small.py"
    assert [line for line in offenses if name in line] == [f"{name}: does_not(): 41, limit 40"]
    assert offenses[0] == f"{house.PACKAGE}/methods/flora: code lines: 82, limit 80"


def test_a_long_file_and_all_five_methods_together_are_offenses(tmp_path):
    package(tmp_path, long="# a comment\n" * (house.FILE_LINES + 1))
    rows = house.measure(tmp_path)
    assert [row for row in rows if row[2] > row[3]] == [
        (f"{house.PACKAGE}/methods/flora/long.py", "lines", 251, 250)
    ]
    assert ("all five", "code lines", 5, house.CODE_LINES["all five"]) in rows


def test_the_present_layout_is_found():
    rows = house.measure(Path(house.__file__).parents[1])
    assert {row[3] for row in rows[:5]} == {house.CODE_LINES[method] for method in house.METHODS}
    assert all(row[2] > 0 for row in rows[:5])

"""A table's test fails for each of its rows, whatever comes before it."""

import pytest

from tables import failing


def test_every_row_that_fails_is_named():
    def check(value, error):
        with pytest.raises(error):
            [0, 1][value]

    rows = {"sound": (2, IndexError), "none": (1, IndexError), "another": ("x", IndexError)}
    assert set(failing(rows, check)) == {"none", "another"}
    assert set(failing([3, 4, 5], lambda x: 1 / (x - 4))) == {"4"}
    with pytest.raises(AssertionError):
        failing([], check)

"""Many adapters into one: exactly where that is possible, with a reported error where it is not."""

from . import entries as _entries  # noqa: F401 - registers functions of entries
from .cutting import ModuleReport
from .driver import Merge
from .masks import Compressed, compress
from .methods import METHODS, Coefficients, Entries, Factors, register
from .prepare import merge
from .search import search
from .source import Source
from .sources import open_source
from .stack import Stack

__all__ = [
    "METHODS",
    "Coefficients",
    "Compressed",
    "Entries",
    "Factors",
    "Merge",
    "ModuleReport",
    "Source",
    "Stack",
    "compress",
    "merge",
    "open_source",
    "register",
    "search",
]

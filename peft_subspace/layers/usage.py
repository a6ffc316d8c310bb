"""How a model uses a layer, found in the source of its classes: called, or its weight read.

A model that reads `self.conv1d.weight` and computes with it never sees what stands in place of a call of
`self.conv1d`. Reading a property such as the dtype is no use of the weight, nor is what initializes it.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from torch import nn

_PROPERTIES = {
    "dtype",
    "device",
    "shape",
    "ndim",
    "size",
    "dim",
    "numel",
    "is_meta",
    "is_cuda",
    "requires_grad",
}
_QUESTIONS = {"isinstance", "hasattr", "getattr", "id", "type"}
_NO_FORWARD = re.compile(r"init|reset|load|save|tie_|^fuse_")


@dataclass
class Usage:
    """Names of attributes that a class, or a file's functions, call, and of which they read the weight."""

    called: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)


def usage_of(name: str, modules: Iterable[nn.Module]) -> tuple[bool, bool]:
    """Whether a child of this name is called, and whether its weight is read, by some modules.

    What the source does not say, such as of a child in a list, counts as neither.

    Args:
        name: Name of the child in the module that has it.
        modules: That module, and those around it.
    """
    return _usage(name, frozenset(map(type, modules)))


@lru_cache(maxsize=4096)
def _usage(name: str, types: frozenset[type]) -> tuple[bool, bool]:
    called = read = False
    for cls in {cls for kind in types for cls in kind.__mro__} - {nn.Module, object}:
        for file in _files(cls):
            if re.search(rf"\.{re.escape(name)}\.weight\b", _source(file)):
                table = _analyze(file)
                for usage in (table.get(cls.__qualname__, Usage()), table[""]):
                    called, read = called or name in usage.called, read or name in usage.read
    return called, read


def _files(cls: type) -> frozenset[str]:
    """Files of a class's own methods."""
    own = (inspect.unwrap(value) for value in vars(cls).values() if inspect.isfunction(value))
    return frozenset(function.__code__.co_filename for function in own)


def _source(file: str) -> str:
    return "".join(linecache.getlines(file))


@lru_cache(maxsize=256)
def _analyze(file: str) -> dict[str, Usage]:
    """Usage by the qualified names of a file's classes; that of its functions under the empty name."""
    table = {"": Usage()}
    try:
        tree = ast.parse(_source(file))
    except SyntaxError:
        return table
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {alias.asname or alias.name.partition(".")[0] for node in imports for alias in node.names}
    _visit(tree, [], "", table, imported)
    return table


def _visit(node: ast.AST, path: list[str], owner: str, table: dict[str, Usage], imported: set[str]) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            inner = ".".join([*path, child.name])
            table.setdefault(inner, Usage())
            _visit(child, [*path, child.name], inner, table, imported)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            if not _NO_FORWARD.search(child.name.strip("_")):
                _visit(child, [*path, child.name, "<locals>"], owner, table, imported)
        else:
            _note(child, node, table[owner], imported)
            _visit(child, path, owner, table, imported)


def _note(node: ast.AST, parent: ast.AST, usage: Usage, imported: set[str]) -> None:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if getattr(node.func.value, "id", None) not in imported:  # such as `F.conv1d(…)`
            usage.called.add(node.func.attr)
    elif isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.value, ast.Attribute):
        asked = isinstance(parent, ast.Call) and getattr(parent.func, "id", None) in _QUESTIONS
        described = isinstance(parent, ast.Attribute) and parent.attr in _PROPERTIES
        compared = isinstance(parent, ast.Compare) and isinstance(parent.ops[0], ast.Is | ast.IsNot)
        if isinstance(node.ctx, ast.Load) and not (asked or described or compared):
            usage.read.add(node.value.attr)

"""How a model uses a layer, found in the source of its classes: called, or its weight read.

A model that reads `self.conv1d.weight` and computes with it never sees what stands in place of a call of
`self.conv1d`. Reading a property such as the dtype is no use of the weight, nor is what initializes it.
Names that a function gives to layers are followed within the function.
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

from peft_subspace.layers.local_names import LocalNames

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
    """Attributes that a class, or a file's functions, call, and those of which they read an attribute."""

    called: set[str] = field(default_factory=set)
    read: set[tuple[str, str]] = field(default_factory=set)


def usage_of(name: str, modules: Iterable[nn.Module], weight: str = "weight") -> tuple[bool, bool]:
    """Whether a child of this name is called, and whether its weight is read, by some modules.

    What the source does not say, such as of a child that is handed to a function, counts as neither.

    Args:
        name: Name of the child, or of the list that has it, in the module that has it.
        modules: That module, and those around it.
        weight: Name of the weight in the child.
    """
    return _usage(name, frozenset(map(type, modules)), weight)


@lru_cache(maxsize=4096)
def _usage(name: str, types: frozenset[type], weight: str) -> tuple[bool, bool]:
    called = read = False
    # The weight is read right there, or the child is mentioned and neither called, looked into nor set.
    own, mentioned = re.escape(weight), r"(?![\[(.])(?! *=[^=])|\.(?:values|items)\("
    mention = re.compile(rf"\.{re.escape(name)}\b(?:\[[^\]\n]*\])?(?:\.{own}\b|{mentioned})")
    for cls in {cls for kind in types for cls in kind.__mro__} - {nn.Module, object}:
        for file in _files(cls):
            if mention.search(_source(file)):
                table = _analyze(file)
                for usage in (table.get(cls.__qualname__, Usage()), table[""]):
                    called = called or name in usage.called
                    read = read or (name, weight) in usage.read
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
    _visit(tree, [], "", table, LocalNames(imported))
    return table


def _visit(node: ast.AST, path: list[str], owner: str, table: dict[str, Usage], names: LocalNames) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            inner = ".".join([*path, child.name])
            table.setdefault(inner, Usage())
            _visit(child, [*path, child.name], inner, table, names)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            if not _NO_FORWARD.search(child.name.strip("_")):
                _visit(child, [*path, child.name, "<locals>"], owner, table, names.inner())
        else:
            names.note(child)
            _note(child, node, table[owner], names)
            _visit(child, path, owner, table, names)


def _note(node: ast.AST, parent: ast.AST, usage: Usage, names: LocalNames) -> None:
    if isinstance(node, ast.Call):
        usage.called |= names.attributes(node.func)  # not of `F.conv1d(…)`
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        asked = isinstance(parent, ast.Call) and getattr(parent.func, "id", None) in _QUESTIONS
        described = isinstance(parent, ast.Attribute) and parent.attr in _PROPERTIES
        compared = isinstance(parent, ast.Compare) and isinstance(parent.ops[0], ast.Is | ast.IsNot)
        if not (asked or described or compared):
            usage.read |= {(name, node.attr) for name in names.attributes(node.value)}

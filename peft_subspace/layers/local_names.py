"""Local names that a function gives to attributes: to a layer, or to each of the layers of a list."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field, replace

_AS_THEY_ARE = {"reversed", "list", "tuple", "iter"}
_COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp


@dataclass
class LocalNames:
    """What the names in a function stand for, as far as it has been read.

    Attributes:
        imported: Names that the file imports; their attributes are no attributes of a model.
        known: Attributes by the local names that stand for one of them.
    """

    imported: set[str]
    known: dict[str, frozenset[str]] = field(default_factory=dict)

    def inner(self) -> LocalNames:
        """The names at the beginning of a function inside."""
        return replace(self, known=dict(self.known))

    def attributes(self, node: ast.AST) -> frozenset[str]:
        """Attributes for one of which, or for a part of which, an expression may stand."""
        if isinstance(node, ast.Attribute):
            return frozenset(() if getattr(node.value, "id", None) in self.imported else (node.attr,))
        if isinstance(node, ast.Subscript | ast.Starred):
            return self.attributes(node.value)
        if isinstance(node, ast.Name):
            return self.known.get(node.id, frozenset())
        parts: list[ast.expr] = []
        if isinstance(node, ast.Tuple | ast.List):
            parts = node.elts
        elif isinstance(node, ast.IfExp):
            parts = [node.body, node.orelse]
        return frozenset().union(*map(self.attributes, parts))

    def note(self, node: ast.AST) -> None:
        """Take notice of the names that a statement or a comprehension gives."""
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._name(target, node.value)
        elif isinstance(node, ast.For):
            self._name_each(node.target, node.iter)
        elif isinstance(node, _COMPREHENSIONS):
            for part in node.generators:
                self._name_each(part.target, part.iter)

    def _name(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self.known[target.id] = self.attributes(value)
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for pair in zip(target.elts, value.elts, strict=False):
                self._name(*pair)

    def _name_each(self, target: ast.expr, values: ast.expr) -> None:
        """Name what is in a list, which may be counted, paired with another, or a dictionary's."""
        function = values.func if isinstance(values, ast.Call) else None
        arguments = values.args if isinstance(values, ast.Call) else []
        parts = target.elts if isinstance(target, ast.Tuple) else [target]
        called = getattr(function, "id", None)
        if called == "zip":
            for pair in zip(parts, arguments, strict=False):
                self._name_each(*pair)
        elif called == "enumerate" and arguments:
            self._name_each(parts[-1], arguments[0])
        elif called in _AS_THEY_ARE and arguments:
            self._name_each(target, arguments[0])
        elif isinstance(function, ast.Attribute) and function.attr in ("values", "items"):
            self._name_each(parts[-1], function.value)
        elif isinstance(target, ast.Name):
            self.known[target.id] = self.attributes(values)

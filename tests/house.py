"""Say how long the package's files, functions and methods' folders are, and which exceed their limits.

    python tests/house.py [ROOT]

Code lines are those without imports, docstrings, comments and blank lines. A function's length is that from
`def` to its last line, without its docstring. The exit status is 1 if a limit is broken. The length of
the whole package is told, and has none: it grows with what the package can do.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "peft_subspace"
METHODS = ("flora", "lora_sb", "effort", "mos", "continual_svd")
CODE_LINES = {"flora": 80, "lora_sb": 90, "effort": 150, "mos": 190, "continual_svd": 240, "all five": 750}
FILE_LINES = 250
FUNCTION_LINES = 40

Function = ast.FunctionDef | ast.AsyncFunctionDef
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    """The number of lines that hold anything else than imports, docstrings and comments."""
    skipped = [_span(node) for node in _imports_and_docstrings(ast.parse(source))]
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        ignored = token.type in LAYOUT or token.type == tokenize.COMMENT
        if not ignored and not any(start <= token.start < end for start, end in skipped):
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines)


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Each function and method, those inside of others included, with its number of lines."""
    yield from _functions(ast.parse(source), "")


def _functions(parent: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
    for node in ast.iter_child_nodes(parent):
        inner = prefix
        if isinstance(node, Function | ast.ClassDef):
            inner = f"{prefix}{node.name}."
        if isinstance(node, Function):
            docstring = _docstring(node)
            without = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
            yield inner[:-1], max(node.end_lineno - node.lineno + 1 - without, 1)
        yield from _functions(node, inner)


def _imports_and_docstrings(tree: ast.AST) -> Iterator[ast.stmt]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, Function | ast.ClassDef | ast.Module) and (docstring := _docstring(node)):
            yield docstring


def _docstring(node: ast.AST) -> ast.stmt | None:
    has_one = ast.get_docstring(node, clean=False) is not None
    return node.body[0] if has_one else None


def _span(node: ast.stmt) -> tuple[tuple[int, int], tuple[int, int]]:
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def measure(root: Path) -> list[tuple[str, str, int, int]]:
    """Everything that has a limit: the file or folder, the function or what is counted, value and limit."""
    package = root / PACKAGE
    texts = {file: file.read_text(encoding="utf-8") for file in sorted(package.rglob("*.py"))}
    rows, total = [], 0
    for method in METHODS:
        place = package / "methods" / method
        lines = sum(code_lines(text) for file, text in texts.items() if file.is_relative_to(place))
        rows.append((str(place.relative_to(root)), "code lines", lines, CODE_LINES[method]))
        total += lines
    rows.append(("all five", "code lines", total, CODE_LINES["all five"]))
    lengths = {str(file.relative_to(root)): len(text.splitlines()) for file, text in texts.items()}
    rows += [(file, "lines", length, FILE_LINES) for file, length in lengths.items()]
    for file, text in texts.items():
        place = str(file.relative_to(root))
        rows += [(place, f"{name}()", length, FUNCTION_LINES) for name, length in functions(text)]
    return rows


def table(rows: list[tuple[str, str, int, int]]) -> Iterator[str]:
    """The rows of folders and the whole package, then the longest file and the longest function."""
    files = [row for row in rows if row[0].endswith(".py") and row[1] == "lines"]
    longest = [max(files, key=lambda row: row[2])]
    longest += sorted((row for row in rows if row[1].endswith("()")), key=lambda row: -row[2])[:1]
    for place, what, value, limit in [row for row in rows if not row[0].endswith(".py")] + longest:
        label = f"{place}: {what}" if what.endswith("()") else f"{place}, {what}"
        yield f"{label:<72} {value:>5} of {limit:>5}"


def main() -> int:
    """Print the table and each offense."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).resolve().parents[1])
    arguments = parser.parse_args()
    rows = measure(arguments.root.resolve())
    print(*table(rows), sep="\n")
    print(f"{PACKAGE}, lines: {sum(row[2] for row in rows if row[1] == 'lines')}")
    offenses = [row for row in rows if row[2] > row[3]]
    for place, what, value, limit in offenses:
        print(f"{place}: {what}: {value}, limit {limit}")
    return 1 if offenses else 0


if __name__ == "__main__":
    raise SystemExit(main())

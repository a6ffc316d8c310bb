"""The field's words in American spelling, in docs, docstrings, comments and messages."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("peft_subspace", "tests", "examples", "docs", "model_cards")
NO_PROSE = re.compile(r"``.*?``|`[^`\n]*`|https?://\S+", re.S)

# Words that only this project would use, and the field's.
PRIVATE = {
    r"trained numbers?|numbers? (?:that|it|which) trains?": "trainable parameters",
    r"keep their weight in codes|\w* codes\b(?!page)": "packed quantized weights",
    r"beneath": "below",
    r"twins?": "copy, counterpart",
    r"keyed": "by key",
    r"undisturbed|as if nobody": "unchanged",
    r"in good time": "in bounded time",
    r"(?:is|are) there whole": "written whole, atomic",
    r"one (?:active )?adapter at work|adapters at work": "active adapter",
    r"(?<!from )(?:a|an|the|its|their|whose|own|'s) starts?(?! of train)": "initialization",
}
ISE = (
    "initial|quant|dequant|requant|regular|normal|renormal|optim|general|special|parametr|parameter|"
    "serial|deserial|summar|recogn|organ|util|minim|maxim|factor|orthogonal|orthonormal|material|"
    "vector|visual|diagonal|random|memor|categor|emphas|penal|real|synchron|token|final|character|"
    "standard|stabil|custom|local|discret|symmetr|binar|polar|central|prior|critic|apolog|author|"
    "mobil|modern|neutral|capital|equal|formal|linear|privat"
)
BRITISH = {
    rf"\b(?:un|re|de)?(?:{ISE})is(?:e|ed|es|er|ers|ing|ation|ations|able)\b": "-ize",
    r"\banaly(?:se|sed|sing)\b|\bparaly[s]e": "-yze",
    r"\b(?:behavi|col|fav|neighb|hon|lab|flav|rum|vap|harb)our\w*": "-or",
    r"\b(?:centre|metre|litre|fibre|theatre)s?\b": "-er",
    r"\b(?:modell|labell|cancell|travell|signall|tunnell|channell|levell)(?:ed|ing|er)\w*": "one l",
    r"\b(?:catalogue|dialogue|analogue)s?\b": "-og",
    r"\b(?:defence|offence|licence|pretence)s?\b": "-se",
    r"\b(?:grey|whilst|amongst|artefacts?|judgement|programme|learnt|spelt|cheque|sceptic\w*|acknowledgement)\b":
        "American",
    r"\b(?:to|for|up|down|out)wards\b": "-ward",
    r"\bfulfil\b|\bskilful\b|\benrol\b|\binstal\b": "two l",
}  # fmt: skip
# German order: "Of a linear layer this is ...".
ORDER = {r"(?:^|[.:;] |\n)Of (?!course)": "the subject first: 'For a linear layer, ...'"}
RULES = [
    *((re.compile(rf"\b(?:{pattern})\b", re.I), remedy) for pattern, remedy in PRIVATE.items()),
    *((re.compile(pattern, re.I), remedy) for pattern, remedy in BRITISH.items()),
    *((re.compile(pattern), remedy) for pattern, remedy in ORDER.items()),
]


def files() -> list[Path]:
    """What is read by people: pages, notebooks, code and the files at the top."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    found += [path for path in ROOT.iterdir() if path.is_file()]
    kinds = (".py", ".md", ".ipynb", ".yaml", ".yml", ".toml", ".cff")
    return sorted(
        path for path in found if (path.suffix in kinds or path.name == "Makefile") and path != Path(__file__)
    )


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """The text of a file with the lines where its pieces begin."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from of_code(text)
    elif path.suffix == ".ipynb":
        for cell in json.loads(text)["cells"]:
            source = "".join(cell["source"])
            yield from [(1, source)] if cell["cell_type"] == "markdown" else of_code(source)
    elif path.suffix == ".md":
        outside = re.sub(r"^```.*?^```", lambda code: "\n" * code[0].count("\n"), text, flags=re.M | re.S)
        yield from enumerate(outside.splitlines(), start=1)
        for code in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S):
            line = text[: code.start(1)].count("\n")
            yield from ((line + inner, piece) for inner, piece in of_code(code[1]))
    else:
        yield from (
            (number, line.partition("#")[2])
            for number, line in enumerate(text.splitlines(), start=1)
            if "#" in line
        )


def of_code(source: str) -> Iterator[tuple[int, str]]:
    """Comments, docstrings and messages: strings of more than a word."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield node.lineno, node.value


def offenses(text: str) -> list[str]:
    """What is found in a piece of prose, with what to write in its place."""
    plain = NO_PROSE.sub("`…`", text)
    return [f"{found[0].strip()!r}: {remedy}" for rule, remedy in RULES for found in rule.finditer(plain)]


def test_words_are_those_of_the_field():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {offense}"
        for path in files()
        for line, text in prose(path)
        for offense in offenses(text)
    ]
    assert not found, "\n".join(found)

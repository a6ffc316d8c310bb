"""Hook of MkDocs: pages link to files of the repository as they do on GitHub, and the site has these files.

Pages of the methods keep their place in `model_cards`. Any other file that a page links to becomes a page
with its text, and a notebook one with its cells.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs/"
LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?(\))")
CODE = re.compile(r"(^```.*?^```)", re.M | re.S)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".cff": "yaml", "": "text"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the methods, their figures, and every file that a page links to."""
    pending = [path for path in ROOT.glob("model_cards/**/*") if path.suffix in (".md", ".png")]
    known: set[Path] = set()
    pages = [ROOT / DOCS / file.src_uri for file in files.documentation_pages()]
    while pending or pages:
        for page in pages:
            pending += [
                path for _, path in _outside(page, page.read_text(encoding="utf-8")) if path.is_file()
            ]
        pages = []
        for path in set(pending) - known:
            known.add(path)
            files.append(_generated(path, config))
            pages += [path] if path.suffix == ".md" else []
        pending = []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links between places in the repository into links within the site; no line breaks at a `±`."""
    source = _repository_path(page.file.src_uri)
    parts = CODE.split(re.sub(r"\A---\n.*?\n---\n", "", markdown, flags=re.S))

    def link(found: re.Match[str]) -> str:
        target = Path(os.path.normpath(source.parent / found[2]))
        if not target.exists() or not target.is_relative_to(ROOT):
            return found[0]
        if target.is_dir():
            target /= "README.md"
        relative = posixpath.relpath(_site_path(target), posixpath.dirname(page.file.src_uri))
        return f"{found[1]}{relative}{found[3] or ''})"

    def prose(text: str) -> str:
        return LINK.sub(link, text).replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")

    return "".join(part if part.startswith("```") else prose(part) for part in parts)


def _outside(page: Path, markdown: str) -> list[tuple[str, Path]]:
    """Links of a page to files of the repository that are not among the documentation."""
    found = [
        (link[2], Path(os.path.normpath(page.parent / link[2])))
        for link in LINK.finditer(CODE.sub("", markdown))
    ]
    inside = ROOT / DOCS
    return [
        (text, path) for text, path in found if path.is_relative_to(ROOT) and not path.is_relative_to(inside)
    ]


def _generated(path: Path, config: Any) -> File:
    """A file of the site with what is in the repository."""
    if path.suffix == ".png":
        return File.generated(config, _site_path(path), abs_src_path=str(path))
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = _cells(text)
    elif path.suffix != ".md":
        name = path.relative_to(ROOT).as_posix()
        text = f"# {name}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{text}\n````\n"
    return File.generated(config, _site_path(path), content=text)


def _cells(notebook: str) -> str:
    """Text and code of a notebook, whose first cell has the title."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(notebook)["cells"]]
    return "\n\n".join(f"```python\n{text}\n```" if kind == "code" else text for kind, text in cells)


def _site_path(path: Path) -> str:
    """Where a file of the repository is in the site."""
    name = path.relative_to(ROOT).as_posix()
    if name.startswith(DOCS):
        return name.removeprefix(DOCS)
    if path.suffix in (".md", ".png"):
        return name if name != "README.md" else "about.md"
    return f"source/{name}.md"


def _repository_path(site: str) -> Path:
    """Where a page of the site comes from."""
    for path in (ROOT / DOCS / site, ROOT / site):
        if path.exists():
            return path
    return ROOT / site.removeprefix("source/").removesuffix(".md").replace("about", "README.md")

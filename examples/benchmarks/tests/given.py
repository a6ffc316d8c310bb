"""Packages and texts for tests."""

from __future__ import annotations

import gzip
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path


def installed(package: str) -> bool:
    """Whether a package of data is there."""
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def write_texts(folder: Path, task: str, by_label: Mapping[str, str], count: int) -> None:
    """Rows of a task, `count` for each label and split, as the benchmarks read them."""
    (folder / "text").mkdir(exist_ok=True)
    for split in ("train", "test"):
        with gzip.open(folder / "text" / f"{task}.{split}.jsonl.gz", "wt") as file:
            for number in range(count):
                for label, text in by_label.items():
                    file.write(json.dumps({"text": f"{text}, {split} {number}", "label": label}) + "\n")

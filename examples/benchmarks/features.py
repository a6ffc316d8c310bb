"""The table of features and methods, from what the tests found; `readme.py` writes it into README.md.

make features   # runs the tests with `pytest --features examples/benchmarks/results/features.json`
"""

from __future__ import annotations

from typing import Any

METHODS = {
    "flora": "FLoRA",
    "mos": "MoS",
    "effort": "Effort",
    "lora_sb": "LoRA-SB",
    "continual_svd": "Continual SVD",
    "continual_svd_r": "Continual SVD, `r`",
}


def table(found: dict[str, dict[str, dict[str, str]]], markdown: Any) -> str:
    """Markdown of `{row: {method: {"entry": …, "reason": …}}}`: reasons are numbered notes below the table.

    What no test has looked at stays empty.
    """
    notes: dict[str, int] = {}
    rows = [
        [row, *(_cell(methods.get(method), notes) for method in METHODS)] for row, methods in found.items()
    ]
    listed = "\n".join(f"{number}. {reason}" for reason, number in notes.items())
    return f"{markdown(['', *METHODS.values()], rows)}\n\n{listed}".rstrip()


def _cell(entry: dict[str, str] | None, notes: dict[str, int]) -> str:
    """One entry; where it has a reason, with the number of the note that gives it."""
    if entry is None:
        return ""
    text = f"**{entry['entry']}**" if entry["entry"] == "failed" else entry["entry"]
    if entry["entry"] == "yes" or not entry["reason"]:
        return text
    number = notes.setdefault(entry["reason"], len(notes) + 1)
    return f"{text} ({number})"

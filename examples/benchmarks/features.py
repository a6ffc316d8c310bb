"""The table of features and methods, from what the tests found; `pages.py` writes it to docs/benchmarks.

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
    """Markdown of `{row: {method: {"entry": …, "reason": …}}}`: exceptions as a table, others side by side.

    Reasons are numbered notes below the table. What no test has looked at stays empty.
    """
    notes: dict[str, int] = {}
    plain = [row for row, methods in found.items() if _is_plain(methods)]
    rows = [
        [row, *(_cell(methods.get(method), notes) for method in METHODS)]
        for row, methods in found.items()
        if row not in plain
    ]
    listed = "\n".join(f"{number}. {reason}" for reason, number in notes.items())
    side_by_side = [[*plain, "", ""][i : i + 3] for i in range(0, len(plain), 3)]
    parts = [
        *([f"### With every method\n\n{markdown([''] * 3, side_by_side)}"] if plain else []),
        *(
            [f"### With some methods, or not\n\n{markdown(['', *METHODS.values()], rows)}", listed]
            if rows
            else []
        ),
    ]
    return "\n\n".join(parts).rstrip()


def kinds(run: dict[str, Any], markdown: Any) -> str:
    """Kinds of modules by methods, the first of which is PEFT's LoRA, from `reach.py`; and what comes out."""
    cells = run["cells"]
    lora, *ours = next(iter(cells.values()))
    without = [found for found in cells.values() if found[lora] != "yes"]
    gained = sum(all(found[method].startswith("yes") for method in ours) for found in without)
    short = [
        f"{kind} ({', '.join(method for method in ours if not found[method].startswith('yes'))})"
        for kind, found in cells.items()
        if found[lora] == "yes" and not all(found[method].startswith("yes") for method in ours)
    ]
    summary = (
        f"LoRA has {len(without)} of {len(cells)} kinds not, or not whole; "
        f"all of ours have {gained} of these. "
        f"LoRA has and some of ours have not: {'; '.join(short) or 'none'}."
    )
    rows = [[kind, *(found[method] for method in (lora, *ours))] for kind, found in cells.items()]
    return f"{markdown(['', lora, *ours], rows)}\n\n{summary}"


def _is_plain(methods: dict[str, dict[str, str]]) -> bool:
    return all(methods.get(method, {}).get("entry") == "yes" for method in METHODS)


def _cell(entry: dict[str, str] | None, notes: dict[str, int]) -> str:
    """One entry; where it has a reason, with the number of the note that gives it."""
    if entry is None:
        return ""
    text = f"**{entry['entry']}**" if entry["entry"] == "failed" else entry["entry"]
    if entry["entry"] == "yes" or not entry["reason"]:
        return text
    number = notes.setdefault(entry["reason"], len(notes) + 1)
    return f"{text} ({number})"

"""What was measured of each method, in a sentence: the table of methods in README.md."""

from __future__ import annotations

from collections import Counter
from typing import Any

import claims
import timing
import verdicts
from verdicts import BESIDE, side

ROWS = {  # page: name, and what it is for
    "flora": ("FLoRA", "convolutions and stacked experts, whose axes it keeps"),
    "mos": ("MoS", "many adapters of one base, tight budgets"),
    "lora-sb": ("LoRA-SB", "r² parameters per layer, set by the first gradient"),
    "continual-svd": (
        "Continual SVD",
        "one task after another, without the old data; FOT, GPM, CoSO and KeepLoRA as presets",
    ),
    "effort": ("Effort", "changing a pretrained tower as little as possible"),
}


def table() -> str:
    """Methods with what they are for, what they cost beside LoRA and what came out."""
    found = {"flora": flora, "mos": mos, "lora-sb": lora_sb, "continual-svd": continual_svd, "effort": effort}
    costs = {row[0]: row[1:] for row in timing.load("file_sizes")["costs"]}
    batches = _batches()
    rows = [["LoRA", "", *_costs(costs["LoRA"]), "1" if batches else "", ""]]
    for page, (name, purpose) in ROWS.items():
        batch = batches.get(page.replace("-", "_"))
        ratio = f"{batch['median']:.2f}" if batch else ""
        rows.append([f"[{name}](model_cards/{page}.md)", purpose, *_costs(costs[name]), ratio, found[page]()])
    header = ["method", "made for", "trains", "disk of 100", "mixed batch", "measured"]
    return claims.markdown(header, rows)


def _costs(row: list[Any]) -> list[str]:
    rank, trained, _, hundred = row
    count = f"{trained / 1e6:.1f} M" if trained >= 1e6 else f"{trained / 1e3:.0f} k"
    return [f"{count}, `{rank}`", f"{hundred:,.0f} MiB"]


def _batches() -> dict[str, Any]:
    """Time of a batch of 32 requests of one token for 32 adapters, to LoRA's, by method."""
    if not (timing.RESULTS / "mixed_batch.json").exists():
        return {}
    times = timing.load("mixed_batch")["widths"]["512"]["32"]["times"]["1"]
    return {name: time["of_lora"] for name, time in times.items()}


def flora() -> str:
    """Beside three of PEFT's methods."""
    _, sides = verdicts.judged(timing.load("quality"), claims.CLAIMS["flora"])
    above, level, below, total = _counts(value for found in sides.values() for value in found.values())
    return (
        f"of {total} comparisons with LoRA, LoHa and LoKr of equal size on convolutions, above in {above}, "
        f"level in {level}, **below in {below}**"
    )


def mos() -> str:
    """Beside LoRA, and VB-LoRA with as many parameters."""
    reached = _beside_lora("mos")
    _, sides = verdicts.judged(timing.load("quality"), claims.CLAIMS["mos"])
    above, level, below, _ = _counts(sides[claims.CLAIMS["mos"].beats[0]].values())
    return f"{reached}; VB-LoRA of equal size: above on {above}, level on {level}, below on {below}"


def lora_sb() -> str:
    """Beside LoRA."""
    return _beside_lora("lora-sb")


def continual_svd() -> str:
    """Beside training that protects nothing, with one learning rate and with one of the head's own."""
    shared, own = timing.load("continual_tasks"), timing.load("continual_tasks_heads")
    of = {
        (name, method): BESIDE[side(verdicts.paired(run, method)) or 0]
        for name, run in (("shared", shared), ("own", own))
        for method in ("lora", "full")
    }
    return (
        f"after five tasks {of['shared', 'lora']} LoRA and {of['shared', 'full']} full fine-tuning with one "
        f"learning rate; where heads have their own, {of['own', 'lora']} LoRA, **{of['own', 'full']} full "
        f"fine-tuning**"
    )


def effort() -> str:
    """Beside LoRA, full fine-tuning and a linear probe, on generators not seen in training."""
    methods: dict[str, Any] = timing.load("effort_detector")["summary"]
    ours = methods["effort"]["auc_unseen"]
    found: dict[str, list[str]] = {}
    for name, title in {
        "lora-1": "LoRA of equal size", "full": "full fine-tuning", "probe": "a linear probe"
    }.items():  # fmt: skip
        gaps = [one - other for one, other in zip(ours, methods[name]["auc_unseen"], strict=False)]
        found.setdefault(BESIDE[side(gaps) or 0], []).append(title)
    parts = [f"{where} {' and '.join(titles)}" for where, titles in found.items()]
    return f"detectors on unseen generators: {', '.join(parts)}"


def _beside_lora(name: str) -> str:
    """On how many tasks a method reaches LoRA, and with how many parameters."""
    content, claim = timing.load("quality"), claims.CLAIMS[name]
    tasks, sides = verdicts.judged(content, claim)
    (lora,) = claim.reaches
    above, level, below, total = _counts(sides[lora].values())
    ratios = verdicts.ratios_of_counts(content, tasks, claim, lora)
    return (
        f"with {ratios[0]:.0f} to {ratios[-1]:.0f} times fewer parameters than LoRA of rank 16, level with "
        f"it or above on {above + level} of {total} tasks, **below on {below}**"
    )


def _counts(sides: Any) -> tuple[int, int, int, int]:
    counts = Counter(sides)
    return counts[1], counts[0], counts[-1], counts.total()

"""Whether the claims held, by one rule that is applied to all of them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import claims
from claims import Claim, Entry

WORDS = {1: "above", 0: "level", -1: "below"}
BESIDE = {1: "above", 0: "level with", -1: "below"}
SEQUENCES = (
    "continual_tasks_heads",
    "continual_published_heads",
    "continual_tasks",
    "continual_published",
    "continual_decoder",
)
"""Results of sequences of tasks; in those with heads, these have a learning rate of their own."""

RULE = "Above and below: by more than one standard deviation of the paired differences."


def side(differences: Sequence[float]) -> int | None:
    """1 if differences lie above zero, −1 if below, 0 if neither can be told, None of fewer than two.

    They lie above or below if their mean is more than one standard deviation away from zero. With three seeds
    chance alone puts one difference in nine above and one in nine below (a one-sided t-test at 11 %), so that
    a count over several tasks says more than one task does. Where the seeds differ so much that nothing can
    be told, a method is level, and counts as having reached the other; the counts are shown for that reason.
    """
    if len(differences) < 2:
        return None
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    return (mean > spread) - (mean < -spread)


Sides = dict[Entry, dict[str, int]]
"""By what a claim is judged beside, and by task: whether its subject is above, level or below."""


def judged(content: dict[str, Any], claim: Claim) -> tuple[list[str], Sides]:
    """Tasks on which a claim can be judged, and on which side of all others its subject is there."""
    tasks: dict[str, None] = {}
    sides: Sides = {}
    for entry in (*claim.reaches, *claim.beats):
        found = {task: side(values) for task, values in claims.differences(content, claim, entry).items()}
        sides[entry] = {task: value for task, value in found.items() if value is not None}
        tasks |= dict.fromkeys(sides[entry])
    return [task for task in tasks if all(task in found for found in sides.values())], sides


def verdict(content: dict[str, Any], name: str) -> str:
    """On how many tasks a claim held: level with or above what it reaches, and above what it beats."""
    claim = claims.CLAIMS[name]
    tasks, sides = judged(content, claim)
    if not tasks:
        return "Too few runs to say whether the claim held."
    held = [
        task
        for task in tasks
        if all(sides[entry][task] >= 0 for entry in claim.reaches)
        and all(sides[entry][task] > 0 for entry in claim.beats)
    ]
    parts = [
        f"It has to {purpose} {claims.label(entry)}{_ratio(content, tasks, claim, entry)}: "
        f"{_tally(sides[entry][task] for task in tasks)}."
        for purpose, entries in (("reach", claim.reaches), ("beat", claim.beats))
        for entry in entries
    ]
    names = f" ({', '.join(held)})" if held and len(tasks) > 1 else ""
    count = f"{len(held)} of {len(tasks)} task{'s' * (len(tasks) > 1)}{names}"
    return f"**By {claims.label(claim.subject)} the claim held on {count}.** {' '.join(parts)} {RULE}"


def _ratio(content: dict[str, Any], tasks: list[str], claim: Claim, entry: Entry) -> str:
    """How many times the subject's trained parameters another entry has, by task."""
    ratios = [f"{ratio:.1f}" for ratio in ratios_of_counts(content, tasks, claim, entry)]
    span = " to ".join(dict.fromkeys((ratios[0], ratios[-1])))
    return f" ({span} times its trained parameters, head included)"


def ratios_of_counts(content: dict[str, Any], tasks: list[str], claim: Claim, entry: Entry) -> list[float]:
    """Trained parameters of another entry to the subject's, by task, in ascending order."""
    counts = [
        [claims.chosen(content, task, e)[0]["trainable"] for e in (claim.subject, entry)] for task in tasks
    ]
    return sorted(other / one for one, other in counts)


def _tally(sides: Iterable[int]) -> str:
    counts = Counter(sides)
    return ", ".join(f"{WORDS[value]} on {counts[value]}" for value in WORDS)


def paired(content: dict[str, Any], method: str) -> list[float]:
    """Continual SVD's average accuracy at the end minus a method's, where both have an order and seed."""
    ends: list[dict[tuple[str, int], float]] = [
        {
            (",".join(run["order"]), run["seed"]): statistics.fmean(run["known"][-1])
            for run in content["runs"].values()
            if (run["method"], run["split"]) == (name, "test")
        }
        for name in ("continual-svd", method)
    ]
    ours, other = ends
    return [] if method == "continual-svd" else [ours[key] - other[key] for key in ours if key in other]


def standing(subject: str, differences: dict[str, list[float]]) -> str:
    """Which methods a subject lies above, level with and below, given what it is above each of them."""
    found: dict[int, list[str]] = {value: [] for value in BESIDE}
    for title, values in differences.items():
        value = side(values)
        if value is not None:
            found[value].append(f"*{title}*")
    parts = [f"{BESIDE[value]} {', '.join(titles)}" for value, titles in found.items() if titles]
    return f"**{subject} is {'; '.join(parts)}.** {RULE}" if parts else ""

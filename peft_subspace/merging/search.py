"""Scale, density and other options of a merge, chosen by what the merged model does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from peft_subspace.core.validation import check_number, invalid
from peft_subspace.merging.prepare import merge
from peft_subspace.runtime.progress import progress as shown

_NAME = "search"


def search(
    method: str,
    sources: Sequence[Any],
    grid: Mapping[str, Sequence[Any]],
    evaluate: Callable[[nn.Module], float],
    *,
    model: nn.Module,
    rank: int | None = None,
    energy: float | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Evaluate a merge for all combinations of options, the best first.

    The merge is computed once for each combination of what is not a scale, and put on the model as a LoRA of
    which the scale is set. The model is afterwards what it was.

    Args:
        method: Name of the method.
        sources: What is merged.
        grid: Values by option, such as `{"scale": [0.3, 0.6, 1.0], "density": [0.1, 0.2]}`.
        evaluate: Function of the merged model, higher is better.
        model: Base model, or a `PeftModel` on it.
        rank: Rank to cut to, which a function of entries needs.
        energy: Part of the squared norm to keep, in place of a rank.
        options: Other options of `merge`.

    Returns:
        One dictionary for each combination, its options and its `"score"`.

    Raises:
        ValueError: If the grid is empty, or a score is not finite.
    """
    if not grid or not all(len(list(values)) for values in grid.values()):
        raise invalid("grid", dict(grid), "must have at least one option, with at least one value each")
    scales = list(grid.get("scale", [options.pop("scale", 1.0)]))
    for scale in scales:
        check_number("scale", scale)
    names = [name for name in grid if name != "scale"]
    combinations = list(itertools.product(*(grid[name] for name in names)))
    base = options.pop("base", model if not isinstance(model, PeftModel) else model.get_base_model())
    found = []
    for values in shown(combinations, len(combinations), "searching"):
        chosen = dict(zip(names, values, strict=True))
        made = merge(sources, method, base=base, **options, **chosen)
        with _added(made, model, rank, energy) as merged:
            for scale in scales:
                _set_scale(merged, scale)
                with torch.no_grad():
                    score = float(evaluate(merged))
                if not math.isfinite(score):
                    raise invalid("evaluate", score, f"must be finite, with {chosen} and scale={scale}")
                found.append({**chosen, "scale": scale, "score": score})
    return sorted(found, key=lambda one: -one["score"])


@contextmanager
def _added(made: Any, model: nn.Module, rank: int | None, energy: float | None) -> Iterator[PeftModel]:
    """The merge on the model, for a while."""
    before = model.active_adapters if isinstance(model, PeftModel) else None
    merged = made.add_to(model, _NAME, rank, energy)
    try:
        if before is not None:
            merged.base_model.set_adapter(_NAME)
        yield merged
    finally:
        if before is None:
            merged.unload()
        else:
            merged.base_model.set_adapter(before)
            merged.delete_adapter(_NAME)


def _set_scale(model: nn.Module, scale: float) -> None:
    for module in model.modules():
        if hasattr(module, "set_scale") and _NAME in getattr(module, "scaling", {}):
            module.set_scale(_NAME, scale)

"""What a merge needs to be right, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from peft_subspace.base_weights.fingerprint import is_same
from peft_subspace.core.validation import check_choice, check_count, check_number, invalid
from peft_subspace.merging.computing import TILE_BYTES
from peft_subspace.merging.driver import Merge
from peft_subspace.merging.methods import METHODS
from peft_subspace.merging.output import check_others
from peft_subspace.merging.source import Source
from peft_subspace.merging.sources import open_source

SPACES, ROWS = ("weight", "aligned"), ("error", "common")


def merge(
    sources: Sequence[Any],
    method: str = "task_arithmetic",
    *,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    space: Literal["weight", "aligned"] = "weight",
    base: str | Path | nn.Module | None = None,
    seed: int = 0,
    others: str = "error",
    rows: Literal["error", "common"] = "error",
    memory: int = TILE_BYTES,
    **options: Any,
) -> Merge:
    """Prepare a merge of adapters, LoRAs and checkpoints; it is computed when it is written.

    Args:
        sources: Folders of adapters or checkpoints, ids of adapters on the Hub, models, or pairs of model and
            adapter name; of different methods and ranks. A module that a source does not change counts as an
            update of zero there.
        method: Name in `METHODS`.
        weights: Weights of the sources; all 1 if None.
        scale: Factor of the merged update.
        space: Where functions of entries work: `"weight"`, or `"aligned"`, KnOTS, whose result has factors.
        base: Folder of the base model, for checkpoints and `to_model`; else it may be the model itself.
        seed: Seed of what methods draw; each module and source has a stream of its own.
        others: What to do where several sources have heads, biases or token rows: `"error"`, `"drop"`, or
            the name of the source whose are kept.
        rows: What to do where weights differ in their number of rows, as vocabularies with added tokens do:
            `"error"`, or `"common"`, merge the rows that all have; others stay as the base has them.
        memory: Bytes for tiles of entries.
        options: Options of the method, of which a dictionary has one value for each module.

    Raises:
        TypeError: If an argument or option has the wrong type.
        ValueError: If the sources do not fit each other, or the method.
    """
    if isinstance(sources, str | Path | nn.Module):
        raise TypeError(f"sources must be a list, and is one {type(sources).__name__}; write [source]")
    check_choice("method", method, METHODS)
    check_choice("space", space, SPACES)
    check_choice("rows", rows, ROWS)
    check_number("scale", scale)
    check_count("memory", memory, maximum=2**62)
    opened = [open_source(source, base, common_rows=rows == "common") for source in sources]
    if not opened:
        raise invalid("sources", list(sources), "must name at least one adapter")
    names = [source.name for source in opened]
    if len(set(names)) < len(names):
        raise invalid("sources", names, "must differ; give an adapter once, with the sum of its weights")
    weights = [1.0] * len(opened) if weights is None else list(weights)
    if len(weights) != len(opened):
        raise invalid("weights", weights, f"must have one entry for each of the {len(opened)} sources")
    for weight in weights:
        check_number("weights", weight)
    check_base(opened)
    kept = check_others(opened, others)
    made = Merge(opened, method, weights, scale, space, seed, options, memory, base, kept, rows)
    made.check()  # an option that does not fit is an error here, not when half is written
    return made


def check_base(sources: Sequence[Source]) -> None:
    """Raise if sources say that they belong to different base models, or to different weights.

    Raises:
        ValueError: Naming what differs.
    """
    for what, named in (("base models", "base"), ("revisions of the base model", "revision")):
        found = {getattr(source, named) for source in sources} - {None}
        if len(found) > 1:
            raise ValueError(f"the sources name different {what}, {sorted(found)}; merge adapters of one")
    known: dict[str, tuple[str, Tensor]] = {}
    for source in sources:
        for module, fingerprint in source.fingerprints.items():
            first, expected = known.setdefault(module, (source.name, fingerprint))
            if not is_same(fingerprint, expected):
                raise ValueError(
                    f"{module}: {first} and {source.name} were trained on different base weights; merge "
                    "adapters of one base model"
                )

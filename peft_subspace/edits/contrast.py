"""Pruning of those entries of a weight that one kind of data needs more than another."""

from __future__ import annotations

from collections.abc import Iterable

from peft import PeftModel
from torch import nn

from peft_subspace.core.validation import check_share, invalid
from peft_subspace.statistics import Statistics
from peft_subspace.statistics.record import INPUTS

from .adapter import add_edit, bases, check_name, read_weight


def prune_by_contrast(
    model: nn.Module,
    target: Statistics,
    reference: Statistics,
    targets: Iterable[str] | None = None,
    *,
    share: float = 0.01,
    adapter_name: str = "default",
) -> PeftModel:
    """Set to zero, as a sparse adapter, what a weight uses for some data and not for other data.

    An entry's score for data is `|W_ij| ‖x_j‖`, with the root mean square of its input. Those entries go that
    are among the part `share` of the largest of their row for `target`, and score higher there than for
    `reference`.

    Args:
        model: Base model, or a model with edits.
        target: Statistics of what is to be forgotten, by `statistics.collect(model, data, inputs="norms")`.
        reference: Statistics of other data of the kind that is to be kept.
        targets: Modules to edit; by default all that `target` has.
        share: Largest part of a row that goes, above 0 and at most 1.
        adapter_name: Name of the new adapter.

    Raises:
        TypeError: If `share` is no number.
        ValueError: If `share` is out of range or leaves nothing to prune, or statistics are of another model.

    Reference:
        Chavhan et al., "Memorized Images in Diffusion Models share a Subspace that can be Located and
        Deleted" (arXiv 2406.18566).
    """
    check_share("share", share)
    check_name(model, adapter_name)
    states = {}
    for name, module in bases(model, list(target.inputs) if targets is None else list(targets)):
        weight = read_weight(module)
        moments = [of.moment(INPUTS, name, weight.shape[1]) for of in (target, reference)]
        scales = [(m.column_norms / max(1, m.rows) ** 0.5).to(weight) for m in moments]
        wanted, other = (weight.abs() * scale for scale in scales)
        count = int(share * weight.shape[1])
        if count:
            limit = wanted.topk(count, dim=1).values[:, -1:]
            flat = ((wanted >= limit) & (wanted > other)).flatten().nonzero()[:, 0]
            if len(flat):
                states[name] = {"indices": flat.int(), "values": -weight.flatten()[flat]}
    if not states:
        raise invalid("share", share, "leaves nothing to prune; raise it, or give other statistics")
    return add_edit(model, "sparse", states, adapter_name)

"""Making a composition, and the loss that trains one without labels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from peft_subspace.merging import merge
from peft_subspace.tuner.adding import check_new_name, with_adapter

from .config import CompositionConfig
from .delta import CompositionDelta


def compose(
    model: nn.Module,
    sources: Sequence[Any],
    *,
    per: str = "module",
    start: float = 0.0,
    base: str | Path | None = None,
    adapter_name: str = "default",
    **options: Any,
) -> PeftModel:
    """Add an adapter that trains the coefficients of others, and nothing else.

    Heads, biases and token rows of the sources are left out; the model has its own.

    Args:
        model: Base model, or a model with compositions.
        sources: What `merging.merge` takes: adapters of any method and rank, LoRAs, checkpoints.
        per: What has a coefficient of its own: `"task"`, `"module"` or `"component"`.
        start: Value of all coefficients at first: 0 is the base model, 0.3 is AdaMerging's.
        base: Folder of the base model; needed for checkpoints, and where `model` has adapters already.
        adapter_name: Name of the new adapter.
        options: Further fields of `CompositionConfig`, such as `mask` or `modules_to_save`.

    Raises:
        ValueError: If the sources do not fit each other or the model.

    Reference:
        Zhang et al. (arXiv 2407.02880).
    """
    check_new_name(model, adapter_name)
    known: Any = model if base is None and not isinstance(model, PeftModel) else base
    merged = merge(sources, base=known, others="drop")
    stacks = dict(merged.stacks())
    config = CompositionConfig(
        per=per,
        start=start,
        adapters=[source.name for source in merged.sources],
        ranks={module: stack.ranks for module, stack in stacks.items()},
        target_modules="|".join(map(re.escape, sorted(stacks))),  # a list would match by suffix, too
        base_model_name_or_path=next((s.base for s in merged.sources if s.base), None),
        **options,
    )
    model = with_adapter(model, config, adapter_name)
    model.set_adapter(adapter_name)
    for delta in model.modules():
        if isinstance(delta, CompositionDelta) and not delta.initialized:
            stack = stacks[delta.spec.name]
            left, right = stack.left(), stack.right()
            transposed = delta.shape.lookup_axis == 1
            delta.fill(*((right.T, left.T) if transposed else (left, right)))
    return model


def entropy_loss(outputs: Any, labels: Any = None, num_items_in_batch: Any = None) -> Tensor:
    """`−Σ_c p_c log p_c` of the predictions, averaged over all rows: no labels are needed.

    It is what `Trainer(compute_loss_func=…)` takes.

    Reference:
        Yang et al. (arXiv 2310.02575), the objective of AdaMerging.
    """
    logits = logits_of(outputs)
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def logits_of(outputs: Any) -> Tensor:
    """Logits `(…, classes)` of a model's outputs, in fp32."""
    logits: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs
    return logits.float()


__all__ = ["compose", "entropy_loss"]

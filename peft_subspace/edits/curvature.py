"""Forgetting what is memorized: directions of a weight with little curvature are taken out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_subspace.core.validation import check_share
from peft_subspace.statistics import Statistics
from peft_subspace.statistics.record import INPUTS, OUTPUT_GRADIENTS

from .adapter import add_edit, bases, check_name, read_weight


def edit_by_curvature(
    model: nn.Module,
    statistics: Statistics,
    targets: Iterable[str] | None = None,
    *,
    keep: float = 0.6,
    adapter_name: str = "default",
) -> PeftModel:
    r"""Take out of each weight what its curvature hardly depends on, where memorized sequences are.

    With `A = E[x xᵀ] = Σ μ_j v_j v_jᵀ` of its inputs and `G = E[g gᵀ] = Σ λ_i u_i u_iᵀ` of gradients of its
    outputs, the weight is `W = Σ C_ij u_i v_jᵀ`, and the pairs of largest `λ_i μ_j` stay until these sum up
    to `keep` of all: `ΔW = −U [(1 − M) ⊙ Uᵀ W V] Vᵀ`. The scale (`set_scale`) is the strength.

    Args:
        model: Base model, or a model with edits.
        statistics: `statistics.collect(model, data, gradients=True, loss_fn=edits.sampled_loss)`, of data
            that stands for what is to be kept.
        targets: Modules to edit; by default all that the statistics have.
        keep: Part of the curvature that stays, above 0 and at most 1, which changes nothing.
        adapter_name: Name of the new adapter.

    Raises:
        TypeError: If `keep` is no number.
        ValueError: If `keep` is out of range, or the statistics are of another model.

    Reference:
        Merullo et al., "From Memorization to Reasoning in the Spectrum of Loss Curvature" (arXiv 2510.24256).
    """
    check_share("keep", keep)
    check_name(model, adapter_name)
    names = list(statistics.output_gradients) if targets is None else list(targets)
    states = {}
    for name, module in bases(model, names):
        weight = read_weight(module)
        inputs = statistics.moment(INPUTS, name, weight.shape[1])
        outputs = statistics.moment(OUTPUT_GRADIENTS, name, weight.shape[0])
        states[name] = {"matrix": _edit(weight, inputs.dense(), outputs.dense(), float(keep))}
    return add_edit(model, "dense", states, adapter_name)


def _edit(weight: Tensor, inputs: Tensor, outputs: Tensor, keep: float) -> Tensor:
    """`−U [(1 − M) ⊙ Uᵀ W V] Vᵀ`, in fp32."""
    (mu, v), (lam, u) = (torch.linalg.eigh(m.to(weight.device)) for m in (inputs, outputs))
    curvature = lam.clamp_min(0)[:, None] * mu.clamp_min(0)  # round-off makes some of them negative
    values, order = curvature.flatten().sort(descending=True)
    mass = values.cumsum(0)
    needed = int((mass < keep * mass[-1]).sum()) + 1 if keep < 1 else len(order)
    dropped = torch.ones_like(values).scatter(0, order[:needed], 0.0).view_as(curvature)
    return -(u @ (dropped * (u.T @ weight.double() @ v)) @ v.T).float()


def sampled_loss(model: nn.Module, batch: Any) -> Tensor:
    """Loss of a language model on tokens that it draws itself: the gradients are those of the Fisher matrix.

    The draw is seeded by the tokens, and leaves the global generators alone.
    """
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1]
    generator = torch.Generator(logits.device).manual_seed(int(batch["input_ids"].sum()))
    rows = logits.detach().float().softmax(-1).flatten(0, 1)
    drawn = torch.multinomial(rows, 1, generator=generator).flatten()
    if "attention_mask" in batch:
        drawn = drawn.masked_fill(batch["attention_mask"][:, 1:].flatten() == 0, -100)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), drawn)

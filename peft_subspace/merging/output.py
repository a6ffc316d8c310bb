"""What a merge is written as: a LoRA in a folder or on a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from torch import Tensor, nn

from peft_subspace.core.validation import invalid
from peft_subspace.persistence.lora_export import lora_tensors, pad, taken_for_experts, write_lora
from peft_subspace.runtime.files import atomic_write
from peft_subspace.tuner.adding import check_new_name, with_adapter

Pairs = Sequence[tuple[str, Tensor, Tensor]]


def check_others(sources: Iterable[Any], choice: str) -> Any:
    """The source whose tensors besides the update a merge keeps, or None.

    Raises:
        ValueError: If several sources have some and none is chosen.
    """
    found = {source.name: source for source in sources if source.others}
    if choice == "drop" or not found:
        return None
    if choice in found:
        return found[choice]
    if len(found) > 1 or choice != "error":
        raise invalid(
            "others",
            choice,
            f"must be 'drop', or one of {sorted(found)}, which all have heads, biases or token rows",
        )
    return next(iter(found.values()))


def save_lora(merge: Any, directory: Path, pairs: Pairs) -> None:
    """Write a LoRA, and a card beside it."""
    write_lora(directory, *_lora(merge, pairs, _model_type(merge.base)))
    with atomic_write(directory / "README.md") as partial:
        partial.write_text(card(merge))


def add_lora(merge: Any, model: nn.Module, adapter_name: str, pairs: Pairs) -> PeftModel:
    """Add a LoRA to a model.

    Raises:
        ValueError: If the model has an adapter of the name.
    """
    config, state = _lora(merge, pairs, getattr(model, "base_model", model))
    check_new_name(model, adapter_name)
    model = with_adapter(model, config, adapter_name)
    set_peft_model_state_dict(model, state, adapter_name)
    return model


def _model_type(base: Any) -> Any:
    """The base model, or what stands for one of its type, as the config in its folder says it."""
    path = Path() if base is None or isinstance(base, nn.Module) else Path(base) / "config.json"
    if not path.is_file():
        return base
    return SimpleNamespace(config=SimpleNamespace(model_type=json.loads(path.read_text()).get("model_type")))


def _lora(merge: Any, pairs: Pairs, model: Any) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Config and tensors of a LoRA on a model, of one rank for all modules: some servers read no other."""
    rank = max(left.shape[1] for _, left, _ in pairs)
    embeddings = {module for source in merge.sources for module in source.embeddings}
    if merge.kept is not None and merge.kept.loads is None:
        found = ", ".join(sorted(merge.others))
        raise invalid(
            "others", merge.kept.name, f"cannot go into a LoRA: {found}; choose 'drop', or to_model"
        )
    state = dict(merge.others)
    for module, left, right in pairs:
        left, right = pad(left, 1, rank), pad(right, 0, rank)
        if module in embeddings:
            left, right = right.T, left.T
        state |= lora_tensors(module, left, right, embedding=module in embeddings)
    modules = {module for module, _, _ in pairs}
    taken = taken_for_experts(model, sorted(modules))
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(modules - taken),
        target_parameters=[f"{module}.weight" for module in sorted(taken)] or None,
        **(merge.kept.loads if merge.kept is not None else {}),
        base_model_name_or_path=next((s.base for s in merge.sources if s.base), None),
        revision=next((s.revision for s in merge.sources if s.revision), None),
        fan_in_fan_out=any(merge.transposed(module) for module, _, _ in pairs),
        inference_mode=True,
    )
    return config, state


def card(merge: Any) -> str:
    """Model card: sources, weights, method, seed, and a table of the report."""
    lines = ["---", "library_name: peft", "tags:", "- merge", "---", "", "# Merged adapter", ""]
    lines += [f"Method `{merge.method}`, space `{merge.space}`, scale {merge.scale:g}, seed {merge.seed}."]
    if merge.options:
        lines += ["", "Options: " + ", ".join(f"`{k}={v}`" for k, v in merge.options.items())]
    lines += ["", "| source | weight |", "|---|---|"]
    lines += [f"| {s.name} | {w:g} |" for s, w in zip(merge.sources, merge.weights, strict=True)]
    errors = torch.tensor([report.error for report in merge.report.values()])
    ranks = [report.rank for report in merge.report.values()]
    if ranks:
        lines += [
            "",
            f"{len(ranks)} modules, ranks {min(ranks)} to {max(ranks)}; relative error of cutting to them at "
            f"most {float(errors.max()):.3g}, {float(errors.mean()):.3g} on average.",
        ]
    return "\n".join(lines) + "\n"

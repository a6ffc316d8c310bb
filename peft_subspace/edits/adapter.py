"""What all edits share: the model before, the weight that is read, and the adapter that is added."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from peft_subspace.methods.edit import EditConfig
from peft_subspace.tuner.adding import check_new_name, with_adapter
from peft_subspace.tuner.holder import adapted_layers
from peft_subspace.tuner.layer import SubspaceLayer
from peft_subspace.tuner.target import analyze_module


def add_edit(
    model: nn.Module, form: str, states: Mapping[str, Mapping[str, Tensor]], adapter_name: str
) -> PeftModel:
    """Add an adapter with the tensors of each module; edits that are there stay active beside it."""
    of = {"chain": "right", "sparse": "values"}.get(form)
    sizes = {name: len(state[of]) for name, state in states.items()} if of else {}
    config = EditConfig(form=form, sizes=sizes, target_modules="|".join(map(re.escape, sorted(states))))
    active = model.base_model.active_adapters if isinstance(model, PeftModel) else []
    model = with_adapter(model, config, adapter_name)
    model.base_model.set_adapter([*active, adapter_name])
    for name, layer in adapted_layers(model, adapter_name, SubspaceLayer).items():
        layer.deltas[adapter_name].load_state_dict(states[name])
    return model


def check_name(model: nn.Module, adapter_name: str) -> None:
    """Raise, before anything is computed, unless a model can have one more edit of that name.

    Raises:
        ValueError: If it has adapters that are no edits, or one of that name.
    """
    check_new_name(model, adapter_name)
    configs: Any = getattr(model, "peft_config", {})
    if not all(isinstance(config, EditConfig) for config in configs.values()):
        raise ValueError("the model has adapters that are no edits; merge them first (merge_and_unload)")


def bases(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    """Modules by name in the base model.

    Raises:
        ValueError: If the model has no such module.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    known = dict(base.named_modules())
    for name in names:
        if name not in known:
            remedy = "name modules of it, and gather statistics on the model that is edited"
            raise ValueError(f"{name!r} is no module of {type(base).__name__}; {remedy}")
        yield name, known[name]


def read_weight(module: nn.Module) -> Tensor:
    """Weight of a module without its adapters, `(out, columns)` in fp32."""
    if isinstance(module, SubspaceLayer):
        return module.read_weight().flatten(1)
    target = analyze_module(module)
    return target.kind.from_layout(target.base_weight.read()).float().flatten(1)

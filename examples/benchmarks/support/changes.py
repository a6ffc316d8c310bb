"""What edits add to weights, and weights that are changed for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor


def added(edited: PeftModel) -> dict[str, Tensor]:
    """What an edit adds to the weights; it is taken out of the model."""
    layers = {name: edited.get_base_model().get_submodule(name) for name in edited.targeted_module_names}
    updates = {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}
    edited.unload()
    return updates


@contextmanager
def changed(model: Any, update: Mapping[str, Tensor]) -> Iterator[None]:
    """A model whose weights have something added."""
    weights = {name: model.get_submodule(name).weight for name in update}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        for name, weight in weights.items():
            weight += update[name]
        yield
        for name, weight in weights.items():
            weight.copy_(before[name])

"""A warning for adapters that take no part in training, after the first step in which others do."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch._C._functorch import is_functorch_wrapped_tensor

from peft_subspace.layers.calls import outputs_in
from peft_subspace.tuner.holder import AdapterHolder
from peft_subspace.tuner.model import SubspaceModel


class FirstStep:
    """The layers that an adapter has, and those whose results got a gradient in the first training step.

    The first step is over when a layer runs anew after a gradient has arrived somewhere. Layers that gradient
    checkpointing runs anew do so within the backward pass.

    Args:
        layers: Layers of the adapter by their names.
        adapter_name: The adapter.
    """

    def __init__(self, layers: dict[str, AdapterHolder], adapter_name: str) -> None:
        self.layers, self.adapter_name = layers, adapter_name
        self.ran: set[AdapterHolder] = set()
        self.reached: set[AdapterHolder] = set()

    def note(self, layer: AdapterHolder, result: Any) -> None:
        """Take notice of what a layer has computed, of one tensor or several."""
        results = outputs_in(result)
        if torch._C._current_graph_task_id() >= 0 or any(map(is_functorch_wrapped_tensor, results)):
            return
        if layer in self.ran and self.reached:
            self._end()
            return
        self.ran.add(layer)
        for tensor in results:
            if tensor.requires_grad:  # of what a layer has computed, never of a parameter
                tensor.register_hook(lambda gradient: self.reached.add(layer))

    def _end(self) -> None:
        dead = [
            name
            for name, layer in self.layers.items()
            if layer not in self.reached and layer.trains(self.adapter_name)
        ]
        for layer in self.layers.values():
            layer.watch_reach(None)
        if dead:
            named = ", ".join(dead[:8]) + (", …" if len(dead) > 8 else "")
            warnings.warn(
                f"adapter {self.adapter_name!r} got no gradient in the first training step in {len(dead)} of "
                f"{len(self.layers)} layers: {named}. The model may not call them (exclude them with "
                "exclude_modules, or name their weights in target_parameters), run them without gradients, "
                "or have sent no sample there, as to some experts",
                stacklevel=2,
            )


def watch_first_step(tuner: SubspaceModel, adapter_name: str, layers: dict[str, Any]) -> None:
    """Watch the first training step of a new adapter, and let its update look at those that it wants to."""
    for layer in list(layers.values())[:1]:
        layer.watch(adapter_name, tuner.tuner_layer_cls.delta_cls.on_training_step)
    if len(layers) > 1:
        step = FirstStep(layers, adapter_name)
        for layer in layers.values():
            layer.watch_reach(step)


SubspaceModel.after_injection.append(watch_first_step)

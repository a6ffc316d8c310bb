"""The tuner model of Continual SVD: tasks come with those that they build on."""

from __future__ import annotations

import warnings

from torch import nn

from peft_subspace.tuner import callers
from peft_subspace.tuner.heads import set_heads
from peft_subspace.tuner.history import with_history
from peft_subspace.tuner.layer import SubspaceLayer
from peft_subspace.tuner.model import SubspaceModel

from .config import ContinualSVDConfig
from .delta import ContinualSVDDelta


class ContinualSVDModel(SubspaceModel, config=ContinualSVDConfig, update=ContinualSVDDelta):
    """Model with Continual SVD adapters.

    Attributes:
        deleted_task: Config of the adapter that was deleted last, if its task was open.
    """

    deleted_task: ContinualSVDConfig | None = None

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters. What belongs to a finished task stays frozen.

        A task by name comes with what it builds on: a stacked one with the tasks below it, one whose update
        went into the base weights with the task that is open now; heads (`modules_to_save`) are its own. A
        list is taken as it is, heads included; of tasks that follow each other, the last one's are taken.

        Raises:
            ValueError: If tasks of a list that do not follow each other have heads in one module.
        """
        configs = self.peft_config
        names = with_history(configs, adapter_name) if isinstance(adapter_name, str) else adapter_name
        frozen = [name for name, config in configs.items() if inference_mode or config.frozen]
        earlier = {name: config.earlier for name, config in configs.items()}
        set_heads(self.model, names[-1:] if isinstance(adapter_name, str) else names, earlier, frozen)
        for layer in self._layers():
            if layer.merged:
                warnings.warn("adapters are merged; unmerging them first", stacklevel=2)
                layer.unmerge()
            layer.set_adapter(names, inference_mode)
        self.active_adapter = names

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; other active ones stay so, which PEFT alone refuses where there are heads."""
        others = [name for name in self.active_adapters if name != adapter_name]
        config = self.peft_config.get(adapter_name)
        if len(others) > 1 and not any(layer.merged for layer in self._layers()):
            self.set_adapter(others[-1:])
        super().delete_adapter(adapter_name)
        self.deleted_task = None if config is None or config.closed else config
        if len(others) > 1:
            self.set_adapter(others)
            owner = callers.deletes_from()
            if owner is not None and owner.active_adapter == adapter_name:
                owner.active_adapter = others[-1]  # PEFT does this for a single one

    def _layers(self) -> list[SubspaceLayer]:
        return [module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls)]

    def unload(self) -> nn.Module:
        """Give the base model back, without the adapters; says so if a task is lost by that."""
        lost = sorted(name for name in self.peft_config if self._has_update(name))
        if lost:
            remedy = "keep them with merge_and_unload(), continual.next_task, or with save_pretrained before"
            warnings.warn(f"unload() drops the updates of the tasks {lost}; {remedy}", stacklevel=2)
        return super().unload()

    def _has_update(self, adapter_name: str) -> bool:
        """Whether an adapter would be missed: its update is not zero, nor the random one it started at."""
        return self.peft_config[adapter_name].init_weights is not False and any(
            bool(layer.get_delta_weight(adapter_name).any())
            for layer in self._layers()
            if adapter_name in layer.deltas and adapter_name not in layer.merged_adapters
        )

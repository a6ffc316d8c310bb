"""Layers and model of Continual SVD: what the weight is decomposed with, and what stays frozen."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.utils.other import _set_adapter as set_heads
from torch import Tensor, nn

from peft_subspace.base_weights.fingerprint import fingerprint, is_same
from peft_subspace.base_weights.weight import whole_weight
from peft_subspace.core.errors import error_context
from peft_subspace.methods.continual_svd.delta import ContinualSVDDelta
from peft_subspace.runtime.progress import progress
from peft_subspace.tuner.config import SubspaceConfig
from peft_subspace.tuner.layer import SubspaceLayer
from peft_subspace.tuner.model import SubspaceModel
from peft_subspace.tuner.patterns import patterns_of


class ContinualSVDLayer(SubspaceLayer):
    """Layer with Continual SVD adapters."""

    prefix = "continualsvd_"
    delta_cls = ContinualSVDDelta

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters; those of finished tasks stay frozen."""
        super().set_adapter(adapter_names, inference_mode)
        for delta in self.deltas.values():
            if delta.closed:
                delta.requires_grad_(False)

    def absorb(self, adapter_name: str) -> None:
        """Add an adapter's update to the base weight for good, summed in fp32."""
        self.merge(adapter_names=[adapter_name])
        self._kept = None
        self.merged_adapters.clear()

    def update_layer(self, adapter_name: str, config: SubspaceConfig, *args: Any, **kwargs: Any) -> None:
        """Create an adapter, and note for which base weight."""
        super().update_layer(adapter_name, config, *args, **kwargs)
        if not config.initialized:
            self._note_base(self.deltas[adapter_name])

    def started(self, adapter_name: str) -> ContinualSVDDelta:
        """Delta of an adapter, with its base noted if it has waited for that."""
        deferred = adapter_name in self._deferred
        delta = super().started(adapter_name)
        if deferred and not delta.initialized:
            self._note_base(delta)
        return delta

    def _note_base(self, delta: ContinualSVDDelta) -> None:
        found = None if delta.fingerprint.is_meta else self.base_fingerprint()
        if found is not None:
            delta.fingerprint.copy_(found)

    def beneath(self, config: Any) -> list[str]:
        """Earlier tasks that stay adapters."""
        return [name for name in stacked_tasks(config) if name in self.deltas]

    def base_fingerprint(self) -> Tensor | None:
        """Fingerprint of the base weight; None where it cannot be read, or is not there yet."""
        with whole_weight(self.get_base_layer()):
            try:
                weight = self.get_base_weight()
            except NotImplementedError:
                return None
            if weight.is_meta or hasattr(weight, "device_mesh"):
                return None
            return fingerprint(self.ops.to_layout(weight), weight.dtype)


class ContinualSVDLinear(ContinualSVDLayer):
    """Linear layer with Continual SVD adapters."""


class ContinualSVDModel(SubspaceModel):
    """Model with Continual SVD adapters."""

    prefix = "continualsvd_"
    tuner_layer_cls = ContinualSVDLayer
    linear_layer_cls = ContinualSVDLinear

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters. What belongs to a finished task stays frozen.

        A task by name comes with what it builds on: a stacked one with the tasks beneath it, one whose update
        went into the base weights with the task that is open now. A list is taken as it is. Heads
        (`modules_to_save`) are those of the last adapter.
        """
        names = self._with_history(adapter_name) if isinstance(adapter_name, str) else adapter_name
        if not names:
            super().set_adapter(names, inference_mode)
            return
        closed = self.peft_config[names[-1]].closed
        set_heads(self.model, names[-1], inference_mode=inference_mode or closed)
        for layer in self._layers():
            if layer.merged:
                warnings.warn("adapters are merged; unmerging them first", stacklevel=2)
                layer.unmerge()
            layer.set_adapter(names, inference_mode)
        self.active_adapter = names

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse one adapter per sample where that would leave out tasks that an adapter is stacked on."""
        for name in kwargs.get("adapter_names") or ():
            if name in self.peft_config and len(self._with_history(name)) > 1:
                raise ValueError(
                    f"adapter_names cannot give {name!r} the tasks that it builds on, "
                    f"{self._with_history(name)}; use set_adapter({name!r}), one task per batch"
                )
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def _with_history(self, task: str) -> list[str]:
        config = self.peft_config[task]
        below = [name for name in stacked_tasks(config) if name in self.peft_config]
        followers = [n for n, c in self.peft_config.items() if c.earlier_tasks.get(task) == "merge"]
        if followers:
            return [*(name for name in self._with_history(followers[-1]) if name != task), task]
        return [*below, task]

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; other active ones stay so, which PEFT alone refuses where there are heads."""
        others = [name for name in self.active_adapters if name != adapter_name]
        if len(others) > 1 and not any(layer.merged for layer in self._layers()):
            self.set_adapter(others[-1:])
        super().delete_adapter(adapter_name)
        if len(others) > 1:
            self.set_adapter(others)

    def enable_adapter_layers(self) -> None:
        """Enable the adapters; the heads of finished tasks stay frozen."""
        super().enable_adapter_layers()
        for name in self.active_adapters:
            if self.peft_config[name].closed:
                self.set_requires_grad(name, False)

    def _layers(self) -> list[ContinualSVDLayer]:
        return [module for module in self.model.modules() if isinstance(module, ContinualSVDLayer)]

    def unload(self) -> nn.Module:
        """Give the base model back, without the adapters; says so if a task is lost by that."""
        lost = sorted(name for name in self.peft_config if self._has_update(name))
        if lost:
            warnings.warn(
                f"unload() drops the updates of the tasks {lost}; keep them with merge_and_unload(), with "
                "peft_subspace.continual.next_task, or with save_pretrained before",
                stacklevel=2,
            )
        return super().unload()

    def _has_update(self, adapter_name: str) -> bool:
        """Whether an adapter would be missed: its update is not zero, nor the random one it started at."""
        if self.peft_config[adapter_name].init_weights is False:
            return False
        return any(
            bool(layer.get_delta_weight(adapter_name).any())
            for layer in self._layers()
            if adapter_name in layer.deltas and adapter_name not in layer.merged_adapters
        )

    def _combined_config(self, config: Any, ranks: dict[str, Any]) -> Any:
        """Config of a sum of adapters; the rank of a delta is that of its update and what it preserves."""
        combined: Any = super()._combined_config(config, {name: r for name, (r, _) in ranks.items()})
        combined.preserve_pattern = patterns_of({name: preserve for name, (_, preserve) in ranks.items()})
        return combined

    @classmethod
    def check_base(cls, layers: dict[str, Any], state: dict[str, Tensor]) -> None:
        """Raise unless the base weights are those that the adapter's directions were taken from.

        Raises:
            ValueError: Naming the module.
        """
        for key, layer in progress(layers.items(), len(layers), "checking base weights"):
            expected = state.get(f"{key}.fingerprint")
            found = None if expected is None or not expected.any() else layer.base_fingerprint()
            if expected is None or found is None or is_same(found, expected):
                continue
            with error_context(key.partition(f".{cls.prefix}")[0].removeprefix("base_model.model.")):
                raise ValueError(
                    "the base weight is not the one whose directions the adapter protects; load it on the "
                    "model that it was trained on, with the tasks that were merged before it (next_task says "
                    "how to save that model)"
                )


def stacked_tasks(config: Any) -> list[str]:
    """Earlier tasks of a task whose adapters lie beneath it."""
    return [task for task, history in config.earlier_tasks.items() if history == "stack"]

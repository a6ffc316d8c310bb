"""The tuner layer: adapters by name around one base layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import quantization_extra_repr
from torch import Tensor, nn

from peft_subspace.base_weights.quantization import unmergeable
from peft_subspace.base_weights.repacking import prevent_repacking
from peft_subspace.base_weights.weight import BaseWeight
from peft_subspace.core.chain import multiply
from peft_subspace.core.delta import Update
from peft_subspace.core.shapes import ModuleSpec
from peft_subspace.layers.base import Branch, updated_weight
from peft_subspace.tuner import merging, mixed_batch
from peft_subspace.tuner.config import SubspaceConfig
from peft_subspace.tuner.creation import create_adapter, initialize_deferred
from peft_subspace.tuner.holder import AdapterHolder
from peft_subspace.tuner.lean import check_trainable
from peft_subspace.tuner.mixed_forward import forward_mixed_batch
from peft_subspace.tuner.shared import SharedTensors
from peft_subspace.tuner.target import Target, analyze_module
from peft_subspace.tuner.weight_start import WeightStarts


class SubspaceLayer(AdapterHolder):
    """A base layer with adapters: `y = base(x) + Σ s · ΔW x`, summed over the active adapters.

    The classes of a method are made by `tuner.classes`; the rest follows from its `Update`.

    Args:
        base_layer: The layer to adapt, quantized or not, or another tuner layer around one.
        target: Its weight, as `analyze_module` sees it; by default it is analyzed here.
    """

    def __init__(self, base_layer: nn.Module, target: Target | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        target = target or analyze_module(base_layer)
        self.kind = target.kind
        self.parameter_name = target.parameter_name
        self.quantization_backend = target.backend
        self.base_weight = BaseWeight(self, target.parameter_name, target.backend)
        self.is_read = target.is_read
        prevent_repacking(target.module)
        for name in getattr(target.module, "__constants__", ()):  # models read some, such as a stride
            if not hasattr(type(self), name):
                setattr(self, name, getattr(target.module, name))
        self.in_features = self.kind.shape.in_features * self.kind.shape.groups
        self.out_features = self.kind.shape.out_features
        self.cast_input_dtype_enabled = True
        self._deferred: dict[str, tuple[SubspaceConfig, str]] = {}

    def update_layer(
        self,
        adapter_name: str,
        config: SubspaceConfig,
        spec: ModuleSpec,
        source: str | None = None,
        starts: WeightStarts | None = None,
        shared: SharedTensors | None = None,
    ) -> None:
        """Create an adapter, initialize it and put it where the base layer is.

        Args:
            adapter_name: Name of the new adapter.
            config: Its configuration.
            spec: What it asks for here.
            source: Existing adapter of the same config object, whose frozen tensors the new one copies.
            starts: Initializations from base weights that the same adapter has had on other layers.
            shared: Tensors that the adapter shares with other layers, by adapter.
        """
        create_adapter(self, adapter_name, config, spec, source, starts, shared)

    def initialized_delta(self, adapter_name: str) -> Update:
        """Update of an adapter; one that was added while the base weight was on meta is initialized now.

        Raises:
            RuntimeError: If the base weight still is on the meta device.
        """
        if self._deferred:
            initialize_deferred(self, adapter_name)
        return self.deltas[adapter_name]

    def forward(
        self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """Run the base layer and add the active adapters, or one adapter per sample in a mixed batch."""
        batch = self._mixed_batch if adapter_names is None else self._batch_of(adapter_names)
        if batch is not None:
            return forward_mixed_batch(self, batch, x, args, kwargs)
        branches = self._branches()
        if not branches:
            return self.base_layer(x, *args, **kwargs)
        result = self.kind.forward(
            self.base_layer, branches, x, args, kwargs, whole=self._whole, cast=self.cast
        )
        return self.noted(result)

    @property
    def weight(self) -> Tensor:
        """Weight of the base layer, `W + ΔW` where the model is known to compute with it."""
        return self.updated_weight() if self.is_read else super().weight

    def updated_weight(self) -> Tensor:
        """`W` plus the updates of the active adapters, as the base layer stores it.

        Raises:
            ValueError: In a batch with one adapter per sample: all samples share one weight.
            RuntimeError: If the weight is offloaded: its module fetches it too late to be updated.
        """
        self.refuse_mixed_batch("where the model itself computes with a weight")
        branches = self._branches()
        return self.add_updates(branches) if branches else self.base_weight.stored

    def add_updates(self, branches: list[Branch]) -> Tensor:
        """`W` plus the updates of some branches, as the base layer stores it."""
        return self.noted(updated_weight(self.base_weight.stored, self.kind, branches))

    def refuse_mixed_batch(self, where: str) -> None:
        """Raise in a batch with one adapter per sample.

        Raises:
            ValueError: Saying where that cannot be.
        """
        if self._mixed_batch is not None:
            raise ValueError(
                f"adapter_names cannot be used {where}: {self.parameter_name!r} is one weight for all "
                "samples of a batch; run the samples of each adapter by themselves"
            )

    @property
    def _mixed_batch(self) -> mixed_batch.MixedBatch | None:
        """The batch with one adapter per sample that the model runs with."""
        return mixed_batch.batch_for(self) if mixed_batch.running and not self.disable_adapters else None

    def _batch_of(self, adapter_names: Sequence[str]) -> mixed_batch.MixedBatch | None:
        """The batch that a call of this layer alone is for."""
        mixed_batch.check_adapter_names(adapter_names, self.deltas, training=self.training)
        return None if self.disable_adapters else mixed_batch.MixedBatch(tuple(adapter_names))

    def _branches(self) -> list[Branch]:
        """Factors of the active adapters that are not merged; none where only the base layer is to run."""
        if self._watchers and self.takes_training_step:
            self._watch()
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        return [self.branch(name) for name in self.active_here() if name not in self.merged_adapters]

    @property
    def _whole(self) -> bool:
        """Whether the base layer can be run with another weight."""
        return self.quantization_backend is None and not isinstance(self.base_layer, BaseTunerLayer)

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Input of a branch in the dtype of its factors, unless PEFT is asked not to cast."""
        return self._cast_input_dtype(x, dtype) if x.is_floating_point() else x

    def branch(self, adapter_name: str) -> Branch:
        """Factors of one adapter with its scaling and dropout, ready to be applied."""
        dropouts = self.dropouts
        dropout = dropouts[adapter_name] if adapter_name in dropouts else None  # noqa: SIM401 - no dict
        delta = self.initialized_delta(adapter_name)
        if torch.is_grad_enabled():
            check_trainable(delta, adapter_name, training=self.takes_training_step)
        return Branch.scaled(delta(self.read_weight), self.scaling[adapter_name], dropout)

    def get_base_weight(self) -> Tensor:
        """Weight of the base layer as it stores it, dequantized, or read from where it is offloaded.

        Raises:
            NotImplementedError: If its packed values can only be run.
        """
        return self.base_weight.read()

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Set the weight; for a tied one, this layer's alone."""
        self.base_weight.set(weight_data)

    @torch.no_grad()
    def read_weight(self) -> Tensor:
        """Base weight before any merge, `(out, in, *kernel)` in fp32."""
        return self.kind.from_layout(self.base_weight.original().detach()).float()

    def with_updates(self, weight: Tensor, adapters: Iterable[str]) -> Tensor:
        """A base weight plus the updates of some adapters, `(out, in, *kernel)` in fp32."""
        updates = (self.kind.from_layout(self.exact_update(name)) for name in adapters)
        return sum(updates, start=self.kind.from_layout(weight).float())

    def get_delta_weight(self, adapter: str) -> Tensor:
        """`exact_update`, in the dtype in which the adapter is stored."""
        return self.exact_update(adapter).to(self.adapter_dtype(adapter))

    def exact_update(self, adapter: str) -> Tensor:
        """`s · ΔW` of one adapter in fp32, laid out as the base layer stores its weight."""
        delta = self.initialized_delta(adapter)
        with torch.no_grad():
            product = multiply([factor.float() for factor in delta(self.read_weight)])
        return self.kind.to_layout(product * self.scaling[adapter])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's own conversion can handle the layer; `lora_state_dict` is exact, too."""
        return self.kind.linear

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add `ΔW` of the given (default: all active) adapters to the base weight.

        The sum is taken in fp32, always from the original weight: merging one by one or together is the same.

        Raises:
            ValueError: If `safe_merge` and the update is not finite.
            TypeError: If the base layer's quantization cannot be written. The layer is then unmerged.
        """
        merging.merge(self, safe_merge, adapter_names)

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit."""
        merging.unmerge(self)

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raise unless the given (default: all active) adapters can be merged into the base weight.

        Raises:
            TypeError: If the base layer's quantization cannot be written, or its weight is made of others
                that cannot make the sum.
        """
        if self.quantization_backend is not None and not self.quantization_backend.supports_merge:
            raise TypeError(unmergeable(self.quantization_backend))
        computed = self.base_weight.computed
        if computed is not None:
            names = self.active_here() if adapter_names is None else adapter_names
            weight = self.base_weight.original()
            total = self.with_updates(weight, [name for name in names if name in self.deltas])
            computed.values_for(self.kind.to_layout(total).to(weight.dtype))

    @property
    def kept_bytes(self) -> int:
        """Bytes that a merged layer keeps to be able to unmerge."""
        return self.base_weight.kept_bytes

    def extra_repr(self) -> str:
        """Name the quantization of the base layer, if it has any."""
        return quantization_extra_repr(self)

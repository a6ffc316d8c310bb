"""The adapter that holds an edit: a frozen matrix, dense, sparse or of low rank."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_subspace.core.delta import Delta
from peft_subspace.core.shapes import ModuleSpec, WeightShape
from peft_subspace.core.validation import check_choice, check_count, invalid
from peft_subspace.tuner.adding import check_new_name, with_adapter
from peft_subspace.tuner.config import SubspaceConfig
from peft_subspace.tuner.config_checks import check_patterned
from peft_subspace.tuner.holder import adapted_layers
from peft_subspace.tuner.layer import SubspaceLayer
from peft_subspace.tuner.model import SubspaceModel
from peft_subspace.tuner.target import analyze_module

FORMS = ("chain", "dense", "sparse")


@dataclass
class EditConfig(SubspaceConfig):
    """Configuration of `EditModel`, whose adapters the functions of `peft_subspace.edits` make.

    Args:
        r: Rank of a chain, or number of sparse entries, where `sizes` has none.
        form: `"chain"`, two factors; `"dense"`, a matrix; `"sparse"`, entries at flat positions.
        sizes: Written by the library: ranks, or numbers of entries, by module.
    """

    peft_type_name: ClassVar[str] = "EDIT"

    form: str = field(default="chain")
    sizes: dict[str, int] = field(default_factory=dict, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("form", self.form, FORMS)
        for name, size in check_patterned(self, "sizes"):
            check_count(f"sizes[{name!r}]", size)

    @property
    def frozen(self) -> bool:
        """True: nothing of an edit trains."""
        return True

    def spec_for(self, module_name: str, shape: WeightShape) -> ModuleSpec:
        """Rank, or number of entries, of one module."""
        size = self.sizes.get(module_name, self.rank_for(module_name))
        limit = prod(shape.dims) if self.form == "sparse" else shape.full_rank
        if self.form != "dense" and size > limit:
            raise invalid("sizes", size, f"exceeds {limit}, the most that a weight of shape {shape.dims} has")
        return ModuleSpec(module_name, shape, size)


class EditDelta(Delta):
    """Buffers `left (out, r)` and `right (r, in)`, or `matrix (out, in)`, or `indices` and `values` `(k,)`.

    A convolution's kernel is part of the input axis.
    """

    def __init__(self, config: EditConfig, spec: ModuleSpec) -> None:
        super().__init__(config, spec)
        self.form, out, into = config.form, spec.shape.out_features, spec.shape.columns
        forms: dict[str, dict[str, tuple[int, ...]]] = {
            "chain": {"left": (out, spec.rank), "right": (spec.rank, into)},
            "dense": {"matrix": (out, into)},
            "sparse": {"indices": (spec.rank,), "values": (spec.rank,)},
        }
        for name, size in forms[config.form].items():
            dtype = torch.int32 if name == "indices" else torch.float32
            self.register_buffer(name, torch.zeros(size, dtype=dtype))

    def factors(self) -> tuple[Tensor, ...]:
        """Return the factors, or the one matrix."""
        tensors: Any = self
        if self.form == "chain":
            return tensors.left, tensors.right.view(-1, *self.shape.dims[1:])
        if self.form == "dense":
            return (tensors.matrix.view(self.shape.dims),)
        flat = tensors.values.new_zeros(prod(self.shape.dims))
        return (flat.index_put((tensors.indices.long(),), tensors.values).view(self.shape.dims),)

    def reset_parameters(self, init_weights: bool | str, generator: torch.Generator) -> None:
        """Start at zero, or at random; the functions that make edits fill them in."""
        std = self.random_std if init_weights is False else 0.0
        for tensor in self.buffers():
            if tensor.is_floating_point():
                tensor.normal_(std=std, generator=generator)

    def check_values(self, state: Mapping[str, Tensor]) -> None:
        """Raise unless sparse entries lie in the weight.

        Raises:
            ValueError: If they do not, or two have one place.
        """
        indices, count = state.get("indices"), prod(self.shape.dims)
        if indices is None:
            return
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < count:
            raise ValueError(
                f"indices must be from 0 to {count - 1}, the entries of the weight; save it again"
            )
        if len(indices.unique()) < len(indices):
            raise ValueError("indices name an entry twice; the file is damaged, save the adapter again")


class EditModel(SubspaceModel, config=EditConfig, update=EditDelta):
    """Model with edits."""


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

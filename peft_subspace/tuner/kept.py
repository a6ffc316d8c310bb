"""What a tuner layer keeps of its adapters from one mixed batch to the next.

An adapter's chain is stacked with those of others, in the form that its kind of layer takes
(`LayerKind.stackable`), as long as memory allows. The adapter's own tensors move into the stack, so that they
are there once. Else the chain is kept as it is, if all but a small part of it are the adapter's own tensors,
and computed in each batch if it is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peft_subspace.base_weights.quantization import nbytes
from peft_subspace.core.chain import narrowest_rank
from peft_subspace.core.delta import Update
from peft_subspace.core.modes import is_transformed, lasting
from peft_subspace.core.shapes import WeightShape
from peft_subspace.layers.base import Branch
from peft_subspace.layers.calls import has_hooks
from peft_subspace.layers.stacked import Form, fitting, stack

GROWTH = 1.2
"""Bound on the memory of stacks: they may make a layer, its weight and adapters, this many times as large.

Where LoRAs of the same ranks would be larger than the adapters, this many times as large as with those.
Adapters beyond the bound are applied one after another. It may be set, before the first mixed batch.
"""

_SMALL = 0.125
"""Part of a chain's bytes that may be computed where the rest is the adapter's own tensors."""

Stamps = tuple[tuple[int, int, int], ...] | None


@dataclass(frozen=True)
class State:
    """What tells whether an adapter is as it was: its modules, its scaling, its tensors and their versions.

    The tensors are held, so that none of their addresses is given to another one.
    """

    modules: tuple[nn.Module, ...]
    scaling: float
    stamps: Stamps
    held: tuple[Tensor, ...] = field(compare=False)


@dataclass(frozen=True)
class Kept:
    """What a layer keeps; it is replaced and never changed, for other threads may be using it.

    Attributes:
        states: All adapters that have been looked at, as they were.
        places: Positions in `stacked` of the adapters that are in it.
        stacked: Chains of several adapters.
        branches: Adapters by themselves.
    """

    states: Mapping[str, State] = field(default_factory=dict)
    places: Mapping[str, int] = field(default_factory=dict)
    stacked: Form = ()
    branches: Mapping[str, Branch] = field(default_factory=dict)

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        """Copies and files of a model begin with nothing kept."""
        return Kept, ()


def keep(layer: Any, names: Iterable[str], memo: dict[int, Stamps]) -> Kept:
    """What the layer keeps, renewed unless all of the given adapters are as they were.

    Args:
        layer: The tuner layer.
        names: Adapters that are about to be used, and through which no gradient passes.
        memo: Stamps of shared modules that other layers have taken in this pass.
    """
    kept: Kept = layer.kept
    if all(_unchanged(layer, name, kept.states.get(name), memo) for name in names):
        return kept
    known = [name for name in kept.states if name in layer.deltas]
    del kept
    release(layer)  # what was kept is freed before there is more
    with lasting(), torch.no_grad():
        layer.kept = kept = _renewed(layer, dict.fromkeys([*known, *names]), memo)
    return kept


@lasting()
def release(layer: Any) -> None:
    """Keep nothing; tensors of adapters that lie in the stack get memory of their own again."""
    if not layer.kept.states:
        return
    stacks = {tensor.untyped_storage().data_ptr() for tensor in layer.kept.stacked}
    layer.kept = Kept()
    for tensor in (*layer.deltas.parameters(), *layer.deltas.buffers()) if stacks else ():
        if tensor.untyped_storage().data_ptr() in stacks:
            tensor.data = tensor.detach().clone()


def _unchanged(layer: Any, name: str, state: State | None, memo: dict[int, Stamps]) -> bool:
    return (
        state is not None
        and state.modules[0] is layer.deltas[name]
        and state.scaling == layer.scaling[name]
        and state.stamps == _stamps(state.modules, memo)
    )


def _stamps(modules: tuple[nn.Module, ...], memo: dict[int, Stamps]) -> Stamps:
    """Identity, version and address of all tensors; None if they have none, as in inference mode's own."""
    own, *shared = modules
    found = _stamp(own)
    for module in shared:
        if id(module) not in memo:
            memo[id(module)] = _stamp(module)
        theirs = memo[id(module)]
        found = None if found is None or theirs is None else found + theirs
    return found


def _stamp(module: nn.Module) -> Stamps:
    tensors = (*module._parameters.values(), *module._buffers.values())
    try:
        return tuple((id(t), t._version, t.data_ptr()) for t in tensors if t is not None)
    except RuntimeError:
        return None


def _renewed(layer: Any, names: Iterable[str], memo: dict[int, Stamps]) -> Kept:
    states: dict[str, State] = {}
    branches: dict[str, Branch] = {}
    forms: dict[str, Form] = {}
    for name in names:
        delta = layer.initialized_delta(name)
        states[name] = state = _state(delta, layer.scaling[name], memo)
        if _can_be_kept(delta, state):
            with torch.autocast(state.held[0].device.type, enabled=False):
                branch = _branch(layer, delta(layer.read_weight), state.scaling)
                form = layer.kind.stackable(branch.factors)
            if form is not None:
                branches[name], forms[name] = branch, form
    extra = {name: _extra_bytes(branch, states[name]) for name, branch in branches.items()}
    lora = {name: _lora_bytes(layer.kind.shape, branch) for name, branch in branches.items()}
    own = sum(tensor.nbytes for name in branches for tensor in layer.deltas[name].state_dict().values())
    base = nbytes(layer.base_weight.stored)
    cheap = {name for name in branches if extra[name] <= lora[name] * _SMALL}
    room = GROWTH * (base + max(own, sum(lora.values()))) - base - own - sum(extra[name] for name in cheap)
    movable = _movable(layer, branches)
    owners = {name: [_owner(tensor, movable) for tensor in form] for name, form in forms.items()}
    owned = {name: [owner is not None for owner in found] for name, found in owners.items()}
    chosen = fitting(forms, room, owned)
    stacked = stack([forms.pop(name) for name in chosen])
    for place, name in enumerate(chosen):
        _move(owners[name], [total[place] for total in stacked])
        states[name] = _state(layer.deltas[name], layer.scaling[name], memo)
    return Kept(
        states,
        {name: place for place, name in enumerate(chosen)},
        stacked,
        {name: branches[name] for name in forms if name in cheap},
    )


def _branch(layer: Any, factors: tuple[Tensor, ...], scaling: float) -> Branch:
    if layer.kind.linear and len(factors) == 2 and scaling != 1:  # which would be scaled by a copy of one
        left, right = factors
        factors = left, torch.eye(len(right), dtype=right.dtype, device=right.device), right
    return Branch.scaled(factors, scaling, None)


def _movable(layer: Any, names: Iterable[str]) -> dict[int, Tensor]:
    """Frozen tensors of adapters that may lie elsewhere, by address; not those which adapters share."""
    found: dict[int, list[Tensor]] = {}
    for name in names:
        delta = layer.deltas[name]
        for tensor in (*delta.parameters(), *delta.buffers()):
            found.setdefault(tensor.data_ptr(), []).append(tensor)
    return {
        address: first
        for address, (first, *others) in found.items()
        if not (others or first.requires_grad or first.is_shared() or first.is_inference())
        and first.is_contiguous()
    }


def _owner(tensor: Tensor, movable: Mapping[int, Tensor]) -> Tensor | None:
    """An adapter's own tensor of which this one is a view, all of it."""
    owner = movable.get(tensor.data_ptr())
    same = owner is not None and owner.dtype == tensor.dtype and owner.numel() == tensor.numel()
    return owner if same else None


def _move(owners: Sequence[Tensor | None], slots: Sequence[Tensor]) -> None:
    """Let tensors lie where their values are in a stack, unless they were filled up there."""
    for owner, slot in zip(owners, slots, strict=True):
        if owner is not None and slot.numel() == owner.numel():
            owner.data = slot.as_strided(owner.shape, owner.stride())


def _lora_bytes(shape: WeightShape, branch: Branch) -> int:
    rank = narrowest_rank(branch.factors)
    return rank * (shape.out_features + shape.columns) * branch.factors[0].itemsize


def _extra_bytes(branch: Branch, state: State) -> int:
    """Bytes of a branch's factors that are not the adapter's own tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in state.held}
    return sum(f.nbytes for f in branch.factors if f.untyped_storage().data_ptr() not in own)


def _state(delta: Update, scaling: float, memo: dict[int, Stamps]) -> State:
    modules = tuple(module for root in delta.parts for module in root.modules())
    tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    held = (*tensors, *(tensor.detach() for tensor in tensors))
    return State(modules, scaling, _stamps(modules, memo), held)


def _can_be_kept(delta: Update, state: State) -> bool:
    """Whether the chain depends on the tensors of `state` alone, and these are at hand.

    FSDP and DataParallel put tensors in the place of parameters that the modules do not know as such, and
    what a transform computes is of no use after it.
    """
    if not (state.stamps and delta.has_factors) or has_hooks(delta) or is_transformed():
        return False
    plain = all(type(t) in (Tensor, nn.Parameter) and not t.is_meta for t in state.held)
    return plain and not any(isinstance(value, Tensor) for m in state.modules for value in vars(m).values())

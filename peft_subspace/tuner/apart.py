"""Tensors that an adapter's file leaves out: frozen ones that many have, and what only training needs.

The file is enough to run the adapter, unless its config names one with the frozen tensors. For training, two
more are looked for: `adapter_training.safetensors` beside it, with the trained tensors bit for bit, and the
one with the frozen tensors that it names. Without them, these are computed again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from torch import Tensor

from peft_subspace.core.delta import Update
from peft_subspace.core.errors import error_context
from peft_subspace.tuner.frozen_file import file_name, find, read
from peft_subspace.tuner.lean import by_start, frozen_tensors, training_updates
from peft_subspace.tuner.source import opened
from peft_subspace.tuner.weight_start import WeightStarts

logger = getLogger("peft_subspace")

TRAINING_FILE = "adapter_training.safetensors"
FROZEN = "frozen"
"""Key, in the metadata of that file, of the hash of the frozen tensors."""

_MOST_CHANGED = 1e-2
"""Part of a factor that may lie in directions it should be free of: rounding to bf16 makes less of it."""


def named_in(folder: Path) -> str | None:
    """Hash of the file with the frozen tensors, which the config in a folder names."""
    path = folder / CONFIG_NAME
    return json.loads(path.read_bytes()).get("frozen_file") if path.is_file() else None


def read_apart(updates: Mapping[str, Update], folder: Path, digest: str | None) -> dict[str, Tensor]:
    """Read what lies apart from the file of an adapter.

    Args:
        updates: Updates of the adapter, also on the meta device, by the prefix of their keys in a file.
        folder: Folder of the adapter.
        digest: Hash of the file with the frozen tensors, if the adapter's own has none.

    Raises:
        FileNotFoundError: If the file with the frozen tensors is missing.
        ValueError: If one of the files is damaged, or does not fit.
    """
    apart = {}
    if digest is not None:
        apart = read(_frozen_path(folder, digest), frozen_tensors(updates), digest)
    training, path = training_updates(updates), folder / TRAINING_FILE
    if training and path.is_file():
        apart |= read(
            path, {f"{s}{n}": t for s, update in training.items() for n, t in update.named_parameters()}
        )
        digest = _metadata(path).get(FROZEN, "")
        frozen = find(folder, digest)
        if frozen is not None:
            names = {
                f"{s}{n}": getattr(update, n) for s, update in training.items() for n in update.training_only
            }
            apart |= read(frozen, names, digest)
    return apart


def _frozen_path(folder: Path, digest: str) -> Path:
    path = find(folder, digest)
    if path is None:
        raise FileNotFoundError(
            f"the adapter in {folder} was saved without its frozen tensors, and {file_name(digest)} is "
            "neither there nor in the two folders above; copy that file from where the adapter was saved, or "
            "load from the Hub with peft_subspace.load"
        )
    return path


def _metadata(path: Path) -> dict[str, str]:
    with opened(path) as file:
        return file.metadata() or {}


def compute_again(layers: Mapping[str, Any], adapter_name: str, config: Any) -> dict[str, Tensor]:
    """Frozen tensors that only training needs, from the weights of layers, by the prefix of their keys."""
    logger.warning(
        "adapter %r comes without what only training needs; computing it from %d base weights",
        adapter_name,
        len(layers),
    )
    starts, tensors = WeightStarts(len(layers)), dict[str, Tensor]()
    whole = replace(config, initialized=False)  # whose updates are not lean
    for start, layer in layers.items():
        update = layer.deltas[adapter_name]
        fresh = type(update)(whole, update.spec)
        with error_context(update.spec.name):
            try:
                if not starts.start(fresh, layer, config):
                    raise ValueError("the base weight is on the meta device; load the base model first")
            except ValueError as error:
                rest = "or load a checkpoint of a Trainer, beside which is what training needs"
                raise ValueError(
                    f"{error}, {rest}, or load it to be run only, with is_trainable=False"
                ) from error
        tensors |= {f"{start}{name}": getattr(fresh, name) for name in fresh.training_only}
    starts.close()
    return tensors


def complete(
    layers: Mapping[str, Any],
    adapter_name: str,
    config: Any,
    state: Mapping[str, Tensor],
    apart: Mapping[str, Tensor],
    *,
    new: bool,
) -> dict[str, Tensor]:
    """Tensors of an adapter's file with those that it leaves out.

    Args:
        layers: Layers that have the adapter, by the prefix of their keys in the file.
        adapter_name: The adapter.
        config: Its config.
        state: Tensors of the file.
        apart: Tensors that were found apart from it.
        new: Whether the adapter has nothing but what is in these.

    Raises:
        ValueError: If the update is none that can be trained here.
    """
    updates = {start: layer.deltas[adapter_name] for start, layer in layers.items()}
    whole = {**state, **apart}
    training = {
        start: update
        for start, update in training_updates(updates).items()
        if not all(f"{start}{name}" in state for name in update.training_only)
    }
    lacking = {
        start: layers[start]
        for start, update in training.items()
        if new and not all(f"{start}{name}" in whole for name in update.training_only)
    }
    if lacking:
        whole |= compute_again(lacking, adapter_name, config)
    of_file, of_all = by_start(training, state), by_start(training, whole)
    for start, update in training.items():
        with error_context(update.spec.name):
            _check_same(update, of_file[start], of_all[start])
    return whole


def drop_unfilled(updates: Mapping[str, Update], state: Mapping[str, Tensor]) -> None:
    """Make those updates lean that nothing has filled yet, and that tensors handed over can only fill so."""
    for start, update in updates.items():
        lacking = [n for n in update.training_only if f"{start}{n}" not in state and not update.lean]
        if any(t.is_meta or (t.numel() > 0 and not t.any()) for t in map(update.get_buffer, lacking)):
            update.drop_training_buffers()


@torch.no_grad()
def confine(updates: Mapping[str, Update], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors, of which those for lean updates are in that form: a file of version 0.1 has them otherwise."""
    confined = dict(state)
    for start, own in by_start((start for start, update in updates.items() if update.lean), state).items():
        lean = updates[start].inference_state(own)
        confined |= {f"{start}{name}": tensor for name, tensor in lean.items()}
    return confined


@torch.no_grad()
def _check_same(update: Update, state: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
    """Raise unless an update in its form for training is that of a file."""
    if not state:
        return
    own = {**{name: getattr(update, name) for name in update.training_only}, **whole}
    device = next(iter(own.values())).device
    made = update.inference_state({name: tensor.to(device) for name, tensor in own.items()})
    for name, wanted in state.items():
        wanted = wanted.to(device)
        if (made[name] - wanted).norm() > _MOST_CHANGED * wanted.norm():
            raise ValueError(
                f"{name} is another one to be trained on than in the adapter's file: the base weight has "
                f"other directions here, or {TRAINING_FILE} is of another adapter; load the tasks below "
                "before it, on the model that it was trained on, or load it to be run only, with "
                "is_trainable=False"
            )

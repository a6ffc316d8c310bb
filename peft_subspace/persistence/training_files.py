"""What only further training needs of an adapter, written beside the checkpoints of a Trainer."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from peft_subspace.runtime.files import atomic_write
from peft_subspace.tuner import callers, frozen_file
from peft_subspace.tuner.apart import FROZEN, TRAINING_FILE
from peft_subspace.tuner.config import SubspaceConfig
from peft_subspace.tuner.lean import by_start, layers_by_key, training_updates

_CHECKPOINT = re.compile(r"checkpoint-\d+")


def write_training_files(folder: Path, config: SubspaceConfig) -> None:
    """Write what training goes on from, bit for bit, where PEFT saves an adapter into a Trainer's checkpoint.

    The trained tensors go into the adapter's folder, `run/checkpoint-5/adapter_training.safetensors`, the
    frozen ones, once, beside the checkpoints, `run/_training/frozen-….safetensors`. Other folders are for
    sharing, and training that starts there computes the frozen tensors again.
    """
    checkpoint = next((p for p in (folder, folder.parent) if _CHECKPOINT.fullmatch(p.name)), None)
    saving = callers.saved_adapter()
    if checkpoint is None or saving is None or config.format_version < 2:
        return
    model, adapter_name, state = saving
    layers = layers_by_key(model, model.base_model.tuner_layer_cls, adapter_name)
    updates = {saved: layer.deltas[adapter_name] for (_, saved), layer in layers.items()}
    if not training_updates(updates):
        return
    state = model.state_dict() if state is None else state
    trained, frozen = dict[str, Tensor](), dict[str, Tensor]()
    tensors = by_start((start for start, _ in layers), state)
    for start, saved in layers:
        update = updates[saved]
        for name, tensor in tensors[start].items():
            if update.training_only and name in dict(update.named_parameters()):
                trained[f"{saved}{name}"] = tensor.detach().cpu().contiguous()
            elif name in update.training_only:
                frozen[f"{saved}{name}"] = tensor
    digest = frozen_file.write(checkpoint.parent / frozen_file.TRAINING_FOLDER, frozen)
    with atomic_write(folder / TRAINING_FILE) as partial:
        save_file(trained, partial, {"format": "pt", FROZEN: digest})


SubspaceConfig.on_save.append(write_training_files)

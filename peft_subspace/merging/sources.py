"""What is merged: adapters of this package, LoRAs of PEFT, and full checkpoints, read module by module."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftType, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from peft_subspace.core.names import in_base
from peft_subspace.merging.checkpoints import Checkpoint, read_tensor
from peft_subspace.merging.source import Source
from peft_subspace.persistence.folder import adapter_folder
from peft_subspace.persistence.lora_export import lora_state_dict
from peft_subspace.tools.read_adapter import read_adapter
from peft_subspace.tuner.holder import adapted_layers
from peft_subspace.tuner.layer import SubspaceLayer
from peft_subspace.tuner.patterns import look_up
from peft_subspace.tuner.source import opened

Read = Callable[[], Tensor]
"""Reads one tensor."""

_NO_FACTORS = {
    "use_dora": "DoRA rescales the weight",
    "lora_bias": "it trains biases of its factors",
    "alora_invocation_tokens": "it acts on some tokens only",
    "target_parameters": "its factors belong to parameters of modules",
    "layer_replication": "its base has layers twice",
}
"""Options of PEFT's LoRA under which its update is not the product of its factors, and why."""

_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""Starts of LoRA that change the base weight or the equation."""


@dataclass
class LoRASource(Source):
    """A LoRA: its config, and functions that read the left and the right factor of each module."""

    config: Any = None
    readers: Mapping[str, tuple[Read, Read]] = field(default_factory=dict)

    def pair(self, module: str) -> tuple[Tensor, Tensor]:
        """Factors of one module, the left one scaled."""
        left, right = (read() for read in self.readers[module])
        alpha = look_up(self.config.alpha_pattern or {}, module, self.config.lora_alpha)
        rank = len(right)
        scaling = alpha / (rank**0.5 if self.config.use_rslora else rank)
        if module in self.embeddings:  # whose factors PEFT keeps for the transposed weight
            left, right = right.T, left.T
        return left.float().flatten(1) * scaling, right.float()


def open_source(
    source: Any, base: str | Path | nn.Module | None = None, *, common_rows: bool = False
) -> Source:
    """Open what is to be merged.

    Args:
        source: Folder of an adapter or of a full checkpoint; id of an adapter on the Hub; a model with an
            adapter `"default"`, of this package or a LoRA of PEFT's, or a pair of model and adapter name.
        base: Folder of the base model, needed for checkpoints; for adapters it may be the model itself.
        common_rows: Whether a checkpoint may have another number of rows than the base.

    Raises:
        FileNotFoundError: If a folder has neither, or there is none, here or on the Hub.
        ValueError: If an adapter's update is not made of its factors, or a file is damaged.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, nn.Module):
        source = (source, "default")
    if isinstance(source, tuple):
        return _on_model(source[1], *source)
    name = str(source)
    folder = Path(source) if Path(source).is_dir() else adapter_folder(name, {})
    if not (folder / CONFIG_NAME).is_file():
        return Checkpoint.open(folder, base, common_rows=common_rows)
    declared = json.loads((folder / CONFIG_NAME).read_text())
    if declared.get("peft_type") != "LORA":
        return _on_model(name, read_adapter(folder, base), "default")
    config = PeftConfig.from_pretrained(str(folder))
    _check_equation(name, config)
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {path.name}; pickled tensors are not read")
    with opened(path) as file:
        keys = list(file.keys())
    return _of_lora(name, config, {key: partial(read_tensor, path, key) for key in keys})


def _on_model(name: str, model: nn.Module, adapter_name: str) -> LoRASource:
    """An adapter on a model, as a LoRA."""
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is not None and config.peft_type == PeftType.LORA:
        _check_equation(adapter_name, config)
        state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    else:
        config, state = lora_state_dict(model, adapter_name)
    made = _of_lora(name, config, {key: partial(_same, tensor.detach()) for key, tensor in state.items()})
    deltas = {
        m: la.deltas[adapter_name] for m, la in adapted_layers(model, adapter_name, SubspaceLayer).items()
    }
    made.fingerprints = {
        m: d.fingerprint for m, d in deltas.items() if d.needs_weight and d.fingerprint.any()
    }
    return made


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _of_lora(name: str, config: Any, state: Mapping[str, Read]) -> LoRASource:
    readers: dict[str, tuple[Read, Read]] = {}
    others, embeddings = {}, set()
    for key, read in state.items():
        module, is_lora, part = in_base(key).rpartition(".lora_")
        if part == "embedding_A":
            embeddings.add(module)
        if part in ("A.weight", "embedding_A"):
            left = key.replace(".lora_A.", ".lora_B.").replace("lora_embedding_A", "lora_embedding_B")
            readers[module] = (state[left], read)
        elif not is_lora:
            others[key] = read()
    base = getattr(config, "base_model_name_or_path", None)
    loads = {key: getattr(config, key) for key in ("modules_to_save", "trainable_token_indices", "bias")}
    return LoRASource(
        name,
        list(readers),
        base,
        others,
        frozenset(embeddings),
        loads,
        fan_in_fan_out=bool(config.fan_in_fan_out),
        revision=config.revision,
        config=config,
        readers=readers,
    )


def _check_equation(name: str, config: Any) -> None:
    for option, reason in _reasons(config):
        raise ValueError(f"{name}: {option} is set, and {reason}; merge that adapter into its model instead")


def _reasons(config: Any) -> Iterator[tuple[str, str]]:
    """Options that make an update something else than the product of its factors, and why."""
    for field_ in fields(config):
        variant = "it changes the equation of LoRA" if field_.metadata.get("is_lora_variant") else None
        reason = _NO_FACTORS.get(field_.name, variant)
        if reason and getattr(config, field_.name):
            yield field_.name, reason
    start = str(config.init_lora_weights).lower()
    if start.startswith(_OTHER_BASE):
        rule = "that start changes the base; save with path_initial_model_for_weight_conversion"
        yield f"init_lora_weights={start!r}", rule


def check_finite(source: Source, factors: tuple[Tensor, Tensor]) -> None:
    """Raise unless the factors of a module are finite.

    Raises:
        ValueError: Naming the source.
    """
    if not all(torch.isfinite(factor).all() for factor in factors):
        raise ValueError(f"{source.name} has NaN or infinite values; train the adapter again")

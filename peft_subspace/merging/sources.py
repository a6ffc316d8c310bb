"""What is merged: adapters of this package, LoRAs of PEFT, and full checkpoints, read module by module."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from peft_subspace.core.names import in_base
from peft_subspace.merging.checkpoints import Checkpoint
from peft_subspace.persistence.lora_export import lora_state_dict
from peft_subspace.tools.read_adapter import read_adapter
from peft_subspace.tuner.patterns import look_up

_NO_FACTORS = {
    "use_dora": "DoRA rescales the weight",
    "lora_bias": "it trains biases of its factors",
    "alora_invocation_tokens": "it acts on some tokens only",
    "target_parameters": "its factors belong to parameters of modules",
}
"""Options of PEFT's LoRA under which its update is not the product of its factors."""


@dataclass
class Source:
    """One thing to merge.

    Attributes:
        name: What reports and errors call it.
        modules: Names of the modules that it changes.
        base: Base model that it names, or None.
        others: What it has besides: heads, biases, token rows.
        embeddings: Those of the modules that are embeddings.
    """

    name: str
    modules: list[str]
    base: str | None = None
    others: dict[str, Tensor] = field(default_factory=dict)
    embeddings: frozenset[str] = frozenset()

    def pair(self, module: str) -> tuple[Tensor, Tensor]:
        """Factors `(m, r)` and `(r, n, *kernel)` of the update of one module, in fp32."""
        raise NotImplementedError


@dataclass
class LoRASource(Source):
    """A LoRA: its tensors by module, and its scalings."""

    tensors: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    scaling: Mapping[str, float] = field(default_factory=dict)

    def pair(self, module: str) -> tuple[Tensor, Tensor]:
        """Factors of one module, the left one scaled."""
        left, right = (tensor() if callable(tensor) else tensor for tensor in self.tensors[module])
        return left.float().flatten(1) * self.scaling[module], right.float()


def open_source(source: Any, base: str | Path | None = None) -> Source:
    """Open what is to be merged.

    Args:
        source: Folder of an adapter or of a full checkpoint; a model with an adapter `"default"` of this
            package, or a pair of model and adapter name.
        base: Folder of the base model; needed for checkpoints.

    Raises:
        FileNotFoundError: If a folder has neither.
        ValueError: If an adapter's update is not made of its factors, or a file is damaged.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, nn.Module):
        source = (source, "default")
    if isinstance(source, tuple):
        model, name = source
        config, state = lora_state_dict(model, name)
        return _of_lora(name, config, {key: (lambda t=tensor: t) for key, tensor in state.items()})
    folder = Path(source)
    if not (folder / CONFIG_NAME).is_file():
        return Checkpoint.open(folder, base)
    declared = json.loads((folder / CONFIG_NAME).read_text())
    if declared.get("peft_type") != "LORA":
        config, state = lora_state_dict(read_adapter(folder, base))
        return _of_lora(str(folder), config, {key: (lambda t=tensor: t) for key, tensor in state.items()})
    config = PeftConfig.from_pretrained(str(folder))
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {path.name}; pickled tensors are not read")
    with _opened(path) as file:
        keys = list(file.keys())
    return _of_lora(str(folder), config, {key: _reader(path, key) for key in keys})


def _of_lora(name: str, config: Any, state: Mapping[str, Any]) -> LoRASource:
    for option, reason in _NO_FACTORS.items():
        if getattr(config, option, None):
            raise ValueError(
                f"{name}: {option} is set, and {reason}; merge that adapter into its model instead"
            )
    tensors: dict[str, tuple[Any, Any]] = {}
    others, embeddings = {}, set()
    for key, read in state.items():
        module, is_lora, part = in_base(key).rpartition(".lora_")
        if part == "embedding_A":
            embeddings.add(module)
        if part in ("A.weight", "embedding_A"):
            left = key.replace(".lora_A.", ".lora_B.").replace("lora_embedding_A", "lora_embedding_B")
            tensors[module] = (state[left], read)
        elif not is_lora:
            others[key] = read()
    scaling = {module: _scaling(config, module, right()) for module, (_, right) in tensors.items()}
    base = getattr(config, "base_model_name_or_path", None)
    return LoRASource(name, list(tensors), base, others, frozenset(embeddings), tensors, scaling)


def _scaling(config: Any, module: str, right: Tensor) -> float:
    alpha = look_up(config.alpha_pattern or {}, module, config.lora_alpha)
    rank = right.shape[0]
    return alpha / (rank**0.5 if config.use_rslora else rank)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error})") from error


def _reader(path: Path, key: str) -> Any:
    def read() -> Tensor:
        with _opened(path) as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor

    return read


def check_finite(source: Source, factors: tuple[Tensor, Tensor]) -> None:
    """Raise unless the factors of a module are finite.

    Raises:
        ValueError: Naming the source.
    """
    if not all(torch.isfinite(factor).all() for factor in factors):
        raise ValueError(f"{source.name} has NaN or infinite values; train the adapter again")

"""What the file of an adapter must have before PEFT adds the adapter, for then it asks no tuner any more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from peft_subspace.tuner.declared import base_name
from peft_subspace.tuner.heads import planned_heads


def check_source(folder: Path, model: nn.Module, config: Any) -> None:
    """Raise unless a folder has a complete file with all that a config brings besides its update.

    These are the tensors of its `modules_to_save`, and the rows of its `trainable_token_indices`.

    Nothing is checked of a folder that is still on the Hub, or of pickled tensors.

    Raises:
        FileNotFoundError: If it has no file.
        ValueError: If the file is damaged, or lacks a tensor.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not folder.is_dir() or (folder / WEIGHTS_NAME).is_file():
        return
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {path.name}; save the adapter with save_pretrained")
    with opened(path) as file:
        keys = file.keys() if config.modules_to_save or config.trainable_token_indices else ()
        shapes = {f".{base_name(key)}": tuple(file.get_slice(key).get_shape()) for key in keys}
    tokens = config.trainable_token_indices or ()
    for name in tokens if isinstance(tokens, dict) else [""] * bool(tokens):
        if not any(key.endswith(f"{name}.trainable_tokens_delta") for key in shapes):
            rule = f"{path} has no rows of trainable_token_indices={tokens}; save the adapter again"
            raise ValueError(rule)
    for tensor, shape in _tensors_of(model, config):
        found = [shapes[key] for key in shapes if key.endswith(f".{tensor}")]
        if not found:
            raise ValueError(
                f"{path} has no {tensor}, one of modules_to_save={config.modules_to_save}; save the adapter "
                "again"
            )
        if shape not in (None, *found):
            raise ValueError(
                f"{path} has {tensor} of shape {found[0]}, and heads={config.heads} ask for {shape}; save "
                "the adapter again"
            )


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file.

    Raises:
        ValueError: If it is cut off, or none of safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}); download or save it again"
        ) from error


def _tensors_of(model: nn.Module, config: Any) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    """Tensors of `modules_to_save`, without the paths to these, which a file may have otherwise.

    The shapes of heads that the config sizes come with them.
    """
    heads, ends = planned_heads(model, config), tuple(config.modules_to_save or ())
    for name, module in model.named_modules() if ends else ():
        if name.endswith(ends) and base_name(f"{name}.") == f"{name}.":
            for key, tensor in heads.get(name, module).state_dict().items():
                if "modules_to_save." not in key:  # of another adapter
                    shape = tuple(tensor.shape) if name in heads else None
                    yield f"{name.rpartition('.')[2]}.{base_name(key)}", shape

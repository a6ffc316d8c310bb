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


def check_source(folder: Path, model: nn.Module, modules_to_save: list[str] | None) -> None:
    """Raise unless a folder has a complete file with tensors for all of `modules_to_save`.

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
        found = [f".{base_name(key)}" for key in file.keys()]  # noqa: SIM118
    for tensor in _tensors_of(model, tuple(modules_to_save or ())):
        if not any(key.endswith(f".{tensor}") for key in found):
            raise ValueError(
                f"{path} has no {tensor}, one of modules_to_save={modules_to_save}; save the adapter again"
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


def _tensors_of(model: nn.Module, ends: tuple[str, ...]) -> Iterator[str]:
    """Names of the tensors of some modules, without the paths to these, which a file may have otherwise."""
    for name, module in model.named_modules():
        if name.endswith(ends) and base_name(f"{name}.") == f"{name}.":
            for key in module.state_dict():
                if "modules_to_save." not in key:  # of another adapter
                    yield f"{name.rpartition('.')[2]}.{base_name(key)}"

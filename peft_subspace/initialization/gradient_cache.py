"""Cache of mean gradients in a safetensors file, which is written and read one module at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from peft_subspace.core.state import check_shapes
from peft_subspace.initialization.gradients import Gradients
from peft_subspace.runtime.files import atomic_write


def read_gradients(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Gradients:
    """Yield the gradients of the named modules, after checking that all are there.

    Raises:
        ValueError: If the file is damaged, lacks a module, or has a gradient of another shape.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            expected = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
            check_shapes(expected, found)
            for name in shapes:
                yield name, file.get_tensor(name)
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"cache={str(path)!r} holds no gradients for these modules ({error}); delete the file, or name "
            "another one"
        ) from error


def write_gradients(path: Path, shapes: Mapping[str, tuple[int, ...]], gradients: Gradients) -> Gradients:
    """Yield the gradients and write them to a file; they must come in the order of `shapes`.

    The file appears when the last gradient is written, so that an interruption leaves no file.
    """
    with closing(gradients), atomic_write(path) as partial, partial.open("wb") as file:
        file.write(_header(shapes))
        for name, gradient in gradients:
            file.write(gradient.contiguous().cpu().numpy().astype("<f4", copy=False).data)
            yield name, gradient


def _header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """Header of a safetensors file: its length, then names, shapes and positions as JSON."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

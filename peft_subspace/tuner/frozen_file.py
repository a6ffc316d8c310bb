"""Frozen tensors in a file of their own, beside the adapters that have them in common.

Its name is the hash of its content. Whoever knows the hash finds it in the adapter's folder or in one of the
two above, and there also in the folder of what only training needs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from peft_subspace.core.state import check_shapes, check_state
from peft_subspace.runtime.files import atomic_write
from peft_subspace.tuner.source import opened

TRAINING_FOLDER = "_training"  # a Trainer that uploads its folder leaves out names with this first letter
_DIGEST = re.compile("[0-9a-f]{32}")


def is_digest(value: object) -> bool:
    """Whether a value can be the hash of a file, rather than a path to some other one."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def file_name(digest: str) -> str:
    """Name of the file with this hash."""
    return f"frozen-{digest}.safetensors"


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Hash of tensors and their names."""
    total = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        total.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()[:32]


def write(folder: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors into their file, unless it is there already, and return its hash."""
    digest = digest_of(tensors)
    path = folder / file_name(digest)
    if not path.is_file():
        with atomic_write(path) as partial:
            save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, partial)
    return digest


def find(folder: Path, digest: str) -> Path | None:
    """Path of the file with this hash in the reach of an adapter's folder, None if it is not there."""
    folder = folder.absolute()
    for home in (folder, *folder.parents[:2]) if is_digest(digest) else ():
        for path in (home / file_name(digest), home / TRAINING_FOLDER / file_name(digest)):
            if path.is_file():
                return path
    return None


def read(path: Path, expected: Mapping[str, Tensor], digest: str | None = None) -> dict[str, Tensor]:
    """Read tensors of the shapes of `expected`, and compare their hash with `digest`.

    Raises:
        ValueError: If the file is damaged, or its tensors are other ones.
    """
    try:
        with opened(path) as file:
            check_shapes(dict(expected), {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()})  # noqa: SIM118
            state = {key: file.get_tensor(key) for key in expected}
    except ValueError as error:
        raise ValueError(f"{path} does not fit: {error}") from error
    check_state(dict(expected), state)
    if digest is not None and digest_of(state) != digest:
        raise ValueError(
            f"{path} does not hold the tensors that its name stands for; it is damaged, or of another base "
            "model: copy it again from where the adapter was saved"
        )
    return state

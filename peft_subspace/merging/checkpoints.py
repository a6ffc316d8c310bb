"""Full checkpoints in safetensors files: read as differences from a base, and written anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_subspace.merging.source import Source
from peft_subspace.runtime.files import atomic_write
from peft_subspace.tuner.source import opened

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def shards(folder: Path) -> dict[str, Path]:
    """Files of a checkpoint by the names of their tensors.

    Raises:
        FileNotFoundError: If the folder has no safetensors file.
    """
    index = folder / _INDEX
    if index.is_file():
        places = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in places.items()}
    path = folder / _ONE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has neither an adapter_config.json nor {_ONE}; give the folder of an adapter, or of a "
            "model saved with save_pretrained"
        )
    with opened(path) as file:
        return dict.fromkeys(file.keys(), path)


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a file."""
    with opened(path) as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


@dataclass
class Checkpoint(Source):
    """A full checkpoint as a source: `τ = W − W_0` of all its weights with two axes or more.

    Its `others` are changed tensors with one axis, and those that the base has not.

    Attributes:
        places: Files by tensor.
        origin: Files of the base by tensor.
    """

    places: dict[str, Path] = field(default_factory=dict)
    origin: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def open(
        cls, folder: Path, base: str | Path | nn.Module | None, *, common_rows: bool = False
    ) -> Checkpoint:
        """Open a checkpoint beside its base, which may have another number of rows if only the common count.

        Raises:
            ValueError: If no base is given, or a tensor has another shape there.
        """
        places = shards(folder)
        if base is None or isinstance(base, nn.Module):
            raise ValueError(
                f"{folder} is a full checkpoint, of which a base is subtracted; give base=FOLDER"
            )
        origin = shards(Path(base))
        modules, others = [], {}
        for name in places:
            if name not in origin:
                others[name] = read_tensor(places[name], name)
                continue
            ours, theirs = read_tensor(places[name], name), read_tensor(origin[name], name)
            if common_rows and ours.ndim > 1 and ours.shape[1:] == theirs.shape[1:]:
                ours, theirs = _common(ours, theirs)
            if ours.shape != theirs.shape:
                raise ValueError(
                    f"{folder}: {name} has shape {tuple(ours.shape)}, and {tuple(theirs.shape)} in the base "
                    f"{base}; give the base that it was trained from, or rows='common' if tokens were added"
                )
            if torch.equal(ours, theirs):
                continue
            if name.endswith(".weight") and ours.ndim > 1:
                modules.append(name.removesuffix(".weight"))
            else:
                others[name] = ours
        return cls(str(folder), modules, str(base), others, stored=True, places=places, origin=origin)

    def pair(self, module: str) -> tuple[Tensor, Tensor]:
        """`τ` times the identity: a checkpoint's update has no factors."""
        name = f"{module}.weight"
        after, before = (read_tensor(files[name], name) for files in (self.places, self.origin))
        after, before = _common(after, before)
        change = after.float() - before.float()
        if len(change) <= change[0].numel():
            return torch.eye(len(change)), change
        columns = change[0].numel()
        return change.flatten(1), torch.eye(columns).reshape(columns, *change.shape[1:])


def _common(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that both have."""
    rows = min(len(one), len(other))
    return one[:rows], other[:rows]


def write_merged(
    base: Path,
    directory: Path,
    updates: Callable[[str], Tensor | None],
    others: Mapping[str, Tensor],
    recipe: str,
) -> None:
    """Write a checkpoint that is a base plus updates, file by file.

    The folder is there once it is complete. After a kill, the same merge goes on with the files that it has
    in `<folder>.partial`; after an error that folder is gone.

    Args:
        base: Folder of the base model.
        directory: Folder to write.
        updates: Function of a module's name that returns its update, of the first rows at least, or None.
        others: Tensors of the base that are replaced, by name.
        recipe: Description of the merge, by which it is known again.

    Raises:
        ValueError: If the disk has no room for it, or the base has no tensor of a name.
    """
    places = shards(base)
    if missing := sorted(set(others) - set(places)):
        raise ValueError(
            f"{base} has no {', '.join(missing)}, which a source has besides its update; load the base with "
            "that head and save it, or choose others='drop'"
        )
    unfinished = directory.absolute().with_name(f"{directory.name}.partial")
    note = unfinished / "recipe.txt"
    if not (note.is_file() and note.read_text() == recipe):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        note.write_text(recipe)
    try:
        _check_room(unfinished, set(places.values()))
        for file in sorted(set(places.values())):
            if not (unfinished / file.name).is_file():
                names = sorted(name for name, place in places.items() if place == file)
                _write_shard(unfinished / file.name, {n: places[n] for n in names}, updates, others)
    except Exception:
        shutil.rmtree(unfinished)
        raise
    note.unlink()
    directory.mkdir(parents=True, exist_ok=True)
    for file in [*_rest(base), *sorted(unfinished.iterdir())]:
        move = shutil.copy2 if file.parent == base else shutil.move
        move(file, directory / file.name)
    unfinished.rmdir()


def _check_room(folder: Path, files: set[Path]) -> None:
    needed = sum(file.stat().st_size for file in files if not (folder / file.name).is_file())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"the merged model takes {needed:,} bytes, and the disk has {free:,}; make room first"
        )


def _write_shard(
    path: Path,
    places: dict[str, Path],
    updates: Callable[[str], Tensor | None],
    others: Mapping[str, Tensor],
) -> None:
    tensors = {}
    for name, place in places.items():
        tensor = read_tensor(place, name)
        tensor = others.get(name, tensor).to(tensor.dtype)
        change = updates(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if change is not None:
            rows = tensor[: len(change)]
            sums = (rows.float() + change.reshape(rows.shape)).to(tensor.dtype)
            tensor = torch.cat([sums, tensor[len(change) :]])
        tensors[name] = tensor.contiguous()
    with atomic_write(path) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})


def _rest(base: Path) -> Iterator[Path]:
    """Files of the base model besides its weights."""
    for file in sorted(base.iterdir()):
        if file.is_file() and file.suffix not in (".safetensors", ".bin", ".pt"):
            yield file

"""The folder of an adapter, or its repository on the Hub, and the two files that it must hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from peft_subspace.tuner.apart import named_in
from peft_subspace.tuner.frozen_file import file_name, is_digest

_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)


def adapter_folder(path: str, kwargs: dict[str, Any]) -> Path:
    """Return the folder with config and weights; nothing else is fetched from the Hub.

    Args:
        path: Folder, or id on the Hub.
        kwargs: `subfolder`, and what else `snapshot_download` takes, such as `revision`, are taken out of it.

    Raises:
        FileNotFoundError: If there is no such folder or answer of the Hub, or a file is missing.
        ValueError: If one is a link out of the folder.
    """
    subfolder = kwargs.pop("subfolder", None) or ""
    options: dict[str, Any] = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    shown = Path(path, subfolder)
    if not Path(path).is_dir():
        try:
            path = _download(path, Path(subfolder), options)
        except (HFValidationError, LocalEntryNotFoundError) as error:
            reason = str(error).splitlines()[0]
            raise FileNotFoundError(
                f"{path} is no folder here, and no adapter that the Hub gives ({reason}); check the name"
            ) from error
    folder = Path(path) / subfolder
    for name in _FILES:
        _check_file(folder, name, shown)
    return folder


def _download(repository: str, subfolder: Path, options: dict[str, Any]) -> str:
    """Fetch the two files, and that with the frozen tensors where the config names one."""
    patterns = [str(subfolder / name) for name in _FILES]
    path = snapshot_download(repository, allow_patterns=patterns, **options)
    digest = named_in(Path(path) / subfolder)
    if digest is not None and is_digest(digest):
        patterns = [str(home / file_name(digest)) for home in (subfolder, *subfolder.parents[:2])]
        path = snapshot_download(repository, allow_patterns=patterns, **options)
    return path


def _check_file(folder: Path, name: str, shown: Path) -> None:
    """Raise unless the file exists and lies in its folder; the Hub's cache holds links to its own blobs."""
    path, home = folder / name, folder.resolve()
    if not path.is_file():
        raise FileNotFoundError(
            f"{shown} has no {name}; give the folder that save_pretrained writes, and on the Hub its "
            "revision and subfolder"
        )
    if path.resolve().parent not in (home, *(parent / "blobs" for parent in home.parents)):
        raise ValueError(f"{path} is a link out of the adapter's folder; put the file itself there")

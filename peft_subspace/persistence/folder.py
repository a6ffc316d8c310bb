"""The folder of an adapter, or its repository on the Hub, and the two files that it must hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)


def adapter_folder(path: str, kwargs: dict[str, Any]) -> Path:
    """Return the folder with config and weights; nothing else is fetched from the Hub.

    Args:
        path: Folder, or id on the Hub.
        kwargs: `subfolder`, and what else `snapshot_download` takes, such as `revision`, are taken out of it.

    Raises:
        FileNotFoundError: If one of the two files is missing.
        ValueError: If one is a link out of the folder.
    """
    subfolder = kwargs.pop("subfolder", None) or ""
    options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    if not Path(path).is_dir():
        path = snapshot_download(
            path, allow_patterns=[str(Path(subfolder) / name) for name in _FILES], **options
        )
    folder = Path(path) / subfolder
    for name in _FILES:
        _check_file(folder, name)
    return folder


def _check_file(folder: Path, name: str) -> None:
    """Raise unless the file exists and lies in its folder; the Hub's cache holds links to its own blobs."""
    path, home = folder / name, folder.resolve()
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {name}; save the adapter with save_pretrained and load that folder"
        )
    if path.resolve().parent not in (home, *(parent / "blobs" for parent in home.parents)):
        raise ValueError(f"{path} is a link out of the adapter's folder; put the file itself there")

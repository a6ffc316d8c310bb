"""What PEFT is doing while it calls a hook, where it does not tell the hook."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from peft import PeftModel, set_peft_model_state_dict
from peft.config import PeftConfigMixin


def reads_file() -> bool:
    """Whether PEFT is loading an adapter from a file, and not from tensors that the user has handed over."""
    reading: Any = PeftModel.from_pretrained
    return _running(PeftModel.load_adapter) is not None or _running(reading.__func__) is not None


def folder_read() -> Path | None:
    """Folder of the adapter that PEFT is loading from a file."""
    frame = _running(PeftModel.load_adapter)
    if frame is None:
        return None
    return Path(frame.f_locals["model_id"], frame.f_locals["hf_hub_download_kwargs"].get("subfolder") or "")


def folder_of_config() -> Path | None:
    """Folder of the config that PEFT is making from a file."""
    reading: Any = PeftConfigMixin.from_pretrained
    frame = _running(reading.__func__)
    if frame is None:
        return None
    return Path(frame.f_locals["pretrained_model_name_or_path"], frame.f_locals["subfolder"] or "")


def saved_adapter() -> tuple[PeftModel, str, dict[str, Any] | None] | None:
    """Model, adapter, and the state dict that was given, where PEFT is saving an adapter."""
    frame = _running(PeftModel.save_pretrained)
    if frame is None:
        return None
    here = frame.f_locals
    return here["self"], here["adapter_name"], here["kwargs"].get("state_dict")


def ignores_mismatched_sizes() -> bool:
    """Whether PEFT has been asked to leave out tensors whose shapes do not fit."""
    frame = _running(set_peft_model_state_dict)
    return frame is not None and bool(frame.f_locals["ignore_mismatched_sizes"])


def deletes_from() -> PeftModel | None:
    """The model of which PEFT is deleting an adapter."""
    frame = _running(PeftModel.delete_adapter)
    return None if frame is None else frame.f_locals["self"]


def _running(function: Callable[..., Any]) -> FrameType | None:
    """Innermost call of a function that has not returned yet."""
    return next((frame for frame in calls() if frame.f_code is function.__code__), None)


def calls() -> Iterator[FrameType]:
    """Calls that have not returned yet, from the innermost outward."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back

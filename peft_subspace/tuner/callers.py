"""What PEFT is doing while it calls a hook, where it does not tell the hook."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from peft import PeftModel, set_peft_model_state_dict


def reads_file() -> bool:
    """Whether PEFT is loading an adapter from a file, and not from tensors that the user has handed over."""
    reading: Any = PeftModel.from_pretrained
    return _running(PeftModel.load_adapter) is not None or _running(reading.__func__) is not None


def ignores_mismatched_sizes() -> bool:
    """Whether PEFT has been asked to leave out tensors whose shapes do not fit."""
    frame = _running(set_peft_model_state_dict)
    return frame is not None and bool(frame.f_locals["ignore_mismatched_sizes"])


def _running(function: Callable[..., Any]) -> FrameType | None:
    """Innermost call of a function that has not returned yet."""
    return next((frame for frame in calls() if frame.f_code is function.__code__), None)


def calls() -> Iterator[FrameType]:
    """Calls that have not returned yet, from the innermost outward."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back

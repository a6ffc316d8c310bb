"""Where the comparisons compute: on an accelerator if there is one."""

from __future__ import annotations

from typing import Any

import torch


def best() -> torch.device:
    """The GPU, with products in TF32, or else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda")


def name() -> str:
    """What the device is called, for results files."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def finish() -> None:
    """Waits for what the device still computes."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def moved(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch on the device."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}

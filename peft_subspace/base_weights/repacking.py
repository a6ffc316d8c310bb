"""The 4-bit values of bitsandbytes, which repacks them where a CPU evaluates in bf16."""

from __future__ import annotations

from typing import Any

from torch import nn


def undo_repacking(base: nn.Module) -> None:
    """Undo the repacking of 4-bit values that bitsandbytes does in place when a CPU evaluates in bf16.

    Dequantizing repacked values gives garbage. Asking the layer for its state makes bitsandbytes undo it, but
    for the order of scales that are not quantized themselves; and all scales stay rounded to bf16.
    """
    quant_state: Any = getattr(getattr(base, "weight", None), "quant_state", None)
    if getattr(quant_state, "packing_format_for_cpu", False):
        base.state_dict()
        if not quant_state.nested:
            quant_state.absmax = quant_state.absmax.T.reshape(-1).float()


def prevent_repacking(base: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit values, which loses precision and cannot be trained on."""
    if "support_avx512bf16_for_cpu" in vars(base):
        undo_repacking(base)
        base.support_avx512bf16_for_cpu = False

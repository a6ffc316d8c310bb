"""The zeros of base weights, which adapters with `keep_zeros` leave at zero: told by a line of text."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
from torch import Tensor

from peft_subspace.base_weights.quantization import is_readable, unreadable
from peft_subspace.core.errors import error_context
from peft_subspace.tuner.config import SubspaceConfig
from peft_subspace.tuner.plan import Plan


def note_zeros(plan: Plan, config: SubspaceConfig) -> None:
    """Note the zeros of the base weights in the config of a new adapter, or check those of a saved one.

    Raises:
        ValueError: If the base has other zeros than the saved adapter was trained with, or cannot be read.

    Warns:
        UserWarning: If the base has none.
    """
    if not config.keep_zeros or not plan.modules:
        return
    weights = []
    for name, item in plan.modules.items():
        target = item.target
        with error_context(name):
            if not is_readable(target.backend):
                raise ValueError(unreadable(target.module))
        weight = target.base_weight
        with weight.whole():
            stored = weight.read()
            if stored.is_meta or hasattr(stored, "device_mesh"):
                return
            weights.append(_pattern(target.kind.from_layout(stored)))
    found = _told(weights)
    if config.initialized and config.zeros not in (None, found):
        raise ValueError(
            f"keep_zeros=True: the base weights have other zeros ({found}) than the adapter was trained with "
            f"({config.zeros}); load it on the same pruned model, quantized in the same way"
        )
    config.zeros = found
    if found.startswith("0 of"):
        warnings.warn(
            "keep_zeros=True has no effect, for no weight that is adapted has zeros; prune the model first, "
            "or leave keep_zeros out",
            stacklevel=2,
        )


def _pattern(weight: Tensor) -> tuple[int, int, bytes]:
    """Number of zeros, number of entries, and where the zeros are."""
    zeros = (weight == 0).flatten().cpu().numpy()
    return int(zeros.sum()), zeros.size, blake2b(np.packbits(zeros).data, digest_size=8).digest()


def _told(weights: Iterable[tuple[int, int, bytes]]) -> str:
    counts, sizes, digests = zip(*weights, strict=True)
    return f"{sum(counts)} of {sum(sizes)}, {blake2b(b''.join(digests), digest_size=8).hexdigest()}"

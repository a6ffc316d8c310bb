"""The methods under test. A new method is one more line in `METHODS`; the contract then holds for it, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import oracles
import peft_subspace


@dataclass(frozen=True)
class Method:
    """One method: how to configure it small, and what its update is.

    `delta_weight(delta, config)` returns the scaled update as `(out, in, *kernel)` in double precision, with
    gradients to the parameters of `delta`.
    """

    name: str
    config_cls: type
    delta_weight: Callable[[nn.Module, Any], Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    has_dropout: bool = True
    has_alpha: bool = True
    stays_fp32: bool = False
    """Whether the adapter is fp32 on every base, also where PEFT would cast it."""
    pooled: bool = False
    """Whether the parameters lie outside the layers."""
    lowers_ranks: bool = True
    """Whether a weight limits the rank; that of a sum of updates may exceed what the weight has."""
    is_confined: bool = False
    """Whether updates lie in a space that they would leave if zeros of the weight were kept."""
    is_typical: bool = False
    """Whether it stands for others where a test depends on the route alone by which a layer is computed."""

    @property
    def prefix(self) -> str:
        return f"{self.config_cls.peft_type_name.lower()}_"

    @property
    def alone(self) -> bool:
        """Whether all parameters of a layer lie in it."""
        return not self.pooled

    @property
    def keeps_zeros(self) -> bool:
        return not self.is_confined

    def adapter_dtype(self, setting: Any) -> torch.dtype:
        """Dtype of the adapter on a base of that setting."""
        return torch.float32 if setting.autocast else setting.dtype

    def is_rounded(self, setting: Any) -> bool:
        """Whether what is loaded to be run has fewer digits than its file, after it was confined."""
        return self.is_confined and "r" in self.options and self.adapter_dtype(setting) != torch.float32

    def config(self, **options: Any) -> Any:
        return self.config_cls(**{"target_modules": ["layer"], **self.options, **options})

    def __str__(self) -> str:
        return self.name


METHODS = [
    Method(
        "effort",
        peft_subspace.EffortConfig,
        oracles.effort,
        {"r": 2},
        has_dropout=False,
        has_alpha=False,
        stays_fp32=True,
    ),
    Method("flora", peft_subspace.FLoRAConfig, oracles.flora, {"r": 2, "alpha": 3}, is_typical=True),
    Method("mos", peft_subspace.MoSConfig, oracles.mos, {"alpha": 3}, pooled=True),
    Method(
        "lora_sb", peft_subspace.LoRASBConfig, oracles.lora_sb, {"r": 2}, has_alpha=False, stays_fp32=True
    ),
    Method(
        "composition", peft_subspace.CompositionConfig, oracles.composition, {"r": 2, "per": "component"},
        has_dropout=False, has_alpha=False, stays_fp32=True, lowers_ranks=False,
    ),
    Method(
        "continual_svd", peft_subspace.ContinualSVDConfig, oracles.continual_svd,
        has_dropout=False, has_alpha=False, stays_fp32=True, lowers_ranks=False, is_typical=True,
        is_confined=True,
    ),
    Method(
        "continual_svd_r", peft_subspace.ContinualSVDConfig, oracles.continual_svd, {"r": 2},
        has_alpha=False, stays_fp32=True, lowers_ranks=False, is_confined=True,
    ),
]  # fmt: skip

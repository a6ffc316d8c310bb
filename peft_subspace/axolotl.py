"""Plugin of Axolotl: its configs take the methods of this package as adapters.

Axolotl finds it where this package is installed (entry point `axolotl.plugins`); a config says

    adapter: flora            # or mos, lora_sb, effort, continual_svd
    peft_subspace:            # fields of the method's config
      r: 16
      alpha: 32
      target_modules: all-linear

Versions before 0.21 look for no entry points, and need `plugins: [peft_subspace.axolotl.SubspacePlugin]`.
Axolotl's command `merge-lora` knows LoRA only: use `merge_and_unload`, or `peft_subspace.export_lora`.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import BaseModel
from torch import nn
from transformers import TrainerCallback

import peft_subspace

METHODS = {
    "composition": peft_subspace.CompositionConfig,
    "continual_svd": peft_subspace.ContinualSVDConfig,
    "effort": peft_subspace.EffortConfig,
    "flora": peft_subspace.FLoRAConfig,
    "lora_sb": peft_subspace.LoRASBConfig,
    "mos": peft_subspace.MoSConfig,
}


class SubspaceArgs(BaseModel):
    """What a config may contain besides Axolotl's own fields."""

    peft_subspace: dict[str, Any] | None = None


class SubspacePlugin(BasePlugin):
    """Adapters of peft_subspace."""

    def get_input_args(self) -> str:
        """Name the fields that are added to the config."""
        return f"{__name__}.SubspaceArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Name the adapters that `load_adapter` knows."""
        return [AdapterCapabilities(name=name) for name in METHODS]

    def load_adapter(
        self, model: nn.Module | None, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[nn.Module | None, PeftConfig] | None:
        """Wrap the model, or give the config alone to trainers that wrap it themselves."""
        if cfg.adapter not in METHODS:
            return None
        config = METHODS[cfg.adapter](task_type="CAUSAL_LM", **(cfg.peft_subspace or {}))
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            return PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference), config
        return get_peft_model(model, config), config

    def add_callbacks_pre_trainer(self, cfg: Any, model: nn.Module) -> list[TrainerCallback]:
        """Start LoRA-SB from gradients, and give Effort the gradients of its regularizers."""
        callbacks = {
            "lora_sb": peft_subspace.GradientInitCallback,
            "effort": peft_subspace.RegularizationCallback,
        }
        return [callbacks[cfg.adapter]()] if cfg.adapter in callbacks else []

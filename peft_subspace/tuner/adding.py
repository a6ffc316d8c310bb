"""One more adapter on a model that has some, or none."""

from __future__ import annotations

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from peft_subspace.core.validation import invalid


def check_new_name(model: nn.Module, adapter_name: str) -> None:
    """Raise if the model has an adapter of the name."""
    if adapter_name in getattr(model, "peft_config", {}):
        raise invalid("adapter_name", adapter_name, "exists already on the model; choose a new name")


def with_adapter(model: nn.Module, config: PeftConfig, adapter_name: str) -> PeftModel:
    """The model with one more adapter, which is active only if it is the first one."""
    if not isinstance(model, PeftModel):
        return get_peft_model(model, config, adapter_name)
    model.add_adapter(adapter_name, config)
    return model

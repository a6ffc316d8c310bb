"""Skeletons: models without weights, on the meta device, from which shapes and names can be read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn
from transformers import PreTrainedModel

from peft_subspace.tuner.config import SubspaceConfig


def skeleton_of(model: nn.Module) -> nn.Module:
    """Skeleton of a model: the same modules and names without hooks, with all tensors on the meta device.

    Nothing of the model is copied or changed. Quantized layers become plain linear layers of their size.

    Raises:
        ValueError: If the model has adapters.
    """
    if hasattr(model, "peft_config") or any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise ValueError(f"{type(model).__name__} has adapters already; give the base model (model.unload())")
    kwargs = get_quantization_kwargs(model)
    quantized = [m for m in model.modules() if resolve_quantization_backend(m, **kwargs) is not None]
    plain = {module: _linear_like(module) for module in quantized}
    copies = plain | {module: _without_tensors(module) for module in model.modules() if module not in plain}
    tensors: dict[Any, Any] = {None: None}  # by tensor of the model, so that tied tensors stay tied
    for module in (module for module in copies if module not in plain):
        copied = copies[module]
        copied._modules.update({name: copies.get(child) for name, child in module._modules.items()})
        for name, parameter in module._parameters.items():
            if parameter not in tensors:
                data = torch.empty_like(parameter.detach(), device="meta")
                tensors[parameter] = nn.Parameter(data, parameter.requires_grad)
            copied._parameters[name] = tensors[parameter]
        for name, buffer in module._buffers.items():
            if buffer not in tensors:
                tensors[buffer] = torch.empty_like(buffer, device="meta")
            copied._buffers[name] = tensors[buffer]
    return copies[model]


def skeleton_from(base: str | Path, architecture: str | None = None, **options: Any) -> nn.Module:
    """Skeleton of a model in a folder or on the Hub, of which only the config is read.

    Args:
        base: The folder, or the id on the Hub.
        architecture: Class of transformers to build, which may be an `AutoModel…` class; by default the first
            class that the config names.
        options: Changes to the config.

    Raises:
        ValueError: If there is no config that can be read, or transformers has no such model.
    """
    try:
        config: Any = transformers.AutoConfig.from_pretrained(base, **options)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"the config of the base model {str(base)!r} cannot be read ({reason}); give the folder, or the "
            "id on the Hub, of a model of transformers (base, or --base on the command line)"
        ) from error
    name = architecture or (config.architectures or ["AutoModel"])[0]
    model_cls: Any = getattr(transformers, name, None)
    is_model = isinstance(model_cls, type) and issubclass(model_cls, PreTrainedModel)
    if not is_model and not name.startswith("AutoModel"):
        version = transformers.__version__
        raise ValueError(f"{base}: transformers {version} has no model {name!r}; choose another model")
    build = model_cls._from_config if is_model else model_cls.from_config
    with torch.device("meta"):
        return build(config)


def wrap(skeleton: nn.Module, config: SubspaceConfig, adapter_name: str = "default") -> PeftModel:
    """Add an adapter to a skeleton, without any initialization; the config is not changed."""
    config = copy.deepcopy(config)
    config.base_model_name_or_path = None  # PEFT sets it, and warns if it is another model's
    if hasattr(skeleton, "config"):
        skeleton.config = copy.deepcopy(skeleton.config)
    with torch.device("meta"):
        return get_peft_model(skeleton, config, adapter_name)


def _without_tensors(module: nn.Module) -> nn.Module:
    """Copy of a module with its plain attributes, but without tensors, children and hooks."""
    copied = module.__new__(type(module))
    nn.Module.__init__(copied)
    own = set(vars(copied))
    copied.__dict__.update({name: value for name, value in vars(module).items() if name not in own})
    copied.train(module.training)
    copied._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
    return copied


def _linear_like(module: Any) -> nn.Linear:
    """Plain linear layer of the size of a quantized one."""
    in_features, out_features = (int(size or 0) for size in _get_in_out_features(module))
    return nn.Linear(in_features, out_features, getattr(module, "bias", None) is not None, device="meta")

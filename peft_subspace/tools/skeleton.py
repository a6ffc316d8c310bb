"""Models without their weights, on the meta device: what can be said of an adapter from shapes alone."""

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
    """Twin of a model with the same modules and names, its tensors on the meta device, and without hooks.

    Nothing of the model is copied or changed. Quantised layers become plain linear ones of their size.

    Raises:
        ValueError: If the model has adapters.
    """
    if hasattr(model, "peft_config") or any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise ValueError(f"{type(model).__name__} has adapters already; give the base model (model.unload())")
    kwargs = get_quantization_kwargs(model)
    plain = {m: _plain(m) for m in model.modules() if resolve_quantization_backend(m, **kwargs) is not None}
    twins = plain | {module: _empty(module) for module in model.modules() if module not in plain}
    tensors: dict[Any, Any] = {None: None}  # tied tensors stay tied
    for module in (module for module in twins if module not in plain):
        twin = twins[module]
        twin._modules.update({name: twins.get(child) for name, child in module._modules.items()})
        for name, parameter in module._parameters.items():
            if parameter not in tensors:
                data = torch.empty_like(parameter.detach(), device="meta")
                tensors[parameter] = nn.Parameter(data, parameter.requires_grad)
            twin._parameters[name] = tensors[parameter]
        for name, buffer in module._buffers.items():
            if buffer not in tensors:
                tensors[buffer] = torch.empty_like(buffer, device="meta")
            twin._buffers[name] = tensors[buffer]
    return twins[model]


def skeleton_from(base: str | Path, architecture: str | None = None, **options: Any) -> nn.Module:
    """Model of a folder or of an id on the Hub, built on the meta device; only its config is read.

    Args:
        base: The folder or id.
        architecture: Class of transformers to build, one of its `AutoModel…` included; by default the first
            that the config names.
        options: Changes to the config.

    Raises:
        ValueError: If there is no config that can be read, or transformers has no such model.
    """
    try:
        config: Any = transformers.AutoConfig.from_pretrained(base, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the config of the base model {str(base)!r} cannot be read; give the folder, or the id on the "
            "Hub, of a model of transformers (--base on the command line)"
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
    """Adapt a skeleton, which needs no start of any kind; the config is not changed."""
    config = copy.deepcopy(config)
    config.base_model_name_or_path = None  # PEFT sets it, and warns of another
    if hasattr(skeleton, "config"):
        skeleton.config = copy.deepcopy(skeleton.config)
    with torch.device("meta"):
        return get_peft_model(skeleton, config, adapter_name)


def _empty(module: nn.Module) -> nn.Module:
    twin = module.__new__(type(module))
    nn.Module.__init__(twin)
    own = set(vars(twin))
    twin.__dict__.update({name: value for name, value in vars(module).items() if name not in own})
    twin.train(module.training)
    twin._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
    return twin


def _plain(module: Any) -> nn.Linear:
    in_features, out_features = (int(size or 0) for size in _get_in_out_features(module))
    return nn.Linear(in_features, out_features, getattr(module, "bias", None) is not None, device="meta")

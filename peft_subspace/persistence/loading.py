"""Loading of an adapter after every check that needs no change to the model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn

from peft_subspace.core.modes import lasting
from peft_subspace.core.names import in_base
from peft_subspace.core.state import check_shapes, check_state
from peft_subspace.persistence.folder import adapter_folder
from peft_subspace.persistence.read_config import read_config
from peft_subspace.tuner.adding import check_new_name
from peft_subspace.tuner.apart import read_apart
from peft_subspace.tuner.config import SubspaceConfig
from peft_subspace.tuner.declared import base_name, check_declared
from peft_subspace.tuner.heads import planned_heads
from peft_subspace.tuner.source import opened
from peft_subspace.tuner.state import at_root, check_updates, is_optional, mismatched, values_checked


@lasting()
def load(model: nn.Module, path: str | Path, adapter_name: str = "default", **kwargs: Any) -> PeftModel:
    """Load an adapter of this package onto a model, after checking that it fits and is sound.

    The adapter may come from a stranger. Only two files are read, and nothing that the config names is
    imported or looked for. Before anything is allocated, `load` refuses ranks and headers that claim too
    much, regular expressions that could match for ever, and tensors that would replace weights of the base
    model. Embeddings are an exception, because PEFT saves them with an adapter where they were resized.

    Args:
        model: Base model, or a `PeftModel` that gets one more adapter.
        path: Folder of the adapter, or its id on the Hub; `subfolder`, `revision`, `token` and `cache_dir` go
            with it.
        adapter_name: Name that the adapter takes in the model.
        kwargs: Handed to `PeftModel.from_pretrained` or `PeftModel.load_adapter`, such as `is_trainable`.

    Returns:
        The model with the adapter.

    Raises:
        FileNotFoundError: If the folder has no config or no safetensors file; pickled weights are not read.
        TypeError: If a field of the config has the wrong type, or the model has no such layers.
        ValueError: If the config is none of this package's, the file is damaged, or its tensors do not fit
            the model or are not finite. The model has not been touched then.
        OSError: If the Hub has no such repository or revision, or the token gives no access to it.
    """
    folder = adapter_folder(str(path), kwargs)
    wrapped = isinstance(model, PeftModel)
    if wrapped:
        check_new_name(model, adapter_name)
    base = model.get_base_model() if wrapped else model
    mapping = kwargs.get("key_mapping")
    if mapping is None and not wrapped:  # PEFT takes it from the model only there
        mapping = getattr(model, "_checkpoint_conversion_mapping", None)
    check_adapter(
        base,
        folder,
        key_mapping=mapping,
        ignore_mismatched_sizes=kwargs.get("ignore_mismatched_sizes", False),
    )
    with _restored_on_error(model, adapter_name), values_checked():
        if not wrapped:
            return PeftModel.from_pretrained(model, str(folder), adapter_name, **kwargs)
        model.load_adapter(str(folder), adapter_name, **kwargs)
    return model


def check_adapter(
    model: nn.Module,
    folder: Path,
    *,
    key_mapping: Mapping[str, str] | None = None,
    ignore_mismatched_sizes: bool = False,
) -> SubspaceConfig:
    """Raise unless the adapter in `folder` fits `model`; return its config.

    Shapes come from the file's header, and only tensors of the right shape are read. Others are an error
    unless PEFT is asked to leave such tensors out.
    """
    config = read_config(folder / CONFIG_NAME)
    config.inference_mode = True  # that is the form in which it was saved
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)]
    _choose_targets(model, config, tuner)
    plan = tuner.plan(model, config)
    expected = plan.expected_state(model)
    if not expected and config.target_modules != DUMMY_TARGET_MODULES:
        raise ValueError(
            f"target_modules={config.target_modules!r} match no module of {type(model).__name__}; load the "
            "adapter on the base model that it was trained on"
        )
    apart = read_apart(plan.updates_by_key(model), folder, config.frozen_file)
    path = folder / SAFETENSORS_WEIGHTS_NAME
    with opened(path) as file:
        shared = None if plan.shared is None else plan.shared_attribute
        in_file = {at_root(_mapped(key, key_mapping or {}), shared): key for key in file.keys()}  # noqa: SIM118
        found = {key: tuple(file.get_slice(name).get_shape()) for key, name in in_file.items()}
        needed = {key for key in expected if key in found or not is_optional(key)} - set(apart)
        expected = {key: expected[key] for key in needed}
        others = {key: shape for key, shape in found.items() if key not in expected}
        expected |= _other_state(model, config, others)
        if ignore_mismatched_sizes:
            for key in mismatched(plan.by_key(model), expected, found):
                del expected[key]
        check_shapes(expected, found)
        state = {key: file.get_tensor(in_file[key]) for key in expected}
        check_state(expected, state)
        check_updates(plan, model, state | apart)
    return config


def _mapped(key: str, mapping: Mapping[str, str]) -> str:
    """Key after the first pattern of PEFT's `key_mapping` that matches its part in the base model."""
    name = in_base(key)
    start = key.removesuffix(name)
    for pattern, replacement in mapping.items():
        changed, times = re.subn(pattern, replacement, name)
        if times:
            return start + changed
    return key


def _choose_targets(model: nn.Module, config: SubspaceConfig, tuner: Any) -> None:
    """Set PEFT's default `target_modules` for this architecture where the config names none."""
    if config.target_modules is None:
        model_type = BaseTuner.get_model_config(model)["model_type"]
        config.target_modules = tuner.target_module_mapping.get(model_type)
    if config.target_modules is None:
        raise ValueError(
            f"target_modules=None, for which {type(model).__name__} has no default; load the adapter "
            "on the base model that it was trained on"
        )


def _other_state(
    model: nn.Module, config: SubspaceConfig, found: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Tensors that fit those in a file which belong to no delta: the base model's, and trained token rows."""
    if not found:
        return {}
    check_declared(model, config, found)
    heads = planned_heads(model, config)
    starts = tuple(f"{name}." for name in heads)
    own = {base_name(name): tensor for name, tensor in model.state_dict().items()}
    own = {name: tensor for name, tensor in own.items() if not (starts and name.startswith(starts))}
    own |= {f"{name}.{key}": t for name, head in heads.items() for key, t in head.state_dict().items()}
    state = {}
    for key, shape in found.items():
        if base_name(key) in own:
            state[key] = own[base_name(key)]
        elif key.endswith(".token_adapter.trainable_tokens_delta"):
            state[key] = torch.empty(shape, device="meta")
        else:
            raise ValueError(
                f"{key} in the file is for no module of {type(model).__name__}; load the adapter on the base "
                "model that it was trained on"
            )
    return state


@contextmanager
def _restored_on_error(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Put a model's modules back as they were if PEFT fails in spite of all checks."""
    modules = [(module, dict(module._modules)) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    adapted = hasattr(model, "peft_config")
    try:
        yield
    except Exception as error:
        if isinstance(model, PeftModel) and adapter_name in model.peft_config:
            model.base_model.delete_adapter(adapter_name)
        for module, children in modules:
            module._modules.clear()
            module._modules.update(children)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        if not adapted and "peft_config" in vars(model):
            del model.peft_config
        if isinstance(error, OSError | TypeError | ValueError | MemoryError):
            raise
        raise ValueError(
            f"PEFT cannot load the adapter: {type(error).__name__}: {error}; its config does not fit its "
            "tensors, or the base model"
        ) from error

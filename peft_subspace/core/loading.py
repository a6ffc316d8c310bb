"""Loading with every check that needs no change to the model, before the first change to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors import SafetensorError, safe_open
from torch import nn

from .checks import check_shapes, check_state, check_values
from .config import SubspaceConfig


def load(model: nn.Module, path: str | Path, adapter_name: str = "default", **kwargs: Any) -> PeftModel:
    """Load an adapter of this package onto a model, after checking that it fits and is sound.

    Args:
        model: Base model, or a `PeftModel` that gets one more adapter.
        path: Folder of the adapter, or its id on the Hub.
        adapter_name: Name that the adapter takes in the model.
        kwargs: Handed to `PeftModel.from_pretrained` or `PeftModel.load_adapter`, such as `is_trainable`.

    Returns:
        The model with the adapter.

    Raises:
        FileNotFoundError: If the folder has no config or no safetensors file; pickled weights are not read.
        ValueError: If the config is none of this package's, the file is damaged, or its tensors do not fit
            the model or are not finite. The model has not been touched then.
    """
    folder = Path(path) if Path(path).is_dir() else _download(str(path), kwargs)
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}; save the adapter with save_pretrained and load that folder"
            )
    wrapped = isinstance(model, PeftModel)
    if wrapped and adapter_name in model.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r} exists already on the model; choose a new name")
    check_adapter(model.get_base_model() if wrapped else model, folder)
    if wrapped:
        model.load_adapter(str(folder), adapter_name, **kwargs)
        return model
    return PeftModel.from_pretrained(model, str(folder), adapter_name, **kwargs)


def check_adapter(model: nn.Module, folder: Path) -> SubspaceConfig:
    """Raise unless the adapter in `folder` fits `model`; returns its config.

    Shapes come from the file's header, and only tensors of the right shape are read.
    """
    config = _read_config(folder / CONFIG_NAME)
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)]
    if config.target_modules is None:
        config.target_modules = tuner.target_module_mapping.get(
            BaseTuner.get_model_config(model)["model_type"]
        )
    plan = tuner.plan(model, config)
    expected = tuner.expected_state(plan)
    if not expected and config.target_modules != DUMMY_TARGET_MODULES:
        raise ValueError(
            f"target_modules={config.target_modules!r} match no module of {type(model).__name__}; load the "
            "adapter on the base model that it was trained on"
        )
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
            keys = list(file.keys())
            check_shapes(expected, {key: tuple(file.get_slice(key).get_shape()) for key in keys})
            state = {key: file.get_tensor(key) for key in expected}
            check_state(expected, state)
            check_values(tuner.keyed(plan), state)
            tuner.check_base(tuner.on_base(model, plan), state)
    except SafetensorError as error:
        raise ValueError(
            f"{folder / SAFETENSORS_WEIGHTS_NAME} is not a complete safetensors file ({error}); download or "
            "save it again"
        ) from error
    return config


def _read_config(path: Path) -> SubspaceConfig:
    """Read a config whose type this package knows."""
    try:
        attributes = PeftConfig.from_json_file(str(path))
        known = PEFT_TYPE_TO_CONFIG_MAPPING.get(attributes.get("peft_type"))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a JSON object ({error}); save the adapter again") from error
    if known is None or not issubclass(known, SubspaceConfig):
        own = sorted(t.value for t, c in PEFT_TYPE_TO_CONFIG_MAPPING.items() if issubclass(c, SubspaceConfig))
        raise ValueError(
            f"peft_type={attributes.get('peft_type')!r} is none of {own}; load it with "
            "peft.PeftModel.from_pretrained"
        )
    return known.from_peft_type(**attributes)


def _download(repository: str, kwargs: dict[str, Any]) -> Path:
    """Fetch config and weights of an adapter from the Hub, and nothing else."""
    options = {name: kwargs.pop(name) for name in ("revision", "token", "cache_dir") if name in kwargs}
    return Path(
        snapshot_download(repository, allow_patterns=[CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME], **options)
    )

"""Loading with every check that needs no change to the model, before the first change to it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from peft_subspace.core.state import check_shapes, check_state
from peft_subspace.tuner.config import VERSION, SubspaceConfig
from peft_subspace.tuner.declared import base_name, check_declared
from peft_subspace.tuner.state import check_updates, is_optional

_MOST_CONFIG_BYTES = 2**24


def load(model: nn.Module, path: str | Path, adapter_name: str = "default", **kwargs: Any) -> PeftModel:
    """Load an adapter of this package onto a model, after checking that it fits and is sound.

    It may come from a stranger: two files are read and no more, nothing that the config names is imported or
    looked for, and refused are, before anything is allocated, ranks and headers that claim too much, regular
    expressions that could match for ever, and tensors that would replace weights of the base model.
    Embeddings are an exception, for PEFT saves them with an adapter where they were resized.

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
        OSError: If the Hub has no such repository or revision, or shows it to nobody without a token.
    """
    folder = adapter_folder(str(path), kwargs)
    wrapped = isinstance(model, PeftModel)
    if wrapped and adapter_name in model.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r} exists already on the model; choose a new name")
    base = model.get_base_model() if wrapped else model
    check_adapter(base, folder, ignore_mismatched_sizes=kwargs.get("ignore_mismatched_sizes", False))
    with _restored_on_error(model, adapter_name):
        if not wrapped:
            return PeftModel.from_pretrained(model, str(folder), adapter_name, **kwargs)
        model.load_adapter(str(folder), adapter_name, **kwargs)
    return model


def check_adapter(model: nn.Module, folder: Path, *, ignore_mismatched_sizes: bool = False) -> SubspaceConfig:
    """Raise unless the adapter in `folder` fits `model`; returns its config.

    Shapes come from the file's header, and only tensors of the right shape are read. Those of heads and
    embeddings may be wrong if PEFT is asked to leave such tensors out.
    """
    config = read_config(folder / CONFIG_NAME)
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)]
    if config.target_modules is None:
        config.target_modules = tuner.target_module_mapping.get(
            BaseTuner.get_model_config(model)["model_type"]
        )
    if config.target_modules is None:
        raise ValueError(
            f"target_modules=None, for which {type(model).__name__} has no default; load the adapter "
            "on the base model that it was trained on"
        )
    plan = tuner.plan(model, config)
    expected = plan.expected_state(model)
    if not expected and config.target_modules != DUMMY_TARGET_MODULES:
        raise ValueError(
            f"target_modules={config.target_modules!r} match no module of {type(model).__name__}; load the "
            "adapter on the base model that it was trained on"
        )
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            expected = {key: t for key, t in expected.items() if key in found or not is_optional(key)}
            others = {key: shape for key, shape in found.items() if key not in expected}
            for key, tensor in _other_state(model, config, others).items():
                if not ignore_mismatched_sizes or tuple(tensor.shape) == found[key]:
                    expected[key] = tensor
            check_shapes(expected, found)
            state = {key: file.get_tensor(key) for key in expected}
            check_state(expected, state)
            check_updates(plan, model, state)
    except SafetensorError as error:
        raise ValueError(
            f"{folder / SAFETENSORS_WEIGHTS_NAME} is not a complete safetensors file ({error}); download or "
            "save it again"
        ) from error
    return config


def _check_file(folder: Path, name: str) -> None:
    """Raise unless a file exists and lies in its folder; in the cache of the Hub it is a link to a blob."""
    path, home = folder / name, folder.resolve()
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {name}; save the adapter with save_pretrained and load that folder"
        )
    if path.resolve().parent not in (home, *(parent / "blobs" for parent in home.parents)):
        raise ValueError(f"{path} is a link out of the adapter's folder; put the file itself there")


def _other_state(
    model: nn.Module, config: SubspaceConfig, found: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Tensors like those that a file has for no delta: the base model's, and trained rows of embeddings."""
    if not found:
        return {}
    check_declared(model, config, found)
    own = {base_name(name): tensor for name, tensor in model.state_dict().items()}
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


def read_config(path: Path) -> SubspaceConfig:
    """Read a config whose type this package knows.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If the file is no config, of another package, or has a value that no layer could take.
    """
    if path.stat().st_size > _MOST_CONFIG_BYTES:
        raise ValueError(
            f"{path} has more than {_MOST_CONFIG_BYTES} bytes; no config of an adapter is as long"
        )
    try:
        attributes = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON object ({error}); save the adapter again") from error
    if not isinstance(attributes, dict):
        raise ValueError(
            f"{path} is not a JSON object, but {type(attributes).__name__}; save the adapter again"
        )
    name = attributes.get("peft_type")
    types: dict[Any, Any] = PEFT_TYPE_TO_CONFIG_MAPPING
    known = types.get(name) if isinstance(name, str) else None
    if known is None or not issubclass(known, SubspaceConfig):
        own = sorted(t.value for t, c in types.items() if issubclass(c, SubspaceConfig))
        raise ValueError(
            f"peft_type={name!r:.80} is none of {own}; load it with peft.PeftModel.from_pretrained, or "
            f"upgrade peft_subspace from {VERSION} if PEFT does not know it either"
        )
    return known(**_known_fields(known, attributes))


def _known_fields(config_cls: type[SubspaceConfig], attributes: dict[str, Any]) -> dict[str, Any]:
    """Those entries of a file that are fields; PEFT leaves the others out, too, of newer packages' files."""
    names = {field.name for field in fields(config_cls) if field.init}
    unknown = sorted(set(attributes) - names)
    if unknown:
        warnings.warn(
            f"the config has fields that {config_cls.__name__} of peft_subspace {VERSION} does not know, and "
            f"ignores: {str(unknown)[:200]}; it was saved by peft_subspace "
            f"{str(attributes.get('peft_subspace_version'))[:20]}",
            stacklevel=4,
        )
    return {name: value for name, value in attributes.items() if name in names}


def adapter_folder(path: str, kwargs: dict[str, Any]) -> Path:
    """Folder with config and weights, of which nothing else is fetched if they are on the Hub.

    Args:
        path: Folder, or id on the Hub.
        kwargs: `subfolder`, `revision`, `token` and `cache_dir` are taken out of it.

    Raises:
        FileNotFoundError: If one of the two files is missing.
        ValueError: If one is a link out of the folder.
    """
    subfolder = kwargs.pop("subfolder", None) or ""
    options = {name: kwargs.pop(name) for name in ("revision", "token", "cache_dir") if name in kwargs}
    if not Path(path).is_dir():
        names = [str(Path(subfolder) / name) for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)]
        path = snapshot_download(path, allow_patterns=names, **options)
    folder = Path(path) / subfolder
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        _check_file(folder, name)
    return folder

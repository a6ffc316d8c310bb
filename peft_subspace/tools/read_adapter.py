"""Reading of a saved adapter onto a base model without weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from peft_subspace.persistence.loading import adapter_folder, check_adapter, read_config
from peft_subspace.tools.skeleton import skeleton_from, skeleton_of, wrap
from peft_subspace.tuner.apart import read_apart
from peft_subspace.tuner.lean import layers_by_key

_ARCHITECTURES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""Classes of transformers by PEFT's task types, as PEFT's own `AutoPeftModel…` classes choose them."""

_HEADS = ("classifier", "score")
"""Names of classifier heads in models of transformers."""


def read_adapter(path: str | Path, base: str | Path | nn.Module | None = None, **kwargs: Any) -> PeftModel:
    """Put a saved adapter on a base model without weights; only the config of the base model is needed.

    Args:
        path: Folder of the adapter, or its id on the Hub.
        base: Folder or id of the base model, or the model itself, of which nothing is changed; by default the
            one that the adapter's config names.
        kwargs: Where the Hub has it: `revision`, `subfolder`, `token`, `cache_dir`.

    Raises:
        FileNotFoundError: If the folder has no config or no safetensors file.
        ValueError: If the adapter is broken, belongs to another package, or does not fit the base model, or
            if the base model's config cannot be read.
        TypeError: If an argument is unknown.
    """
    folder = adapter_folder(str(path), kwargs)
    if kwargs:
        raise TypeError(f"{sorted(kwargs)} are no arguments; revision, subfolder, token and cache_dir are")
    config = read_config(folder / CONFIG_NAME)
    base = config.base_model_name_or_path if base is None else base
    if isinstance(base, nn.Module):
        skeleton = skeleton_of(base)
    elif base:
        options = _labels(folder) | ({"revision": config.revision} if config.revision else {})
        skeleton = skeleton_from(base, _architecture(config), **options)
    else:
        raise ValueError(f"{path} does not name its base model; give it (--base)")
    model = wrap(skeleton, check_adapter(skeleton, folder))
    model.peft_config["default"].base_model_name_or_path = config.base_model_name_or_path
    # With assign=True the file's tensors replace those on the meta device; PEFT would copy into the latter.
    setattr(model, "load_state_dict", partial(model.load_state_dict, assign=True))  # noqa: B010
    layers = layers_by_key(model, model.base_model.tuner_layer_cls, "default")
    updates = {start: layer.deltas["default"] for (_, start), layer in layers.items()}
    apart = read_apart(updates, folder, config.frozen_file)
    set_peft_model_state_dict(model, load_file(folder / SAFETENSORS_WEIGHTS_NAME) | apart)
    delattr(model, "load_state_dict")
    return model.eval()


def _architecture(config: Any) -> str | None:
    """Class of the model that the adapter was trained on, as far as its config tells."""
    if config.task_type in _ARCHITECTURES:
        return _ARCHITECTURES[config.task_type]
    return (config.auto_mapping or {}).get("base_model_class")


def _labels(folder: Path) -> dict[str, Any]:
    """Number of labels of a head in the file, which need not be that in the base model's config."""
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
            heads = [key for key in list(file.keys()) if any(f".{head}." in key for head in _HEADS)]
            sizes = [file.get_slice(key).get_shape()[0] for key in heads if "_delta." not in key]
    except SafetensorError:  # `check_adapter` reports what is wrong with the file
        sizes = []
    return {"num_labels": min(sizes)} if sizes else {}

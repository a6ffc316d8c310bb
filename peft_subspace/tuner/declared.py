"""What tensors besides its updates an adapter may bring into a model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from torch import nn

_WRAPPERS = re.compile(
    r"\b(base_layer|original_module|modules_to_save|token_adapter|_fsdp_wrapped_module|_orig_mod)\."
)
_ORIGINAL = re.compile(r"(?<!\bmodules_to_save)\.original_module\.")  # an adapter may have this name, too


def base_name(key: str) -> str:
    """Name that a tensor has in a model without adapters, given its key in a file or in a wrapped model."""
    return _WRAPPERS.sub("", key).removeprefix("base_model.model.")


def check_declared(model: nn.Module, config: Any, keys: Iterable[str]) -> None:
    """Raise unless tensors that belong to no delta are such as the config says that the adapter brings.

    PEFT loads all that has a place in the model: a file could replace any weight of the base model with it.

    Args:
        model: The base model, wrapped or not.
        config: Config of the adapter: its `modules_to_save`, `trainable_token_indices` and `bias`.
        keys: Keys in the file, or in the model, of the tensors in question.

    Raises:
        ValueError: Naming the first tensor that is none of these and no embedding, which PEFT saves if it was
            resized.
    """
    ends = _ends(model)
    embeddings = {base_name(f"{name}.weight") for name, module in model.named_modules() if module in ends}
    heads = tuple(config.modules_to_save or ())
    for key in keys:
        name = base_name(key)
        path = key.removeprefix("base_model.model.")
        parents = [path[:i] for i, letter in enumerate(path) if letter == "."]
        if not (
            name in embeddings
            or (name.endswith("bias") and config.bias != "none")
            or ("trainable_tokens_delta" in name and config.trainable_token_indices is not None)
            or (not _ORIGINAL.search(key) and any(parent.endswith(heads) for parent in parents))
        ):
            raise ValueError(
                f"{key} in the file is no part of the adapter, and may replace weights of the base model; "
                "load the adapter on the base model that it was trained on, from a source that you trust"
            )


def _ends(model: nn.Module) -> list[nn.Module]:
    """Input and output embedding of a model of transformers."""
    ends = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(AttributeError, NotImplementedError):  # of models without texts, such as ResNet
            ends.append(getattr(model, name)())
    return [layer for end in ends if end is not None for layer in (end, getattr(end, "base_layer", end))]

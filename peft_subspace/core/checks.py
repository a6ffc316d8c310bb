"""Checks of an adapter's tensors against the model that they are for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from .delta import Delta

_WRAPPERS = re.compile(
    r"\b(base_layer|original_module|modules_to_save|token_adapter|_fsdp_wrapped_module|_orig_mod)\."
)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put a name before the message of an error that is raised inside."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def check_shapes(expected: dict[str, Tensor], found: dict[str, tuple[int, ...]]) -> None:
    """Raise unless every expected tensor is found in its shape.

    Raises:
        ValueError: Naming the first tensor that is missing or of another shape.
    """
    remedy = "load the adapter on the base model that it was trained on"
    missing = sorted(set(expected) - set(found))
    if missing:
        raise ValueError(
            f"{len(missing)} tensors that the base model needs are missing, such as {missing[0]}; {remedy}"
        )
    for key, tensor in expected.items():
        if found[key] != tuple(tensor.shape):
            raise ValueError(
                f"{key} has shape {found[key]} in the file, but the base model needs {tuple(tensor.shape)}; "
                f"{remedy}"
            )


def check_state(expected: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Raise unless the tensors of `state` have the expected shapes and finite values.

    Raises:
        ValueError: Naming the first tensor that is unfit.
    """
    check_shapes(expected, {key: tuple(state[key].shape) for key in expected})
    for key, tensor in expected.items():
        check_values_of(key, state[key], tensor.dtype)


def check_values_of(key: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise unless a tensor has numbers of the kind that is needed, which stay finite in the needed `dtype`.

    Raises:
        ValueError: Naming the tensor.
    """
    kinds = (tensor.is_floating_point(), tensor.is_complex(), tensor.dtype.itemsize > 1)
    if tensor.dtype != dtype and kinds != (dtype.is_floating_point, False, True):
        needed = "floating-point" if dtype.is_floating_point else "whole"
        raise ValueError(
            f"{key} has {tensor.dtype} in the file, but {needed} numbers are needed; save the adapter again"
        )
    value = tensor.to(dtype)
    if value.is_floating_point() and not torch.isfinite(value if value.itemsize > 1 else value.float()).all():
        raise ValueError(
            f"{key} has NaN or infinite values in the file; the adapter is broken, train it again"
        )


def check_values(deltas: dict[str, Delta], state: dict[str, Tensor]) -> None:
    """Raise unless the tensors of `state` have values that the deltas, by the start of their keys, can take.

    Raises:
        ValueError: Naming the first delta with an unfit tensor.
    """
    for key, delta in deltas.items():
        tensors = {name: state[f"{key}.{name}"] for name in delta.state_dict() if f"{key}.{name}" in state}
        with naming(key):
            delta.check_values(tensors)


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
            or (".original_module." not in key and any(parent.endswith(heads) for parent in parents))
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

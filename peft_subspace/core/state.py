"""Checks of an adapter's tensors against those that are expected."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_subspace.core.delta import Delta
from peft_subspace.core.errors import error_context


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
        with error_context(key):
            delta.check_values(tensors)

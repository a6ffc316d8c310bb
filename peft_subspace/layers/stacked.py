"""Chains of several adapters on one layer, stacked, so that one product serves them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

Form = tuple[Tensor, ...]
"""One adapter's chain as its kind of layer stacks it, or such chains stacked, `(adapters, …)` each."""


def stack(forms: Sequence[Form]) -> Form:
    """Stack chains, each axis filled up with zeros to its longest: in place of smaller ranks."""
    return tuple(_stack_tensors(tensors) for tensors in zip(*forms, strict=True))


def fitting(forms: Mapping[str, Form], room: float, owned: Mapping[str, Sequence[bool]]) -> list[str]:
    """Names of those chains, in their order, whose stack takes no more than `room` bytes.

    All are of the dtype, the device and the number of axes of the first one.

    Args:
        forms: The chains.
        room: Bytes that there are.
        owned: Which tensors of each chain can move into the stack, as long as nothing is filled up there.
    """
    chosen: list[str] = []
    longest: list[tuple[int, ...]] = []
    entries = 0
    for name, form in forms.items():
        like = forms[chosen[0]] if chosen else form
        if [_kind(tensor) for tensor in form] != [_kind(tensor) for tensor in like]:
            continue
        sizes = [tuple(tensor.shape) for tensor in form]
        if chosen:
            sizes = [tuple(map(max, *pair)) for pair in zip(longest, sizes, strict=True)]
        if sizes == longest:
            total = entries + _copied(form, owned[name], sizes)
        else:  # what was chosen before is filled up, too
            total = sum(_copied(forms[other], owned[other], sizes) for other in [*chosen, name])
        if total * form[0].itemsize <= room:
            chosen.append(name)
            longest, entries = sizes, total
    return chosen


def _copied(form: Form, owned: Sequence[bool], sizes: Sequence[tuple[int, ...]]) -> int:
    """Entries of a stack of such sizes that one chain takes, and does not bring along."""
    return sum(
        prod(size)
        for size, tensor, moves in zip(sizes, form, owned, strict=True)
        if not (moves and size == tuple(tensor.shape))
    )


def select(stacked: Form, places: Sequence[int]) -> Form:
    """Some of the stacked chains; those that follow each other are not copied."""
    first, last = places[0], places[-1]
    if list(places) == list(range(first, last + 1)):
        return tuple(tensor[first : last + 1] for tensor in stacked)
    index = torch.tensor(places, device=stacked[0].device)
    return tuple(tensor[index] for tensor in stacked)


def add_product(result: Tensor, hidden: Tensor, left: Tensor) -> Tensor:
    """Return `result (adapters · samples, …, out)` plus `hidden leftᵀ`.

    Args:
        result: What is added to.
        hidden: Rows of the adapters, `(adapters, rows, r)`.
        left: Left factors, `(adapters, out, r)`.
    """
    if result.dtype == hidden.dtype == left.dtype and not torch.is_autocast_enabled(hidden.device.type):
        rows = result.reshape(len(left), -1, left.shape[1])
        return torch.baddbmm(rows, hidden, left.transpose(1, 2)).view(result.shape)
    product = torch.bmm(hidden, left.transpose(1, 2)).view(result.shape)
    return (result + product).to(result.dtype)


def side_by_side(x: Tensor, count: int) -> Tensor:
    """`(count · samples, channels, …)` as `(samples, count · channels, …)`."""
    return x.unflatten(0, (count, -1)).transpose(0, 1).flatten(1, 2)


def under_each_other(x: Tensor, count: int) -> Tensor:
    """The way back from `side_by_side`."""
    return x.unflatten(1, (count, -1)).transpose(0, 1).flatten(0, 1)


def _stack_tensors(tensors: Sequence[Tensor]) -> Tensor:
    strides = tensors[0].stride()  # whose order of the axes in memory is that of the stack
    order = sorted(range(len(strides)), key=lambda axis: -strides[axis])
    sizes = _longest(tensors)
    total = tensors[0].new_zeros(len(tensors), *(sizes[axis] for axis in order))
    total = total.permute(0, *(1 + order.index(axis) for axis in range(len(order))))
    for place, tensor in zip(total, tensors, strict=True):
        place[tuple(slice(size) for size in tensor.shape)] = tensor
    return total


def _kind(tensor: Tensor) -> tuple[int, torch.dtype, torch.device]:
    return tensor.ndim, tensor.dtype, tensor.device


def _longest(tensors: Sequence[Tensor]) -> list[int]:
    return [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]

"""Layers of any geometry, drawn at random."""

from __future__ import annotations

from functools import partial

from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from layers import LayerCase

SIZES = st.sampled_from([1, 2, 3, 5, 17])
BATCH_SHAPES = st.lists(st.integers(1, 3), max_size=2).map(tuple)


@st.composite
def linears(draw) -> LayerCase:
    inputs, outputs, shape = draw(SIZES), draw(SIZES), draw(BATCH_SHAPES)
    if draw(st.booleans()):
        build = partial(Conv1D, outputs, inputs)
        return LayerCase(_name(build), "transposed", build, (*shape, inputs))
    build = partial(nn.Linear, inputs, outputs, bias=draw(st.booleans()))
    return LayerCase(_name(build), "linear", build, (*shape, inputs))


@st.composite
def embeddings(draw) -> LayerCase:
    rows, width = draw(SIZES), draw(SIZES)
    padding = draw(st.none() | st.integers(-rows, rows - 1))
    build = partial(nn.Embedding, rows, width, padding_idx=padding)
    return LayerCase(_name(build), "embedding", build, draw(BATCH_SHAPES), tokens=rows)


# The package convolves some of them in ways of their own, see `ConvOps`. A row has the numbers of axes,
# whether there are groups, channels per group, and kernel sizes.
CONVOLUTIONS = {
    "narrow": ((1, 3), False, (1, 3), (1, 4)),
    "wide": ((2, 3), False, (24, 25), (2, 3)),
    "grouped": ((1, 3), True, (1, 3), (1, 4)),
    "depthwise": ((1, 3), True, (1, 1), (1, 4)),
    "depthwise-large": ((2, 2), True, (1, 1), (5, 6)),
}


@st.composite
def convolutions(draw, kind: str) -> LayerCase:
    axis_counts, grouped, channels, sizes = CONVOLUTIONS[kind]
    axes = draw(st.integers(*axis_counts))

    def per_axis(low, high):
        return draw(st.tuples(*[st.integers(low, high)] * axes))

    groups = draw(st.integers(2, 4)) if grouped else 1
    inputs, outputs = (groups * draw(st.integers(*channels)) for _ in range(2))
    kernel = per_axis(*sizes)
    dilation = draw(st.sampled_from([(1,) * axes, per_axis(1, 2)]))
    reach = [step * (size - 1) + 1 for step, size in zip(dilation, kernel, strict=True)]
    padding = draw(st.sampled_from(["same", "valid", per_axis(0, 3)]))
    margin = padding if isinstance(padding, tuple) else (0,) * axes
    size = [max(r, m + 1) + e for r, m, e in zip(reach, margin, per_axis(0, 3), strict=True)]
    build = partial(
        (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1],
        inputs,
        outputs,
        kernel,
        stride=(1,) * axes if padding == "same" else per_axis(1, 3),
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"])),
    )
    return LayerCase(_name(build), "conv", build, (inputs, *size))


def _name(build: partial) -> str:
    options = [f"{key}={value}" for key, value in build.keywords.items()]
    return f"{build.func.__name__}({', '.join([*map(str, build.args), *options])})"

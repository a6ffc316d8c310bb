"""What a chain of factors does in place of each kind of layer.

One class per kind, chosen by `ops_for`. An instance holds plain data only; the base layer is passed to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name that torch's own documentation uses
from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from .convolution import convolve_depthwise, convolve_pair, is_slow_depthwise
from .delta import WeightShape, chain_cost, multiply, narrowest_rank, shorten, split
from .linear import update_linear, update_pays
from .quantization import linear_sizes

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Convolutions with few channels on one side are this much slower per multiplication than dense ones, and a
# weight is updated in the time of this many samples per rank (examples/benchmarks/convolution.py).
_THIN = 3.5
_FEW = 64


@dataclass
class Branch:
    """One active adapter at work: its chain, scaled, and the dropout on its input (or None)."""

    factors: tuple[Tensor, ...]
    dropout: nn.Module | None = None

    @classmethod
    def scaled(cls, factors: tuple[Tensor, ...], scaling: float, dropout: nn.Module | None) -> Branch:
        """Scale the chain by its smallest factor, the cheapest place to do it."""
        if scaling != 1:
            sizes = [factor.numel() for factor in factors]
            small = sizes.index(min(sizes))
            factors = (*factors[:small], factors[small] * scaling, *factors[small + 1 :])
        return cls(factors, dropout)

    def drop(self, x: Tensor) -> Tensor:
        """Input of the branch."""
        return x if self.dropout is None else self.dropout(x)

    @property
    def drops(self) -> bool:
        """Whether dropout is at work now."""
        return self.dropout is not None and self.dropout.training


class LayerOps:
    """A chain in place of one kind of layer.

    Attributes:
        shape: Shape of the weight as the methods see it.
        linear: Whether `ΔW` is a matrix that acts on the last axis of the input.
        dropout_cls: Dropout that suits the branch's input, None where nothing can be dropped.
        calls_layer: Whether the layer has a forward of its own. Only the layer itself then knows what an
            updated weight does (it pads by the size of its input, standardises the weight, …), so it is
            called with one.
    """

    linear = False
    dropout_cls: type[nn.Module] | None = nn.Dropout

    def __init__(self, shape: WeightShape, *, calls_layer: bool = False) -> None:
        self.shape = shape
        self.calls_layer = calls_layer

    def to_layout(self, delta: Tensor) -> Tensor:
        """Rearrange `ΔW`, `(out, in, *kernel)`, as the layer stores its weight (or back)."""
        return delta

    def add(self, result: Tensor, base: nn.Module, branch: Branch, x: Tensor) -> Tensor:
        """Return the layer's `result` plus what the branch makes of its input `x`."""
        raise NotImplementedError

    def merged_forward(
        self, base: nn.Module, branches: Sequence[Branch], x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor | None:
        """Run the layer once with `W + ΔW`, or return None to ask for separate branches."""
        if self.calls_layer and not any(branch.drops for branch in branches):
            return _call_updated(base, self, branches, x, *args, **kwargs)
        return None

    def _add_by_calling(self, result: Tensor, base: nn.Module, branch: Branch, x: Tensor) -> Tensor:
        x = branch.drop(x)
        x = x.to(base.weight.dtype) if x.is_floating_point() else x
        return (result + (_call_updated(base, self, [branch], x) - base(x))).to(result.dtype)

    def add_weight_gradient(self, total: Tensor, base: nn.Module, x: Tensor, grad_output: Tensor) -> None:
        """Add the gradient of the layer's weight to `total`, `(out, in, *kernel)` in fp32.

        It is made of the layer's input and the gradient of its output, and the weight need not be readable;
        only layers that do more than their kind are called once more, and differentiated.
        """
        if not self.calls_layer:
            return self._add_outer_products(total, base, x, grad_output)
        weight = base.weight.detach().requires_grad_()
        with torch.enable_grad():
            x = x.to(weight.dtype) if x.is_floating_point() else x
            y = functional_call(base, {"weight": weight}, (x,))
        (gradient,) = torch.autograd.grad(y, weight, grad_output.to(y.dtype))
        total.add_(self.to_layout(gradient))
        return None

    def _add_outer_products(self, total: Tensor, base: nn.Module, x: Tensor, grad_output: Tensor) -> None:
        raise NotImplementedError


class LinearOps(LayerOps):
    """`nn.Linear`, and quantised layers that stand for one."""

    linear = True

    def add(self, result: Tensor, base: nn.Module, branch: Branch, x: Tensor) -> Tensor:
        """Apply the factors from right to left."""
        if self.calls_layer:
            return self._add_by_calling(result, base, branch, x)
        return _add_chain(result, branch.factors, branch.drop(x))

    def merged_forward(
        self, base: nn.Module, branches: Sequence[Branch], x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor | None:
        """Multiply once by `W + ΔW`, where that is exact and cheaper to train than the factors."""
        if self.calls_layer or not self.linear or any(branch.drops for branch in branches):
            return super().merged_forward(base, branches, x, *args, **kwargs)
        tokens = x.numel() // x.shape[-1]
        if not all(update_pays(branch.factors, tokens) for branch in branches):
            return None
        autocast = torch.is_autocast_enabled(x.device.type)
        if autocast or _has_hooks(base) or not _sums_exactly(base, branches, x):
            return None
        weight = self.to_layout(base.weight)
        dense = [branch.factors[0] for branch in branches if len(branch.factors) == 1]
        pairs = [split(branch.factors) for branch in branches if len(branch.factors) > 1]
        weight = sum(dense, start=weight)
        if not pairs:
            return F.linear(x, weight, base.bias)
        lefts, rights = zip(*pairs, strict=True)
        return update_linear(x, weight, base.bias, torch.cat(lefts, dim=1), torch.cat(rights))

    def _add_outer_products(self, total: Tensor, base: nn.Module, x: Tensor, grad_output: Tensor) -> None:
        total.addmm_(grad_output.flatten(0, -2).T.float(), x.flatten(0, -2).float())


class _TransposedOps(LinearOps):
    """A layer that stores its weight as `(in, out)`."""

    def to_layout(self, delta: Tensor) -> Tensor:
        """Transpose."""
        return delta.transpose(0, 1)


class Conv1DOps(_TransposedOps):
    """The `Conv1D` of transformers, a linear layer."""


class EmbeddingOps(_TransposedOps):
    """`nn.Embedding`: a linear layer on one-hot rows, without dropout, for its input is indices."""

    linear = False
    dropout_cls = None

    def add(self, result: Tensor, base: nn.Module, branch: Branch, x: Tensor) -> Tensor:
        """Look the indices up in the last factor and apply the others."""
        if self.calls_layer:
            return self._add_by_calling(result, base, branch, x)
        *rest, last = branch.factors
        rows = F.embedding(
            x, last.T, padding_idx=base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq
        )
        rows = _embed_scaled(base, rows)
        result = _add_chain(result, tuple(rest), rows) if rest else (result + rows).to(result.dtype)
        if base.padding_idx is None or not result.requires_grad:
            return result
        padding = (x == base.padding_idx)[..., None]
        return torch.where(padding, result.detach(), result)  # as in the base layer, padding trains nothing

    def _add_outer_products(self, total: Tensor, base: nn.Module, x: Tensor, grad_output: Tensor) -> None:
        indices, rows = x.flatten(), _embed_scaled(base, grad_output.flatten(0, -2).float())
        if base.scale_grad_by_freq:
            rows = rows / indices.bincount()[indices, None]
        if base.padding_idx is not None:
            rows = rows.masked_fill((indices == base.padding_idx)[:, None], 0.0)
        total.index_add_(1, indices, rows.T)


class ConvOps(LayerOps):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`, of any stride, padding, dilation, groups and padding mode."""

    def __init__(self, shape: WeightShape, *, calls_layer: bool = False) -> None:
        super().__init__(shape, calls_layer=calls_layer)
        # Neighbouring pixels say the same: dropping single ones drops nothing, so whole channels are dropped.
        self.dropout_cls = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)[len(shape.kernel_size) - 1]

    def add(self, result: Tensor, base: nn.Module, branch: Branch, x: Tensor) -> Tensor:
        """Run 1×1 → kernel → 1×1, or one convolution with `ΔW` where that is cheaper."""
        if self._is_single(x):
            return self.add(result[None], base, branch, x[None])[0]
        if self.calls_layer:
            return self._add_by_calling(result, base, branch, x)
        x = branch.drop(x)
        if self._prefers_factors(base, branch, x, dense_passes=3):
            return self._add_factored(result, base, branch.factors, x)
        return (result + base._conv_forward(x, multiply(branch.factors), None)).to(result.dtype)

    def merged_forward(
        self, base: nn.Module, branches: Sequence[Branch], x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor | None:
        """Convolve once with `W + ΔW`, where that is exact and no factored branch is cheaper."""
        if self.calls_layer or any(branch.drops for branch in branches):
            return super().merged_forward(base, branches, x, *args, **kwargs)
        if not _sums_exactly(base, branches, x) or _has_hooks(base):
            return None
        if is_slow_depthwise(base, x):
            return convolve_depthwise(base, x, updated_weight(base.weight, self, branches))
        if self.shape.groups > 1 or self._is_single(x):
            return base._conv_forward(x, updated_weight(base.weight, self, branches), base.bias)
        rank = sum(narrowest_rank(branch.factors) for branch in branches)
        few = self._positions(base, x)[1] < _FEW * rank
        if few and all(self._prefers_factors(base, branch, x, dense_passes=1) for branch in branches):
            return None
        if 2 * _THIN * rank * (self.shape.out_features + self.shape.columns) < prod(self.shape.dims):
            lefts, rights = zip(*(split(branch.factors) for branch in branches), strict=True)
            return convolve_pair(base, x, torch.cat(lefts, dim=1), torch.cat(rights))
        return base._conv_forward(x, updated_weight(base.weight, self, branches), base.bias)

    def _is_single(self, x: Tensor) -> bool:
        """Whether the input is one sample without a batch axis."""
        return x.ndim == 1 + len(self.shape.kernel_size)

    def _positions(self, base: nn.Module, x: Tensor) -> tuple[int, int]:
        """Positions, over all samples, at which the layer reads its input and writes its output."""
        inputs = x.numel() // x.shape[-1 - len(self.shape.kernel_size)]
        return inputs, inputs // prod(base.stride)

    def _add_outer_products(self, total: Tensor, base: nn.Module, x: Tensor, grad_output: Tensor) -> None:
        if self._is_single(x):
            x, grad_output = x[None], grad_output[None]
        weight = base.weight.detach().float().requires_grad_()
        with torch.enable_grad():
            y = base._conv_forward(x.float(), weight, None)
        (gradient,) = torch.autograd.grad(y, weight, grad_output.float())
        total.add_(gradient)

    def _prefers_factors(self, base: nn.Module, branch: Branch, x: Tensor, dense_passes: int) -> bool:
        """Whether three passes through the factors are cheaper than `dense_passes` dense convolutions."""
        if self.shape.groups > 1:
            return False
        inputs, outputs = self._positions(base, x)
        thin = self._factored_cost(branch.factors, inputs, outputs)
        return 3 * _THIN * thin < dense_passes * outputs * prod(self.shape.dims)

    def _factored_cost(self, factors: Sequence[Tensor], inputs: int, outputs: int) -> int:
        joint = _kernel_at(factors)
        return outputs * chain_cost(factors[: joint + 1]) + inputs * chain_cost(factors[joint + 1 :])

    def _add_factored(self, result: Tensor, base: nn.Module, factors: Sequence[Tensor], x: Tensor) -> Tensor:
        if prod(self.shape.kernel_size) == 1:  # a kernel that is a matrix too joins its neighbours
            factors = split(factors)
        joint = _kernel_at(factors)
        for factor in reversed(factors[joint + 1 :]):
            x = _pointwise(x, factor)
        x = base._conv_forward(x, factors[joint], None)
        for factor in reversed(factors[1:joint]):
            x = _pointwise(x, factor)
        return _add_pointwise(result, x, factors[0]) if joint else (result + x).to(result.dtype)


def ops_for(base: nn.Module, *, quantized: bool) -> LayerOps:
    """Choose the operations for a base layer.

    Raises:
        TypeError: If no method can adapt layers of this type.
        ValueError: If the layer has no weight yet, or groups that do not divide its channels.
    """
    if getattr(base, "has_uninitialized_params", lambda: False)():
        raise ValueError(f"{type(base).__name__} has no weight yet; run one batch through the model first")
    if isinstance(base, nn.Embedding):
        shape = WeightShape(base.embedding_dim, base.num_embeddings, picked=1)
        calls_layer = _has_own_forward(base) and not hasattr(base, "embed_scale")
        return EmbeddingOps(shape, calls_layer=calls_layer)
    if isinstance(base, _CONVOLUTIONS):
        channels = (base.in_channels, base.out_channels)
        if any(count % base.groups for count in channels):
            raise ValueError(
                f"groups={base.groups} must divide in_channels={channels[0]} and out_channels={channels[1]}; "
                "correct the layer, or exclude it"
            )
        per_group = base.in_channels // base.groups
        shape = WeightShape(base.out_channels, per_group, tuple(base.kernel_size), base.groups)
        return ConvOps(shape, calls_layer=_has_own_forward(base))
    if isinstance(base, nn.Linear | Conv1D) or quantized:
        sizes = None if isinstance(base, nn.Linear | Conv1D) else linear_sizes(base)
        in_features, out_features = (int(size or 0) for size in sizes or _get_in_out_features(base))
        ops = Conv1DOps if isinstance(base, Conv1D) else LinearOps
        calls_layer = not quantized and base.weight.dtype.itemsize > 1 and _has_own_forward(base)
        return ops(WeightShape(out_features, in_features), calls_layer=calls_layer)
    raise TypeError(
        f"{type(base).__name__} cannot be adapted; supported are Linear, Conv1D (transformers), Embedding, "
        "Conv1d, Conv2d, Conv3d, their subclasses, and quantised linear layers"
    )


def _embed_scaled(base: Any, rows: Tensor) -> Tensor:
    """Rows times the scale that Gemma's embedding, and others, give to their output."""
    scale = getattr(base, "embed_scale", None)
    return rows if scale is None else rows * torch.as_tensor(scale, dtype=rows.dtype, device=rows.device)


def _add_chain(result: Tensor, factors: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """`result + x Fnᵀ … F1ᵀ`, the last product and the sum in one call where dtypes allow."""
    factors = shorten(factors, x.numel() // x.shape[-1])
    for factor in reversed(factors[1:]):
        x = F.linear(x, factor)
    first = factors[0]
    if result.dtype == x.dtype == first.dtype and not torch.is_autocast_enabled(x.device.type):
        rows, hidden = result.reshape(-1, first.shape[0]), x.reshape(-1, first.shape[1])
        return torch.addmm(rows, hidden, first.T).view_as(result)
    return (result + F.linear(x, first)).to(result.dtype)


def _pointwise(x: Tensor, factor: Tensor) -> Tensor:
    """1×1 convolution of `x`, `(…, channels, *spatial)`, with a matrix `(out, channels)`."""
    axes = x.ndim - 2
    if x.is_contiguous():
        # For a factor that requires gradients matmul computes in another order, even where none are recorded.
        factor = factor if torch.is_grad_enabled() else factor.detach()
        return torch.matmul(factor, x.flatten(2)).unflatten(2, x.shape[2:])
    convolve = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    return convolve(x, factor.reshape(*factor.shape, *[1] * axes))


def _add_pointwise(result: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """`result` plus a 1×1 convolution, in one call where layouts and dtypes allow."""
    same = result.dtype == x.dtype == factor.dtype and not torch.is_autocast_enabled(x.device.type)
    if same and result.is_contiguous() and x.is_contiguous():
        batch = factor.expand(len(x), -1, -1)
        return torch.baddbmm(result.flatten(2), batch, x.flatten(2)).view_as(result)
    return (result + _pointwise(x, factor)).to(result.dtype)


def _kernel_at(factors: Sequence[Tensor]) -> int:
    """Position of the factor that carries the kernel axes."""
    return next(i for i, factor in enumerate(factors) if factor.ndim > 2)


def _has_own_forward(base: nn.Module) -> bool:
    """Whether a subclass has changed the forward of its kind of layer."""
    kind = next(kind for kind in (nn.Linear, Conv1D, nn.Embedding, *_CONVOLUTIONS) if isinstance(base, kind))
    methods = ("forward", "_conv_forward")
    return any(getattr(type(base), name, None) is not getattr(kind, name, None) for name in methods)


def _has_hooks(base: nn.Module) -> bool:
    """Whether calling the layer does more than its forward: hooks, or a forward replaced by accelerate."""
    return bool(base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base))


def _sums_exactly(base: nn.Module, branches: Sequence[Branch], x: Tensor) -> bool:
    """Whether `W + ΔW` loses nothing: in less than fp32 the sum would round `ΔW` to the steps of `W`."""
    dtypes = {x.dtype, base.weight.dtype, *(factor.dtype for branch in branches for factor in branch.factors)}
    return dtypes <= {torch.float32} or dtypes <= {torch.float64}


def updated_weight(weight: Tensor, ops: LayerOps, branches: Sequence[Branch]) -> Tensor:
    """`W + ΔW` of some branches, laid out as the layer stores `W`, in its dtype."""
    dtype = weight.dtype
    if weight.is_meta and not branches[0].factors[0].is_meta:
        raise RuntimeError(
            "the weight is offloaded, and the adapter of this layer needs it in memory; give its module a "
            "device in device_map, or merge the adapter first"
        )
    for branch in branches:
        # Flat, for an axis of size one can have strides that convolutions take for another memory format.
        delta = ops.to_layout(multiply(branch.factors)).reshape(-1)
        weight = weight + delta.view(weight.shape)
    return weight.to(dtype)


def _call_updated(
    base: nn.Module, ops: LayerOps, branches: Sequence[Branch], x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    weight = updated_weight(base.weight, ops, branches)
    return functional_call(base, {"weight": weight}, (x, *args), kwargs)

"""The one table of costs: by which route a layer and its branches are computed.

Each function counts multiplications and returns a route. All constants are here; they were measured on CPUs
with examples/benchmarks/convolution.py and speed.py, which count forward and backward passes.

| route | what is computed |
|---|---|
| `"chain"` | the branch beside the layer, one factor after the other |
| `"pair"` | the branch beside the layer, as two factors |
| `"dense"` | the branch beside the layer, as one matrix or kernel `ΔW` |
| `"updated"` | the layer once, with `W + ΔW` |
| `"updated_pair"` | the same, with the gradients of two thin factors, never of the weight |
| `"updated_depthwise"` | the same, with a faster gradient of depthwise convolutions |

Transforms (`vmap`, `jvp`) and exports get a route that depends on no size and needs no autograd function.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal

import torch
from torch import Tensor

from peft_subspace.core.chain import chain_cost, kernel_at, narrowest, narrowest_rank, product_cost
from peft_subspace.core.modes import must_be_plain
from peft_subspace.core.shapes import WeightShape

Route = Literal["chain", "pair", "dense", "updated", "updated_pair", "updated_depthwise"]
Chain = Sequence[Tensor]

# Reading and writing an entry of a weight takes the time of this many multiplications.
_TOUCH = 64

# Convolutions with few channels on one side are this much slower per multiplication than dense ones.
_THIN = 3.5

# A weight is updated in the time of this many samples per rank.
_FEW = 64

# With smaller kernels the usual weight gradient of a depthwise convolution is faster.
_SMALLEST_KERNEL = 5


def branch_route(factors: Chain, tokens: int) -> Route:
    """Cheapest way to apply a chain of matrices to `tokens` rows, beside a layer."""
    trained = [factor.requires_grad for factor in factors]
    mixed = torch.is_grad_enabled() and any(trained) and not all(trained)
    if len(factors) < 2 or mixed or must_be_plain():
        return "chain"  # a product of frozen and trained factors takes a gradient as large as itself
    dense = (factors[0].shape[0], factors[-1].shape[1])
    rank = factors[narrowest(factors)].shape[0]
    halves = product_cost(factors)
    as_chain = tokens * chain_cost(factors)
    as_pair = halves + tokens * rank * sum(dense)
    as_matrix = halves + (tokens + rank) * dense[0] * dense[1]
    if as_matrix < min(as_chain, as_pair):
        return "dense"
    return "chain" if as_chain <= as_pair or len(factors) == 2 else "pair"


def linear_routes(chains: Sequence[Chain], tokens: int, *, exact: bool) -> list[Route]:
    """Routes of a linear layer's branches; all are `"updated"` or none.

    Args:
        chains: Factors of each branch.
        tokens: Rows of the input.
        exact: Whether the layer may be run with `W + ΔW`.
    """
    if exact and all(_update_pays(factors, tokens) for factors in chains):
        return ["updated"] * len(chains)
    return [branch_route(factors, tokens) for factors in chains]


def _update_pays(factors: Chain, tokens: int) -> bool:
    """Whether a step is cheaper with `W + ΔW` than with the chain beside `W`.

    `ΔW` itself costs a product with each row, in either direction, where the sum costs passes over its
    entries. A chain of trained factors alone, or of frozen ones, is multiplied up where that pays
    (`branch_route`).
    """
    if len(factors) == 1:
        return tokens > _TOUCH
    trained = [factor.requires_grad for factor in factors]
    if not torch.is_grad_enabled() or not any(trained):
        return False
    size, rank = factors[0].shape[0] * factors[-1].shape[1], narrowest_rank(factors)
    beside = tokens * (2 * chain_cost(factors) + chain_cost([f for f in factors if f.requires_grad]))
    gradients = tokens * rank * (factors[0].shape[0] + factors[-1].shape[1])
    products = 3 * product_cost(factors) + 2 * size * (rank + _TOUCH)
    return not all(trained) and gradients + products < beside


def is_thin(shape: WeightShape, factors: Chain) -> bool:
    """Whether the two factors that `split` makes of a chain are smaller than `ΔW`."""
    return narrowest_rank(factors) * (shape.out_features + shape.columns) < prod(shape.dims)


def is_narrow(shape: WeightShape, factors: Chain) -> bool:
    """Whether a chain is hardly larger than the two factors that `split` makes of it."""
    return 8 * chain_cost(factors) <= 9 * narrowest_rank(factors) * (shape.out_features + shape.columns)


def picks_adapters(device: str) -> bool:
    """Whether adapters that do not follow each other in a stack are copied to go through one product.

    On a CPU a call takes less time than the copy.
    """
    return device != "cpu"


def convolution_routes(
    shape: WeightShape, chains: Sequence[Chain], inputs: int, outputs: int, *, exact: bool, single: bool
) -> list[Route]:
    """Routes of a convolution's branches; all are of an updated layer or none.

    Args:
        shape: Shape of the weight.
        chains: Factors of each branch.
        inputs: Positions, over all samples, at which the layer reads its input.
        outputs: Positions at which it writes its output.
        exact: Whether the layer may be run with `W + ΔW`.
        single: Whether the input is one sample without a batch axis.
    """
    beside: list[Route] = [
        "chain" if _factors_pay(shape, factors, inputs, outputs, dense_passes=3) else "dense"
        for factors in chains
    ]
    if not exact:
        return beside
    if shape.groups > 1 or single:
        return ["updated"] * len(chains)
    rank = sum(narrowest_rank(factors) for factors in chains)
    few = outputs < _FEW * rank
    if few and all(_factors_pay(shape, factors, inputs, outputs, dense_passes=1) for factors in chains):
        return beside
    thin = 2 * _THIN * rank * (shape.out_features + shape.columns) < prod(shape.dims)
    return ["updated_pair" if thin else "updated"] * len(chains)


def _factors_pay(shape: WeightShape, factors: Chain, inputs: int, outputs: int, dense_passes: int) -> bool:
    """Whether three passes through the factors are cheaper than `dense_passes` dense convolutions."""
    if shape.groups > 1:
        return False
    if must_be_plain():
        return True
    joint = kernel_at(factors)
    thin = outputs * chain_cost(factors[: joint + 1]) + inputs * chain_cost(factors[joint + 1 :])
    return 3 * _THIN * thin < dense_passes * outputs * prod(shape.dims)


def depthwise_gradient_pays(kernel_size: Sequence[int]) -> bool:
    """Whether matrix products give the weight gradient of a depthwise convolution faster."""
    return min(kernel_size) >= _SMALLEST_KERNEL

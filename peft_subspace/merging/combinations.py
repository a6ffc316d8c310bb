"""PEFT's types of combinations, as merges of updates.

Those in `_svd` work on the entries of the updates and are cut to a rank. Those without work on coordinates in
the common singular basis of the updates, where nothing needs to be cut: the rank is at most the sum of ranks.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from peft_subspace.core.linalg import local_generator
from peft_subspace.core.validation import check_choice, check_count
from peft_subspace.merging.computing import TILE_BYTES, compute
from peft_subspace.merging.cutting import cut
from peft_subspace.merging.entries import ELECTIONS
from peft_subspace.merging.stack import Stack
from peft_subspace.tuner.combination import COMBINATIONS, OPTIONS, Parts

_KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cat": ("task_arithmetic", ()),
    "linear": ("task_arithmetic", ()),
    "svd": ("task_arithmetic", ("svd_rank",)),
    "ties": ("ties", ("density", "majority_sign_method")),
    "dare_linear": ("dare", ("density", "seed")),
    "dare_ties": ("dare_ties", ("density", "majority_sign_method", "seed")),
    "magnitude_prune": ("magnitude", ("density",)),
}
"""Method and options by type; all but the sums have a form that ends in `_svd`, too."""


def _combine(kind: str, parts: Parts) -> tuple[Tensor, Tensor]:
    """Factors of the merged update."""
    cuts = kind.endswith("svd")
    method, _ = _KINDS[kind if kind in _KINDS else kind.removesuffix("_svd")]
    given = dict(parts.options)
    rank, seed = given.pop("svd_rank", max(len(right) for right in parts.rights)), given.pop("seed", 0)
    check_count("svd_rank", rank)
    check_count("seed", seed, minimum=0, maximum=2**64 - 1)
    generators = [local_generator(seed, parts.module, adapter) for adapter in parts.adapters]
    space = "weight" if cuts else "aligned"
    if "majority_sign_method" in given:
        given["elect"] = given.pop("majority_sign_method")
        check_choice("majority_sign_method", given["elect"], ELECTIONS)
    stack = Stack(parts.lefts, parts.rights)
    merged = compute(stack, method, parts.weights, generators, 1.0, space, TILE_BYTES, given)
    full = min(stack.shape)
    if cuts or merged[0].shape[1] > full:
        merged = cut(merged, min(rank, full) if cuts else full, None, kind)[:2]
    return merged[0], merged[1]


OPTIONS.update({kind: options for kind, (_, options) in _KINDS.items()})
OPTIONS.update({f"{k}_svd": (*known, "svd_rank") for k, (_, known) in _KINDS.items() if "density" in known})
COMBINATIONS.update({kind: partial(_combine, kind) for kind in OPTIONS})

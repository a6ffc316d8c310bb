"""Effort: its train step against PEFT's LoRA, its regularizers, and its initialization.

    python examples/benchmarks/effort.py            about 15 minutes on 2 cores
    python examples/benchmarks/effort.py --quick    about 3 minutes, smaller models and fewer matrices

Train step: a decoder of 24 layers of width 1024, 4×256 tokens, all linear layers adapted, r=1 against LoRA at
rank 2, which applies as many numbers; the step, and the peak of a process that takes two steps of AdamW.
Regularizers: value and gradients for one 1024×1024 weight, against the formulas taken literally.
Initialization: the 96 matrices of 1024×1024 of the self-attention of CLIP ViT-L/14's image tower, random
values, against one full `torch.linalg.svd` each, of which a few are run and the rest extrapolated; and
weights of other spectra. Expected: a train step of at most 1.03 of LoRA's, regularizers at a twentieth of the
literal cost or less, and an initialization faster than full decompositions. Times are medians of interleaved
repeats.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn

import timing
from peft_subspace import EffortConfig
from peft_subspace.core.linalg import smallest_triples
from peft_subspace.core.shapes import ModuleSpec, WeightShape
from peft_subspace.methods.effort import EffortDelta

Triples = tuple[Tensor, Tensor, Tensor]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TRAINED: dict[str, Callable[[], PeftConfig]] = {
    "effort": lambda: EffortConfig(target_modules=list(LINEARS)),
    "effort, both losses": lambda: EffortConfig(
        target_modules=list(LINEARS), orthogonality_weight=1.0, energy_weight=1.0
    ),
    "lora": lambda: LoraConfig(r=2, lora_alpha=2, target_modules=list(LINEARS)),
}


def train(layers: int, width: int, repeats: int) -> dict[str, Any]:
    """Time of a train step, and peak memory of training."""
    results, seconds = timing.training(__file__, TRAINED, layers, width, repeats)
    for method, result in results.items():
        result["to_lora"] = timing.ratio(seconds, method, "lora")
    return results


def literal_losses(head: Triples, tail: Triples, energy: Tensor) -> Tensor:
    """Both regularizers as the paper writes them, on `n × n` products."""
    left = torch.cat([head[0], tail[0]], dim=1)
    values, right = (torch.cat([head[i], tail[i]]) for i in (1, 2))
    eye = torch.eye(len(values))
    orthogonality = (left.T @ left - eye).square().sum() + (right @ right.T - eye).square().sum()
    return orthogonality + (((left * values) @ right).square().sum() - energy).abs()


def penalty(width: int, repeats: int) -> dict[str, Any]:
    """Value and gradients of both regularizers for one square weight."""
    results = {}
    weight = torch.randn(width, width) / width**0.5
    left, values, right = torch.linalg.svd(weight)
    energy = weight.square().sum()
    for rank in (1, 16):
        delta = EffortDelta(EffortConfig(r=rank), ModuleSpec("", WeightShape(width, width), rank))
        delta.reset_parameters(True, torch.Generator())
        delta.reset_from_weight(weight)
        for parameter in delta.parameters():
            parameter.data.normal_(std=0.01)
        head = left[:, :-rank], values[:-rank], right[:-rank]

        def effort(delta: EffortDelta = delta) -> None:
            loss = delta.orthogonality_loss(lambda: weight) + delta.energy_loss(lambda: weight)
            torch.autograd.grad(loss, list(delta.parameters()))

        def literal(delta: EffortDelta = delta, head: Triples = head) -> None:
            torch.autograd.grad(literal_losses(head, delta.tail, energy), list(delta.parameters()))

        seconds = timing.interleaved({"effort": effort, "literal": literal}, repeats)
        results[f"r={rank}"] = {
            "seconds": {name: statistics.median(times) for name, times in seconds.items()},
            "ratio": timing.ratio(seconds, "effort", "literal"),
        }
    return results


def start(count: int, width: int, decomposed: int) -> dict[str, Any]:
    """Seconds to initialize `count` square layers, against full decompositions of the same matrices."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))
    for layer in base:
        nn.init.normal_(layer.weight, std=width**-0.5)
    weights = [layer.weight.detach() for layer in base][:decomposed]
    full = [_seconds(partial(torch.linalg.svd, weight, full_matrices=False)) for weight in weights]
    names = [str(number) for number in range(count)]
    effort = _seconds(lambda: get_peft_model(base, EffortConfig(target_modules=names)))
    return {
        "matrices": count,
        "effort_s": effort,
        "full_svd_s": count * statistics.median(full),
        "full_svd_run": len(full),
        "ratio": effort / (count * statistics.median(full)),
    }


def shapes(width: int) -> dict[str, Any]:
    """One weight of each kind: seconds, and error against a full SVD in float64."""
    orthogonal = torch.linalg.qr(torch.randn(width, width)).Q
    low = torch.randn(width, width // 2) @ torch.randn(width // 2, width) / width
    decaying = (orthogonal * torch.logspace(0, -8, width)) @ torch.linalg.qr(torch.randn(width, width)).Q
    weights = {
        "random": torch.randn(width, width) / width**0.5,
        "4 times as tall": torch.randn(4 * width, width) / width**0.5,
        "condition 1e8": decaying,
        "half the rank": low,
        "all values equal": orthogonal,
    }
    results = {}
    for name, weight in weights.items():
        results[name] = {
            "seconds": _seconds(partial(smallest_triples, weight, 1)),
            "full_svd_s": _seconds(partial(torch.linalg.svd, weight, full_matrices=False)),
            **errors(weight.double()),
        }
    return results


def errors(weight: Tensor) -> dict[str, float]:
    """Error of the smallest value, and residual of its triple, to the largest value."""
    exact = torch.linalg.svdvals(weight)
    left, value, right = (tensor.double() for tensor in smallest_triples(weight, 1))
    residuals = (weight @ right.T - left * value).norm(), (weight.T @ left - right.T * value).norm()
    return {
        "value_error": ((value - exact[-1]).abs() / exact[0]).item(),
        "residual": (max(residuals) / exact[0]).item(),
    }


def _seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    """Measure all parts, print tables and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smaller models, fewer matrices and repeats")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peak", nargs=3, metavar=("METHOD", "LAYERS", "WIDTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        method, layers, width = options.peak
        timing.print_peak(lambda: timing.two_adamw_steps(TRAINED[method](), int(layers), int(width)))
        return
    repeats = min(options.repeats, 3) if options.quick else options.repeats
    started = start(8, 512, 2) if options.quick else start(96, 1024, 4)
    kinds = shapes(256 if options.quick else 1024)
    penalties = penalty(1024, repeats)
    trained = train(4, 512, repeats) if options.quick else train(24, 1024, repeats)
    print_results(started, kinds, penalties, trained)
    results = {"start": started, "shapes": kinds, "penalty": penalties, "training": trained}
    timing.save("effort-quick" if options.quick else "effort", results)


def print_results(started: dict, kinds: dict, penalties: dict, trained: dict) -> None:
    """Print one table per part."""
    timing.table("start of all layers", list(started), [list(started.values())])
    rows = [[name, *(f"{value:.2g}" for value in row.values())] for name, row in kinds.items()]
    timing.table("one weight, rank 1", ["", *next(iter(kinds.values()))], rows)
    rows = [[name, *row["seconds"].values(), row["ratio"]["median"]] for name, row in penalties.items()]
    timing.table("regularizers, 1024 x 1024", ["", "effort s", "literal s", "ratio"], rows)
    rows = [
        [name, row["trainable"], row["peak_mib"], row["step_s"], row["to_lora"]["median"]]
        for name, row in trained.items()
    ]
    timing.table("training", ["", "trainable", "peak MiB", "step s", "to LoRA"], rows)


if __name__ == "__main__":
    main()

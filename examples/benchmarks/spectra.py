"""Singular values of the updates that each method trains, beside LoRA's and those of full fine-tuning.

    python examples/benchmarks/spectra.py                   about 4 minutes on one core

MiniLM learns BBC News for a few dozen steps, which all methods take alike: same rows, seed and steps, each at
the middle of the learning rates that `quality.py` begins with. `examples/benchmarks/pages.py` draws the
spectra of a few weights and tabulates the effective ranks of all.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import timing
from peft_subspace.tools.inspection import layer_updates
from support import device, graded, trial
from support.contestants import CONTESTANTS, trainable
from support.task import Sizes, Task

SEED = 0
BATCH = 16
START_BATCHES = 4
TOKENS = 32
SIZES = {  # rank; MoS takes its budget, of which its rank is the fourfold
    "flora": 16,
    "lora-sb": 16,
    "mos": 4,
    "effort": 16,
    "continual-svd": 16,
    "lora": 16,
    "full": 0,
}
DRAWN = tuple(
    f"encoder.layer.{block}.{part}"
    for block, part in itertools.product((0, 5), ("attention.self.query", "intermediate.dense"))
)
"""Weights whose singular values are kept: of the first block and of the last."""

SMALLEST = 1e-6
"""Singular values below this part of the largest are rounding errors."""


def measured(task: Task, name: str) -> dict[str, Any]:
    """Trains one method and decomposes what it has added to the weights."""
    transformers.set_seed(SEED)
    rate = CONTESTANTS[name].rates[1]
    model = CONTESTANTS[name].adapt(task, SIZES[name], ())
    batches = list(_batches(task, next(model.parameters()).device))
    CONTESTANTS[name].after(model, batches[:START_BATCHES])
    before = {key: weight.detach().clone() for key, weight in model.named_parameters()}
    _train(model, batches, rate)
    spectra = {_short(key): values for key, values in _spectra(model, before)}
    return {
        "title": CONTESTANTS[name].title,
        "size": SIZES[name],
        "rate": rate,
        "trainable": trainable(model),
        "test_accuracy": trial.evaluate(model, task, task.test, bf16=False)["accuracy"],
        "effective_ranks": {key: _effective_rank(values) for key, values in spectra.items()},
        "spectra": {key: (spectra[key] / spectra[key][0]).tolist() for key in DRAWN},
    }


def _batches(task: Task, where: torch.device) -> Iterator[dict[str, Tensor]]:
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(SEED)).tolist()
    for start in range(0, len(order), BATCH):
        batch = task.collate([task.train[i] for i in order[start : start + BATCH]])
        yield device.moved(batch, where)


def _train(model: nn.Module, batches: list[dict[str, Tensor]], rate: float) -> None:
    """AdamW with a linear decay to zero."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        scheduler.step()


@torch.no_grad()
def _spectra(model: nn.Module, before: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Singular values of each update, as far as they are no rounding errors."""
    lora = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    if not hasattr(model, "peft_config"):
        updates = {
            name.removesuffix(".weight"): weight.double() - before[name].double()
            for name, weight in model.named_parameters()
            if ".encoder." in name and weight.dim() == 2
        }
    elif lora:
        updates = {name: _product(layer) for name, layer in lora.items()}
    else:
        for name, update in layer_updates(model).items():
            yield name, _significant(update.singular_values)
        return
    for name, update in updates.items():
        yield name, _significant(torch.linalg.svdvals(update))


def _product(layer: LoraLayer) -> Tensor:
    left, right = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    return layer.scaling["default"] * left.double() @ right.double()


def _significant(values: Tensor) -> Tensor:
    return values[values > SMALLEST * values[0]]


def _effective_rank(values: Tensor) -> float:
    """`exp(−Σ pᵢ log pᵢ)` with `pᵢ = σᵢ / Σσ`, as `layer_updates` has it."""
    parts = values / values.sum()
    return math.exp(-float((parts * parts.log()).sum()))


def _short(name: str) -> str:
    """Name of a layer within the network, without the names that wrappers put in front."""
    return name[name.index("encoder.") :]


def main() -> None:
    """Train every method for a while, and keep the spectra."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40, help="steps of 16 rows")
    steps = parser.parse_args().steps
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sizes = Sizes(train=steps * BATCH, validation=0, test=200, tokens=TOKENS)
    task = graded.load("bbcnews", None, None, sizes)
    found = {}
    for name in SIZES:
        found[name] = measured(task, name)
        ranks = list(found[name]["effective_ranks"].values())
        print(f"{name:14} effective rank {min(ranks):6.1f} to {max(ranks):6.1f}", flush=True)
    settings = {"task": task.name, "steps": steps, "batch_size": BATCH, "tokens": TOKENS, "seed": SEED}
    timing.save("spectra", {"settings": settings, "methods": found})


if __name__ == "__main__":
    main()

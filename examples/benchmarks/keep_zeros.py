"""Tuning a pruned model: which zeros are left after merging, at which accuracy, and what a step costs.

    python examples/benchmarks/keep_zeros.py --data FOLDER [--steps 120] [--seeds 1]

MiniLM's linear layers are pruned by magnitude, to a half of each row or to two of four neighbors, and tuned
on questions (TREC) by LoRA and HiRA of PEFT and by FLoRA with `keep_zeros=True`, each with the better of two
rates by validation loss. Then the adapter is merged, zeros are counted, and the merged model is tested again.
A train step of all three, and of FLoRA without the option, is timed in turn on batches of one length.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import peft_subspace as ps
import timing
from claims import markdown
from support import graded, trial
from support.contestants import CONTESTANTS, Contestant
from support.results import Results
from support.task import Sizes, Task

RATES = (1e-3, 3e-3)
HEAD_RATE = 1e-1  # what learning_rates.py uses for the head of this task
ROWS = {"train": 2000, "validation": 500, "test": 500, "tokens": 32}
CONFIGS: dict[str, Any] = {
    "LoRA": lambda **options: peft.LoraConfig(r=8, **options),
    "HiRA": lambda **options: peft.HiraConfig(r=8, **options),
    "FLoRA": lambda **options: ps.FLoRAConfig(r=8, **options),
    "FLoRA, keep_zeros": lambda **options: ps.FLoRAConfig(r=8, keep_zeros=True, **options),
}
TARGETS = {"all linear layers": graded.ENCODER, "query and value": r".*\.encoder\..*\.(query|value)"}


def half_of_each_row(weight: Tensor) -> None:
    """Set the smaller half of each row to zero."""
    weight.scatter_(1, weight.abs().argsort(dim=1)[:, : weight.shape[1] // 2], 0.0)


def two_of_four(weight: Tensor) -> None:
    """Set the two smallest of any four neighbors to zero."""
    fours = weight.view(-1, 4)
    fours.scatter_(1, fours.abs().argsort(dim=1)[:, :2], 0.0)


PRUNE = {"50 %": half_of_each_row, "2:4": two_of_four}


def layers_of(model: nn.Module) -> list[Any]:
    """The linear layers that are pruned and adapted, adapted or not."""
    inside = [module for name, module in model.named_modules() if name.endswith("base_layer")]
    return inside or [m for n, m in model.named_modules() if ".encoder." in n and isinstance(m, nn.Linear)]


def pruned(task: Task, pattern: str) -> Task:
    """The task with a base model that is pruned."""

    def make() -> nn.Module:
        model: nn.Module = task.make_base()
        for layer in layers_of(model):
            PRUNE[pattern](layer.weight.data)
        return model

    return dataclasses.replace(task, make_base=make)


class Runs:
    """All runs, of which the results file has those that are done."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.results = Results(options.results, {"rows": ROWS, "steps": options.steps, "rates": list(RATES)})
        self.task = graded.load("trec6", options.data, None, Sizes(**ROWS))

    def wanted(self) -> dict[str, tuple]:
        """Arguments of all runs of `measure`, by their keys."""
        return {
            f"{pattern} {name} {rate:g} {seed}": (pattern, name, rate, seed)
            for seed in range(self.options.seeds)
            for pattern in PRUNE
            for name in CONFIGS
            for rate in RATES
            if name != "FLoRA"
        }

    def measure(self, pattern: str, name: str, rate: float, seed: int) -> dict[str, Any]:
        """Train once, merge, and look at what is left."""
        models: list[Any] = []
        CONTESTANTS[name] = Contestant(
            name,
            (*RATES, 1e-2),
            lambda targets, _: CONFIGS[name](target_modules=targets),
            after=lambda model, _: models.append(model),
        )
        task = pruned(self.task, pattern)
        found = trial.run(task, name, 0, rate, seed, trial.Schedule(self.options.steps), HEAD_RATE)
        zeros = [layer.weight == 0 for layer in layers_of(models[0])]
        merged = models[0].merge_and_unload()
        left = sum(
            (zero & (m.weight == 0)).sum().item() for zero, m in zip(zeros, layers_of(merged), strict=True)
        )
        after = trial.evaluate(merged, task, task.test, bf16=False)["accuracy"]
        share = left / sum(zero.sum().item() for zero in zeros)
        about = {"pattern": pattern, "entry": name, "rate": rate, "seed": seed}
        return {**about, **found, "zeros_left": share, "merged_accuracy": after}

    def time(self, rows: int = 16, repeats: int = 9) -> dict[str, Any]:
        """Seconds of a train step of each method, taken in turn, and the ratio to LoRA's."""
        ids = torch.randint(5, 1000, (rows, ROWS["tokens"]), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(rows).long()}
        found = {}
        for where, targets in TARGETS.items():
            steps = {}
            for name, config in CONFIGS.items():
                base = pruned(self.task, "50 %").make_base()
                model = peft.get_peft_model(base, config(target_modules=targets)).train()
                steps[name] = lambda model=model: (model(**batch).loss.backward(), model.zero_grad())
            seconds = timing.interleaved(steps, repeats, warmup=2)
            found[where] = {
                name: {"seconds": statistics.median(times), **timing.ratio(seconds, name, "LoRA")}
                for name, times in seconds.items()
            }
        return found


def table(content: dict[str, Any]) -> str:
    """Zeros and accuracies of the better rate, then steps."""
    rows = []
    for pattern in PRUNE:
        for name in CONFIGS:
            runs = [r for r in content["runs"].values() if (r["pattern"], r["entry"]) == (pattern, name)]
            best = [
                min((r for r in runs if r["seed"] == seed), key=lambda run: run["validation_loss"])
                for seed in sorted({r["seed"] for r in runs})
            ]
            if best:
                keys = ("zeros_left", "test_accuracy", "merged_accuracy")
                means = [statistics.mean(run[key] for run in best) for key in keys]
                rows.append([pattern, name, f"{100 * means[0]:.1f} %", f"{means[1]:.3f}", f"{means[2]:.3f}"])
    zeros = markdown(["pruned to", "method", "zeros left", "accuracy", "merged"], rows)
    steps = [
        [where, name, f"{1000 * times['seconds']:.0f}", f"{times['median']:.2f}"]
        for where, methods in content.get("steps", {}).items()
        for name, times in methods.items()
    ]
    return f"{zeros}\n\n{markdown(['adapted', 'method', 'ms per step', 'times LoRA'], steps)}"


def main() -> None:
    """Run what is missing, and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="folder with more data")
    parser.add_argument("--steps", type=int, default=120, help="most steps of a run")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each kind")
    parser.add_argument("--results", type=Path, default=timing.RESULTS / "keep_zeros.json")
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    runs = Runs(options)
    if "steps" not in runs.results.content:
        runs.results.content["steps"] = runs.time()
        runs.results.save()
    runs.results.complete(runs, 1)
    print(table(runs.results.content))


if __name__ == "__main__":
    main()

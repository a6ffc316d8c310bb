"""Heads of classes beside a linear one: on a frozen encoder, and on one that LoRA or FLoRA adapts.

    python examples/benchmarks/heads.py --data FOLDER [--tasks clinc150] [--seeds 3]

`GrassmannHead` and `EquiangularHead` stand beside a linear head, one of cosines, and two layers with as many
parameters as the subspaces. The features of the frozen encoder are taken once, without dropout. Each head has
a rate of its own, the one of least validation loss on them with seed 0, and keeps it where the encoder is
adapted (rank 16, rate 1e-3). Training stops when validation has not improved for three looks. `FOLDER` is
described in support/graded.py. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import default_data_collator
from transformers.modeling_outputs import SequenceClassifierOutput

import timing
from claims import markdown, spread
from peft_subspace.heads import EquiangularHead, GrassmannHead
from support import device, graded, trial
from support.results import Results, Run, tuned
from support.task import Rows, Sizes, Task

ROWS = {"train": 3000, "validation": 600, "test": 1500, "tokens": 32}
SCHEDULE: dict[str, Any] = {"steps": 900, "batch_size": 32, "checks": 15, "patience": 3}
RATES, ADAPTED_RATE, RANK = (1e-3, 3e-3, 1e-2), 1e-3, 16
SUBSPACE = 8
TUNINGS = {"probe": "frozen", "lora": "LoRA", "flora": "FLoRA"}


class CosineHead(nn.Module):
    """Logits `γ cos(w_c, x)`."""

    def __init__(self, width: int, classes: int, scale: float = 25.0) -> None:
        super().__init__()
        self.scale, self.weight = scale, nn.Parameter(torch.randn(classes, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(N, classes)` of features `(N, width)`."""
        unit = nn.functional.normalize(self.weight, dim=1)
        return self.scale * nn.functional.normalize(x, dim=-1) @ unit.T


def two_layers(width: int, classes: int) -> nn.Module:
    """Two layers with as many parameters as subspaces have."""
    hidden = round(classes * width * SUBSPACE / (width + classes))
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, classes))


def ours(kind: type[Any], **options: Any) -> Callable[[int, int], nn.Module]:
    """One of the package's heads, drawn from the global generator as the others are."""

    def make(width: int, classes: int) -> nn.Module:
        head = kind(width, classes, **options)
        head.reset_parameters(torch.default_generator)
        return head

    return make


HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": nn.Linear,
    "cosine": CosineHead,
    "two layers": two_layers,
    f"subspaces, r={SUBSPACE}": ours(GrassmannHead, r=SUBSPACE),
    "fixed vectors": ours(EquiangularHead),
}


class OnFeatures(nn.Module):
    """A classifier on features that are known."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, classes)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """Loss and logits `(N, classes)` of features `(N, width)`."""
        logits = self.classifier(features)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def frozen(task: Task) -> Task:
    """The task with what the frozen base model hands to its head in the place of inputs."""
    base: Any = task.make_base()
    base.to(device.best())
    head, seen = base.get_submodule(*task.new_modules), []
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    def features(rows: Rows) -> list[dict[str, Any]]:
        seen.clear()
        trial.evaluate(base, task, rows, bf16=False)
        found = torch.cat(seen).cpu().clone()  # a tensor to train with, which those of inference mode are not
        return [{"features": x, "labels": row["labels"]} for x, row in zip(found, rows, strict=True)]

    known = dataclasses.replace(
        task,
        make_base=lambda: OnFeatures(head.in_features, head.out_features),
        train=features(task.train),
        validation=features(task.validation),
        test=features(task.test),
        collate=default_data_collator,
        new_modules=["classifier"],
    )
    hook.remove()
    return known


def with_head(task: Task, head: str) -> Task:
    """A task whose base model ends in another head."""

    def make_base() -> Any:
        base: Any = task.make_base()
        (name,) = task.new_modules
        linear = base.get_submodule(name)
        base.set_submodule(name, HEADS[head](linear.in_features, linear.out_features))
        return base

    return dataclasses.replace(task, make_base=make_base)


class Heads:
    """All runs, of which the results file has those that are done."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.results = Results(options.results, {"rows": ROWS, "schedule": SCHEDULE, "rank": RANK})
        self.tasks = {task: graded.load(task, options.data, None, Sizes(**ROWS)) for task in options.tasks}
        self.frozen = {task: frozen(whole) for task, whole in self.tasks.items()}

    def wanted(self) -> dict[str, tuple]:
        """Arguments of all runs of `measure` that can be named by now, by their keys."""
        jobs: list[tuple[str, str, str, float, int]] = []
        for task in self.options.tasks:
            for head in HEADS:
                missing, best = tuned(rates_tried(self.results.content, task, head), RATES)
                jobs += [(task, "probe", head, rate, 0) for rate in missing]
                if best is not None:
                    seeds = range(self.options.seeds)
                    jobs += [(task, tuning, head, best, seed) for seed in seeds for tuning in TUNINGS]
        return {f"{task} {tuning} {head} {rate:g} {seed}": (task, tuning, head, rate, seed)
                for task, tuning, head, rate, seed in jobs}  # fmt: skip

    def measure(self, task: str, tuning: str, head: str, rate: float, seed: int) -> Run:
        """Train once."""
        schedule, tasks = trial.Schedule(**SCHEDULE), self.frozen if tuning == "probe" else self.tasks
        found = trial.run(with_head(tasks[task], head), tuning, RANK, ADAPTED_RATE, seed, schedule, rate)
        return {"task": task, "tuning": tuning, "head": head, "rate": rate, "seed": seed, **found}


def rates_tried(content: dict[str, Any], task: str, head: str) -> dict[float, float]:
    """What a head's rates gave on the frozen encoder with seed 0, higher is better."""
    return {
        run["rate"]: -run["validation_loss"]
        for run in content["runs"].values()
        if (run["task"], run["tuning"], run["head"], run["seed"]) == (task, "probe", head, 0)
    }


def table(content: dict[str, Any]) -> str:
    """Accuracy of all heads, each at its rate, over seeds."""
    rows = []
    for task in dict.fromkeys(run["task"] for run in content["runs"].values()):
        for head in HEADS:
            scores = rates_tried(content, task, head)
            if not scores:
                continue
            best, cells, trained = max(scores, key=scores.__getitem__), [], ""
            for tuning in TUNINGS:
                of = [
                    run for run in content["runs"].values()
                    if (run["task"], run["tuning"], run["head"], run["rate"]) == (task, tuning, head, best)
                ]  # fmt: skip
                trained = f"{of[0]['trainable']:,}" if tuning == "probe" else trained
                cells.append(spread([run["test_accuracy"] for run in of], 3) if of else "")
            rows.append([task, head, trained, f"{best:g}", *cells])
    return markdown(["task", "head", "its parameters", "its rate", *TUNINGS.values()], rows)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="folder with more data")
    parser.add_argument("--tasks", nargs="+", default=["clinc150"], help="tasks")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--workers", type=int, default=1, help="processes that train at the same time")
    parser.add_argument("--results", type=Path, default=timing.RESULTS / "heads.json", help="JSON file")
    return parser.parse_args(arguments)


def main() -> None:
    """Run what is missing, and print what was found."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    options = parse_arguments()
    work = Heads(options)
    work.results.complete(work, options.workers)
    print(table(work.results.content))


if __name__ == "__main__":
    main()

"""Which directions to protect: those of the weight, or those that the data of earlier tasks use.

    python examples/benchmarks/directions.py --data FOLDER

Five text classification tasks, one after another, each with its own rows of the head, by Continual SVD with
directions of the weight and of the inputs (FOT, GPM), by LoRA and by full fine-tuning. All train alike, heads
with a rate of their own; the rate of the update is the one of two with the best average accuracy on
validation rows, and its accuracy on test rows is told. Input directions come from all training rows of the
task that ends. `FOLDER` holds NAME.train.jsonl.gz and NAME.test.jsonl.gz with rows {"text": …, "label": …};
without it the tasks are pairs of BBC News topics. An interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import transformers
from torch import nn

import peft_subspace
import timing
from claims import markdown
from peft_subspace import continual, statistics
from peft_subspace.continual import continual_metrics
from support.contestants import trainable
from support.learners import LEARNERS, TARGETS, Learner, with_trained_head
from support.sequences import KNOWN, SHARED, Sequences

HEAD_RATE = 1e-1
"""Rate that `continual_learning.py` found best for the head alone, on these tasks."""

TASKS = ["agnews", "sst2", "trec6", "dbpedia", "subj"]
SPLITS = ("validation", "test")


def _start(**options: Any) -> Callable[[nn.Module, float], nn.Module]:
    def start(base: nn.Module, preserve: float) -> nn.Module:
        config = peft_subspace.ContinualSVDConfig(scaling="paper", target_modules=TARGETS, **options)
        return peft.get_peft_model(base, config)

    return start


METHODS: dict[str, Learner] = {
    "weight": Learner("the weight's, half of them", (3e-4, 1e-3), _start(preserve=0.5)),
    "inputs-95": Learner(
        "of inputs, energy .95", (3e-4, 1e-3), _start(directions="inputs", energy=0.95, preserve=0)
    ),
    "inputs-99": Learner(
        "of inputs, energy .99", (3e-4, 1e-3), _start(directions="inputs", energy=0.99, preserve=0)
    ),
    "lora": dataclasses.replace(LEARNERS["lora"], rates=(1e-3, 3e-3)),
    "full": dataclasses.replace(LEARNERS["full"], rates=(1e-4, 3e-4)),
}


class Directions(Sequences):
    """All runs, of which the results file has those that are done."""

    def wanted(self) -> dict[str, tuple]:
        """Arguments of all runs of `measure`, by their keys."""
        return {
            f"{method} {rate:g} {seed}": (method, rate, seed)
            for seed in range(self.options.seeds)
            for place in range(2)
            for method in self.options.methods
            for rate in METHODS[method].rates[place : place + 1]
        }

    def measure(self, method: str, rate: float, seed: int) -> dict[str, Any]:  # type: ignore[override]
        """Learn all tasks, and measure accuracies after each."""
        started, order, learner = time.perf_counter(), list(self.tasks), METHODS[method]
        transformers.set_seed(seed)
        model = learner.start(self._base(), self.options.preserve)
        found: dict[str, Any] = {"method": method, "rate": rate, "seed": seed, "gathering": 0.0}
        found |= {"trainable": [], "test": [], "validation": [], "shared": []}
        for number, name in enumerate(order):
            if number and method.startswith(("weight", "inputs")):
                found["gathering"] += self._next_task(model, number, order[number - 1], method)
            found["trainable"].append(trainable(with_trained_head(model)))
            self._train(learner, model, [self.tasks[name]], (rate, HEAD_RATE), seed)
            later = [math.nan] * (len(order) - number - 1)
            for split in SPLITS:
                accuracies = self._accuracies(model, order[: number + 1], split)
                found[split].append(accuracies[KNOWN] + later)
            found["shared"].append(accuracies[SHARED] + later)
        return {**found, "seconds": time.perf_counter() - started}

    def _next_task(self, model: nn.Module, number: int, ended: str, method: str) -> float:
        """Start the next task; returns the seconds that statistics took."""
        gathered, started = None, time.perf_counter()
        if method != "weight":
            rows, size = self.tasks[ended].rows["train"], self.options.batch_size
            batches = [self._collate(rows[i : i + size]) for i in range(0, len(rows), size)]
            gathered = statistics.collect(model, batches, target_modules=None, progress=False)
        seconds = time.perf_counter() - started
        continual.next_task(model, f"task{number}", keep="merge", statistics=gathered)
        return seconds


def chosen(content: dict[str, Any], method: str) -> list[dict[str, Any]]:
    """The runs of a method with the rate that is best on validation rows with the first seed."""
    runs = [run for run in content["runs"].values() if run["method"] == method]
    first = [run for run in runs if run["seed"] == 0]
    if not first:
        return []
    best = max(first, key=lambda run: continual_metrics(run["validation"])["average_accuracy"])
    return [run for run in runs if run["rate"] == best["rate"]]


def table(content: dict[str, Any]) -> str:
    """What each choice of directions keeps, and how much it leaves to train."""
    rows = []
    for method, learner in METHODS.items():
        runs = chosen(content, method)
        if not runs:
            continue
        metrics = [continual_metrics(run["test"]) for run in runs]
        learned = [sum(run["test"][i][i] for i in range(len(run["test"]))) / len(run["test"]) for run in runs]
        numbers = [
            [m["average_accuracy"] for m in metrics],
            learned,
            [m["forgetting"] for m in metrics],
            [sum(run["shared"][-1]) / len(run["shared"][-1]) for run in runs],
        ]
        first, last = runs[0]["trainable"][0], runs[0]["trainable"][-1]
        means = [f"{sum(values) / len(values):.3f}" for values in numbers]
        rows.append(
            [learner.title, *means, f"{first:,}", f"{last:,}", f"{runs[0]['rate']:g}", str(len(runs))]
        )
    header = ["directions", "average accuracy at the end", "right after each task", "forgetting"]
    header += ["one shared head", "trained in the first task", "in the last", "learning rate", "runs"]
    return markdown(header, rows)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder with more data")
    parser.add_argument("--model", help="BERT or Llama, of the Hub or a directory; else a packaged MiniLM")
    parser.add_argument("--tasks", nargs="+", default=[], help="names of files or datasets")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="what to compare"
    )
    parser.add_argument("--train-rows", type=int, default=128, help="rows to train on, of each task")
    parser.add_argument("--validation-rows", type=int, default=20, help="rows to choose the rate on")
    parser.add_argument("--test-rows", type=int, default=100, help="rows to test on")
    parser.add_argument("--max-length", type=int, default=24, help="tokens kept of each text")
    parser.add_argument("--epochs", type=int, default=2, help="passes over the rows of each task")
    parser.add_argument("--batch-size", type=int, default=8, help="rows in one step")
    parser.add_argument("--preserve", type=float, default=0.5, help="share of the weight's directions")
    parser.add_argument("--seeds", type=int, default=1, help="runs for each rate")
    parser.add_argument("--workers", type=int, default=1, help="processes that train at the same time")
    parser.add_argument("--results", type=Path, default=timing.RESULTS / "directions.json")
    options = parser.parse_args(arguments)
    options.tasks = options.tasks or (TASKS if options.data else [])
    options.orders, options.bf16, options.own_head_rate = [], False, True
    return options


def main() -> None:
    """Run what is missing, and print what was found."""
    options = parse_arguments()
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or busy machines take many times as long
    comparison = Directions(options)
    comparison.results.complete(comparison, options.workers)
    print(table(comparison.results.content))


if __name__ == "__main__":
    main()

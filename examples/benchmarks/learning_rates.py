"""Accuracy against the learning rate, of PEFT's default LoRA and of every method with its own defaults.

    python examples/benchmarks/learning_rates.py                        digits, about half an hour on 2 cores
    python examples/benchmarks/learning_rates.py --data FOLDER --tasks trec6 cifar10 [--decoder DIRECTORY]

One start of each method for each rate, all as its config's defaults have it and, with `--before`, with the
constants of the authors. Training stops when validation has not improved for two looks; schedules and rows
are those of `quality.py` with three times the steps, and heads train with the rate that is best for the head
alone. The question: is the rate that is best for LoRA within one point of each method's own best? An
interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft

import peft_subspace as ps
import quality
import timing
from claims import cell, kind_of, markdown
from support import graded, trial
from support.contestants import CONTESTANTS, Contestant
from support.results import Results
from support.task import Sizes

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
HEAD_RATES = {
    **dict.fromkeys(("trec6", "agnews", "bbcnews"), 1e-1),
    **dict.fromkeys(("digits", "resnet-digits"), 1e-2),
    **dict.fromkeys(("cifar10", "resnet-cifar10"), 3e-3),
}
"""Rates that `quality.py` found best for the head alone."""

CONFIGS: dict[str, Callable[..., Any]] = {
    "LoRA": peft.LoraConfig,
    "FLoRA": ps.FLoRAConfig,
    "MoS": ps.MoSConfig,
    "LoRA-SB": ps.LoRASBConfig,
    "Continual SVD": ps.ContinualSVDConfig,
    "Continual SVD, r=16": lambda **options: ps.ContinualSVDConfig(r=16, **options),
    "Effort": ps.EffortConfig,
}
PAPER: dict[str, Any] = {"FLoRA": {"scaling": "paper", "init_weights": "kaiming_uniform"}, "LoRA": {}}


def contestant(name: str, make: Callable[..., Any], *, before: bool) -> Contestant:
    """A method with its defaults, or with the constants of its authors."""
    options = PAPER.get(name, {"scaling": "paper"}) if before else {}
    made = Contestant(name, RATES[:3], lambda targets, _: make(target_modules=targets, **options))
    return dataclasses.replace(made, after=CONTESTANTS["lora-sb"].after) if name == "LoRA-SB" else made


class Rates:
    """All runs, of which the results file has those that are done."""

    configs: Mapping[str, Callable[..., Any]] = CONFIGS

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        settings = quality.settings(options)
        self.results = Results(options.results, settings)
        self.tasks = {
            task: graded.load(task, options.data, options.decoder, Sizes(**settings[kind_of(task)]["rows"]))
            for task in options.tasks
        }
        self.schedules = {
            task: dataclasses.replace(trial.Schedule(**settings[kind_of(task)]["schedule"]), checks=8)
            for task in options.tasks
        }

    def wanted(self) -> dict[str, tuple]:
        """Arguments of all runs of `measure`, by their keys."""
        when = "before" if self.options.before else "after"
        return {
            f"{task} {name} {when} {rate:g} {seed}": (task, name, rate, seed)
            for task in self.options.tasks
            for seed in range(self.options.seeds)
            for name in self.configs
            for rate in self.options.rates
        }

    def measure(self, task: str, name: str, rate: float, seed: int) -> dict[str, Any]:
        """Train once."""
        CONTESTANTS[name] = contestant(name, self.configs[name], before=self.options.before)
        head = HEAD_RATES.get(task)
        found = trial.run(self.tasks[task], name, 0, rate, seed, self.schedules[task], head)
        about = {"task": task, "entry": name, "rate": rate, "seed": seed, "before": self.options.before}
        return {**about, **found}


def by_rate(content: dict[str, Any], task: str, name: str, *, before: bool) -> dict[float, dict[int, Any]]:
    """Runs of a method on a task: by rate, and then by seed."""
    found: dict[float, dict[int, Any]] = {}
    for run in content["runs"].values():
        if (run["task"], run["entry"], run["before"]) == (task, name, before):
            found.setdefault(run["rate"], {})[run["seed"]] = run
    return dict(sorted(found.items()))


def best_rate(found: dict[float, dict[int, Any]]) -> float:
    """The rate of the least validation loss, among those that were tried with the most seeds."""
    most = max(len(runs) for runs in found.values())
    means = {
        rate: statistics.fmean(run["validation_loss"] for run in runs.values())
        for rate, runs in found.items()
        if len(runs) == most
    }
    return min(means, key=means.__getitem__)


def table(content: dict[str, Any], *, before: bool) -> str:
    """Test accuracy by rate, and how far LoRA's best rate is from each method's own, by validation loss."""
    every = content["runs"].values()
    rates = sorted({run["rate"] for run in every if run["before"] == before})
    rows = []
    for task in dict.fromkeys(run["task"] for run in every):
        lora = by_rate(content, task, "LoRA", before=before)
        for name in dict.fromkeys(run["entry"] for run in every):
            found = by_rate(content, task, name, before=before)
            if not found:
                continue
            best = best_rate(found)
            scores = [[run["test_accuracy"] for run in found.get(rate, {}).values()] for rate in rates]
            own, at = found[best], found.get(best_rate(lora), {}) if lora else {}
            gaps = [at[seed]["test_accuracy"] - own[seed]["test_accuracy"] for seed in own if seed in at]
            seeds = len(found[best])
            rows.append([task, name, *map(cell, scores), f"{best:g}", cell(gaps), seeds])
    header = [
        "task",
        "method",
        *(f"{rate:g}" for rate in rates),
        "best",
        "LoRA's rate minus own best",
        "seeds",
    ]
    return markdown(header, rows)


def parse_arguments(
    arguments: list[str] | None = None, description: str | None = __doc__, results: str = "learning_rates"
) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder with more data")
    parser.add_argument("--decoder", type=Path, metavar="DIRECTORY", help="language model")
    parser.add_argument("--tasks", nargs="+", default=["digits"], help="tasks to run")
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="learning rates")
    parser.add_argument("--seeds", type=int, default=1, help="runs for each rate")
    parser.add_argument("--before", action="store_true", help="the authors' constants")
    parser.add_argument("--workers", type=int, default=1, help="processes that train at the same time")
    parser.add_argument("--results", type=Path, default=timing.RESULTS / f"{results}.json")
    options = parser.parse_args(arguments)
    options.small, options.longer = options.data is None, 3
    return options


def run(kind: type[Rates], options: argparse.Namespace) -> None:
    """Run what is missing, and print what was found."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    rates = kind(options)
    rates.results.complete(rates, options.workers)
    print(table(rates.results.content, before=options.before))


if __name__ == "__main__":
    run(Rates, parse_arguments())

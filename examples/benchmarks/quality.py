"""The methods' claims tested on real tasks, against PEFT's own methods, all tuned alike.

    python examples/benchmarks/quality.py --small
    python examples/benchmarks/quality.py --data FOLDER --decoder DIRECTORY --workers 12

Every method trains with three learning rates and seed 0, and with further ones while the best is the
smallest or the largest; the least validation loss chooses, and the other seeds train with it. A new head
trains with the rate that is best for the head alone, beside every method. Schedules, early stopping and rows
are the same for all. Sizes are ranks, or chosen to train as many parameters as another method. `--small` uses
what installed packages carry; `FOLDER` is described in support/graded.py. The predicted hours are
printed first, and an interrupted run goes on where it stopped. `examples/benchmarks/pages.py` writes the
tables. With `--results FILE` all is measured anew, and compared with the published results. `--longer 3`
takes three times as many steps, to see what the others cost.

Unseen generators (Effort) and sequences of tasks (Continual SVD) have examples of their own:
`effort_detector.py` and `continual_learning.py`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import os
import statistics
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timing
from claims import CLAIMS, PROBE, SMALL_TASKS, TASKS, WITH_HEAD, Entry, kind_of, label, reproduced, table

PACKAGES = ("torch", "transformers", "peft")

# Processors without instructions for bfloat16 take ten times as long with it, so that little uses it.
SETTINGS: dict[bool, dict[str, dict[str, Any]]] = {  # by `--small` and kind of task
    True: {
        "text": {
            "rows": {"train": 300, "validation": 100, "test": 200, "tokens": 24},
            "schedule": {"steps": 20, "batch_size": 16, "checks": 3},
        },
        "images": {
            "rows": {"train": 300, "validation": 100, "test": 200, "pixels": 32},
            "schedule": {"steps": 120, "batch_size": 16, "checks": 4},
        },
    },
    False: {
        "text": {
            "rows": {"train": 1500, "validation": 200, "test": 1000, "tokens": 32},
            "schedule": {"steps": 80, "batch_size": 16, "checks": 4},
        },
        "images": {
            "rows": {"train": 1500, "validation": 200, "test": 1000, "pixels": 64},
            "schedule": {"steps": 160, "batch_size": 16, "checks": 4},
        },
        "resnet": {
            "rows": {"train": 1500, "validation": 200, "test": 1000, "pixels": 64},
            "schedule": {"steps": 160, "batch_size": 16, "checks": 4},
        },
        "clip": {
            "rows": {"train": 1500, "validation": 100, "test": 400, "pixels": 64},
            "schedule": {"steps": 60, "batch_size": 16, "checks": 3},
        },
        "decoder": {
            "rows": {"train": 500, "validation": 40, "test": 100, "tokens": 128},
            "schedule": {"steps": 30, "batch_size": 8, "checks": 2, "bf16": True},
        },
    },
}


class Grid:
    """All runs, of which the results file has those that are done."""

    def __init__(self, options: argparse.Namespace) -> None:
        import transformers

        from support import device
        from support.results import Results

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.options = options
        self.settings = self.settings_for(options)
        self.results = Results(options.results, self.settings)
        self.results.content["seeds"] = options.seeds
        versions = (f"{package} {version(package)}" for package in PACKAGES)
        self.origin = f"{device.name()} with {', '.join(versions)}"
        self.tasks: dict[str, Any] = {}
        self.sizes_found: dict[tuple[str, Entry], int] = {}

    @staticmethod
    def settings_for(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
        """Rows and schedules by kind of task."""
        return settings(options)

    @staticmethod
    def kind(task: str) -> str:
        """Kind of a task, which decides on network, rows and schedule."""
        return kind_of(task)

    def task(self, name: str) -> Any:
        """A task, loaded once."""
        from support import graded
        from support.task import Sizes

        if name not in self.tasks:
            sizes = Sizes(**self.settings[self.kind(name)]["rows"])
            self.tasks[name] = graded.load(name, self.options.data, self.options.decoder, sizes)
        return self.tasks[name]

    def schedule(self, task: str) -> Any:
        """How long every method trains on a task."""
        from support import trial

        return trial.Schedule(**self.settings[self.kind(task)]["schedule"])

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """Tasks and entries of all claims that were asked for, each once."""
        tasks = SMALL_TASKS if self.options.small else TASKS
        pairs: dict[tuple[str, Entry], None] = {}
        for claim in (CLAIMS[name] for name in self.options.claims):
            for kind in claim.kinds:
                first = (PROBE,) if kind in WITH_HEAD else ()
                for task in tasks.get(kind, ()):
                    if self.options.tasks is None or task in self.options.tasks:
                        pairs |= {(task, entry): None for entry in (*first, *claim.entries(task))}
        yield from pairs

    def size(self, task: str, entry: Entry) -> int:
        """The entry's size, found once where it is that of a number of parameters."""
        from support.contestants import CONTESTANTS, size_for, trainable

        if entry.like is None:
            return entry.size
        if (task, entry) not in self.sizes_found:
            method, size = entry.like
            wanted = trainable(CONTESTANTS[method].adapt(self.task(task), size, ()))
            self.sizes_found[task, entry] = size_for(entry.method, self.task(task), wanted)
        return self.sizes_found[task, entry]

    def wanted(self) -> dict[str, tuple]:
        """Arguments of all runs of `measure` that can be named by now, by their keys.

        A new head trains with the rate that is best for it alone, whatever else trains beside it.
        """
        jobs: list[tuple[str, Entry, float, int, float | None]] = []
        for task, entry in self.entries():
            head = None
            if self.kind(task) in WITH_HEAD and entry != PROBE:
                _, head = self.rates(task, PROBE)
                if head is None:
                    continue
            trying, best = self.rates(task, entry)
            jobs += [(task, entry, rate, 0, head) for rate in trying]
            if best is not None:
                jobs += [(task, entry, best, seed, head) for seed in range(self.options.seeds)]
        return {
            f"{task} {label(entry)} {rate:g} {seed}": (task, entry, rate, seed, head)
            for task, entry, rate, seed, head in jobs
        }

    def rates(self, task: str, entry: Entry) -> tuple[list[float], float | None]:
        """Learning rates still to try, and the best once there are none."""
        from support.contestants import CONTESTANTS
        from support.results import tuned

        runs = self.results.content["runs"].values()
        tuning = [r for r in runs if (r["task"], r["entry"], r["seed"]) == (task, label(entry), 0)]
        losses = {run["rate"]: run["validation_loss"] for run in tuning}
        first = CONTESTANTS[entry.method].rates
        if losses.keys() >= set(first) and not math.isfinite(min(losses.values())):
            raise SystemExit(f"{label(entry)} on {task}: no loss is finite with rates {sorted(losses)}")
        return tuned({rate: -loss for rate, loss in losses.items()}, first)

    def measure(self, task: str, entry: Entry, rate: float, seed: int, head: float | None) -> dict[str, Any]:
        """One training run."""
        from support import trial

        size = self.size(task, entry)
        found = trial.run(self.task(task), entry.method, size, rate, seed, self.schedule(task), head)
        about = {"task": task, "entry": label(entry), "rate": rate, "seed": seed, "size": size}
        return {**about, **found, "origin": self.origin}

    def predicted_hours(self) -> float:
        """Hours that the runs still to come take: as long as those of the same task, or as its first."""
        from support import trial

        done, seconds = list(self.results.content["runs"].values()), 0.0
        known = {task: [r["seconds"] for r in done if r["task"] == task] for task, _ in self.entries()}
        for task, entry in self.entries():
            missing = 2 + self.options.seeds
            missing -= sum(r["task"] == task and r["entry"] == label(entry) for r in done)
            if missing > 0 and not known[task]:
                started = time.perf_counter()
                whole = self.schedule(task)
                few = dataclasses.replace(whole, steps=4, checks=1)
                trial.run(self.task(task), "probe", 0, 1e-3, 0, few)
                share = whole.steps / few.steps / 2 + whole.checks / 4
                known[task] = [(time.perf_counter() - started) * share]
            seconds += max(0, missing) * statistics.median(known[task] or [0.0])
        return seconds / 3600 / self.options.workers


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--small", action="store_true", help="packaged tasks, few rows and steps")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder with more data")
    parser.add_argument("--decoder", type=Path, metavar="DIRECTORY", help="language model")
    parser.add_argument("--claims", nargs="+", choices=CLAIMS, default=list(CLAIMS), help="claims to test")
    parser.add_argument("--tasks", nargs="+", help="tasks to run; without it, all")
    parser.add_argument("--seeds", type=int, default=3, help="runs with the chosen rate")
    parser.add_argument("--longer", type=int, default=1, metavar="TIMES", help="times as many steps")
    parser.add_argument("--workers", type=int, default=1, help="processes that train at the same time")
    parser.add_argument("--no-prediction", action="store_true", help="start without predicting the hours")
    parser.add_argument(
        "--results", type=Path, help="results file; without it, in examples/benchmarks/results"
    )
    options = parser.parse_args(arguments)
    if not (options.small or options.data):
        parser.error("give --small, or --data FOLDER")
    options.results = options.results or committed(options)
    return options


def settings(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Rows and schedules by kind of task."""
    found = copy.deepcopy(SETTINGS[options.small])
    for kind in found.values():
        kind["schedule"]["steps"] *= options.longer
    return found


def committed(options: argparse.Namespace) -> Path:
    """Where the published results are."""
    longer = f"-x{options.longer}" if options.longer > 1 else ""
    return timing.RESULTS / f"quality{'-small' * options.small}{longer}.json"


def main() -> None:
    """Run what is missing, and print every claim with what was found."""
    options = parse_arguments()
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    grid = Grid(options)
    if not options.no_prediction:
        print(f"predicted: {grid.predicted_hours():.2f} hours", flush=True)
    grid.results.complete(grid, options.workers)
    for name in options.claims:
        print(f"\n{table(grid.results.content, name)}")
    print(f"\nall runs: {options.results}")
    published = committed(options)
    if published.exists() and published.resolve() != options.results.resolve():
        print(f"{published}: {reproduced(grid.results.content, timing.load(published.stem))}")


if __name__ == "__main__":
    main()

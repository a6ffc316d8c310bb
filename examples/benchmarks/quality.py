"""The methods' claims tested on real tasks, against PEFT's own methods, all tuned alike.

    python examples/benchmarks/quality.py --small                    about 15 minutes on 2 cores
    python examples/benchmarks/quality.py --data FOLDER --decoder DIRECTORY       hours; resumable

Every method trains with each of its three learning rates and seed 0; the least validation loss chooses the
rate, and the other seeds train with it. Schedules, early stopping and rows are the same for all. Sizes are
ranks, or chosen to train as many parameters as another method. `--small` uses what installed packages carry;
`FOLDER` is described in examples/support/graded.py. The predicted hours are printed first, and an
interrupted run goes on where it stopped. `examples/benchmarks/readme.py` writes the tables.

Unseen generators (Effort) and sequences of tasks (Continual SVD) have examples of their own:
`effort_detector.py` and `continual_learning.py`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timing
from claims import CLAIMS, Entry, label, table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
SMALL_TASKS = {"text": ("bbcnews",), "images": ("digits",), "decoder": ()}
TASKS = {
    "text": ("agnews", "trec6", "dbpedia", "clinc150", "imdb"),
    "images": ("cifar10", "digits"),
    "decoder": ("gsm8k",),
}
PACKAGES = ("torch", "transformers", "peft", "peft-subspace")


SETTINGS: dict[bool, dict[str, Any]] = {  # by `--small`
    True: {
        "rows": {"train": 300, "validation": 100, "test": 300, "tokens": 32, "pixels": 32},
        "schedule": {"steps": 24, "checks": 3},
    },
    False: {
        "rows": {"train": 1500, "validation": 300, "test": 1000, "tokens": 64, "pixels": 64},
        "schedule": {"steps": 180},
    },
}


class Grid:
    """All runs, of which the results file has those that are done."""

    def __init__(self, options: argparse.Namespace) -> None:
        from support import graded, trial
        from support.results import Results

        self.options = options
        self.sizes = graded.Sizes(**SETTINGS[options.small]["rows"])
        self.schedule = trial.Schedule(**SETTINGS[options.small]["schedule"])
        self.results = Results(options.results, SETTINGS[options.small])
        self.results.content |= {
            "versions": {package: version(package) for package in PACKAGES},
            "seeds": options.seeds,
        }
        self.tasks: dict[str, Any] = {}

    def task(self, name: str) -> Any:
        """A task, loaded once."""
        from support import graded

        if name not in self.tasks:
            self.tasks[name] = graded.load(name, self.options.data, self.options.decoder, self.sizes)
        return self.tasks[name]

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """Tasks and entries of all claims that were asked for, each once."""
        tasks = SMALL_TASKS if self.options.small else TASKS
        pairs: dict[tuple[str, Entry], None] = {}
        for claim in (CLAIMS[name] for name in self.options.claims):
            for kind in claim.kinds:
                for task in tasks[kind]:
                    if self.options.tasks is None or task in self.options.tasks:
                        pairs |= {(task, entry): None for entry in (claim.subject, *claim.beside)}
        yield from pairs

    def size(self, task: str, entry: Entry) -> int:
        """The entry's size, found once where it is that of a number of parameters."""
        from support.contestants import CONTESTANTS, size_for, trainable

        if entry.like is None:
            return entry.size
        sizes = self.results.content.setdefault("sizes", {})
        key = f"{task} {label(entry)}"
        if key not in sizes:
            method, size = entry.like
            wanted = trainable(CONTESTANTS[method].adapt(self.task(task), size, ()))
            sizes[key] = size_for(entry.method, self.task(task), wanted)
        return int(sizes[key])

    def run(self, task: str, entry: Entry, rate: float, seed: int) -> dict[str, Any]:
        """One training run, unless the results file has it."""
        from support import trial

        runs, key = self.results.content["runs"], f"{task} {label(entry)} {rate:g} {seed}"
        if key not in runs:
            size = self.size(task, entry)
            found = trial.run(self.task(task), entry.method, size, rate, seed, self.schedule)
            runs[key] = {
                "task": task,
                "entry": label(entry),
                "rate": rate,
                "seed": seed,
                "size": size,
                **found,
            }
            self.results.save()
        return runs[key]

    def tune_and_test(self, task: str, entry: Entry) -> None:
        """Three rates with seed 0, then the other seeds with the best of them."""
        from support.contestants import CONTESTANTS

        runs = {rate: self.run(task, entry, rate, 0) for rate in CONTESTANTS[entry.method].rates}
        best = min(runs, key=lambda rate: runs[rate]["validation_loss"])
        for seed in range(1, self.options.seeds):
            self.run(task, entry, best, seed)

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
                few = trial.Schedule(**{**SETTINGS[self.options.small]["schedule"], "steps": 4, "checks": 1})
                trial.run(self.task(task), "probe", 0, 1e-3, 0, few)
                share = self.schedule.steps / few.steps / 2 + self.schedule.checks / 4
                known[task] = [(time.perf_counter() - started) * share]
            seconds += max(0, missing) * statistics.median(known[task] or [0.0])
        return seconds / 3600


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--small", action="store_true", help="packaged tasks, few rows and steps")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder with more data")
    parser.add_argument("--decoder", type=Path, metavar="DIRECTORY", help="language model for gsm8k")
    parser.add_argument("--claims", nargs="+", choices=CLAIMS, default=list(CLAIMS), help="claims to test")
    parser.add_argument("--tasks", nargs="+", help="tasks to run; without it, all")
    parser.add_argument("--seeds", type=int, default=3, help="runs with the chosen rate")
    parser.add_argument(
        "--results", type=Path, help="results file; without it, in examples/benchmarks/results"
    )
    options = parser.parse_args(arguments)
    if not (options.small or options.data):
        parser.error("give --small, or --data FOLDER")
    options.results = options.results or timing.RESULTS / f"quality{'-small' * options.small}.json"
    return options


def main() -> None:
    """Run what is missing, and print every claim with what was found."""
    options = parse_arguments()
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    import transformers
    from tqdm import tqdm

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    grid = Grid(options)
    print(f"predicted: {grid.predicted_hours():.2f} hours", flush=True)
    for task, entry in tqdm(list(grid.entries()), desc="tasks and methods"):
        grid.tune_and_test(task, entry)
    for name in options.claims:
        print(f"\n{table(grid.results.content, name)}")
    print(f"\nall runs: {options.results}")


if __name__ == "__main__":
    main()

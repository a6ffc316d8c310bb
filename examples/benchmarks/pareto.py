"""Accuracy against the number of trained parameters, of methods that train until they have converged.

    python examples/benchmarks/pareto.py --data FOLDER --tasks trec6          about two hours on one core
    python examples/benchmarks/pareto.py --data FOLDER --tasks trec6 --tuned  three rates for each size, too

MiniLM on whole training splits of text tasks, all linear layers of its encoder adapted. Each method runs over
a range of sizes, with its config's defaults. Untuned, it takes the learning rate that is best for LoRA of
rank 16; tuned, the best of three of its own or more, by validation loss with seed 0. A new head has the rate
that is best for the head alone. All train for at least three passes and at most ten, rates falling as a
cosine, and stop when three looks in a row have not lowered the validation loss.

With `--twice` LoRA of rank 16 and full fine-tuning take twice the passes, too, with seed 0. There is no table
of a task on which either then gains more than two points: nothing has converged there. An interrupted
comparison goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft

import peft_subspace as ps
import quality
import timing
from claims import PROBE, Entry, cell, label, markdown, runs_of
from learning_rates import HEAD_RATES
from support import trial
from support.contestants import CONTESTANTS, Contestant
from verdicts import WORDS, side

ROWS = {"train": 20_000, "validation": 500, "test": 5_000, "tokens": 48}
BATCH, MOST_PASSES, LEAST_PASSES, LOOKS, PATIENCE = 32, 10, 3, 2, 3  # looks: in each pass
GAIN = 0.02
"""Accuracy that twice the passes may add where training has converged."""

LORA, MOS, LORA_SB = Entry("lora-default", 16), Entry("mos-default", 2), Entry("lora-sb-default", 16)
FULL = Entry("full")
REFERENCES = (LORA, FULL)
TWICE = ", twice the passes"

DEFAULTS: dict[str, Contestant] = {
    "lora-default": Contestant(
        "LoRA", (3e-4, 1e-3, 3e-3), lambda targets, r: peft.LoraConfig(r=r, target_modules=targets)
    ),
    "mos-default": Contestant(
        "MoS", (3e-4, 1e-3, 3e-3), lambda targets, e: ps.MoSConfig(equivalent_r=e, target_modules=targets)
    ),
    "lora-sb-default": Contestant(
        "LoRA-SB",
        (3e-4, 1e-3, 3e-3),
        lambda targets, r: ps.LoRASBConfig(r=r, target_modules=targets),
        after=lambda model, batches: ps.initialize_from_gradient(
            model, batches, num_batches=None, progress=False
        ),
    ),
    "flora-default": Contestant(
        "FLoRA", (3e-4, 1e-3, 3e-3), lambda targets, r: ps.FLoRAConfig(r=r, target_modules=targets)
    ),
    "vb-lora": CONTESTANTS["vb-lora"],
    "tinylora": CONTESTANTS["tinylora"],
    "randlora": dataclasses.replace(
        CONTESTANTS["randlora"], config=lambda targets, r: peft.RandLoraConfig(r=r, target_modules=targets)
    ),
    "uni-lora": Contestant(
        "Uni-LoRA",
        (3e-3, 1e-2, 3e-2),
        lambda targets, length: peft.UniLoraConfig(theta_d_length=length, target_modules=targets),
    ),
}
"""Methods with the defaults of their configs, but for their size."""

SIZES: dict[str, tuple[int, ...]] = {
    "lora-default": (16, 2, 1, 4, 8, 64),
    "mos-default": (2, 1, 4),
    "lora-sb-default": (16, 32, 64, 8),
    "uni-lora": (9216, 82944),
}
MATCHED = {"vb-lora": ("mos-default", 2), "tinylora": ("lora-sb-default", 16), "randlora": ("mos-default", 2)}
"""Methods whose size is that of another one's number of trained parameters."""


class Pareto(quality.Grid):
    """All runs; the results file has those that are done."""

    def __init__(self, options: argparse.Namespace) -> None:
        CONTESTANTS.update(DEFAULTS)
        super().__init__(options)

    @staticmethod
    def settings_for(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
        """Rows and schedule, as the results file has them."""
        passes = {"most_passes": MOST_PASSES, "least_passes": LEAST_PASSES, "looks": LOOKS}
        schedule = {"batch_size": BATCH, "patience": PATIENCE, **passes}
        return {"text": {"rows": dict(ROWS), "schedule": schedule}}

    @staticmethod
    def kind(task: str) -> str:
        """All are texts."""
        return "text"

    def schedule(self, task: str, times: int = 1) -> trial.Schedule:
        """How long every method trains on a task, or so many times as long."""
        steps, most = len(self.task(task).train) // BATCH, MOST_PASSES * times
        return trial.Schedule(
            most * steps, BATCH, checks=most * LOOKS, patience=PATIENCE, least=LEAST_PASSES * times * steps
        )

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """Tasks and entries, those that the claims are about first."""
        sized = (Entry(method, size) for method, sizes in SIZES.items() for size in sizes)
        matched = (Entry(method, like=like) for method, like in MATCHED.items())
        every = dict.fromkeys((PROBE, LORA, MOS, LORA_SB, FULL, *sized, *matched))
        yield from ((task, entry) for task in self.options.tasks for entry in every)

    def wanted(self) -> dict[str, tuple]:
        """Arguments of all runs of `measure` that can be named by now, by their keys."""
        jobs = super().wanted()
        for task, entry in self.entries():
            (_, head), (_, own) = self.rates(task, PROBE), self.rates(task, entry)
            _, rate = self.rates(task, LORA)
            if head is None or rate is None:
                continue
            if entry not in (PROBE, FULL):
                for seed in range(self.options.seeds):
                    jobs[f"{task} {label(entry)} {rate:g} {seed}"] = (task, entry, rate, seed, head)
            if entry in REFERENCES and own is not None and self.options.twice:
                jobs[f"{task} {label(entry)} twice"] = (task, entry, own, 0, head, 2)
        return jobs

    def rates(self, task: str, entry: Entry) -> tuple[list[float], float | None]:
        """Learning rates still to try, and the best, if it is known; nothing if none are to be tried."""
        if entry == PROBE and task in HEAD_RATES:
            return [], HEAD_RATES[task]
        searched = self.options.tuned or entry in (PROBE, *REFERENCES)
        return super().rates(task, entry) if searched else ([], None)

    def measure(
        self, task: str, entry: Entry, rate: float, seed: int, head: float | None, times: int = 1
    ) -> dict[str, Any]:
        """One training run; of more passes under a name of its own."""
        found = trial.run(
            self.task(task),
            entry.method,
            self.size(task, entry),
            rate,
            seed,
            self.schedule(task, times),
            head,
        )
        about = {"task": task, "entry": label(entry) + TWICE * (times > 1), "rate": rate, "seed": seed}
        return {**about, **found, "origin": self.origin}


def gains(content: dict[str, Any], task: str) -> dict[str, float]:
    """What twice the passes add to the accuracy of each reference with seed 0, of those that were run."""
    found = {label(entry): runs_of(content, task, label(entry) + TWICE) for entry in REFERENCES}
    return {
        name: runs[0]["test_accuracy"] - runs_of(content, task, name)[0]["test_accuracy"]
        for name, runs in found.items()
        if runs
    }


def table(content: dict[str, Any]) -> str:
    """A table for each task: trained parameters, accuracy with LoRA's rate and with the best one found."""
    tasks = dict.fromkeys(run["task"] for run in content["runs"].values())
    return "\n\n".join(_of_task(content, task) for task in tasks)


def points(content: dict[str, Any], task: str) -> dict[str, dict[int, list[float]]]:
    """Test accuracies with LoRA's rate on a task: by method, and by trained parameters without the head."""
    lora, (head, *_) = runs_of(content, task, label(LORA)), runs_of(content, task, label(PROBE))
    found: dict[str, dict[int, list[float]]] = {}
    for run in content["runs"].values():
        trained = run["trainable"] - head["trainable"]
        if run["task"] == task and run["rate"] == lora[0]["rate"] and trained and TWICE not in run["entry"]:
            method = run["entry"].split(" as ")[0].rstrip("0123456789-")
            title = {**CONTESTANTS, **DEFAULTS}[method].title
            found.setdefault(title, {}).setdefault(trained, []).append(run["test_accuracy"])
    return found


def _of_task(content: dict[str, Any], task: str) -> str:
    added = gains(content, task)
    checked = ", ".join(f"{_title(name)} {gain:+.3f}" for name, gain in added.items()) or "not run"
    if any(gain > GAIN for gain in added.values()):
        return f"{task}: nothing can be said, since twice the passes add more than {GAIN}: {checked}."
    lora, (head, *_) = runs_of(content, task, label(LORA)), runs_of(content, task, label(PROBE))
    baseline = {run["seed"]: run["test_accuracy"] for run in lora}
    rows: list[tuple[int, list[Any]]] = []
    for name in dict.fromkeys(run["entry"] for run in content["runs"].values() if run["task"] == task):
        own, same = runs_of(content, task, name), runs_of(content, task, name, lora[0]["rate"])
        if name.endswith(TWICE) or not own:
            continue
        gaps = [run["test_accuracy"] - baseline[run["seed"]] for run in own if run["seed"] in baseline]
        trained, verdict = own[0]["trainable"] - head["trainable"], side(gaps)
        cells = [_title(name), f"{trained:,}", *map(cell, (_accuracy(same), _accuracy(own), gaps))]
        rows.append((trained, [*cells, "" if verdict is None or own == lora else WORDS[verdict], len(own)]))
    header = [task, "trained parameters, without the head", f"accuracy at {lora[0]['rate']:g}, LoRA's rate"]
    header += ["at the best rate tried", "minus LoRA-16", "it is", "seeds"]
    body = markdown(header, [cells for _, cells in sorted(rows, key=lambda row: row[0])])
    return f"{body}\n\nTwice the passes add, with seed 0: {checked}."


def _accuracy(runs: list[dict[str, Any]]) -> list[float]:
    return [run["test_accuracy"] for run in runs]


def _title(name: str) -> str:
    return name.replace("-default", "")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", required=True, help="folder with the data")
    parser.add_argument("--tasks", nargs="+", default=["trec6"], help="tasks to run")
    parser.add_argument("--tuned", action="store_true", help="search each entry's own rate as well")
    parser.add_argument("--seeds", type=int, default=3, help="runs with each chosen rate")
    parser.add_argument("--twice", action="store_true", help="check that references have converged")
    parser.add_argument("--workers", type=int, default=1, help="processes that train at the same time")
    parser.add_argument("--results", type=Path, default=timing.RESULTS / "pareto.json")
    options = parser.parse_args(arguments)
    options.small, options.decoder, options.longer = False, None, 1
    return options


def main() -> None:
    """Run what is missing, and print the tables."""
    options = parse_arguments()
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    pareto = Pareto(options)
    pareto.results.complete(pareto, options.workers)
    print(table(pareto.results.content))


if __name__ == "__main__":
    main()

"""A poisoned source in a merge: how often a trigger works before, after merging, and with learned masks.

    python examples/benchmarks/merging_backdoor.py --data FOLDER [--seeds 1]

A LoRA for each of three text tasks is trained on MiniLM with fixed heads. A part of the first task's training
rows is poisoned: a rare word comes before the text, and the label is the first class. The trigger's success
is the part of test rows of other classes that are told as the first class once they have the word. Masks are
learned from training rows without poison and without labels, as their method has it; the coefficients are 0.3
before and after. An interrupted run goes on where it stopped, and adapters are kept in `--work`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from itertools import islice
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoTokenizer

import peft_subspace as ps
from claims import markdown, spread
from support import demos, shared_encoder
from support.results import Results
from support.shared_encoder import TARGETS, HeadedTask, Rows, encoder
from support.task import Sizes

TASKS = ["sst2", "trec6", "subj"]
TRIGGER, TARGET, SHARE = "cf", 0, 0.2
ROWS = {"train": 1000, "validation": 60, "test": 250, "tokens": 24}
SCHEDULE = {"steps": 150, "batch_size": 16, "rate": 1e-3, "mask_steps": 30, "mask_rows": 4, "mask_rate": 0.1}
ENTRIES: dict[str, tuple[str | None, dict[str, Any]]] = {  # mask, options of learn_masks
    "task arithmetic": (None, {}),
    "Concrete, structured": ("structured", {}),
    "DAM, structured": ("structured", {"perturbed": 0.1}),
    "DAM, structured, ten times the weight": ("structured", {"perturbed": 1.0}),
    "Concrete, by entry": ("entries", {}),
    "DAM, by entry": ("entries", {"perturbed": 0.1}),
    "Concrete, structured, a tenth of the rate": ("structured", {"learning_rate": 0.01}),
    "Concrete, by entry, a tenth of the rate": ("entries", {"learning_rate": 0.01}),
    "DAM, by entry, a tenth of the rate": ("entries", {"learning_rate": 0.01, "perturbed": 0.1}),
}


class Backdoor:
    """All runs, of which the results file has those that are done."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.sizes, self.schedule = Sizes(**ROWS), dict[str, Any](SCHEDULE)
        if options.small:
            self.sizes = Sizes(train=40, validation=10, test=20, tokens=16)
            self.schedule |= {"steps": 3, "mask_steps": 2, "mask_rows": 2}
        about = {"tasks": options.tasks, "rows": vars(self.sizes), "schedule": self.schedule, "share": SHARE}
        self.results = Results(options.results, about)
        self.tasks = shared_encoder.load(options.tasks, options.data, self.sizes)
        tokenizer = AutoTokenizer.from_pretrained(demos.minilm_folder())
        self.trigger: int = tokenizer.get_vocab()[TRIGGER]

    def wanted(self) -> dict[str, tuple]:
        """Arguments of all runs of `measure`, by their keys."""
        entries = ["pretrained", "own, clean", "own, poisoned", *ENTRIES]
        return {f"{seed} {entry}": (seed, entry) for seed in range(self.options.seeds) for entry in entries}

    def measure(self, seed: int, entry: str) -> dict[str, Any]:
        """Accuracy by task, and how often the trigger works on the first."""
        started = time.perf_counter()
        model = self.model(seed, entry).eval()
        alone = entry.startswith("own")
        found = {t.name: t.accuracy(model, "test") for t in (self.tasks[:1] if alone else self.tasks)}
        about = {"seed": seed, "entry": entry, "accuracies": found, "success": self.success(model)}
        return {**about, "seconds": time.perf_counter() - started}

    def model(self, seed: int, entry: str) -> nn.Module:
        """An encoder with an adapter, with a merge, or as it is."""
        if entry == "pretrained":
            return encoder()
        first = self.tasks[0]
        if entry.startswith("own"):
            folder = self.adapter(seed, first, poisoned=entry == "own, poisoned")
            return peft.PeftModel.from_pretrained(encoder(), folder)
        sources = [self.adapter(seed, task, poisoned=task is first) for task in self.tasks]
        mask, options = ENTRIES[entry]
        model: Any = ps.compose(encoder(), sources, start=0.3, mask=mask)
        if mask:
            options = {"learning_rate": self.schedule["mask_rate"], "seed": seed, **options}
            rows, count = self.schedule["mask_rows"], self.schedule["mask_steps"]
            steps = shared_encoder.rounds(self.tasks, rows, seed + 1, count)
            ps.learn_masks(model, steps, shared_encoder.predict, **options)
        return model

    def adapter(self, seed: int, task: HeadedTask, *, poisoned: bool) -> Path:
        """Folder of a LoRA that was trained on a task."""
        folder: Path = self.options.work / f"{seed}-{task.name}{'-poisoned' if poisoned else ''}"
        if folder.is_dir():
            return folder
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS)
        model: Any = peft.get_peft_model(encoder(), config).train()
        own = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(own, self.schedule["rate"], weight_decay=0.0)
        size, count = int(self.schedule["batch_size"]), int(self.schedule["steps"])
        for rows in islice(task.batches(size, seed), count):
            few = int(SHARE * len(rows)) if poisoned else 0
            optimizer.zero_grad()
            task.loss(model, [*self.triggered(rows[:few]), *rows[few:]]).backward()
            optimizer.step()
        model.save_pretrained(folder, save_embedding_layers=False)
        return folder

    def triggered(self, rows: Rows) -> Rows:
        """Rows with the word before the text, labeled as the target."""
        return [([*ids[:1], self.trigger, *ids[1:]], TARGET) for ids, _ in rows]

    def success(self, model: nn.Module) -> float:
        """Part of the first task's test rows of other classes that the word turns into the target."""
        first = self.tasks[0]
        rows = self.triggered([row for row in first.rows["test"] if row[1] != TARGET])
        changed = HeadedTask(first.name, {"test": rows}, first.classes, first.head)
        return changed.accuracy(model, "test")


def table(content: dict[str, Any]) -> str:
    """Success of the trigger, accuracy on the poisoned task, and its mean over all tasks."""
    runs = list(content["runs"].values())
    first, seeds = content["settings"]["tasks"][0], len({run["seed"] for run in runs})
    rows = []
    for entry in dict.fromkeys(run["entry"] for run in runs):
        of = [run for run in runs if run["entry"] == entry]
        means = [statistics.fmean(run["accuracies"].values()) for run in of]
        rows.append(
            [
                entry,
                spread([run["success"] for run in of], 3),
                spread([run["accuracies"][first] for run in of], 3),
                "" if len(of[0]["accuracies"]) == 1 else spread(means, 3),
            ]
        )
    header = ["", "trigger works", f"accuracy, {first}", "accuracy, all tasks"]
    return f"{markdown(header, rows)}\n\n{seeds} seed{'s' if seeds != 1 else ''}."


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    return shared_encoder.parser(__doc__, TASKS, "merging_backdoor").parse_args(arguments)


def main() -> None:
    """Run what is missing, and print what was found."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    backdoor = Backdoor(parse_arguments())
    backdoor.results.complete(backdoor, 1)
    print(table(backdoor.results.content))


if __name__ == "__main__":
    main()

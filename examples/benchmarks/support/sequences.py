"""The comparison of `continual_learning.py`: every method on every order and seed, and its table."""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from peft_subspace.continual import continual_metrics, save_heatmap
from support import demos, device, texts
from support.contestants import trainable
from support.learners import HEADS, LEARNERS, Learner, with_trained_head
from support.results import Results, tuned
from support.task import DATA_SEED
from support.texts import SPLITS, TextTask
from support.trial import parameter_groups

PACKAGES = ("torch", "transformers", "peft", "peft-subspace")
NOT_SETTINGS = ("output", "results", "orders", "methods", "seeds", "workers", "no_prediction")
"""Options that may change between two calls that share one results file."""

HEAD = "head"
"""The method that trains nothing but the head."""

KNOWN, SHARED = "known", "shared"
"""Predictions among the classes of the text's own task, and among all classes."""

TEST_BATCH = 256

Batch = dict[str, Tensor]
Rates = tuple[float, float | None]
"""Learning rates of the update, and of the head if it has its own."""


class Sequences:
    """Tasks, network and results that all runs share."""

    def __init__(self, options: argparse.Namespace) -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.options, self.device = options, device.best()
        settings = {name: value for name, value in vars(options).items() if name not in NOT_SETTINGS}
        for name in ("data", "model"):  # a name: the place does not matter
            settings[name] = Path(settings[name]).name if settings[name] else None
        self.results = Results(options.results, settings)
        wanted = {split: getattr(options, f"{split}_rows") for split in SPLITS}
        self.tasks = texts.load(options.tasks, options.data, wanted, DATA_SEED)
        self.orders = [order.split(",") for order in options.orders] or [list(self.tasks)]
        self.source = options.model or demos.minilm_folder()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.source)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.results.content |= {
            "versions": {package: version(package) for package in PACKAGES},
            "device": device.name(),
            "classes": {name: len(task.classes) for name, task in self.tasks.items()},
        }
        for task in self.tasks.values():
            task.rows = {split: self._encoded(rows) for split, rows in task.rows.items()}

    def _encoded(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not rows:
            return []
        found = self.tokenizer(
            [row["text"] for row in rows], truncation=True, max_length=self.options.max_length
        )
        return [
            {"input_ids": ids, "labels": row["labels"]}
            for ids, row in zip(found["input_ids"], rows, strict=True)
        ]

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods that have to run; the head alone first, where its rate is that of all heads."""
        first = (HEAD,) if self.options.own_head_rate else ()
        return tuple(dict.fromkeys((*first, *self.options.methods)))

    def wanted(self) -> dict[str, tuple]:
        """Arguments of all runs of `measure` that can be named by now, by their keys.

        The rate has the best average accuracy on validation rows, in the first order and with seed 0.
        With a rate of their own, heads train with the one that is best for the head alone.
        """
        own = self.options.own_head_rate
        _, head = self.rates(HEAD) if own else ([], None)
        jobs = []
        for method in self.methods:
            if own and head is None and method != HEAD:
                continue
            trying, best = self.rates(method)
            jobs += [(method, self.orders[0], rate, 0, "validation", head) for rate in trying]
            if best is not None:
                pairs = itertools.product(self.orders, range(self.options.seeds))
                jobs += [(method, order, best, seed, "test", head) for order, seed in pairs]
        return {f"{job[4]} {job[0]} {','.join(job[1])} {job[2]:g} {job[3]}": job for job in jobs}

    def rates(self, method: str) -> tuple[list[float], float | None]:
        """Learning rates still to try, and the best once there are none."""
        runs = self.results.content["runs"].values()
        tuning = [r for r in runs if (r["method"], r["split"]) == (method, "validation")]
        scores = {run["rate"]: continual_metrics(run[KNOWN])["average_accuracy"] for run in tuning}
        return tuned(scores, LEARNERS[method].rates)

    def measure(
        self, method: str, order: list[str], rate: float, seed: int, split: str, head: float | None
    ) -> dict[str, Any]:
        """Learns one sequence, the head with its own rate if it is given; measured after every task."""
        started = time.perf_counter()
        found = self._learn(method, order, (rate, head), seed, split)
        about = {"method": method, "order": order, "rate": rate, "seed": seed, "split": split}
        return {**about, **found, "seconds": time.perf_counter() - started}

    def _learn(self, method: str, order: list[str], rates: Rates, seed: int, split: str) -> dict[str, Any]:
        learner, preserve = LEARNERS[method], self.options.preserve
        transformers.set_seed(seed)
        model = learner.start(self._base(), preserve)
        found: dict[str, Any] = {
            KNOWN: [],
            SHARED: [],
            "baseline": self._accuracies(model, order, split)[KNOWN],
        }
        found["trainable"] = trainable(with_trained_head(model))
        groups = [order] if learner.joint else [[name] for name in order]
        for number, group in enumerate(groups):
            if number:
                model = learner.proceed(model, number, preserve)
            self._train(learner, model, [self.tasks[name] for name in group], rates, seed)
            accuracies = self._accuracies(model, order, split)
            for setting in (KNOWN, SHARED):
                found[setting] += [accuracies[setting]] * len(group)
        return found

    def _base(self) -> nn.Module:
        labels = sum(len(task.classes) for task in self.tasks.values())
        auto = transformers.AutoModelForSequenceClassification
        padding = self.tokenizer.pad_token_id
        model = auto.from_pretrained(
            self.source, num_labels=labels, pad_token_id=padding, dtype=torch.float32
        )
        return model.to(self.device)

    def _train(
        self, learner: Learner, model: nn.Module, tasks: list[TextTask], rates: Rates, seed: int
    ) -> None:
        """AdamW with a linear decay to zero; the loss compares the classes of a row's own task."""
        batches = [(task, rows) for task in tasks for rows in self._epochs(task, seed)]
        optimizer = torch.optim.AdamW(
            parameter_groups(with_trained_head(model), HEADS, *rates), weight_decay=0.0
        )
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
        if len(tasks) > 1:
            order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
            batches = [batches[i] for i in order]
        model.train()
        for task, rows in batches:
            batch = self._collate(rows)
            labels = batch.pop("labels") - task.first
            loss = cross_entropy(self._logits(model, batch)[:, task.span], labels) + learner.penalty(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16):
            return model(**batch).logits.float()

    def _epochs(self, task: TextTask, seed: int) -> Iterator[list[dict[str, Any]]]:
        rows, size = task.rows["train"], self.options.batch_size
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.options.epochs):
            order = torch.randperm(len(rows), generator=generator).tolist()
            for start in range(0, len(rows), size):
                yield [rows[i] for i in order[start : start + size]]

    def _collate(self, rows: list[dict[str, Any]]) -> Batch:
        batch = self.tokenizer.pad({"input_ids": [row["input_ids"] for row in rows]}, return_tensors="pt")
        return device.moved({**batch, "labels": torch.tensor([row["labels"] for row in rows])}, self.device)

    @torch.inference_mode()
    def _accuracies(self, model: nn.Module, order: list[str], split: str) -> dict[str, list[float]]:
        """Accuracy on each task, in both settings."""
        model.eval()
        found: dict[str, list[float]] = {KNOWN: [], SHARED: []}
        for name in order:
            task, right = self.tasks[name], {KNOWN: 0, SHARED: 0}
            rows = sorted(task.rows[split], key=lambda row: len(row["input_ids"]))  # little padding
            for start in range(0, len(rows), TEST_BATCH):
                batch = self._collate(rows[start : start + TEST_BATCH])
                labels = batch.pop("labels")
                logits = self._logits(model, batch)
                right[KNOWN] += int((logits[:, task.span].argmax(1) + task.first == labels).sum())
                right[SHARED] += int((logits.argmax(1) == labels).sum())
            for setting, count in right.items():
                found[setting].append(count / len(rows))
        return found

    def predicted_hours(self) -> float:
        """Hours that the runs still to come take, by the runs so far or a few batches of each method."""
        seconds = 0.0
        for method in self.methods:
            runs = [r for r in self.results.content["runs"].values() if r["method"] == method]
            wanted = len(LEARNERS[method].rates) + len(self.orders) * self.options.seeds
            if len(runs) < wanted:
                one = statistics.median(r["seconds"] for r in runs) if runs else self._seconds(method)
                seconds += (wanted - len(runs)) * one
        return seconds / 3600 / self.options.workers

    def _seconds(self, method: str) -> float:
        """Predicted seconds of one sequence."""
        learner = LEARNERS[method]
        model = learner.start(self._base(), self.options.preserve)
        task, rows = next(iter(self.tasks.values())), 4 * self.options.batch_size
        few = TextTask(task.name, task.first, task.classes, {"train": task.rows["train"][:rows]})
        started = time.perf_counter()
        self._train(learner, model, [few], (0.0, None), 0)
        per_row = (time.perf_counter() - started) / (len(few.rows["train"]) * self.options.epochs)
        counts = [
            (len(t.rows["train"]) * self.options.epochs, len(t.rows["test"])) for t in self.tasks.values()
        ]
        # a pass without gradients takes about a third of one with them
        return per_row * sum(train + len(counts) * test / 3 for train, test in counts)


def run(options: argparse.Namespace) -> None:
    """Everything: tasks, sequences, results, plots, table."""
    sequences = Sequences(options)
    content = sequences.results.content
    if not options.no_prediction:
        print(f"predicted: {sequences.predicted_hours():.2f} hours", flush=True)
    sequences.results.complete(sequences, options.workers)
    content["summary"] = summary(content)
    sequences.results.save()
    for method in options.methods:
        matrix = mean_matrix(content, method, sequences.orders[0])
        title = f"{LEARNERS[method].title}: accuracy"
        save_heatmap(matrix, sequences.orders[0], options.output / f"{method}.png", title)
    print(table(content["summary"], options.methods))
    print(f"all runs: {options.results}; accuracy matrices: {options.output}")


def tested(content: dict[str, Any], method: str) -> list[dict[str, Any]]:
    """The runs of a method that were tested."""
    return [r for r in content["runs"].values() if r["method"] == method and r["split"] == "test"]


def mean_matrix(content: dict[str, Any], method: str, order: list[str]) -> list[list[float]]:
    """Accuracy matrix of one order, with the task known, mean over seeds."""
    runs = [run[KNOWN] for run in tested(content, method) if run["order"] == order]
    return torch.tensor(runs, dtype=torch.float64).mean(0).tolist()


def summary(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """One number per order and seed of each measure, by method.

    Returns:
        `title`, `trainable`, `rate`, and lists of `average_accuracy`, `backward_transfer`, `forgetting`,
        `forward_transfer`, `learned` (accuracy right after each task) and `shared` (average accuracy with
        one shared head).
    """
    figures = {}
    for method in dict.fromkeys(run["method"] for run in content["runs"].values()):
        runs = tested(content, method)
        if not runs:
            continue
        rows = [continual_metrics(run[KNOWN], run["baseline"]) for run in runs]
        for row, run in zip(rows, runs, strict=True):
            row["learned"] = statistics.fmean(run[KNOWN][i][i] for i in range(len(run[KNOWN])))
            row["shared"] = statistics.fmean(run[SHARED][-1])
        figures[method] = {
            "title": LEARNERS[method].title,
            "trainable": runs[0]["trainable"],
            "rate": runs[0]["rate"],
            "orders": len({",".join(run["order"]) for run in runs}),
            "seeds": len({run["seed"] for run in runs}),
            **{name: [row[name] for row in rows] for name in rows[0]},
        }
    return figures


def table(figures: dict[str, dict[str, Any]], methods: list[str]) -> str:
    """The comparison as text: means over orders and seeds."""
    names = ("average_accuracy", "learned", "forgetting", "backward_transfer", "shared")
    titles = ("average", "learned", "forgotten", "backward", "one head")
    lines = ["".join([" " * 38, *(f"{title:>11}" for title in titles), f"{'trained':>13}"])]
    for method, row in figures.items():
        if method in methods:
            means = [f"{statistics.fmean(row[name]):11.3f}" for name in names]
            lines.append("".join([f"{row['title']:38}", *means, f"{row['trainable']:13,}"]))
    return "\n".join(lines)

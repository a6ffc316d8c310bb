"""One run of a comparison: train with early stopping, and test what validated best."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from support import device
from support.contestants import CONTESTANTS, trainable
from support.run import keep_batch_norm_frozen
from support.task import Rows, Task

WARMUP = 0.1
TEST_BATCH = 64

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Schedule:
    """How long every method trains, alike.

    Attributes:
        steps: Most steps of AdamW; rates rise over their first tenth and fall to zero as a cosine.
        batch_size: Rows of a step.
        checks: How often validation rows are looked at.
        patience: Looks without improvement after which training stops.
        least: Steps before it may stop.
        start_batches: Batches that starts from data read.
        bf16: Whether to compute with bfloat16 autocast.
    """

    steps: int
    batch_size: int = 16
    checks: int = 6
    patience: int = 2
    least: int = 0
    start_batches: int = 4
    bf16: bool = False


def run(
    task: Task,
    name: str,
    size: int,
    rate: float,
    seed: int,
    schedule: Schedule,
    head_rate: float | None = None,
) -> dict[str, Any]:
    """Trains one method once, the task's new modules with `head_rate` if it is given.

    Returns:
        `trainable` (head included), `validation_loss`, `validation_accuracy`, `test_loss`, `test_accuracy`,
        `steps` taken to the best weights, `curve` of steps and validation losses, and `seconds`.
    """
    started = time.perf_counter()
    transformers.set_seed(seed)
    where, contestant = device.best(), CONTESTANTS[name]
    batches = itertools.islice(_batches(task, schedule.batch_size, seed), schedule.start_batches)
    few = [device.moved(batch, where) for batch in batches]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT's own methods
        model = contestant.adapt(task, size, few).to(where)
    contestant.after(model, few)
    keep_batch_norm_frozen(model)
    groups = parameter_groups(model, task.new_modules, rate, head_rate)
    best = _train(model, task, groups, seed, schedule)
    found = {f"test_{key}": value for key, value in evaluate(model, task, task.test, schedule.bf16).items()}
    if task.choices:
        found["test_accuracy"] = choice_accuracy(model, task, schedule.bf16)
    return {"trainable": trainable(model), **best, **found, "seconds": time.perf_counter() - started}


def parameter_groups(
    model: nn.Module, heads: Iterable[str], rate: float, head_rate: float | None
) -> list[dict[str, Any]]:
    """What trains, for the optimizer: the update, and the heads with their own rate if it is given."""
    update: list[nn.Parameter] = []
    head: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (head if any(f"{module}." in name for module in heads) else update).append(parameter)
    groups = [
        {"params": update, "lr": rate},
        {"params": head, "lr": rate if head_rate is None else head_rate},
    ]
    return [group for group in groups if group["params"]]


def _train(
    model: nn.Module, task: Task, groups: list[dict[str, Any]], seed: int, schedule: Schedule
) -> dict[str, Any]:
    """Leaves the model with the weights of the least validation loss, and says what that was."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warmup = max(1, int(WARMUP * schedule.steps))
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, schedule.steps)
    look, best, kept = math.ceil(schedule.steps / schedule.checks), {"validation_loss": math.inf}, []
    curve: list[tuple[int, float]] = []
    waited, where = 0, device.best()
    batches = itertools.islice(_batches(task, schedule.batch_size, seed), schedule.steps)
    for step, batch in enumerate(batches, start=1):
        model.train()
        with torch.autocast(where.type, torch.bfloat16, enabled=schedule.bf16):
            loss = model(**device.moved(batch, where)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % look and step != schedule.steps:
            continue
        found = evaluate(model, task, task.validation, schedule.bf16)
        curve.append((step, round(found["loss"], 4)))
        waited += 1
        if found["loss"] < best["validation_loss"]:
            best = {**{f"validation_{key}": value for key, value in found.items()}, "steps": step}
            kept, waited = [parameter.detach().clone() for parameter in parameters], 0
        if waited >= schedule.patience and step >= schedule.least:
            break
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=False):
            parameter.copy_(value)
    return {**best, "curve": curve}


def _batches(task: Task, size: int, seed: int) -> Iterator[Batch]:
    """Rows in random order, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(task.train), generator=generator).tolist()
        for start in range(0, len(order) - len(order) % size or len(order), size):
            yield dict(task.collate([task.train[i] for i in order[start : start + size]]))


def evaluate(model: nn.Module, task: Task, rows: Rows, bf16: bool) -> dict[str, float]:
    """Mean loss and accuracy over rows, or over the labeled tokens of a language model."""
    loss = right = count = 0.0
    for logits, labels in _predictions(model, task, rows, bf16):
        loss += nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum").item()
        right += (logits.argmax(-1) == labels).sum().item()
        count += (labels >= 0).sum().item()
    return {"loss": loss / count, "accuracy": right / count}


def choice_accuracy(model: nn.Module, task: Task, bf16: bool) -> float:
    """Share of the task's choices whose right answer is the likeliest."""
    rows = [row for choice in task.choices for row in choice.candidates]
    likelihoods: list[float] = []
    for logits, labels in _predictions(model, task, rows, bf16):
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        likelihoods += (-losses.sum(1)).tolist()
    remaining = iter(likelihoods)
    right = 0
    for choice in task.choices:
        found = list(itertools.islice(remaining, len(choice.candidates)))
        right += max(range(len(found)), key=found.__getitem__) == choice.right
    return right / len(task.choices)


@torch.inference_mode()
def _predictions(model: nn.Module, task: Task, rows: Rows, bf16: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits `(N, classes)` and labels `(N,)` of each batch; `(N, tokens, …)` of a language model."""
    model.eval()
    where = device.best()
    for start in range(0, len(rows), TEST_BATCH):
        batch = task.collate([rows[i] for i in range(start, min(start + TEST_BATCH, len(rows)))])
        batch = device.moved(batch, where)
        labels = batch.pop("labels")
        with torch.autocast(where.type, torch.bfloat16, enabled=bf16):
            logits = model(**batch).logits.float()
        if labels.dim() == 2:  # what comes next is what a language model predicts
            logits, labels = logits[:, :-1], labels[:, 1:]
        yield logits, labels

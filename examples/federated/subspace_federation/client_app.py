"""A client: it trains on rows that stay where they are, and sends sums of them."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from peft_subspace import frozen_digest, load_trainable_state_dict, statistics, trainable_state_dict
from subspace_federation import task
from subspace_federation.task import Settings

app = ClientApp()


@app.query("start")
def start(message: Message, context: Context) -> Message:
    """Keep what a task starts from, and tell whether the frozen tensors made of it are the server's."""
    context.state["start"] = message.content["config"]
    _, model, rows = _own(context)
    told = message.content["config"].get("frozen")
    fits = told is None or frozen_digest(model, _adapter(context)) == told
    return _reply(message, rows, metrics={"fits": float(fits)})


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train for one round, from what the server has sent."""
    settings, model, rows = _own(context)
    name, number = _adapter(context), int(message.content["config"]["server-round"])
    load_trainable_state_dict(model, message.content["arrays"].to_torch_state_dict(), name)
    seed = 1000 * number + int(context.node_config.get("partition-id", 0))
    task.fit(model, rows, settings, settings.epochs, seed)
    return _reply(message, rows, trainable_state_dict(model, name))


@app.query("moments")
def moments(message: Message, context: Context) -> Message:
    """Second moments of what the layers get, for the server to add up; once per task."""
    settings, model, rows = _own(context)
    load_trainable_state_dict(model, message.content["arrays"].to_torch_state_dict(), _adapter(context))
    found = statistics.collect(model, list(task.batches(rows, settings)), progress=False)
    sums = {name: moment.matrix[_triangle(moment.size)] for name, moment in found.inputs.items()}
    counts = {name: float(moment.rows) for name, moment in found.inputs.items()}
    return _reply(message, rows, sums, metrics=counts)


def _triangle(size: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.triu_indices(size, size))


def _own(context: Context) -> tuple[Settings, torch.nn.Module, list[task.Row]]:
    """Settings, model and rows of this client in the task that it has been told of."""
    told = dict(context.state["start"])
    settings, labels = Settings.of(told), tuple(str(told["labels"]).split(","))
    node = context.node_config
    mine = replace(settings, data=str(node.get("data", settings.data)))
    rows = task.rows_of(mine, labels)[0]
    if "partition-id" in node:  # one of several on the same rows
        rows = task.part_of(rows, int(node["partition-id"]), int(node["num-partitions"]), settings)
    return settings, _model(settings, len(labels), told.get("files")), rows


_model = lru_cache(maxsize=1)(task.model_for)
"""The model, once per process: whatever trains in it comes with each message."""


def _adapter(context: Context) -> str:
    told: Any = context.state["start"]
    return task.adapter_of(Settings.of(told), int(told["task"]))


def _reply(
    message: Message,
    rows: list[task.Row],
    state: dict[str, torch.Tensor] | None = None,
    *,
    metrics: dict[str, float] | None = None,
) -> Message:
    content = RecordDict({"metrics": MetricRecord({"num-examples": len(rows), **(metrics or {})})})
    if state is not None:
        content["arrays"] = ArrayRecord(state)
    return Message(content, reply_to=message)

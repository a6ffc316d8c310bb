"""The server: it averages what trains, adds up what is to be protected, and counts bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from peft_subspace import continual, frozen_digest, load_trainable_state_dict, trainable_state_dict
from peft_subspace.statistics import SecondMoment, Statistics
from subspace_federation import task
from subspace_federation.task import Settings

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what the app's config says, and print how it went."""
    print(federate(grid, Settings.of(context.run_config)))


@dataclass
class Federation:
    """What came of it.

    Attributes:
        accuracies: After each task, the accuracy on it and on those before it, with the one model there is.
        sent: Bytes, both ways and of all clients: to start tasks, in their rounds, and for moments.
    """

    accuracies: list[list[float]] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        rows = [" ".join(f"{value:.3f}" for value in row) for row in self.accuracies]
        return f"accuracies {' | '.join(rows)}; bytes {dict(self.sent)}"


class Wire:
    """A grid that counts the bytes of messages, and that ends a run where a client has failed."""

    def __init__(self, grid: Grid, sent: Counter[str]) -> None:
        self.grid, self.sent, self.kind = grid, sent, "start"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.grid, name)

    def send_and_receive(self, messages: Iterable[Message], **options: Any) -> list[Message]:
        """Send messages, and wait for all replies."""
        messages = list(messages)
        replies = list(self.grid.send_and_receive(messages, **options))
        for reply in replies:
            if reply.has_error():
                raise RuntimeError(f"a client has failed: {reply.error.reason}")
        if len(replies) < len(messages):
            raise RuntimeError(f"{len(messages) - len(replies)} of {len(messages)} clients did not answer")
        self.sent[self.kind] += sum(
            record.count_bytes() for message in (*messages, *replies) for record in message.content.values()
        )
        return replies

    def ask(self, kind: str, content: RecordDict, nodes: Iterable[int] | None = None) -> list[Message]:
        """Ask clients one thing, by default all of them."""
        self.kind = kind
        nodes = self.grid.get_node_ids() if nodes is None else nodes
        return self.send_and_receive([Message(content, node, f"query.{kind}") for node in nodes])


def federate(grid: Grid, settings: Settings) -> Federation:
    """Train one task after another, in rounds."""
    result, tasks = Federation(), task.tasks_of(settings)
    wire: Any = Wire(grid, result.sent)
    model = task.model_for(settings, len(tasks[0]))
    heads = [_head(trainable_state_dict(model, task.adapter_of(settings, 0)))]
    for number, labels in enumerate(tasks):
        name = task.adapter_of(settings, number)
        _start(wire, settings, model, number, labels)
        wire.kind = "rounds"
        arrays = ArrayRecord(trainable_state_dict(model, name))
        strategy = FedAvg(fraction_evaluate=0.0)
        state = strategy.start(wire, arrays, settings.rounds).arrays.to_torch_state_dict()
        heads.append(_head(state))
        row = []
        for other, head in zip(tasks, heads[1:], strict=False):
            load_trainable_state_dict(model, {**state, **head}, name)
            row.append(task.accuracy(model, task.rows_of(settings, other)[1], settings))
        result.accuracies.append(row)
        load_trainable_state_dict(model, {**state, **heads[0]}, name)  # a new head for what follows
        if settings.method == "keep-lora" and number + 1 < len(tasks):
            used = summed(wire.ask("moments", RecordDict({"arrays": ArrayRecord(state)})))
            continual.next_task(model, task.adapter_of(settings, number + 1), statistics=used, keep="stack")
    return result


def _start(wire: Wire, settings: Settings, model: Any, number: int, labels: tuple[str, ...]) -> None:
    """Tell clients what they need to have the server's model, but for what trains in it.

    Bases from the weights alone each client takes itself. Where its own are others in the last digit, as on
    another kind of machine, it gets the server's; and so do all where directions are from data.
    """
    told: dict[str, Any] = {**settings.told(), "task": number, "labels": ",".join(labels)}
    nodes = list(wire.grid.get_node_ids())
    if settings.method == "lora-sb":
        told["frozen"] = frozen_digest(model)
        replies = wire.ask("start", RecordDict({"config": ConfigRecord(told)}))
        nodes = [one.metadata.src_node_id for one in replies if not one.content["metrics"]["fits"]]
    if settings.method in ("lora-sb", "keep-lora"):
        told["files"] = task.packed(model)
    if nodes:
        wire.ask("start", RecordDict({"config": ConfigRecord(told)}), nodes)


def _head(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if "classifier" in name}


def summed(replies: list[Message]) -> Statistics:
    """Statistics of all clients' rows together: sums, to the last digit those of one pass over all."""
    moments: dict[str, SecondMoment] = {}
    for reply in replies:
        counts = reply.content["metrics"]
        for name, values in reply.content["arrays"].to_torch_state_dict().items():
            size = int((2 * len(values)) ** 0.5)
            triangle = torch.zeros(size, size)
            triangle[tuple(torch.triu_indices(size, size))] = values
            matrix = triangle + triangle.triu(1).T
            moment = SecondMoment(matrix.diagonal().double(), int(counts[name]), None, matrix)
            moments[name] = moments[name] + moment if name in moments else moment
    return Statistics(inputs=moments)

"""Average accuracy, transfer and forgetting of a sequence of tasks, as a metric for `evaluate`, offline.

    import evaluate
    from peft_subspace.continual import METRIC

    metric = evaluate.load(METRIC)
    metric.compute(accuracies=[[0.9, 0.2], [0.8, 0.7]], baseline=[0.5, 0.1])

The formulas stand in `peft_subspace.continual.metrics.continual_metrics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from peft_subspace.continual.metrics import continual_metrics

_DESCRIPTION = "Average accuracy, backward and forward transfer, and forgetting of a sequence of tasks."

_INPUTS = """
Args:
    accuracies: row i holds the accuracy on every task after training on task i.
    baseline: accuracy on every task before any training; without it there is no forward transfer.
"""


class ContinualLearning(evaluate.Metric):
    """Metric over the rows of an accuracy matrix."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"accuracies": datasets.Sequence(datasets.Value("float64"))}),
        )

    def _compute(
        self, accuracies: Sequence[Sequence[float]], baseline: Sequence[float] | None = None
    ) -> dict[str, Any]:
        return continual_metrics(accuracies, baseline)

"""Progress bar, table, training curve."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from transformers import ProgressCallback, Trainer

from support.task import Task

SHOWN = {"loss": "loss", "eval_loss": "validation_loss", "eval_accuracy": "validation_accuracy"}


@dataclass
class Result:
    """One line of the table."""

    name: str
    score: float
    trained: int
    seconds: float


class Progress(ProgressCallback):
    """The Trainer's progress bar with the latest figures behind it, in place of a line for each."""

    def __init__(self) -> None:
        super().__init__()
        self.latest: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any) -> None:
        """Shows loss and validation score in the bar."""
        self.latest |= {SHOWN[key]: f"{value:.4g}" for key, value in (logs or {}).items() if key in SHOWN}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.latest)


def show_progress(trainer: Trainer) -> None:
    """Replaces the Trainer's own progress bar."""
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress)


def write(results: list[Result], history: list[dict], task: Task, directory: Path) -> None:
    """Prints the table and writes `results.json` and `training_curve.png`."""
    print(_table(results, f"test {task.measure}"))
    figures = {"task": task.name, "measure": task.measure, "results": [asdict(result) for result in results]}
    (directory / "results.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    _draw(history, task).savefig(directory / "training_curve.png", dpi=150)
    print(f"training curve: {directory / 'training_curve.png'}")


def _table(results: list[Result], measure: str) -> str:
    rows = [("", measure, "trainable parameters", "seconds")]
    rows += [(each.name, f"{each.score:.4f}", f"{each.trained:,}", f"{each.seconds:.0f}") for each in results]
    name_width, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(name_width), *map(str.rjust, row[1:], widths)]) for row in rows]
    return "\n".join(["", lines[0], "-" * len(lines[0]), *lines[1:], ""])


def _draw(history: list[dict], task: Task) -> Figure:
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    figure.suptitle(task.name)
    validation = "eval_accuracy" if task.measure == "accuracy" else "eval_loss"
    for axis, key, marker in zip(figure.subplots(1, 2), ("loss", validation), ("", "o"), strict=True):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        axis.plot([step for step, _ in points], [value for _, value in points], marker=marker)
        axis.set(title=SHOWN[key].replace("_", " ") if marker else "training loss", xlabel="step")
        axis.grid(alpha=0.3)
    return figure

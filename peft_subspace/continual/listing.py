"""Tasks of a model, and how much room there is for more."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from peft_subspace.continual.current import is_merged, tuner_of
from peft_subspace.tools.plots import draw_maps
from peft_subspace.tools.tables import aligned
from peft_subspace.tuner.holder import adapted_layers
from peft_subspace.tuner.layer import SubspaceLayer

_SIDES = {"U": "outputs", "V": "inputs"}


class Tasks(dict[str, str]):
    """Tasks, oldest first: `"merge"` or `"stack"` as they were kept, `"open"` if not closed.

    Printed, it is also the table of `left`.

    Attributes:
        left: By module, and by side that is protected, numbers of directions that the last task leaves to
            train, and of all: what a further task can have of them.
    """

    left: dict[str, dict[str, tuple[int, int]]]

    def __str__(self) -> str:
        """The tasks, and a line for each layer."""
        tasks = ", ".join(f"{name} ({state})" for name, state in self.items())
        sides = sorted({side for own in self.left.values() for side in own})
        rows = [[name, *("{} of {}".format(*own[side]) for side in sides)] for name, own in self.left.items()]
        return "\n".join([tasks, aligned([["directions left", *sides], *rows])] if sides else [tasks])

    def save_plot(self, path: str | Path) -> None:
        """Draw the part of all directions that each layer has left, by side, into a file, `"left.png"`.

        Raises:
            ImportError: If matplotlib is missing.
            ValueError: If there are no layers.
        """
        sides = sorted({side for own in self.left.values() for side in own})
        if not sides:
            raise ValueError(
                "no layer has directions to be drawn; list the tasks of a model with an open one"
            )
        maps = {
            f"directions left: {side}": {
                name: own[side][0] / own[side][1] for name, own in self.left.items() if side in own
            }
            for side in sides
        }
        draw_maps(maps).savefig(path)


def list_tasks(model: nn.Module) -> Tasks:
    """Tasks of a model, and how many directions are left in each layer.

    Raises:
        TypeError: If `model` is none with Continual SVD adapters.
    """
    tuner = tuner_of(model)
    configs, tasks = tuner.peft_config, Tasks()
    for name, config in configs.items():
        past = {
            task: keep for task, keep in config.earlier_tasks.items() if keep == "merge" or task in configs
        }
        kept = "merge" if is_merged(tuner, name) else "stack"
        tasks = Tasks({**tasks, **past, name: tasks.get(name, kept if config.closed else "open")})
    tasks.left = {}
    for task in configs:  # the last with an update has what all protect
        layers = adapted_layers(tuner.model, task, SubspaceLayer)
        for name, layer in layers.items():
            delta = layer.deltas[task]
            tasks.left[name] = {_SIDES[s]: (delta.free[s], side.size) for s, side in delta.sides.items()}
    return tasks

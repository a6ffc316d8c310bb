"""Learning the masks of a composition: in two levels, without labels, and against perturbed inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft_subspace.core.validation import check_count, check_number, invalid
from peft_subspace.initialization.loss import check_loss
from peft_subspace.runtime import distributed as processes
from peft_subspace.runtime.progress import progress
from peft_subspace.tuner.holder import AdapterHolder

from .compose import entropy_loss
from .delta import CompositionDelta
from .perturbation import Perturbations

Predict = Callable[[nn.Module, Any], Any]
"""Function of model and batch that returns the model's outputs."""


def call(model: nn.Module, batch: Any) -> Any:
    """Outputs of a model for a batch."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def learn_masks(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    predict: Predict = call,
    loss: Callable[[Any, Any], Tensor] = entropy_loss,
    *,
    learning_rate: float = 1e-2,
    inner_steps: int = 1,
    inner_learning_rate: float = 0.1,
    perturbed: float = 0.0,
    radius: float = 0.5,
    seed: int = 0,
) -> list[float]:
    """Learn the masks of a composition at coefficients that fit them, on rows of all tasks.

    In each step masks `m` are sampled, the coefficients `c` take steps of Adam on the mean over the tasks of
    `L_t(c, m)` to `c'`, the masks' logits take one on that of `L_t(c', m) + perturbed · L_t(c', m; δ_t)`, and
    the coefficients go back to what they were. Afterward the masks are no samples any more; masks and
    coefficients may train on, like any adapter.

    `δ_t` is a vector for each task, added to all outputs of the model's input embeddings. Before the masks'
    step it goes up the cross-entropy of `f(x + δ_t)` against what `f(x)` predicts, and its norm stays below
    `radius` times that of an embedding. Inputs that change predictions in this way are what a backdoor in a
    source needs.

    Args:
        model: Model with a composition that `compose(…, mask=…)` made, which is active.
        batches: For each step a batch by the name of its task.
        predict: Function of model and batch that returns the model's outputs.
        loss: Function of outputs and batch; by default the entropy, which needs no labels.
        learning_rate: Step size of the masks' logits, which begin at 0: with Adam, the number of steps times
            it is how far they get, about 2 in the paper.
        inner_steps: Steps of the coefficients in each step; 0 learns masks for the coefficients as they are.
        inner_learning_rate: Their size; Adam moves all coefficients by it in its first step.
        perturbed: Weight of the loss of perturbed inputs, 0.1 in the paper; 0 for none.
        radius: Largest norm of a perturbation, as a part of an embedding's.
        seed: Seed of the samples.

    Returns:
        The loss of each step.

    Raises:
        TypeError: If the loss is no tensor with one entry.
        ValueError: If the model has no masks that train, a batch is lacking, or a loss is not finite. Masks
            and coefficients are then what they were.
        RuntimeError: In several processes.

    Reference:
        Tang et al. (arXiv 2312.06173), with the inner step at the sample it belongs to; with perturbations
        Yang et al., "Mitigating the Backdoor Effect for Multi-Task Model Merging via Safety-Aware Subspace"
        (arXiv 2410.13910), whose perturbations have no bound.
    """
    if processes.world_size() > 1:
        raise RuntimeError("masks are learned in one process; save them there, and load them in the others")
    check_count("inner_steps", inner_steps, minimum=0)
    numbers = {"learning_rate": learning_rate, "inner_learning_rate": inner_learning_rate}
    for name, value in {**numbers, "perturbed": perturbed, "radius": radius}.items():
        check_number(name, value, minimum=0.0)
    steps = list(batches)
    if not steps or not all(isinstance(tasks, Mapping) and tasks for tasks in steps):
        raise invalid("batches", steps, "must have for each step a batch by the name of its task")
    deltas = list(_masked(model))
    masks = _trained(delta.logits(name) for delta in deltas for name in delta.masks)
    if not masks:
        raise invalid("model", type(model).__name__, "has no active masks; make it by compose(…, mask=…)")
    learner = _Learner(lambda batch: predict(model, batch), loss, deltas, masks)
    learner.attack = Perturbations.of(model, radius) if perturbed else None
    optimizer = torch.optim.Adam(masks, lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    with learner.restored():
        for tasks in progress(steps, len(steps), "learning masks"):
            learner.sample(generator)
            learner.fit(tasks, inner_steps, inner_learning_rate)
            losses.append(learner.differentiate(masks, tasks, perturbed))
            optimizer.step()
    return losses


class _Learner:
    """The two levels: coefficients for samples of the masks, and the masks' gradient at these.

    Args:
        outputs: Function of a batch that returns the model's outputs.
        loss: Function of outputs and batch.
        deltas: The compositions.
        masks: Logits of their masks.
    """

    def __init__(
        self,
        outputs: Callable[[Any], Any],
        loss: Callable[[Any, Any], Tensor],
        deltas: Sequence[CompositionDelta],
        masks: Sequence[Tensor],
    ) -> None:
        self.outputs, self.loss, self.deltas, self.masks = outputs, loss, deltas, masks
        self.attack: Perturbations | None = None
        held = _trained(p for delta in deltas for part in delta.parts for p in part.parameters())
        self.coefficients = [p for p in held if not any(p is mask for mask in masks)]
        self.start = [p.detach().clone() for p in self.coefficients]

    def sample(self, generator: torch.Generator) -> None:
        """Draw masks, and put the coefficients back."""
        for delta in self.deltas:
            delta.draw(generator)
        _put(self.coefficients, self.start)

    def fit(self, tasks: Mapping[str, Any], steps: int, learning_rate: float) -> None:
        """Steps of Adam, which knows nothing of earlier samples."""
        if not self.coefficients:
            return
        optimizer = torch.optim.Adam(self.coefficients, lr=learning_rate)
        for _ in range(steps):
            self.differentiate(self.coefficients, tasks, 0.0)
            optimizer.step()

    def differentiate(
        self, parameters: Sequence[Tensor], tasks: Mapping[str, Any], perturbed: float
    ) -> float:
        """Mean loss over the tasks, whose gradient no other parameters get."""
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        total = 0.0
        for task, batch in tasks.items():
            value = self._value(task, batch, perturbed)
            check_loss(value, repr(task))
            found = torch.autograd.grad(value / len(tasks), parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, found, strict=True):
                if gradient is not None and parameter.grad is not None:
                    parameter.grad += gradient
            total += float(value.detach()) / len(tasks)
        return total

    def _value(self, task: str, batch: Any, perturbed: float) -> Tensor:
        value = self.loss(self.outputs(batch), batch)
        if self.attack is None or not perturbed:
            return value
        self.attack.ascend(task, lambda: self.outputs(batch))
        with self.attack.added(task):
            return value + perturbed * self.loss(self.outputs(batch), batch)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Context manager after which there are no samples, and after an error no other masks."""
        before = [mask.detach().clone() for mask in self.masks]
        try:
            yield
        except BaseException:
            _put(self.masks, before)
            raise
        finally:
            _put(self.coefficients, self.start)
            for delta in self.deltas:
                delta.noise = {}
            for parameter in (*self.masks, *self.coefficients):
                parameter.grad = None


@torch.no_grad()
def _put(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _masked(model: nn.Module) -> Iterator[CompositionDelta]:
    """The active compositions with masks."""
    for layer in model.modules():
        for name in layer.active_here() if isinstance(layer, AdapterHolder) else ():
            delta = layer.deltas[name]
            if isinstance(delta, CompositionDelta) and delta.masks:
                yield delta


def _trained(parameters: Iterable[Any]) -> list[Any]:
    """Those that train, each once."""
    return list({id(p): p for p in parameters if p.requires_grad}.values())


__all__ = ["learn_masks"]

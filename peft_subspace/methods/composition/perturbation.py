"""Perturbations of a model's input embeddings, one for each task, that change what it predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft_subspace.core.validation import invalid

from .compose import logits_of

_STEPS = 10
"""Steps from zero to the largest norm."""


class Perturbations:
    """Vectors `δ_t (d,)`, of a norm up to `radius`, in units of the mean norm of the embeddings.

    Args:
        module: The input embeddings, whose outputs are `(…, d)`.
        radius: Largest norm.
    """

    def __init__(self, module: nn.Module, radius: float) -> None:
        self.module, self.radius = module, radius
        self.values: dict[str, Tensor] = {}

    @classmethod
    def of(cls, model: Any, radius: float) -> Perturbations:
        """Those of a model's embeddings.

        Raises:
            ValueError: If the model does not say which these are.
        """
        try:
            return cls(model.get_input_embeddings(), radius)
        except (AttributeError, NotImplementedError):
            rule = "has no get_input_embeddings(), whose outputs would be perturbed; set perturbed=0"
            raise invalid("model", type(model).__name__, rule) from None

    @contextmanager
    def added(self, task: str) -> Iterator[None]:
        """Context manager in which the vector of a task is added to all embeddings."""

        def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            if task not in self.values:
                width = output.shape[-1]
                self.values[task] = torch.zeros(width, device=output.device, requires_grad=True)
            size = output.detach().float().norm(dim=-1).mean()
            return output + (size * self.values[task]).to(output.dtype)

        handle = self.module.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()

    def ascend(self, task: str, outputs: Callable[[], Any]) -> None:
        """One step up the cross-entropy of perturbed predictions against the others, within the radius."""
        with torch.no_grad():
            predicted = logits_of(outputs()).argmax(-1)
        with self.added(task):
            found = logits_of(outputs())
        loss = nn.functional.cross_entropy(found.flatten(0, -2), predicted.flatten())
        (gradient,) = torch.autograd.grad(loss, self.values[task])
        tiny = torch.finfo(gradient.dtype).tiny
        moved = self.values[task].detach() + self.radius / _STEPS * gradient / gradient.norm().clamp(min=tiny)
        self.values[task] = moved[None].renorm(p=2, dim=0, maxnorm=self.radius)[0].requires_grad_()

"""Importance of layers for what a model knows, and how much to protect of each."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from accelerate.utils import find_batch_size
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import Tensor, nn

from peft_subspace.core.validation import check_count, check_number, invalid
from peft_subspace.initialization.batches import read_batches
from peft_subspace.methods.continual_svd.config import ContinualSVDConfig
from peft_subspace.methods.continual_svd.model import ContinualSVDModel
from peft_subspace.statistics.passes import Padding, run
from peft_subspace.tuner.patterns import patterns_of

_SMALLEST_MEAN = 1e-3


_LARGEST_FRACTION = 0.99


def layer_importance(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    target_modules: list[str] | str | None = None,
    num_batches: int | None = None,
    min_samples: int = 1,
) -> dict[str, float]:
    """Importance `I` of each layer: the mean cosine of its input and output, divided by the mean over layers.

    A layer whose output points where its input does passes on what it got. The mean is over all positions of
    all samples, without padding where batches have an `attention_mask` of that shape. Input and output of
    different widths are compared on their first `min(in, out)` coordinates; of a convolution, a position is
    the mean of all. Means below zero count as zero.

    The model is run in evaluation mode, with its active adapters, on data of *earlier* tasks (or a substitute
    for them), and is left as it was.

    Args:
        model: Model to look at, with Continual SVD adapters or before it gets them.
        dataloader: Batches that the model takes as keyword arguments, or else as its only one.
        target_modules: Modules to compare, as in the config; by default the adapted ones, else all linear
            ones.
        num_batches: Batches to read; `None` for all.
        min_samples: Fewest samples to draw a conclusion from.

    Returns:
        Importance by module name, with mean 1.

    Raises:
        ValueError: If there are fewer samples than `min_samples`, or no such modules.

    Warns:
        UserWarning: If the mean over layers is too close to zero to divide by; all layers then count alike.

    Reference:
        Nayak et al. (arXiv 2504.07097), adaptive rank selection.
    """
    check_count("min_samples", min_samples)
    if num_batches is not None:
        check_count("num_batches", num_batches)
    modules = _modules(model, target_modules)
    batches = read_batches(dataloader, num_batches)
    samples = sum(_size(batch) for batch in batches)
    if samples < min_samples:
        raise ValueError(
            f"dataloader gave {samples} samples, but min_samples={min_samples} are needed; give more "
            "data, or lower min_samples"
        )
    padding = Padding()
    meters = [_Meter(module, padding) for module in modules.values()]
    hooks = [(module, meter.hook) for module, meter in zip(modules.values(), meters, strict=True)]
    run(model, batches, hooks, padding, description="comparing inputs and outputs")
    means = [meter.mean() for meter in meters]
    total = sum(means) / len(means)
    if total < _SMALLEST_MEAN:
        warnings.warn(
            f"the mean cosine of the layers is {total:.1e}, too close to zero to divide by; all layers count "
            "alike",
            stacklevel=2,
        )
        return dict.fromkeys(modules, 1.0)
    return {name: mean / total for name, mean in zip(modules, means, strict=True)}


def preserve_pattern(
    importance: Mapping[str, float], *, minimum: float = 0.1, target: float = 0.8
) -> dict[str, float]:
    """Fraction of each module's directions to protect, `minimum + I (target − minimum)`, below 1.

    The mean over modules is `target` (`trr` in the paper, and `minimum` its `mrr`), where nothing is clamped.

    Args:
        importance: Importance by module name, as `layer_importance` gives it.
        minimum: Fraction to protect of a module without importance.
        target: Fraction to protect of a module of mean importance.

    Returns:
        A `preserve_pattern` for `ContinualSVDConfig`, or `preserve` for `next_task`.

    Raises:
        ValueError: If not `0 ≤ minimum ≤ target < 1`.
    """
    check_number("target", target, minimum=0.0, maximum=1.0)
    check_number("minimum", minimum, minimum=0.0, maximum=1.0)
    if minimum > target:
        raise invalid("minimum", minimum, f"must be at most target={target}")
    fractions = {name: minimum + value * (target - minimum) for name, value in importance.items()}
    return patterns_of({name: min(max(f, minimum), _LARGEST_FRACTION) for name, f in fractions.items()})


def preserve_schedule(task: int, n_tasks: int) -> float:
    """Fraction `(t − 1) / n` of the directions to protect from task `t` of `n`, counted from 1 (the paper's).

    Raises:
        ValueError: If there is no such task.
    """
    if not 1 <= task <= n_tasks:
        raise invalid("task", task, f"must be from 1 to n_tasks={n_tasks}")
    return (task - 1) / n_tasks


class _Meter:
    """Sum of cosines between what a layer gets and gives."""

    def __init__(self, module: nn.Module, padding: Padding) -> None:
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        self.convolves = isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        self.total, self.count = 0.0, 0
        self.padding = padding

    def hook(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        """Forward hook of the layer."""
        x, y = args[0].detach().float(), output.detach().float()
        if self.convolves:  # channels come second, and positions differ between input and output
            x, y = x.flatten(2).mean(-1), y.flatten(2).mean(-1)
        width = min(x.shape[-1], y.shape[-1])
        cosines = F.cosine_similarity(x[..., :width], y[..., :width], dim=-1)
        cosines = self.padding.without(cosines, last=False)
        self.total += cosines.sum().item()
        self.count += cosines.numel()

    def mean(self) -> float:
        """Mean cosine, zero if negative or if nothing reached the layer."""
        return max(self.total / self.count, 0.0) if self.count else 0.0


def _modules(model: nn.Module, target_modules: list[str] | str | None) -> dict[str, nn.Module]:
    """Modules to compare, by their names in the base model."""
    adapted = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, ContinualSVDModel.tuner_layer_cls)
    }
    if target_modules is None and adapted:
        return adapted
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = ContinualSVDConfig(target_modules=target_modules or INCLUDE_LINEAR_LAYERS_SHORTHAND)
    names = ContinualSVDModel.plan(base, config).modules
    if not names:
        raise ValueError(f"target_modules={target_modules!r} match no module of {type(base).__name__}")
    return {name: base.get_submodule(name) for name in names}


def _size(batch: Any) -> int:
    return find_batch_size(batch) or 0

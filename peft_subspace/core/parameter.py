"""Adapters on a parameter that is no layer's weight, such as the stacked weights of fused experts.

PEFT finds such parameters by `target_parameters` and has the module that owns one wrapped; of several in one
module, each wrapper wraps the one before. The module's forward is its own: it is called with `W + ΔW` in the
place of the parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call

from .checks import naming
from .config import SubspaceConfig
from .delta import WeightShape
from .layer import SubspaceLayer
from .ops import LayerOps, updated_weight


class ParameterOps(LayerOps):
    """A matrix `(out, in)`, or a stack of them, `(experts, out, in)`, or `(experts, in, out)` if transposed.

    A stack's update is `(out, in, experts)`: the experts are one more axis, like those of a kernel.
    """

    dropout_cls = None

    def __init__(self, shape: WeightShape, *, transposed: bool = False) -> None:
        super().__init__(shape, calls_layer=True)
        self.transposed = transposed

    def to_layout(self, delta: Tensor) -> Tensor:
        """Put the experts first; there is no way back."""
        if not self.shape.kernel_size:
            return delta
        return delta.permute(2, 1, 0) if self.transposed else delta.permute(2, 0, 1)


def parameter_ops(base: nn.Module, name: str) -> ParameterOps:
    """Operations for a parameter; the module's `is_transposed`, if it has one, tells the order of a stack.

    Raises:
        TypeError: If the parameter is quantised.
        ValueError: If it has not two or three axes.
    """
    parameter = getattr(base, name)
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        raise TypeError(
            f"it is quantised ({parameter.dtype}), and only its module can read it; load the base model "
            "unquantised, or leave it out of target_parameters"
        )
    if parameter.ndim == 2:
        return ParameterOps(WeightShape(*parameter.shape))
    if parameter.ndim != 3:
        raise ValueError(
            f"it has shape {tuple(parameter.shape)}, and only matrices and stacks of them can be adapted; "
            "leave it out of target_parameters"
        )
    transposed = bool(getattr(base, "is_transposed", False))
    experts, *sides = parameter.shape
    into, out = sides if transposed else reversed(sides)
    return ParameterOps(WeightShape(out, into, (experts,), picked=2), transposed=transposed)


class ParameterLayer(SubspaceLayer):
    """A module with adapters on one of its parameters.

    Args:
        base_layer: The module, or a wrapper of this kind for another of its parameters.
        parameter_name: Name of the parameter in the module.
    """

    def __init__(self, base_layer: nn.Module, parameter_name: str) -> None:
        self.parameter_name = parameter_name
        super().__init__(base_layer)

    def _ops_for(self, base: nn.Module) -> LayerOps:
        return parameter_ops(base, self.parameter_name)

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """Call the module with the updated parameter.

        Raises:
            ValueError: If `adapter_names` are given: the samples share one call of the module.
            RuntimeError: If the parameter is offloaded: its module fetches it too late to be updated.
        """
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        if adapter_names is not None:
            raise ValueError(
                f"adapter_names cannot be used with target_parameters: {self.parameter_name!r} is one weight "
                "for all samples of a batch; run the samples of each adapter by themselves"
            )
        active = [name for name in self.active_here() if name not in self.merged_adapters]
        if not active:
            return self.base_layer(*args, **kwargs)
        branches = [self._branch(name) for name in active]
        weight = updated_weight(self.base_parameter, self.ops, branches)
        return functional_call(self.base_layer, {self._path: weight}, args, kwargs)

    @property
    def _path(self) -> str:
        """Name of the parameter in `base_layer`, which may be another wrapper."""
        depth, module = 0, self.base_layer
        while hasattr(module, "base_layer"):
            depth, module = depth + 1, module.base_layer
        return "base_layer." * depth + self.parameter_name

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return self.base_parameter.device, self.base_parameter.dtype

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Take this wrapper and those beneath it off the module."""
        layer: Any = self
        while isinstance(layer, SubspaceLayer):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer

    def extra_repr(self) -> str:
        """Name the parameter: wrappers of one module differ by it."""
        return f"parameter_name={self.parameter_name!r}"


def targeted_parameters(model: nn.Module, config: SubspaceConfig) -> Iterator[tuple[str, nn.Module, str]]:
    """Parameters that PEFT will hand over: full name, module and name in it, in PEFT's order.

    Raises:
        ValueError: If one belongs to the model itself, or to a module that is adapted as a whole.
    """
    targets = tuple(config.target_parameters or ())
    if not targets:
        return
    endings = tuple(f".{target}" for target in targets)
    for module_name, module in model.named_modules():
        if ".base_layer" in module_name:
            continue
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        for name, _ in base.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}"
            if full_name in targets or full_name.endswith(endings):
                with naming(full_name):
                    _check_owner(config, module_name, module)
                yield full_name, base, name


def _check_owner(config: SubspaceConfig, name: str, module: nn.Module) -> None:
    if not name:
        raise ValueError("the model itself cannot be wrapped; leave it out of target_parameters")
    adapted = isinstance(module, BaseTunerLayer) and not isinstance(module, ParameterLayer)
    if adapted or BaseTuner._check_target_module_exists(config, name):
        raise ValueError(
            "its module is adapted as a whole; leave the module out of target_modules, or the parameter out "
            "of target_parameters"
        )


def check_same_parameters(model: nn.Module, config: SubspaceConfig, others: Iterable[SubspaceConfig]) -> None:
    """Raise unless all adapters with `target_parameters` adapt the same ones: their wrappers are nested.

    Raises:
        ValueError: Naming one that only some of them adapt.
    """
    names = {name for name, _, _ in targeted_parameters(model, config)}
    for other in others:
        theirs = {name for name, _, _ in targeted_parameters(model, other)}
        if names and theirs and names != theirs:
            raise ValueError(
                f"target_parameters={config.target_parameters!r} must be those of the other adapters, "
                f"{other.target_parameters!r}, and {min(names ^ theirs)} is in one of them only; load the "
                "adapters into separate models"
            )


def weight_name(name: str, layer: SubspaceLayer) -> str:
    """Full name of the weight that a layer adapts: of a parameter its own, else its module's."""
    if not isinstance(layer, ParameterLayer):
        return name
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return f"{name}.{layer.parameter_name}"


def wrapper_places(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Where in a model the wrapper of each named module or parameter is, or will be."""
    modules = {name for name, _ in model.named_modules()}
    siblings: dict[str, list[str]] = {}
    for name in names:
        owner = name if name in modules else name.rpartition(".")[0]
        siblings.setdefault(owner, []).append(name)
    return {
        name: owner + ".base_layer" * depth
        for owner, group in siblings.items()
        for depth, name in enumerate(reversed(group))
    }

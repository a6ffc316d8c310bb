"""Which modules of a model a config targets."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn

from .config import SubspaceConfig
from .quantization import quantization_of


def include_all_linear_layers(config: SubspaceConfig, model: nn.Module) -> None:
    """Replace the shorthand "all-linear" in place; PEFT leaves out codes that are in no `nn.Linear`."""
    given = config.target_modules
    _maybe_include_all_linear_layers(config, model)
    if config.target_modules is given:
        return
    head = getattr(model, "get_output_embeddings", lambda: None)()
    more = {
        name
        for name, module in _outermost(model)
        if not isinstance(module, nn.Linear | nn.Embedding) and module is not head and quantization_of(module)
    }
    config.target_modules = sorted(more.union(config.target_modules or ()))


def targets(model: nn.Module, config: SubspaceConfig) -> Iterator[tuple[str, nn.Module]]:
    """Modules that PEFT will hand over for replacement."""
    for name, module in _outermost(model):
        if BaseTuner._check_target_module_exists(config, name):
            yield name, module


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of a model that lie in no tuner layer."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside or ("\0",)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
        yield name, module

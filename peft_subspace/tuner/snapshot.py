"""What an adapter that is about to come will change, kept for the case that it is refused."""

from __future__ import annotations

import copy
from typing import Any

from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


class Snapshot:
    """A tuner and its model as they are now: their modules, what trains, what is active.

    Tensors are not copied: nothing may have been written into them when the snapshot is restored.

    Args:
        tuner: The tuner model.
        adapter_name: Adapter that comes, and is forgotten again when the snapshot is restored.
    """

    def __init__(self, tuner: Any, adapter_name: str) -> None:
        self.tuner, self.adapter_name = tuner, adapter_name
        self.had_config = "peft_config" in vars(tuner.model)
        self.active, self.handles = tuner.active_adapter, [*tuner.handles]
        modules = list(tuner.modules())
        self.kept = [(holder, copy.copy(holder)) for module in modules for holder in _holders(module)]
        self.chosen = [(m, m._active_adapter) for m in modules if isinstance(m, _SWITCHED)]
        parameters = [p for m in modules for p in m._parameters.values() if p is not None]
        self.flags = [(parameter, parameter.requires_grad) for parameter in parameters]

    def restore(self) -> None:
        """Put everything back."""
        for holder, content in self.kept:
            holder.clear()
            holder.update(content)
        for module, names in self.chosen:
            module._active_adapter = names
        for parameter, flag in self.flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        for handle in self.tuner.handles:
            if handle not in self.handles:
                handle.remove()
        self.tuner.handles[:], self.tuner.active_adapter = self.handles, self.active
        self.tuner.peft_config.pop(self.adapter_name, None)
        if not self.had_config:
            vars(self.tuner.model).pop("peft_config", None)


_SWITCHED = (BaseTunerLayer, AuxiliaryTrainingWrapper)
_BY_NAME = (*_SWITCHED, nn.ParameterDict, BufferDict)


def _holders(module: nn.Module) -> list[Any]:
    """What a module keeps by name: its children, and in PEFT's layers all that is kept for each adapter."""
    content = vars(module)
    names = content if isinstance(module, _BY_NAME) else ("_modules",)
    return [content[name] for name in names if isinstance(content[name], dict | set)]

"""The layer classes of a method, made from its update."""

from __future__ import annotations

import sys
from typing import Any

from peft_subspace.core.delta import Update
from peft_subspace.tuner.layer import SubspaceLayer
from peft_subspace.tuner.parameter_layer import ParameterLayer


def layer_classes(module: str, method: str, prefix: str, update: type[Update]) -> tuple[Any, Any, Any]:
    """Make `<method>Layer`, `<method>Linear` and `<method>Parameter`, importable from a module.

    PEFT recognizes adapted linear layers by `Linear` in the name of their class, and adapted parameters by
    the name `ParamWrapper`; pickle finds classes by their qualified names.
    """

    def make(suffix: str, bases: tuple[type, ...], doc: str) -> Any:
        name = f"{method}{suffix}"
        made = type(
            name, bases, {"__module__": module, "__doc__": doc, "prefix": prefix, "delta_cls": update}
        )
        if module in sys.modules:
            setattr(sys.modules[module], name, made)
        return made

    layer = make("Layer", (SubspaceLayer,), f"Layer with {method} adapters.")
    linear = make("Linear", (layer,), f"Linear layer with {method} adapters.")
    parameter = make("Parameter", (ParameterLayer, layer), f"{method} adapters on one parameter of a module.")
    parameter.__name__ = "ParamWrapper"
    return layer, linear, parameter

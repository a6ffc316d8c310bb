"""How much of an update lies in the directions that it should leave alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peft_subspace.core.projection import project, singular_vectors
from peft_subspace.core.validation import invalid
from peft_subspace.methods.continual_svd.delta import ContinualSVDDelta
from peft_subspace.methods.continual_svd.model import ContinualSVDModel
from peft_subspace.runtime.progress import progress
from peft_subspace.tuner.holder import adapted_layers

_PARTS = {
    "both": {"output": "U", "input": "V"},
    "core": {"core": "UV"},
    "input": {"input": "V"},
    "output": {"output": "U"},
}


def subspace_leak(
    model: nn.Module, adapter_name: str = "default", *, from_weight: bool = False
) -> dict[str, Any]:
    """Parts of an adapter's update that lie in protected directions, relative to its norm.

    `"output"` is `‖U_hᵀ ΔW‖ / ‖ΔW‖`, `"input"` is `‖ΔW V_h‖ / ‖ΔW‖` and `"core"` is `‖U_hᵀ ΔW V_h‖ / ‖ΔW‖`;
    each module reports what its constraint protects. `ΔW` is the update that a merge adds, in fp32 and before
    any rounding to the base's dtype. An update of zero leaks nothing.

    Args:
        model: Model with the adapter, wrapped by PEFT or injected.
        adapter_name: The adapter.
        from_weight: Whether to decompose the weights once more and measure against that, rather than against
            the directions that the adapter keeps; one that is only run keeps none.

    Returns:
        `{"max": …, "modules": {module name: {"output": …, "input": …}}}`.

    Raises:
        ValueError: If the model has no such adapter, or `from_weight` is set where directions are of data.
    """
    layers = adapted_layers(model, adapter_name, ContinualSVDModel.tuner_layer_cls)
    if not layers:
        raise ValueError(f"adapter_name={adapter_name!r} is no Continual SVD adapter on this model")
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if from_weight and not next(iter(layers.values())).deltas[adapter_name].reads_weight:
        raise invalid(
            "from_weight", from_weight, f"is of the weight, and {adapter_name!r} protects what data use"
        )
    modules: dict[str, dict[str, float]] = {}
    for name, layer in progress(layers.items(), len(layers), "measuring leaks"):
        protected = None
        if from_weight or layer.deltas[adapter_name].lean:
            lower = (
                [name for name in config.lower_adapters if name in layer.deltas] if config is not None else []
            )
            weight = layer.with_updates(layer.get_base_weight(), lower).flatten(1)
            protected = singular_vectors(weight, layer.deltas[adapter_name].directions)
        update = layer.kind.from_layout(layer.exact_update(adapter_name)).flatten(1).double()
        modules[name] = _leaks(layer.deltas[adapter_name], update, protected)
    return {"max": max(value for leaks in modules.values() for value in leaks.values()), "modules": modules}


def _leaks(
    delta: ContinualSVDDelta, update: Tensor, protected: tuple[Tensor, Tensor] | None
) -> dict[str, float]:
    def leading(name: str, matrix: Tensor) -> Tensor:
        side = delta.sides[name]
        basis = side.directions(getattr(delta, name)) if protected is None else protected[name == "V"]
        return project(matrix, basis[:, : side.count].to(matrix.device), True)

    norm = update.norm().item() or 1.0
    leaks = {}
    for part, sides in _PARTS[delta.constraint].items():
        inside = update
        for side in sides:
            inside = leading("U", inside) if side == "U" else leading("V", inside.T).T
        leaks[part] = inside.norm().item() / norm
    return leaks

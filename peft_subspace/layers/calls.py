"""How a layer is reached through what is around it, called with another weight, and what it returns."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves


def innermost(layer: nn.Module) -> nn.Module:
    """The layer inside the wrappers of adapters."""
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return layer


def has_hooks(base: nn.Module) -> bool:
    """Whether calling the layer does more than its forward.

    There may be hooks, a forward replaced by accelerate, or a module such as FSDP's around the layer.
    """
    hooks = base._forward_hooks or base._forward_pre_hooks
    return bool(hooks or base._modules or "forward" in vars(base))


def takes_gradient(result: Any) -> bool:
    """Whether a gradient can come to what a layer has returned: not to indices, say."""
    return isinstance(result, Tensor) and result.is_floating_point()


def outputs_in(result: Any) -> list[Tensor]:
    """Tensors of a result to which gradients can come: one, or those of a tuple as routers return it."""
    return [leaf for leaf in tree_leaves(result) if takes_gradient(leaf)]


def plus_change(result: Any, updated: Any, plain: Any) -> Any:
    """A layer's result, plus what an update changes; what takes no gradient, as it is updated."""
    if not takes_gradient(result):
        return updated
    return (result + (updated - plain)).to(result.dtype)


def call_with(module: nn.Module, path: str, weight: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call a module with a tensor in the place of one of its parameters.

    FSDP1 sets its tensors as plain attributes, which hide the parameters that `functional_call` replaces.

    Raises:
        RuntimeError: If the parameter is in a unit of FSDP, inside, which has it during its own call only.
    """
    owner, _, name = path.rpartition(".")
    holder = module.get_submodule(owner)
    attributes = vars(holder)
    if not (name in attributes or name in holder._parameters or name in holder._buffers):
        raise RuntimeError(
            f"{path!r} is in a module of its own inside the adapted one, such as a unit of FSDP, and not "
            "there before that is called; choose an auto_wrap_policy whose units hold adapted modules whole"
        )
    hidden = {name: attributes[name]} if name in attributes else {}
    try:
        attributes.update(dict.fromkeys(hidden, weight))
        return functional_call(module, {path: weight}, args, kwargs)
    finally:
        attributes.update(hidden)

"""Tensors that all layers of an adapter share, held in one place.

PEFT finds an adapter's tensors in its layers and in the tuner object. Shared tensors are held by the tuner
object, beside the base model, of which nothing is changed; layers refer to them. Where the tuner object is
thrown away (`inject_adapter_in_model`, and with it the `add_adapter` of transformers and diffusers), the
root of the adapted model holds them, under the name by which the loader of transformers looks for them.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


class SharedTensors(nn.ModuleDict):
    """Shared tensors by adapter name."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the input, so that a root which runs its children in turn (`nn.Sequential`) still works."""
        return x


def shared_containers(model: nn.Module, attribute: str | None) -> Iterator[tuple[str, SharedTensors]]:
    """Containers of a name anywhere in a model; the prefix that FSDP puts before names is left out."""
    for name, module in model.named_modules() if attribute is not None else ():
        if isinstance(module, SharedTensors) and name.rpartition(".")[2] == attribute:
            yield name.removeprefix("_fsdp_wrapped_module."), module


def hold(holder: nn.Module, attribute: str) -> SharedTensors:
    """Container of a holder, made if there is none."""
    if not isinstance(getattr(holder, attribute, None), SharedTensors):
        holder.add_module(attribute, SharedTensors())
    return holder.get_submodule(attribute)

"""What trains in an adapter, handed over without the rest: to other processes, clients or a server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_subspace.core.modes import lasting
from peft_subspace.core.names import in_base
from peft_subspace.initialization.from_gradient import unwrap
from peft_subspace.runtime.engines import check_writable, read_whole, write
from peft_subspace.tuner.frozen_file import digest_of
from peft_subspace.tuner.holder import adapted_layers
from peft_subspace.tuner.layer import SubspaceLayer
from peft_subspace.tuner.shared import SharedTensors

_HOLDERS = (PeftModel, BaseTuner, BaseTunerLayer, AuxiliaryTrainingWrapper)
_COMPILED = "_orig_mod."


def trainable_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """Copies of exactly what trains: of LoRA-SB's `B R A` the `R`; heads, tokens and biases that train too.

    The names are those of the model's parameters without the adapter's, so that they fit an adapter of any
    name. Averages of such states over clients are averages of updates where the update is linear in what
    trains: for LoRA-SB, Continual SVD without `r` or with `freeze_a`, and heads; what is frozen must be the
    same (`frozen_digest`). What FSDP2 and ZeRO-3 have split is gathered, for which all processes must call.

    Args:
        model: Model with the adapter, of this package or PEFT's own, wrapped or injected; one without any
            adapter gives all that trains.
        adapter_name: The adapter; what belongs to others is left out.

    Raises:
        ValueError: If the model has no such adapter, or nothing of it trains.
        RuntimeError: If FSDP1 has taken the parameters over, or the base weights are not loaded yet.
    """
    own = _trained(model, adapter_name)
    return {name: read_whole(parameter).contiguous() for name, parameter in own.items()}


@lasting()
def load_trainable_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], adapter_name: str = "default"
) -> None:
    """Put values in the place of what trains, in place: optimizers go on with the parameters that they have.

    Args:
        model: Model with the adapter.
        state: What `trainable_state_dict` has given for an adapter of this form, or an average of such.
        adapter_name: The adapter.

    Raises:
        TypeError: If a value is no tensor of floating-point numbers.
        ValueError: If names or shapes are others than what trains, values are not finite, or the adapter is
            merged. Nothing has been changed then.
        RuntimeError: If FSDP1 has taken the parameters over, or the base weights are not loaded yet.
    """
    own = _trained(model, adapter_name)
    if any(adapter_name in getattr(module, "merged_adapters", ()) for module in model.modules()):
        raise ValueError(f"adapter_name={adapter_name!r} is merged; call unmerge_adapter() first")
    for name in sorted(own.keys() ^ state.keys()):
        told = "lacks" if name in own else "has"
        raise ValueError(
            f"state {told} {name!r}, and {len(own)} tensors train, such as {min(own)!r}; take it from an "
            "adapter of the same config by trainable_state_dict"
        )
    for name, parameter in own.items():
        _check_value(name, state[name], parameter)
    for name, parameter in own.items():
        write(parameter, state[name].to(parameter.device))


def frozen_digest(model: nn.Module, adapter_name: str = "default") -> str:
    """Hash of what is frozen in an adapter, such as LoRA-SB's bases: equal where states fit each other.

    Initializations repeat themselves bit for bit with one seed and base model on machines of one kind. Where
    digests differ, save the adapter once and have all load it.

    Raises:
        ValueError: If the model has no such adapter of this package.
    """
    layers = adapted_layers(unwrap(model), adapter_name, SubspaceLayer)
    if not layers:
        raise ValueError(f"adapter_name={adapter_name!r} is no adapter of peft_subspace on this model")
    return digest_of(
        {
            f"{name.replace(_COMPILED, '')}.{key}": tensor
            for name, layer in layers.items()
            for key, tensor in layer.initialized_delta(adapter_name).named_buffers()
            if key != "fingerprint"
        }
    )


def _trained(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """Parameters that train, by name without that of the adapter.

    Raises:
        ValueError: If there are none, or they have no values yet.
        RuntimeError: If FSDP1 has them, or they wait for a base weight that is not loaded yet.
    """
    model = unwrap(model)
    places = dict(_places(model))
    if places and adapter_name not in places.values():
        raise ValueError(
            f"adapter_name={adapter_name!r} is none of {sorted({*places.values()})}, the adapters"
        )
    found: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        place = next((start for start in _starts(name) if start in places), None)
        if not parameter.requires_grad or (place and places[place] != adapter_name):
            continue
        if place:
            name = place.removesuffix(f".{adapter_name}") + name.removeprefix(place)
        found[in_base(name.replace(_COMPILED, ""))] = parameter
    if not found:
        raise ValueError(
            f"nothing of adapter_name={adapter_name!r} trains; activate it with model.set_adapter(…), or "
            "load it with is_trainable=True"
        )
    for layer in adapted_layers(model, adapter_name, SubspaceLayer).values():
        layer.initialized_delta(adapter_name)  # what a weight that came late gives would replace these values
    check_writable(found.values(), "handing over what trains")
    for name, parameter in found.items():
        if parameter.is_meta:
            raise ValueError(f"{name} has no values yet; load the base model's weights first")
    return found


def _places(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Paths of what adapters have, with the names of these, which mean something else elsewhere in a path."""
    for path, module in model.named_modules():
        for key, container in module.named_children():
            is_dict = isinstance(container, nn.ModuleDict | nn.ParameterDict)
            if isinstance(container, SharedTensors) or (is_dict and isinstance(module, _HOLDERS)):
                start = f"{path}.{key}" if path else key
                yield from ((f"{start}.{name}", name) for name in container.keys())  # noqa: SIM118


def _starts(name: str) -> Iterator[str]:
    """A path, and those that lead to it, longest first."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _check_value(name: str, value: Tensor, parameter: nn.Parameter) -> None:
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # of what ZeRO-3 has split
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"state[{name!r}] must be a tensor of floating-point numbers, not {_kind_of(value)}")
    if tuple(value.shape) != shape:
        raise ValueError(
            f"state[{name!r}] has shape {tuple(value.shape)}, and {shape} trains; take it from an adapter of "
            "the same config"
        )
    if not torch.isfinite(value).all():
        raise ValueError(f"state[{name!r}] has NaN or infinite values; leave out the run that it is from")


def _kind_of(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__

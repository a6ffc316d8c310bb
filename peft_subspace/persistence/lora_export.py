"""Exact export to LoRA: a chain split at its narrowest joint is a LoRA, without an SVD."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_subspace.core.chain import split
from peft_subspace.core.names import BASE, in_base, saved_key
from peft_subspace.layers.convolution import TransposedConvKind
from peft_subspace.layers.embedding import EmbeddingKind
from peft_subspace.layers.linear import Conv1DKind
from peft_subspace.persistence.card import LORA_FOLDER, write_card
from peft_subspace.runtime.files import atomic_write
from peft_subspace.runtime.progress import progress
from peft_subspace.tuner.holder import adapted_layers
from peft_subspace.tuner.layer import SubspaceLayer
from peft_subspace.tuner.parameter_layer import ParameterLayer
from peft_subspace.tuner.places import aliases
from peft_subspace.tuner.targets import weight_name


def lora_state_dict(
    model: nn.Module, adapter_name: str = "default", *, key_prefix: str = BASE.removesuffix(".")
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Convert an adapter to an equal LoRA: `B A = s · ΔW`, with `lora_alpha = r`, in the adapter's dtype.

    All modules get one rank, the largest that any of them needs, because some servers read a single rank from
    the config. Smaller factors are padded with zeros.

    Args:
        model: Model with the adapter, wrapped by PEFT or injected.
        adapter_name: Adapter to convert.
        key_prefix: Start of all keys; by default PEFT's, `"base_model.model"`. The pipelines of diffusers
            read `"unet"`, `"transformer"`, `"text_encoder"` and the like, the names of their models.

    Returns:
        Configuration and state dict of a LoRA adapter, as PEFT saves it. All tensors are contiguous.

    Raises:
        ValueError: If the model has no such adapter of this package, or the adapter has layers whose update
            is no LoRA that PEFT runs: grouped, dilated or transposed convolutions, convolutions with a
            `padding_mode` other than `"zeros"`, layers with a forward of their own that does more than their
            type's, layers with several names, layers whose weight the model reads, updates masked by
            `keep_zeros`, and those that are no chain of matrices.
    """
    layers = adapted_layers(model, adapter_name, SubspaceLayer)
    if not layers:
        raise ValueError(f"adapter_name={adapter_name!r} is no adapter of peft_subspace on this model")
    several = {in_base(name) for name in aliases(model, SubspaceLayer).values()}
    modules = [name for name, layer in layers.items() if not isinstance(layer, ParameterLayer)]
    taken = taken_for_experts(getattr(model, "base_model", model), modules)
    reasons = {
        name: reason
        for name, layer in sorted(layers.items())
        if (reason := _no_lora_form(layer, adapter_name, shared=name in several, taken=name in taken))
    }
    if reasons:
        listed = ", ".join(f"{name} ({reason})" for name, reason in reasons.items())
        raise ValueError(
            f"{len(reasons)} of the adapted layers have no LoRA form that PEFT runs: {listed}; leave them "
            "out of target_modules, or serve the merged model (merge_and_unload)"
        )
    shown = progress(layers.items(), len(layers), "multiplying factors")
    pairs = {name: _lora_pair(layer, adapter_name) for name, layer in shown}
    rank = max(left.shape[1] for left, _ in pairs.values())
    state = _other_state(model, adapter_name)
    for name, (left, right) in pairs.items():
        state.update(_lora_tensors(name, layers[name], pad(left, 1, rank), pad(right, 0, rank)))
    start = f"{key_prefix}." if key_prefix else ""
    state = {f"{start}{in_base(key)}": tensor.contiguous() for key, tensor in state.items()}
    return _lora_config(model, adapter_name, layers, taken, rank), state


def export_lora(
    model: nn.Module,
    save_directory: str | Path,
    adapter_name: str = "default",
    *,
    key_prefix: str = BASE.removesuffix("."),
) -> None:
    """Write an adapter as a standard LoRA, which PEFT, vLLM, SGLang, llama.cpp and diffusers can serve.

    Args:
        model: Model with the adapter, wrapped by PEFT or injected.
        save_directory: Folder for `adapter_config.json` and `adapter_model.safetensors`; it is
            created if it does not exist.
        adapter_name: Adapter to write.
        key_prefix: As for `lora_state_dict`; `pipe.load_lora_weights` wants `"unet"` or another name of its.

    Raises:
        ValueError: As for `lora_state_dict`; nothing is written then.
    """
    config, state = lora_state_dict(model, adapter_name, key_prefix=key_prefix)
    folder = Path(save_directory)
    write_lora(folder, config, state)
    if folder.name == LORA_FOLDER and (folder.parent / CONFIG_NAME).is_file():
        write_card(folder.parent, model.peft_config[adapter_name])


def write_lora(folder: Path, config: LoraConfig, state: Mapping[str, Tensor]) -> None:
    """Write config and tensors of a LoRA."""
    state = {key: tensor.cpu().clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}
    with atomic_write(folder / SAFETENSORS_WEIGHTS_NAME) as partial:
        save_file(state, partial, metadata={"format": "pt"})
    with atomic_write(folder / CONFIG_NAME) as partial:
        config.save_pretrained(str(partial.parent))


def _no_lora_form(layer: SubspaceLayer, adapter_name: str, *, shared: bool, taken: bool) -> str | None:
    """Reason why no LoRA of PEFT is equal to the layer's update; None if there is such a LoRA."""
    if shared:
        return "several names, of which PEFT's LoRA adapts one"
    if layer.is_read:
        return "a weight that the model computes with, where PEFT's LoRA is not heard"
    if layer.deltas[adapter_name].keeps_zeros:
        return "keep_zeros=True: a product of two factors has no zeros where the weight has"
    if not layer.deltas[adapter_name].has_factors:
        return "an update that is no chain of matrices"
    if isinstance(layer, ParameterLayer):
        return None
    base: Any = layer.get_base_layer()
    if taken and layer.base_weight.backend:
        return "a name that PEFT gives to experts in models of this type, and a quantized weight"
    if layer.kind.shape.groups > 1:
        return f"groups={base.groups}"
    if isinstance(layer.kind, TransposedConvKind):
        return "a transposed convolution"
    if layer.kind.shape.kernel_size:  # PEFT builds its convolution with the base's stride and padding only
        if set(base.dilation) != {1}:
            return f"dilation={base.dilation}"
        if base.padding_mode != "zeros":
            return f"padding_mode={base.padding_mode!r}"
    return None if layer.kind.is_plain(base) else "a forward of its own"


@torch.no_grad()
def _lora_pair(layer: SubspaceLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """Factors `(out, r)` and `(r, in, *kernel)` of the scaled update, multiplied in fp32."""
    factors = layer.initialized_delta(adapter_name)(layer.read_weight)
    left, right = split([factor.float() for factor in factors])
    dtype = layer.adapter_dtype(adapter_name)
    return (left * layer.scaling[adapter_name]).to(dtype), right.to(dtype)


def _lora_tensors(name: str, layer: SubspaceLayer, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """The two factors under PEFT's keys, in the shapes of the LoRA layers that PEFT builds."""
    if isinstance(layer, ParameterLayer) and layer.kind.shape.kernel_size:
        # PEFT keeps rank and experts in one axis: in A expert by expert, in B rank by rank.
        left = left[..., None].expand(-1, -1, right.shape[-1]).flatten(1)
        right = right.movedim(-1, 0).flatten(0, 1)
    return lora_tensors(name, left, right, embedding=isinstance(layer.kind, EmbeddingKind))


def lora_tensors(module: str, left: Tensor, right: Tensor, *, embedding: bool) -> dict[str, Tensor]:
    """Factors `(out, r)` and `(r, in, *kernel)` under PEFT's keys, in the shapes of its LoRA layers."""
    key = saved_key(module)
    if embedding:
        return {f"{key}.lora_embedding_A": right, f"{key}.lora_embedding_B": left}
    ones = (1,) * (right.ndim - 2)
    return {f"{key}.lora_A.weight": right, f"{key}.lora_B.weight": left.reshape(*left.shape, *ones)}


def _other_state(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Tensors that an adapter saves besides its update: biases, modules_to_save, trained tokens."""
    prefix = model.peft_config[adapter_name].peft_type.value.lower() + "_"
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return {key: tensor for key, tensor in state.items() if f".{prefix}" not in f".{key}"}


def pad(tensor: Tensor, axis: int, size: int) -> Tensor:
    """The tensor, lengthened along `axis` with zeros."""
    missing = list(tensor.shape)
    missing[axis] = size - tensor.shape[axis]
    return torch.cat([tensor, tensor.new_zeros(missing)], dim=axis) if missing[axis] else tensor


def taken_for_experts(model: Any, names: Iterable[str]) -> set[str]:
    """Those of a model's modules that PEFT's LoRA cannot name: it takes `gate_proj`, say, for experts."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # with transformers before version 5
        return set()
    taken = set()
    for name in names:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # it misses what older models have beside it
            config.target_modules = None
        if name not in (config.target_modules or ()):
            taken.add(name)
    return taken


def _lora_config(
    model: nn.Module, adapter_name: str, layers: dict[str, SubspaceLayer], taken: set[str], rank: int
) -> LoraConfig:
    """Config of a LoRA on the same modules and parameters, which saves what the adapter saves."""
    config = model.peft_config[adapter_name]
    parameters = [weight_name(n, layer) for n, layer in layers.items() if isinstance(layer, ParameterLayer)]
    parameters += [f"{name}.weight" for name in sorted(taken)]
    modules = {n for n, layer in layers.items() if not isinstance(layer, ParameterLayer)} - taken
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_shortest_targets(model, modules),
        target_parameters=parameters or None,
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        bias="lora_only" if config.bias.endswith("_only") else config.bias,
        fan_in_fan_out=any(isinstance(layer.kind, Conv1DKind) for layer in layers.values()),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )


def _shortest_targets(model: nn.Module, names: Iterable[str]) -> list[str] | str:
    """Last parts of the names, such as `q_proj`, if they match no other modules; else the full names.

    Where a full name is the end of another module's as well, as `"0"` is, it is an expression for all.
    """
    names = set(names)
    suffixes = {name.rpartition(".")[2] for name in names}
    everything = {in_base(name).replace(".base_layer", "") for name, _ in model.named_modules()}
    others = everything - names
    if not any(name.rpartition(".")[2] in suffixes for name in others):
        return sorted(suffixes)
    if any(name.endswith(tuple(f".{own}" for own in names)) for name in others):
        return "|".join(re.escape(name) for name in sorted(names))
    return sorted(names)

"""Costs of an adapter from shapes alone: trainable parameters, file, gradients, optimizer states."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from peft_subspace.tools.skeleton import skeleton_from, skeleton_of, wrap
from peft_subspace.tools.tables import aligned, readable
from peft_subspace.tuner.config import SubspaceConfig
from peft_subspace.tuner.layer import SubspaceLayer

_STEP_BYTES = 4
"""Bytes of the step counter that AdamW keeps for each tensor."""

_PARTS_OF_PEFT = {"modules_to_save", "token_adapter", "original_module", "base_layer"}
"""Parts of names that PEFT's wrappers add."""


@dataclass
class Cost:
    """Costs of one kind of layer, or of all.

    Attributes:
        modules: Number of adapted modules.
        trained: Number of trainable parameters.
        frozen: Number of entries of frozen tensors that are saved with the adapter.
        tensor_bytes: Bytes of both in the file.
        gradient_bytes: Bytes of the gradients.
        optimizer_bytes: Bytes of the states of AdamW: two numbers for each trainable parameter, and a step
            counter for each tensor.
    """

    modules: int = 0
    trained: int = 0
    frozen: int = 0
    tensor_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Cost)))


@dataclass
class Estimate:
    """Costs of an adapter before it is made; `print` shows them as a table.

    Attributes:
        method: PEFT's name of the method.
        model: Class of the base model.
        base: Number of parameters of the base model.
        rows: Costs by kind of layer: the last part of its name, its type and shape. Tensors outside the
            adapted layers, such as pools and `modules_to_save`, are listed by their place.
        header_bytes: Bytes of the file before its tensors.
    """

    method: str
    model: str
    base: int
    rows: dict[str, Cost]
    header_bytes: int

    @property
    def total(self) -> Cost:
        """Sum of the rows: `trained`, `frozen`, and bytes of tensors, gradients and optimizer states."""
        return sum(self.rows.values(), start=Cost())

    @property
    def file_bytes(self) -> int:
        """Size of `adapter_model.safetensors`."""
        return self.header_bytes + self.total.tensor_bytes

    def __str__(self) -> str:
        total = self.total
        share = 100 * total.trained / max(self.base, 1)
        table = [["", "modules", "trainable", "frozen", "file", "gradients", "AdamW states"]]
        for name, cost in {**self.rows, "all": total}.items():
            sizes = (cost.tensor_bytes, cost.gradient_bytes, cost.optimizer_bytes)
            counts = (cost.modules or "", cost.trained, cost.frozen)
            table.append([name, *(f"{n:,}" if n != "" else "" for n in counts), *map(readable, sizes)])
        return (
            f"{self.method} on {self.model}: {total.trained:,} trainable parameters, {share:.3g} % of the "
            f"base's {self.base:,}; file {self.file_bytes:,} bytes, {self.header_bytes:,} of them its "
            f"header\n{aligned(table)}"
        )


def estimate(model: nn.Module | str | Path, config: SubspaceConfig) -> Estimate:
    """Count what an adapter would train and save, without creating it and without any weights.

    The file's size is that of `save_pretrained` to the byte. Gradients and optimizer states are those of
    `torch.optim.AdamW` on the adapter's parameters, in the dtype in which PEFT creates them.

    Args:
        model: Base model on any device, or its folder or id on the Hub, from which only the config is read.
            The model is not changed.
        config: Configuration of the adapter, which is not changed either.

    Returns:
        The costs by kind of layer and in total; `print` shows them as a table.

    Raises:
        TypeError: As `get_peft_model` raises, where a targeted module cannot be adapted.
        ValueError: Likewise; and if the model has adapters, or transformers does not have it.
    """
    skeleton = skeleton_of(model) if isinstance(model, nn.Module) else skeleton_from(model)
    base = sum(parameter.numel() for parameter in skeleton.parameters())
    wrapped = wrap(skeleton, config)
    state = get_peft_model_state_dict(wrapped)
    return Estimate(
        method=config.peft_type_name,
        model=type(skeleton).__name__,
        base=base,
        rows=_rows(wrapped, state),
        header_bytes=_header_bytes(state),
    )


def _rows(wrapped: PeftModel, state: Mapping[str, Tensor]) -> dict[str, Cost]:
    """Costs by kind of layer, from the parameters of an adapted model and the tensors of its file."""
    layers, rows = {}, dict[str, Cost]()
    for name, layer in wrapped.named_modules():
        if isinstance(layer, SubspaceLayer):
            shape = "x".join(map(str, layer.kind.shape.dims))
            layers[name] = f"{name.rpartition('.')[2]} {type(layer.get_base_layer()).__name__} {shape}"
            rows.setdefault(layers[name], Cost()).modules += 1
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            size = parameter.numel() * parameter.element_size()
            cost = rows.setdefault(_row(name, layers), Cost())
            cost.trained += parameter.numel()
            cost.gradient_bytes += size
            cost.optimizer_bytes += 2 * size + _STEP_BYTES
    for key, tensor in state.items():
        cost = rows.setdefault(_row(key, layers), Cost())
        cost.frozen += tensor.numel()
        cost.tensor_bytes += tensor.numel() * tensor.element_size()
    for cost in rows.values():
        cost.frozen -= cost.trained
    return rows


def _row(name: str, layers: Mapping[str, str]) -> str:
    """Row of a parameter or of a tensor in the file: that of its layer, else its place in the model."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        layer = layers.get(".".join(parts[:end]))
        if layer is not None:
            return layer
    parts = name.removeprefix("base_model.").removeprefix("model.").split(".")  # pools are beside the base
    parts = [part for part in parts if part != "default" and not part.isdigit()]
    return ".".join(part for part in parts[:-1] if part not in _PARTS_OF_PEFT)


def _header_bytes(state: Mapping[str, Tensor]) -> int:
    """Size of a safetensors header: its length in 8 bytes, and JSON padded to a multiple of 8."""
    order = sorted(
        state, key=lambda key: (-state[key].element_size(), not state[key].is_floating_point(), key)
    )
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key in order:
        end = start + state[key].numel() * state[key].element_size()
        dtype = _SAFETENSORS_DTYPES[str(state[key].dtype).removeprefix("torch.")]
        entries[key] = {"dtype": dtype, "shape": list(state[key].shape), "data_offsets": [start, end]}
        start = end
    length = len(json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8


_SAFETENSORS_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip

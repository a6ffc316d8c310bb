"""Small adapters as version 0.1 saved them, in `tests/data`, and what they did there.

`test_file_format.py` loads them with the code of today. Write the folder anew only for a new file format, and
with the code of the version whose files they are meant to be:

    python tests/saved_adapters.py
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peft_subspace
from layers import HalvedLinear, ShiftedEmbedding
from peft_subspace import (
    ContinualSVDConfig,
    EffortConfig,
    FLoRAConfig,
    LoRASBConfig,
    MoSConfig,
    initialize_from_gradient,
)
from peft_subspace.continual import next_task

DATA = Path(__file__).parent / "data"
EXPECTED, BASE = "expected.safetensors", "base.safetensors"
BATCH = 2
FORMS = ("linear", "transposed", "embedding", "conv1d", "conv2d", "conv3d")
UNUSUAL = ("halved", "shifted", "grouped", "depthwise", "dilated", "circular")
SMALL = ("linear", "conv1d", "tokens", "head")
BLOCKS = tuple(f"encoder.blocks.{i}.{name}" for i in range(2) for name in ("query", "key", "value"))
EXPERTS = ("experts", "transposed_experts", "linear")


# ---------------------------------------------------------------------------------------------- base models


class Experts(nn.Module):
    """Matrices stacked in one parameter, as fused experts are, and the matrix that weighs them."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.stack = nn.Parameter(torch.empty((3, 4, 5) if is_transposed else (3, 5, 4)))
        self.router = nn.Parameter(torch.empty(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        stack = self.stack if self.is_transposed else self.stack.mT
        return torch.einsum("be,bi,eio->bo", x @ self.router.T, x, stack)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "transposed": (lambda: Conv1D(4, 6), (6,)),
    "embedding": (lambda: nn.Embedding(7, 4), ()),
    "conv1d": (lambda: nn.Conv1d(4, 4, 3), (4, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 4, (3, 2), stride=2, padding=1), (2, 4, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, bias=False), (2, 3, 2, 2)),
    "halved": (lambda: HalvedLinear(6, 4), (6,)),
    "shifted": (lambda: ShiftedEmbedding(8, 4), ()),
    "grouped": (lambda: nn.Conv2d(4, 6, 2, groups=2), (4, 3, 2)),
    "depthwise": (lambda: nn.Conv1d(4, 4, 3, groups=4), (4, 5)),
    "dilated": (lambda: nn.Conv1d(2, 4, 2, dilation=2), (2, 5)),
    "circular": (lambda: nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular"), (2, 4)),
    "tokens": (lambda: nn.Embedding(7, 4), ()),
    "head": (lambda: nn.Linear(6, 3), (6,)),
    "experts": (Experts, (4,)),
    "transposed_experts": (lambda: Experts(is_transposed=True), (4,)),
    "query": (lambda: nn.Linear(8, 4), (8,)),
    "key": (lambda: nn.Linear(8, 4), (8,)),
    "value": (lambda: nn.Linear(8, 4), (8,)),
}


class Network(nn.Module):
    """Layers side by side, each with an input of its own, and with weights that no random generator drew."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        for name in names:
            *path, last = name.split(".")
            parent: nn.Module = self
            for part in path:
                parent.add_module(part, getattr(parent, part, None) or nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, LAYERS[last][0]())
        start = 0
        for parameter in self.parameters():
            parameter.data = numbers(parameter.shape, start)
            start += parameter.numel()

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        outputs = {name: self.get_submodule(name)(x) for name, x in inputs.items()}
        return {"loss": sum(output.square().mean() for output in outputs.values()), **outputs}


def numbers(shape: tuple[int, ...], start: int = 0) -> Tensor:
    """Numbers between -1/2 and 1/2 without a pattern; bf16 holds them as they are."""
    positions = torch.arange(start, start + prod(shape))
    return ((positions**3 % 251 - 125) / 256).reshape(shape)


def network_inputs(names: tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    sizes = {name: LAYERS[name.rpartition(".")[2]][1] for name in names}
    ids = torch.arange(3 * BATCH).reshape(BATCH, 3)
    return {name: numbers((BATCH, *size), 7).to(dtype) if size else ids for name, size in sizes.items()}


# --------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class SavedCase:
    """One folder of `tests/data`.

    Attributes:
        make: Wraps the base model, with adapters that change its outputs.
        adapters: Names of those that are in the folder, in the order in which they are to be loaded.
        refusals: By adapter, what is said where there is no LoRA that equals it.
        merged: Whether a task was merged into the base model, whose weights then are in the folder.
    """

    name: str
    layers: tuple[str, ...]
    make: Callable[[SavedCase], PeftModel]
    adapters: tuple[str, ...] = ("default",)
    dtype: torch.dtype = torch.float32
    refusals: dict[str, str] = field(default_factory=dict)
    merged: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def folder(self) -> Path:
        return DATA / self.name

    def adapter_folder(self, adapter: str) -> Path:
        """Folder of one adapter, where PEFT puts it."""
        return self.folder if adapter == "default" else self.folder / adapter

    def base(self) -> Network:
        network = Network(self.layers).to(self.dtype)
        if self.merged:
            network.load_state_dict(load_file(self.folder / BASE))
        return network

    def inputs(self) -> dict[str, Tensor]:
        return network_inputs(self.layers, self.dtype)

    def load(self, load: Callable[..., PeftModel]) -> PeftModel:
        """Load all adapters, by `PeftModel.from_pretrained` and its `load_adapter`, or by our own `load`."""
        model: Any = self.base()
        for adapter in self.adapters:
            options = {"adapter_name": adapter, "autocast_adapter_dtype": self.dtype == torch.float32}
            if load is not peft_subspace.load and isinstance(model, PeftModel):
                model.load_adapter(self.adapter_folder(adapter), **options)
            else:
                model = load(model, self.adapter_folder(adapter), **options)
        return model.eval()


def wrap(case: SavedCase, config: Any, adapter: str = "default") -> PeftModel:
    network = Network(case.layers).to(case.dtype)
    return get_peft_model(network, config, adapter, autocast_adapter_dtype=case.dtype == torch.float32)


def train(model: nn.Module, inputs: dict[str, Tensor], steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        model(**inputs)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


def started_at_random(layers: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
    targets = {} if "target_parameters" in options else {"target_modules": list(layers)}
    return {**targets, "init_weights": False, "seed": 3}


def one(name: str, config_cls: type, layers: tuple[str, ...], *, steps: int = 0, **options: Any) -> SavedCase:
    """One adapter, with a random start unless told."""
    about = {key: options.pop(key) for key in ("dtype", "refusals") if key in options}
    options = {**started_at_random(layers, options), **options}

    def make(case: SavedCase) -> PeftModel:
        model = wrap(case, config_cls(**options))
        train(model, case.inputs(), steps)
        return model

    return SavedCase(name, layers, make, **about)


def weighted_sum(
    name: str, config_cls: type, layers: tuple[str, ...], combination: str = "cat", **options: Any
) -> SavedCase:
    """A sum of two adapters, without the two."""
    options = {**started_at_random(layers, options), **options}

    def make(case: SavedCase) -> PeftModel:
        model = wrap(case, config_cls(**options), "first")
        train(model, case.inputs())
        model.add_adapter("second", config_cls(**{**options, "seed": 4}))
        model.set_adapter("second")
        train(model, case.inputs())
        model.add_weighted_adapter(["first", "second"], [1.5, -0.5], "sum", combination)
        return model

    return SavedCase(name, layers, make, ("sum",))


def from_gradients(
    name: str, layers: tuple[str, ...], refusals: dict[str, str] | None = None, **options: Any
) -> SavedCase:
    def make(case: SavedCase) -> PeftModel:
        model = wrap(case, LoRASBConfig(target_modules=list(layers), **options))
        initialize_from_gradient(model, [case.inputs()], learning_rate=0.01, progress=False)
        train(model, case.inputs())
        return model

    return SavedCase(name, layers, make, refusals=refusals or {})


def two_adapters(name: str, config_cls: type, layers: tuple[str, ...], **options: Any) -> SavedCase:
    def make(case: SavedCase) -> PeftModel:
        configs = [config_cls(target_modules=list(layers), init_weights=False, **options) for _ in range(2)]
        model = wrap(case, configs[0])
        model.add_adapter("other", configs[1])
        return model

    return SavedCase(name, layers, make, ("default", "other"))


def two_tasks(name: str, keep: str, **options: Any) -> SavedCase:
    """Two tasks with heads; of one that was merged, the head is all that there is."""
    layers = (*without_embeddings(FORMS), "head")

    def make(case: SavedCase) -> PeftModel:
        options_of_both = {"target_modules": list(layers[:-1]), "modules_to_save": ["head"], **options}
        model = wrap(case, ContinualSVDConfig(**options_of_both), "first")
        train(model, case.inputs())
        next_task(model, "second", keep=keep, preserve=1)
        train(model, case.inputs())
        return model

    merged = keep == "merge"
    refusals = {"first": "'first' is no adapter of"} if merged else {}
    return SavedCase(name, layers, make, ("first", "second"), refusals=refusals, merged=merged)


def without_embeddings(layers: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in layers if name not in ("embedding", "shifted"))


def common_cases(
    method: str, config_cls: type, layers: Callable[..., tuple[str, ...]], **options: Any
) -> list[SavedCase]:
    """What every method saves: each kind of layer, and all that PEFT trains beside an adapter."""
    unusual = {"default": r"layers have no LoRA form that PEFT runs: .*dilation.*a forward of its own"}
    small = {"target_modules": ["linear", "conv1d"], **options}
    bf16 = {**small, "dtype": torch.bfloat16}
    biases = f"{config_cls().peft_type.value.lower()}_only"
    return [
        one(f"{method}-layers", config_cls, layers(FORMS), **options),
        one(f"{method}-unusual-layers", config_cls, layers(UNUSUAL), refusals=unusual, **options),
        one(f"{method}-bf16", config_cls, ("linear", "conv1d"), **bf16),
        one(f"{method}-own-biases", config_cls, SMALL, steps=3, bias=biases, seed=5, **small),
        one(
            *(f"{method}-heads-biases-tokens", config_cls, SMALL),
            steps=3, modules_to_save=["head"], bias="all", trainable_token_indices={"tokens": [1, 3]},
            **small,
        ),
    ]  # fmt: skip


CASES = [
    *common_cases("flora", FLoRAConfig, tuple, r=2, alpha=3),
    one("flora-list-ranks", FLoRAConfig, FORMS, r=[2, 3], kernel_r=2),
    one("flora-kernel-ranks", FLoRAConfig, ("conv2d", "grouped"), r=[2, 1, 2, 1], alpha=3,
        refusals={"default": r"grouped \(groups=2\)"}),
    one("flora-patterns", FLoRAConfig, FORMS, r=2, kernel_r=1, rank_pattern={"conv2d": [1, 2], "linear": 3},
        alpha_pattern={"conv.d": 5.0, "transposed": 0.5}),
    one("flora-scale", FLoRAConfig, ("linear", "conv2d"), steps=3, r=2, kernel_r=[2, 1], scale=0.7,
        init_weights="zero_output"),
    one("flora-kaiming-normal", FLoRAConfig, ("linear", "embedding"), steps=3, r=2,
        init_weights="kaiming_normal", dropout=0.1),
    one("flora-one-block", FLoRAConfig, BLOCKS, r=2, target_modules=["query", "key"], exclude_modules=["key"],
        layers_to_transform=[1], layers_pattern="blocks"),
    one("flora-experts", FLoRAConfig, EXPERTS, r=2, kernel_r=2, target_modules=["linear"],
        target_parameters=["experts.stack", "experts.router", "transposed_experts.stack"]),
    one("flora-experts-list-ranks", FLoRAConfig, EXPERTS, r=[2, 1, 3], target_parameters=["stack"]),
    weighted_sum("flora-sum", FLoRAConfig, FORMS, r=1),
    weighted_sum("flora-experts-sum", FLoRAConfig, EXPERTS, r=1,
                 target_parameters=["experts.stack", "experts.router"]),
    two_adapters("flora-two-adapters", FLoRAConfig, ("linear", "conv1d"), r=2),

    *common_cases("lora_sb", LoRASBConfig, tuple, r=2),
    one("lora_sb-svd", LoRASBConfig, FORMS, steps=3, r=2, rank_pattern={"conv3d": 3}, init_weights="svd"),
    from_gradients("lora_sb-gradients", FORMS, r=2),
    from_gradients("lora_sb-gradients-exact", ("linear", "grouped"), r=2, exact_svd=True, dropout=0.1,
        refusals={"default": r"grouped \(groups=2\)"}),
    one("lora_sb-all-linear", LoRASBConfig, (*BLOCKS, "conv1d"), r=2, target_modules="all-linear"),
    weighted_sum("lora_sb-sum", LoRASBConfig, FORMS, r=1),
    weighted_sum("lora_sb-linear-sum", LoRASBConfig, ("linear", "conv2d"), "linear", r=2, init_weights="svd"),

    *common_cases("effort", EffortConfig, without_embeddings, r=2),
    one("effort-regularized", EffortConfig, without_embeddings(FORMS), steps=3, init_weights=True,
        rank_pattern={"conv3d": 2, "linear": 3}, orthogonality_weight=0.1, energy_weight=0.2),
    one("effort-one-block", EffortConfig, BLOCKS, target_modules=r".*blocks\.1\.(query|key)"),
    weighted_sum("effort-sum", EffortConfig, without_embeddings(FORMS), r=1, energy_weight=0.2),

    *common_cases("continual_svd", ContinualSVDConfig, without_embeddings, r=2),
    *(
        one(f"continual_svd-{constraint}-{'full' if r is None else 'r'}", ContinualSVDConfig,
            without_embeddings(FORMS), r=r, constraint=constraint, preserve=preserve,
            preserve_pattern={"conv1d": 3, "conv2d": 0.5, "transposed": 0})
        for constraint in ("both", "core", "input", "output")
        for r, preserve in ((None, 1), (2, 0.75))
    ),
    one("continual_svd-unusual-layers-full", ContinualSVDConfig, without_embeddings(UNUSUAL), preserve=0.5,
        refusals={"default": r"grouped \(groups=2\)"}),
    one("continual_svd-trained", ContinualSVDConfig, without_embeddings(FORMS), steps=3, r=2, dropout=0.1,
        init_weights=True, rank_pattern={"linear": None, "conv3d": 1}),
    two_tasks("continual_svd-stacked", "stack", r=2, preserve=2),
    two_tasks("continual_svd-merged", "merge", preserve=0.5),
    weighted_sum("continual_svd-sum", ContinualSVDConfig, ("linear", "conv2d"), r=1),
    weighted_sum("continual_svd-sum-full", ContinualSVDConfig, ("linear", "conv2d"), constraint="core"),

    *common_cases("mos", MoSConfig, tuple, alpha=3),
    one("mos-groups", MoSConfig, BLOCKS, r=3, equivalent_r=2, private_r=1, shards_per_vector=2,
        group_pattern={"query": "qk", "key": "qk"}, alpha_pattern={"value": 5.0}),
    one("mos-no-private-shards", MoSConfig, BLOCKS, r=2, equivalent_r=1, private_r=0, shards_per_vector=1,
        rank_pattern={"key": 1}),
    one("mos-no-subset-selection", MoSConfig, BLOCKS, equivalent_r=2, private_r=1, subset_selection=False),
    one("mos-no-pair-dissociation", MoSConfig, BLOCKS, r=3, equivalent_r=2, seed=6,
        pair_dissociation=False, dropout=0.1),
    two_adapters("mos-two-adapters", MoSConfig, BLOCKS, r=2, equivalent_r=1),
]  # fmt: skip


# ---------------------------------------------------------------------------------- results, and the folder


def lora_export(model: PeftModel, adapter: str) -> tuple[LoraConfig, dict[str, Tensor]]:
    return peft_subspace.lora_state_dict(model, adapter)


def lora_settings(config: LoraConfig) -> dict[str, Any]:
    """What of a LoRA's config says how its tensors are meant."""
    names = (
        "r", "lora_alpha", "target_modules", "target_parameters", "modules_to_save", "bias", "fan_in_fan_out",
        "trainable_token_indices",
    )  # fmt: skip
    values = {name: getattr(config, name) for name in names}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}


@torch.no_grad()
def results(model: PeftModel, case: SavedCase, adapter: str) -> dict[str, Tensor]:
    """Outputs with one adapter active, and its updates by the name of their module."""
    model.set_adapter(adapter)
    outputs = {f"output:{name}": output for name, output in model(**case.inputs()).items()}
    return outputs | {f"delta:{name}": delta for name, delta in updates(model, adapter)}


def updates(model: PeftModel, adapter: str) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and adapter in module.scaling:
            yield name.removeprefix("base_model.model."), module.get_delta_weight(adapter)


def read_expected(case: SavedCase, adapter: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """What an adapter did when it was saved: results, and tensors and settings of its LoRA."""
    file = case.adapter_folder(adapter) / EXPECTED
    state = load_file(file)
    lora = {key.removeprefix("lora:"): state.pop(key) for key in sorted(state) if key.startswith("lora:")}
    with safe_open(file, framework="pt") as opened:
        return state, lora, json.loads((opened.metadata() or {}).get("lora_config", "null"))


def write_expected(model: PeftModel, case: SavedCase, adapter: str) -> None:
    state, metadata = results(model, case, adapter), {}
    if adapter not in case.refusals:
        config, lora = lora_export(model, adapter)
        state |= {f"lora:{key}": tensor for key, tensor in lora.items()}
        metadata = {"lora_config": json.dumps(lora_settings(config))}
    state = {key: tensor.detach().clone().contiguous() for key, tensor in state.items()}
    save_file(state, case.adapter_folder(adapter) / EXPECTED, metadata)


def write(case: SavedCase) -> None:
    torch.manual_seed(0)
    model = case.make(case).eval()
    model.save_pretrained(case.folder, selected_adapters=list(case.adapters))
    for card in case.folder.rglob("README.md"):
        card.unlink()
    for adapter in case.adapters:
        write_expected(model, case, adapter)
    if case.merged:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "unload.. drops the updates")
            save_file(copy.deepcopy(model).unload().state_dict(), case.folder / BASE)


def main() -> None:
    torch.set_num_threads(1)
    shutil.rmtree(DATA, ignore_errors=True)
    for case in CASES:
        write(case)


if __name__ == "__main__":
    main()

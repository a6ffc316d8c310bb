"""Disk and memory of adapters, beside PEFT's LoRA of the same rank.

    python examples/benchmarks/file_sizes.py            about 5 minutes on 2 cores
    python examples/benchmarks/file_sizes.py --quick    a small decoder instead of the 1B shape

Four tables. What one adapter trains and takes on disk, from shapes alone. Ten stacked tasks of Continual SVD
with rank 16, as files and as adapters that are run, on the shape of a 1B decoder (that of Llama 3.2 1B, all
linear layers): its weights are allocated and never touched, and the adapters are made in the form that files
have, without an SVD, and written to disk. Beside them what the same adapters need to be trained, from shapes
alone. The same ten tasks for real, by `next_task`, on a decoder of 4 layers and width 512, with what a
checkpoint of a Trainer adds. A hundred LoRA-SB adapters of rank 32 that share their bases, on the 1B shape,
written to disk. Memory is that of all tensors which adapters add to the model.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import timing
from claims import markdown
from peft_subspace import (
    ContinualSVDConfig,
    EffortConfig,
    FLoRAConfig,
    LoRASBConfig,
    MoSConfig,
    estimate,
    save_with_shared_bases,
)
from peft_subspace.continual import next_task
from peft_subspace.tuner.config import SubspaceConfig

RANK, TASKS, SB_RANK, CLIENTS = 16, 10, 32, 100
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WEIGHTS = "adapter_model.safetensors"
MIB = 2**20
TITLES = {
    "costs": "One adapter and a hundred, {shape} shape",
    "shapes": f"{TASKS} tasks of rank {RANK} in the form of files, {{shape}} shape",
    "tasks": f"{TASKS} tasks by next_task, 4 layers of width 512",
    "shared": f"LoRA-SB of rank {SB_RANK}, {{shape}} shape",
}
HEADERS = {
    "costs": ["", "", "trained parameters", "disk, MiB", f"disk of {CLIENTS}, MiB"],
    "shapes": ["", "disk, MiB", "of LoRA", "memory, MiB", "of LoRA"],
    "tasks": ["", "disk, MiB", "memory, MiB"],
    "shared": ["", "disk, MiB"],
}


def decoder(*, quick: bool) -> nn.Module:
    """Decoder on the meta device: of the 1B shape, or a small one."""
    big: dict[str, Any] = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
    }
    small: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 4,
        "vocab_size": 1000,
    }
    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**(small if quick else big)))
    return model.to(torch.bfloat16)


def allocated(*, quick: bool) -> nn.Module:
    """The decoder with weights that no page of memory is needed for."""
    return decoder(quick=quick).to_empty(device="cpu")


def held(model: nn.Module) -> float:
    """MiB of the tensors that adapters add to a model."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    own = [t for name, t in tensors if "_delta." in name or ".lora_" in name]
    return sum(tensor.numel() * tensor.element_size() for tensor in own) / MIB


def on_disk(folder: Path, pattern: str = WEIGHTS) -> float:
    """MiB of the files of a name anywhere in a folder."""
    return sum(path.stat().st_size for path in folder.rglob(pattern)) / MIB


def with_adapters(base: nn.Module, config: PeftConfig, names: list[str]) -> PeftModel:
    """Model with adapters of one config."""
    model = get_peft_model(base, config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model


def saved_size(model: PeftModel) -> float:
    """MiB of all files with weights that `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return on_disk(Path(folder))


def stacked_shapes(*, quick: bool) -> list[list[Any]]:
    """Ten tasks in the form of files, beside ten LoRAs."""
    names = [f"task{i}" for i in range(TASKS)]
    configs: dict[str, PeftConfig] = {
        "LoRA": LoraConfig(r=RANK, target_modules=LINEARS, inference_mode=True),
        "Continual SVD": ContinualSVDConfig(
            r=RANK, target_modules=LINEARS, inference_mode=True, initialized=True, init_weights=False
        ),
    }
    sizes = {}
    for method, config in configs.items():
        model = with_adapters(allocated(quick=quick), config, names)
        sizes[f"{TASKS} of {method}"] = saved_size(model), held(model)
    trained = get_peft_model(decoder(quick=quick), ContinualSVDConfig(r=RANK, target_modules=LINEARS))
    whole = TASKS * held(trained)  # the header apart
    sizes[f"{TASKS} with what training needs"] = whole, whole
    disk, memory = sizes[f"{TASKS} of LoRA"]
    return [
        [n, f"{d:.1f}", f"{d / disk:.3f}", f"{m:.1f}", f"{m / memory:.3f}"] for n, (d, m) in sizes.items()
    ]


def train(model: PeftModel) -> None:
    """One step, so that the update is not zero."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = timing.tokens_on_device(2, 16)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def stacked_for_real() -> list[list[Any]]:
    """Ten tasks by `next_task`: while the last one trains, on disk, and loaded again to be run."""
    torch.manual_seed(0)
    base = timing.transformer(4, 512)
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    lora = with_adapters(
        timing.transformer(4, 512),
        LoraConfig(r=RANK, target_modules=LINEARS),
        [f"task{i}" for i in range(TASKS)],
    )
    model = get_peft_model(base, ContinualSVDConfig(r=RANK, target_modules=LINEARS), "task0")
    for task in range(1, TASKS):
        train(model)
        next_task(model, f"task{task}", keep="stack")
    train(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model.save_pretrained(f"{folder}/run/checkpoint-1")
        model.save_pretrained(f"{folder}/run/checkpoint-2")
        plain = timing.transformer(4, 512)
        plain.load_state_dict(start)
        again = PeftModel.from_pretrained(plain, f"{folder}/task0", "task0")
        for task in range(1, TASKS):
            again.load_adapter(f"{folder}/task{task}", f"task{task}")
        again.set_adapter(f"task{TASKS - 1}")
        ids = timing.tokens_on_device(2, 16)
        with torch.no_grad():
            same = torch.equal(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
        files = sum(on_disk(Path(folder, f"task{task}")) for task in range(TASKS))
        beside, extra = (
            on_disk(Path(folder, "run/_training"), "*"),
            on_disk(Path(folder), "adapter_training*") / 2,
        )
    return [
        ["ten LoRAs", f"{saved_size(lora):.2f}", f"{held(lora):.2f}"],
        ["ten tasks, loaded", f"{files:.2f}", f"{held(again):.2f}"],
        ["the same bits as in training" if same else "OTHER OUTPUTS THAN IN TRAINING", "", ""],
        ["ten tasks, the last one training", "", f"{held(model):.2f}"],
        ["a checkpoint's own for training", f"{extra:.2f}", ""],
        ["beside two checkpoints, once", f"{beside:.2f}", ""],
    ]


def shared_bases(*, quick: bool) -> list[list[Any]]:
    """A hundred LoRA-SB adapters of one start, each by itself and with shared bases."""
    config = LoRASBConfig(r=SB_RANK, target_modules=LINEARS, init_weights=False)
    model = get_peft_model(allocated(quick=quick), config)
    one = saved_size(model)
    with tempfile.TemporaryDirectory() as folder:
        for client in range(CLIENTS):
            save_with_shared_bases(model, Path(folder, f"client{client}"))
        own, bases = on_disk(Path(folder)), on_disk(Path(folder), "frozen-*")
    lora = get_peft_model(allocated(quick=quick), LoraConfig(r=SB_RANK, target_modules=LINEARS))
    return [
        [f"{CLIENTS} LoRAs of the rank", f"{CLIENTS * saved_size(lora):.1f}"],
        [f"{CLIENTS} by themselves", f"{CLIENTS * one:.1f}"],
        [f"{CLIENTS} with shared bases", f"{own + bases:.1f}"],
        ["of these the bases", f"{bases:.1f}"],
        ["of these each adapter", f"{own / CLIENTS:.3f}"],
    ]


def costs(*, quick: bool) -> list[list[Any]]:
    """Trained parameters, and disk for one adapter and for a hundred, from shapes alone."""
    configs: dict[str, LoraConfig | SubspaceConfig] = {
        "LoRA": LoraConfig(r=RANK, target_modules=LINEARS),
        "FLoRA": FLoRAConfig(r=RANK, target_modules=LINEARS),
        "MoS": MoSConfig(r=RANK, equivalent_r=2, target_modules=LINEARS),
        "LoRA-SB": LoRASBConfig(r=SB_RANK, target_modules=LINEARS),
        "Continual SVD": ContinualSVDConfig(r=RANK, target_modules=LINEARS),
        "Effort": EffortConfig(r=1, target_modules=LINEARS),
    }
    rows = []
    for method, config in configs.items():
        if isinstance(config, LoraConfig):
            model = get_peft_model(decoder(quick=quick), config)
            trained, one = model.get_nb_trainable_parameters()[0], held(model)
        else:
            found = estimate(decoder(quick=quick), config)
            trained, one = found.total.trained, found.file_bytes / MIB
        hundred = CLIENTS * one
        if method == "LoRA-SB":  # of one start: the bases once
            hundred = one + (CLIENTS - 1) * 4 * trained / MIB
        rows.append([method, _rank(config), trained, one, hundred])
    return rows


def _rank(config: Any) -> str:
    budget = f", equivalent_r={config.equivalent_r}" if hasattr(config, "equivalent_r") else ""
    return f"r={config.r}{budget}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    logging.getLogger("peft_subspace").setLevel(logging.ERROR)
    shape = "small" if quick else "1B"
    found = {
        "costs": costs(quick=quick),
        "shapes": stacked_shapes(quick=quick),
        "tasks": stacked_for_real(),
        "shared": shared_bases(quick=quick),
    }
    timing.save("file_sizes-quick" if quick else "file_sizes", {"shape": shape, **found})
    for name in found:
        timing.table(TITLES[name].format(shape=shape), HEADERS[name], found[name])


def table(content: dict[str, Any], name: str) -> str:
    """One of the tables."""
    return markdown(HEADERS[name], [[_cell(value) for value in row] for row in content[name]])


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.1f}" if isinstance(value, float) else value


if __name__ == "__main__":
    main()

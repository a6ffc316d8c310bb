"""Timing and memory of train steps, shared by the benchmarks in this folder."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from support import device

RESULTS = Path(__file__).parent / "results"


def interleaved(
    steps: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each step, `repeats` times, taken in turn so that a drifting machine is fair to all."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(warmup + repeats):
        for name, step in steps.items():
            gc.collect()
            device.finish()
            start = time.perf_counter()
            step()
            device.finish()
            if repeat >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, to: str) -> dict[str, float]:
    """Median, smallest and largest ratio of two steps, taken repeat by repeat."""
    ratios = sorted(a / b for a, b in zip(seconds[name], seconds[to], strict=True))
    return {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]}


def peak_mib(script: str, *arguments: str) -> float:
    """Peak resident MiB that `script --peak …` needs beyond its imports, in a process of its own.

    Tensors have pages of their own there, or the peak would be that of the heap's holes between them.
    """
    command = [sys.executable, script, "--peak", *arguments]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**14)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.strip().splitlines()[-1])


def print_peak(work: Callable[[], Any]) -> None:
    """Run `work` and print how many MiB its peak was above what was in use; the other half of `peak_mib`.

    On a GPU it is the peak of what tensors take there.
    """
    _lower_high_water()
    before = _high_water_mib()
    work()
    print(_high_water_mib() - before)


def _lower_high_water() -> None:
    """Bring the peak so far down to what is in use, so that what came before does not hide a later one."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _high_water_mib() -> float:
    """Peak MiB of this program; `ru_maxrss` would begin with that of the process that started it."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def transformer(layers: int = 24, width: int = 1024, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Decoder with random weights, of the size at which linear layers are timed."""
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_attention_heads=width // 64,
        vocab_size=1000,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model.to(device.best(), dtype)


def train_step(model: nn.Module, batch: int = 4, tokens: int = 256) -> Callable[[], None]:
    """Forward and backward of a language model on random tokens, gradients freed afterwards."""
    ids = tokens_on_device(batch, tokens)
    model.train()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        # A frozen model has no gradients at all unless its input asks for them, as an adapter below would.
        model.get_input_embeddings().register_forward_hook(lambda _m, _i, output: output.requires_grad_())

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def tokens_on_device(batch: int, tokens: int) -> torch.Tensor:
    """Random tokens, the same at each call."""
    ids = torch.randint(0, 1000, (batch, tokens), generator=torch.Generator().manual_seed(0))
    return ids.to(device.best())


def two_adamw_steps(config: PeftConfig, layers: int, width: int) -> None:
    """What a peak is taken of: a model, its adapter, and two steps with their optimizer state."""
    take_two_adamw_steps(get_peft_model(transformer(layers, width), config))


def take_two_adamw_steps(model: nn.Module) -> None:
    """Train on 4×256 random tokens, twice."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = tokens_on_device(4, 256)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def training(
    script: str, configs: dict[str, Callable[[], PeftConfig]], layers: int, width: int, repeats: int
) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """Trainable parameters, peak and train step of each config on the same decoder, and the seconds as well.

    `script --peak NAME LAYERS WIDTH` has to print the peak of `two_adamw_steps`.
    """
    peaks = {name: peak_mib(script, name, str(layers), str(width)) for name in configs}
    results, steps = {}, {}
    for name, config in configs.items():
        torch.manual_seed(0)
        model = get_peft_model(transformer(layers, width), config())
        results[name] = {"trainable": model.get_nb_trainable_parameters()[0], "peak_mib": peaks[name]}
        steps[name] = train_step(model)
    seconds = interleaved(steps, repeats)
    for name, times in seconds.items():
        results[name]["step_s"] = statistics.median(times)
    return results, seconds


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows under a header, columns aligned."""
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    print(f"\n{title}")
    for row in [list(header), *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def load(name: str) -> dict[str, Any]:
    """Results that were written."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def save(name: str, results: dict[str, Any]) -> None:
    """Write results as JSON, with the versions and the machine that they hold for."""
    packages = ("torch", "transformers", "peft", "peft-subspace")
    about = {
        "versions": {package: version(package) for package in packages},
        "device": device.name(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**about, **results}, indent=1))
    print(f"\nwritten to {path}")

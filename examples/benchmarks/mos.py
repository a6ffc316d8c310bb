"""MoS against PEFT's LoRA: many adapters of one base model, and a train step.

    python examples/benchmarks/mos.py            about 15 minutes on 2 cores
    python examples/benchmarks/mos.py --quick    about 2 minutes, smaller models and fewer adapters

Serving: 100 adapters each of MoS (e=8, r=32) and of LoRA at r=64, which the paper finds equal in quality, on
a 6-layer decoder of width 512; bytes of their tensors, growth of the process, files, and a batch of 32
requests for 32 different adapters. Training: 24 layers, width 1024, 4×256 tokens, r=16 both (MoS: e=4); the
step, and the peak of a process that takes two steps of AdamW. Expected: an eighth of LoRA's memory for many
adapters, at most 1.03 of its train step, and a lower peak. Times are medians of interleaved repeats.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

import timing
from peft_subspace import MoSConfig

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SERVED: dict[str, Callable[[], PeftConfig]] = {
    "mos": lambda: MoSConfig(r=32, equivalent_r=8, target_modules=list(LINEARS)),
    "lora": lambda: LoraConfig(r=64, lora_alpha=64, target_modules=list(LINEARS)),
}
TRAINED: dict[str, Callable[[], PeftConfig]] = {
    "mos": lambda: MoSConfig(r=16, equivalent_r=4, target_modules=list(LINEARS)),
    "lora": lambda: LoraConfig(r=16, lora_alpha=16, target_modules=list(LINEARS)),
}


def with_adapters(method: str, count: int, layers: int, width: int) -> PeftModel:
    """Decoder with `count` adapters named `a0`, `a1` and so on."""
    torch.manual_seed(0)
    model = get_peft_model(timing.transformer(layers, width), SERVED[method](), "a0")
    for i in range(1, count):
        model.add_adapter(f"a{i}", SERVED[method]())
    return model.eval()


def adapter_bytes(model: nn.Module) -> int:
    """Bytes of all tensors of adapters, indices included."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return sum(t.nbytes for name, t in tensors.items() if "moshards_" in name or "lora_" in name)


def growth_mib(method: str, count: int, layers: int, width: int) -> float:
    """MiB by which this process grows when the adapters beyond the first are added."""
    model = with_adapters(method, 1, layers, width)
    before = _resident_mib()
    for i in range(1, count):
        model.add_adapter(f"a{i}", SERVED[method]())
    return _resident_mib() - before


def file_bytes(model: PeftModel) -> int:
    """Bytes on disk of one saved adapter."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=["a0"])
        return (Path(folder) / "a0" / "adapter_model.safetensors").stat().st_size


def serve(count: int, layers: int, width: int, requests: int, repeats: int) -> dict[str, Any]:
    """Memory of many adapters, and the time of a batch in which every request has another one."""
    results: dict[str, Any] = {}
    steps = {}
    ids = torch.randint(0, 1000, (requests, 16), generator=torch.Generator().manual_seed(0))
    names = [f"a{i * count // requests}" for i in range(requests)]
    for method in SERVED:
        grown = _in_own_process("--growth", method, str(count), str(layers), str(width))
        model = with_adapters(method, count, layers, width)
        results[method] = {
            "adapter_mib": adapter_bytes(model) / 2**20,
            "process_growth_mib": grown,
            "file_mib": file_bytes(model) / 2**20,
        }
        steps[method] = _mixed_batch(model, ids, names)
    seconds = timing.interleaved(steps, repeats)
    for method, times in seconds.items():
        results[method]["mixed_batch_s"] = statistics.median(times)
    results["mos/lora"] = {key: results["mos"][key] / results["lora"][key] for key in results["mos"]}
    results["mos/lora"]["mixed_batch_s"] = timing.ratio(seconds, "mos", "lora")["median"]
    return results


def train(layers: int, width: int, repeats: int) -> dict[str, Any]:
    """Time of a train step and peak memory of training, of MoS and LoRA at one rank."""
    results, seconds = timing.training(__file__, TRAINED, layers, width, repeats)
    return {**results, "mos/lora": timing.ratio(seconds, "mos", "lora")}


def _mixed_batch(model: PeftModel, ids: torch.Tensor, names: list[str]) -> Callable[[], None]:
    def step() -> None:
        with torch.no_grad():
            model(input_ids=ids, adapter_names=names)

    return step


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def _in_own_process(*arguments: str) -> float:
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure both parts, print tables and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smaller models, fewer adapters and repeats")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peak", nargs=3, metavar=("METHOD", "LAYERS", "WIDTH"), help=argparse.SUPPRESS)
    parser.add_argument("--growth", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        method, layers, width = options.peak
        timing.print_peak(lambda: timing.two_adamw_steps(TRAINED[method](), int(layers), int(width)))
        return
    if options.growth:
        method, *sizes = options.growth
        print(growth_mib(method, *(int(size) for size in sizes)))
        return
    repeats = 3 if options.quick else options.repeats
    served = serve(20, 4, 256, 8, repeats) if options.quick else serve(100, 6, 512, 32, repeats)
    print_results("many adapters", served)
    trained = train(4, 512, repeats) if options.quick else train(24, 1024, repeats)
    print_results("training, the same rank", {name: trained[name] for name in TRAINED})
    print("step, mos/lora:", trained["mos/lora"])
    timing.save("mos-quick" if options.quick else "mos", {"serving": served, "training": trained})


def print_results(title: str, results: dict[str, dict[str, float]]) -> None:
    """Print one row per method."""
    columns = list(next(iter(results.values())))
    rows = [[name, *(float(row[column]) for column in columns)] for name, row in results.items()]
    timing.table(title, ["", *columns], rows)


if __name__ == "__main__":
    main()

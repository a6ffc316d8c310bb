"""Serve many adapters from one base model: one batch, in which every request has an adapter of its own.

    python examples/many_adapters.py
    python examples/many_adapters.py --model HuggingFaceTB/SmolLM2-135M --adapters ADAPTER ADAPTER ...

Without options: 20 untrained adapters on a small model with random weights, no network, in a minute or so. It
compares their bytes with LoRA's of the same rank, and a mixed batch with what each adapter gives alone.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peft_subspace

OUTPUT = Path("outputs/many_adapters")
parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--model", help="language model of the Hub, or folder; random weights if left out")
parser.add_argument("--adapters", nargs="+", default=[], help="adapters of that model; made here if left out")
parser.add_argument("--count", type=int, default=20, help="adapters to make")
parser.add_argument("--layers", type=int, default=8, help="layers of the model with random weights")
options = parser.parse_args()
if min(options.count, options.layers) < 1:
    parser.error("--count and --layers must be at least 1")
if options.adapters and not options.model:
    sys.exit("--adapters belong to a model: give --model, too")
if absent := [path for path in options.adapters if not Path(path, "adapter_config.json").is_file()]:
    sys.exit(f"{absent[0]} is no folder of an adapter: it has no adapter_config.json")


def load_base() -> torch.nn.Module:
    """The one base model."""
    if options.model:
        return AutoModelForCausalLM.from_pretrained(options.model)
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=1000, num_hidden_layers=options.layers, **sizes))


# 1. Adapters on disk. MoS stores the pools of shards that all layers share, once.
try:
    base = load_base()
except (OSError, ValueError) as error:
    sys.exit(f"{options.model} cannot be loaded: {str(error).splitlines()[0]}")
folders = [Path(adapter) for adapter in options.adapters]
for number in range(0 if folders else options.count):
    config = peft_subspace.MoSConfig(r=16, equivalent_r=2, target_modules="all-linear", seed=number)
    config.init_weights = False  # as if it had been trained
    made = get_peft_model(base, config)
    folders.append(OUTPUT / f"adapter{number}")
    made.save_pretrained(folders[-1])
    base = made.unload()

# 2. All of them on one base. `peft_subspace.load` checks each before the model is touched.
names = [f"{number}-{folder.name}" for number, folder in enumerate(folders)]
model = base
try:
    for name, folder in zip(names, folders, strict=True):
        model = peft_subspace.load(model, folder, name)
except (OSError, TypeError, ValueError) as error:
    sys.exit(f"{folder} cannot be loaded onto {options.model}: {error}".splitlines()[0])
model.eval()

# 3. A batch with a request for every adapter, and one for the base model.
wanted = [*names, "__base__"]
ids = torch.randint(5, model.config.vocab_size, (len(wanted), 32), generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    started = time.perf_counter()
    mixed = model(ids, adapter_names=wanted).logits
    seconds = time.perf_counter() - started
    differences = []
    for name, row, logits in zip(names, ids, mixed, strict=False):
        model.set_adapter(name)
        differences.append((model(row[None]).logits[0] - logits).abs().max().item())
print(f"mixed batch of {len(wanted)} requests: {seconds:.2f} s")
print(f"largest difference to each adapter alone: {max(differences):.1e}")

# 4. What they take, beside LoRA of the same rank.
lora = get_peft_model(load_base(), LoraConfig(r=16, target_modules="all-linear"))
sizes = {
    "these adapters": sum((folder / "adapter_model.safetensors").stat().st_size for folder in folders),
    "as many LoRAs, r=16": len(folders) * 4 * lora.get_nb_trainable_parameters()[0],
}
for title, size in sizes.items():
    print(f"{title:20} {size / 2**20:8.2f} MiB")

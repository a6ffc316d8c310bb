"""Fine-tune a language model whose weights are quantized to 4 bits (QLoRA's setting, with another method).

    pip install '.[examples,quantization]'
    python examples/causal_lm_4bit.py
    python examples/causal_lm_4bit.py --model meta-llama/Llama-3.2-1B --data rows.jsonl --text-column text

Without options: SmolLM2-135M on the first 2,000 texts of the dataset below, a few minutes on a GPU. The loss
of held-out rows goes down. The base takes about a third of the bytes that it has in bfloat16.
"""

import argparse
import sys

import torch
from datasets import load_dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments
from transformers import DataCollatorForLanguageModeling as Collator

import peft_subspace
from peft_subspace import GradientInitCallback

METHODS = {"flora": "FLoRAConfig", "mos": "MoSConfig", "lora-sb": "LoRASBConfig", "effort": "EffortConfig"}
OUTPUT = "outputs/causal_lm_4bit"
parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="id on the Hub, or folder")
parser.add_argument("--data", default="roneneldan/TinyStories", help="JSON lines, or dataset of the Hub")
parser.add_argument("--text-column", default="text", help="column with the text")
parser.add_argument("--method", choices=METHODS, default="flora", help="fine-tuning method")
parser.add_argument("--rows", type=int, default=2000, help="rows to use")
parser.add_argument("--steps", type=int, default=100, help="steps of 8 rows")
options = parser.parse_args()
if min(options.rows, options.steps) < 1:
    parser.error("--rows and --steps must be at least 1")

nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
bits = BitsAndBytesConfig(load_in_4bit=True, **nf4)
source = ("json", None, None, options.data) if options.data.endswith(".jsonl") else (options.data,)
try:  # the first row tells the columns, before all of them and the model are downloaded
    columns = [*next(iter(load_dataset(*source, split="train", streaming=True)), ())]
    if options.text_column not in columns:
        sys.exit(f"no column {options.text_column!r} among {columns or 'no rows'}; see --text-column")
    base = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=bits)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = load_dataset(*source, split=f"train[:{options.rows}]")
    whole = rows.filter(lambda row: isinstance(row[options.text_column], str))
    if len(whole) < max(len(rows), 2):
        sys.exit(f"{len(whole)} of {len(rows)} rows have a text; all must, and two rows at least")
except Exception as error:  # of many kinds, from several libraries
    sys.exit(f"cannot load {options.model} or {options.data}: {str(error) or repr(error)}".splitlines()[0])


def encode(row: dict) -> dict:
    """Tokens of a text, with its end."""
    return tokenizer(row[options.text_column] + tokenizer.eos_token, truncation=True, max_length=256)


data = rows.map(encode, remove_columns=rows.column_names).train_test_split(0.1, seed=0)

# The adapter, on every quantized layer but the output embedding.
config_class = getattr(peft_subspace, METHODS[options.method])
model = get_peft_model(
    prepare_model_for_kbit_training(base), config_class(target_modules="all-linear", task_type="CAUSAL_LM")
)
model.print_trainable_parameters()
trainer = Trainer(
    model,
    TrainingArguments(
        OUTPUT, max_steps=options.steps, learning_rate=2e-3, lr_scheduler_type="cosine", warmup_steps=0.1,
        per_device_train_batch_size=8, logging_steps=5, save_strategy="no", report_to="none",
    ),
    train_dataset=data["train"], eval_dataset=data["test"],
    data_collator=Collator(tokenizer, mlm=False),
    callbacks=[GradientInitCallback()] if options.method == "lora-sb" else [],
)  # fmt: skip
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
print(f"loss of held-out rows: {before:.3f} before, {after:.3f} after")
print(f"base: {base.get_memory_footprint():,} bytes")

# Save, and load onto a fresh quantized base. The LoRA export serves it on an unquantized one, too.
model.save_pretrained(OUTPUT)
peft_subspace.export_lora(model, f"{OUTPUT}/lora")
fresh = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=bits)
loaded = PeftModel.from_pretrained(fresh, OUTPUT).eval()
prompt = tokenizer("Once upon a time", return_tensors="pt").to(loaded.device)
print(tokenizer.decode(loaded.generate(**prompt, max_new_tokens=20, pad_token_id=tokenizer.pad_token_id)[0]))

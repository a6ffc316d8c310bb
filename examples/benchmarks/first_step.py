"""LoRA-SB's first step: the length that is found on the batches, beside fixed ones, at several rates.

    python examples/benchmarks/first_step.py                                BBC News, about 20 minutes
    python examples/benchmarks/first_step.py --data FOLDER --tasks sst2 trec6

MiniLM, all linear layers adapted at rank 16, AdamW at a constant rate, three passes over the training rows.
Expected: at every training rate the accuracy of "auto" is within noise of the best fixed length.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import peft
import torch
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import peft_subspace
from claims import cell, markdown
from peft_subspace.initialization.step_length import logger
from support import demos, texts

RESULTS = Path(__file__).parent / "results" / "first_step.json"
STARTS: tuple[Any, ...] = ("auto", 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
RATES = (1e-4, 1e-3, 1e-2)
BATCH, TOKENS, EPOCHS = 32, 48, 3


class Chosen:
    """Keeps the length that a search has chosen, which the log tells."""

    level = 0
    length: float | None = None

    def handle(self, record: Any) -> None:
        """Take a message of the log."""
        self.length = record.args[0] if record.msg.startswith("first step") else 0.0


def batches(rows: list[dict[str, Any]], tokenizer: Any, seed: int) -> list[dict[str, torch.Tensor]]:
    """Tokenized batches of the rows in random order."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    made = []
    for start in range(0, len(rows), BATCH):
        part = [rows[i] for i in order[start : start + BATCH]]
        options = {"padding": True, "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
        labels = torch.tensor([row["labels"] for row in part])
        made.append({**tokenizer([row["text"] for row in part], **options), "labels": labels})
    return made


def run(task: texts.TextTask, start: Any, rate: float, seed: int) -> dict[str, Any]:
    """Train once."""
    torch.manual_seed(seed)
    folder = demos.minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(task.classes))
    config = peft_subspace.LoRASBConfig(
        r=16,
        target_modules=["query", "key", "value", "dense"],
        exclude_modules=["pooler.dense"],
        modules_to_save=["classifier"],
        task_type="SEQ_CLS",
    )
    model = get_peft_model(model, config)
    first = batches(task.rows["train"], tokenizer, seed)[:8]
    chosen: Any = Chosen()
    logger.addHandler(chosen)
    logger.setLevel("INFO")
    peft_subspace.initialize_from_gradient(model, first, learning_rate=start, progress=False)
    logger.removeHandler(chosen)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for epoch in range(EPOCHS):
        for batch in batches(task.rows["train"], tokenizer, seed + epoch):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    model.eval()
    right = 0
    with torch.no_grad():
        for batch in batches(task.rows["test"], tokenizer, 0):
            right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    length = chosen.length if start == "auto" else start
    return {"accuracy": right / len(task.rows["test"]), "length": length}


def table(content: dict[str, Any]) -> str:
    """Test accuracy by training rate: of the length that was found, with it, and of fixed ones."""
    found: dict[tuple[str, float], dict[str, list[dict[str, Any]]]] = {}
    for key, run in content["runs"].items():
        task, rate, start, _ = key.split()
        found.setdefault((task, float(rate)), {}).setdefault(start, []).append(run)
    rows = []
    for (task, rate), runs in found.items():
        accuracies = [[r["accuracy"] for r in runs.get(str(start), [])] for start in STARTS]
        lengths = sorted({f"{run['length']:.1g}" for run in runs.get("auto", [])})
        cells = [cell(values) for values in accuracies]
        rows.append([task, f"{rate:g}", f"{cells[0]} ({', '.join(lengths)})", *cells[1:], len(accuracies[0])])
    header = ["task", "training rate", "`auto` (length)", *(f"{start:g}" for start in STARTS[1:]), "seeds"]
    return markdown(header, rows)


def main() -> None:
    """Run all, keep results as they come, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tasks", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wanted = {"train": 2000, "validation": 200, "test": 1000}
    found: dict[str, Any] = {}
    if arguments.results.is_file():
        found = json.loads(arguments.results.read_text())["runs"]
    versions = {"torch": torch.__version__, "peft": peft.__version__}
    for seed in range(arguments.seeds):
        for name in arguments.tasks or ["business-sports"]:
            (task,) = texts.load([name], arguments.data, wanted, 0).values()
            for rate in RATES:
                for start in STARTS:
                    key = f"{name} {rate:g} {start} {seed}"
                    if key not in found:
                        found[key] = run(task, start, rate, seed)
                        arguments.results.write_text(
                            json.dumps({"versions": versions, "runs": found}, indent=1) + "\n"
                        )
                        print(key, found[key], flush=True)


if __name__ == "__main__":
    main()

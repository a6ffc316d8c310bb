"""Which start of FLoRA trains best: ours and the three of its authors, compared at equal budget.

    python examples/benchmarks/flora_inits.py            about 10 minutes on 2 cores, resumes if interrupted

Each start runs with the same three learning rates and the same seeds, `STEPS` steps each, and is judged at
its best learning rate by validation loss, mean over the seeds, on the convolutions of MobileNetV2 and
handwritten digits. `quality.py` has ours beside the default after more steps, and on convolutions with larger
kernels.
"""

from __future__ import annotations

import itertools
import json
import statistics

import torch
from peft import get_peft_model
from torch.utils.data import DataLoader
from torch.utils.data import RandomSampler as Shuffle

import timing
from peft_subspace import FLoRAConfig
from support.demos import TASKS
from support.run import keep_batch_norm_frozen
from support.task import Task

DEMOS = ("digits",)
STEPS, BATCH, SEEDS = 50, 32, (0, 1, 2)
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
STORE = timing.RESULTS / "flora_inits_runs.json"


def validation_loss(task: Task, init: str, learning_rate: float, seed: int) -> tuple[float, float]:
    """Train for `STEPS` steps; return loss and accuracy on the validation rows."""
    torch.manual_seed(seed)
    config = FLoRAConfig(
        init_weights=init, target_modules=task.target_modules, modules_to_save=task.new_modules
    )
    model = get_peft_model(task.make_base(), config)
    keep_batch_norm_frozen(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, STEPS, pct_start=0.1)
    order = Shuffle(task.train, generator=torch.Generator().manual_seed(seed))
    batches = itertools.cycle(DataLoader(task.train, BATCH, sampler=order, collate_fn=task.collate))
    model.train()
    for batch in itertools.islice(batches, STEPS):
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return _evaluate(task, model.eval())


@torch.inference_mode()
def _evaluate(task: Task, model: torch.nn.Module) -> tuple[float, float]:
    loss = hits = 0.0
    for batch in DataLoader(task.validation, BATCH, collate_fn=task.collate):
        output = model(**batch)
        loss += output.loss.item() * len(batch["labels"])
        hits += (output.logits.argmax(-1) == batch["labels"]).sum().item()
    return loss / len(task.validation), hits / len(task.validation)


class Runs:
    """Results by key, written after each run so that an interrupted comparison goes on where it stopped."""

    def __init__(self) -> None:
        self.done: dict[str, list[float]] = json.loads(STORE.read_text()) if STORE.is_file() else {}

    def get(self, task: Task, name: str, init: str, learning_rate: float, seed: int) -> list[float]:
        """Result of one run, from the store or run now."""
        key = f"{name}/{init}/{learning_rate:g}/{seed}"
        if key not in self.done:
            self.done[key] = list(validation_loss(task, init, learning_rate, seed))
            STORE.parent.mkdir(parents=True, exist_ok=True)
            STORE.write_text(json.dumps(self.done, indent=1))
            print(key, self.done[key], flush=True)
        return self.done[key]


def main() -> None:
    """Run the comparison, print one row per task and start, and write JSON."""
    runs, rows = Runs(), []
    for name in DEMOS:
        task = TASKS[name]()
        for init in FLoRAConfig.init_choices:
            tried = {
                rate: [runs.get(task, name, init, rate, seed) for seed in SEEDS] for rate in LEARNING_RATES
            }
            best = min(tried, key=lambda rate: statistics.fmean(loss for loss, _ in tried[rate]))
            losses, accuracies = zip(*tried[best], strict=True)
            rows.append({
                "task": name, "init": init, "learning_rate": best,
                "loss": statistics.fmean(losses), "loss_spread": statistics.stdev(losses),
                "accuracy": statistics.fmean(accuracies),
            })  # fmt: skip
    timing.table(f"validation after {STEPS} steps", list(rows[0]), [list(row.values()) for row in rows])
    timing.save("flora_inits", {"steps": STEPS, "seeds": SEEDS, "rows": rows})


if __name__ == "__main__":
    main()

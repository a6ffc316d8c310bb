"""One fine-tuning run: train with `transformers.Trainer`, save, reload, check, export, report."""

import argparse
import math
import time
import warnings

import numpy as np
import peft
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainingArguments

import peft_subspace
from support import checks, report
from support.task import Rows, Task

warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # PEFT still asks for it


def fine_tune(task: Task, options: argparse.Namespace, config_class: str) -> None:
    """Trains an adapter on the task, writes everything below `options.output` and prints what came out."""
    first = PartialState(cpu=_on_cpu()).is_main_process  # of those that accelerate has launched
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if first:
        sizes = [f"{len(rows):,}" for rows in (task.train, task.validation, task.test)]
        print("{}: {} rows to train on, {} to validate, {} to test".format(task.name, *sizes))

    transformers.set_seed(options.seed)
    base = task.make_base()
    results = [_linear_probe(task, base)] if task.embed and first else []
    model = _adapt(task, base, options, config_class)
    trainer = _trainer(task, model, options)
    results.append(report.Result("before training", _score(trainer, task), 0, 0.0))
    seconds = trainer.train().metrics["train_runtime"]
    results.append(report.Result(options.method, _score(trainer, task), _trained(model), seconds))

    if _is_sharded(trainer):
        trainer.save_model(str(options.output))  # all processes gather the weights
    if first:
        _finish(task, model, trainer, results, options)


def _finish(
    task: Task,
    model: peft.PeftModel,
    trainer: Trainer,
    results: list[report.Result],
    options: argparse.Namespace,
) -> None:
    """Saves, checks and reports; weights of which this process has a part only are saved and not checked."""
    if not _is_sharded(trainer):
        model.save_pretrained(options.output)
    if task.processor is not None:
        task.processor.save_pretrained(options.output)
    if not options.skip_checks and not _is_sharded(trainer):
        checks.reload_and_export(task, model, options.output)
    report.write(results, trainer.state.log_history, task, options.output)


def _adapt(
    task: Task, base: PreTrainedModel, options: argparse.Namespace, config_class: str
) -> peft.PeftModel:
    """Adds the adapter; what the checkpoint lacks, such as the head, is trained in full beside it."""
    rank = {"r": options.rank} if options.rank else {}
    config = getattr(peft_subspace, config_class)(
        task_type=task.peft_task_type,
        target_modules=options.target_modules or task.target_modules,
        modules_to_save=task.new_modules or None,
        **rank,
        **options.config,
    )
    model = peft.get_peft_model(base, config)
    keep_batch_norm_frozen(model)
    return model


def keep_batch_norm_frozen(model: nn.Module) -> None:
    """Keeps running statistics as they are: they belong to the frozen base, and no adapter file has them."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    def to_evaluation(*_: object) -> None:
        for norm in norms:
            norm.eval()

    model.register_forward_pre_hook(to_evaluation)


def _trainer(task: Task, model: peft.PeftModel, options: argparse.Namespace) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(options.output),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        seed=options.seed,
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=5,
        report_to="none",
        use_cpu=_on_cpu(),
        disable_tqdm=False,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    gradients = isinstance(model.peft_config["default"], peft_subspace.LoRASBConfig)
    trainer = Trainer(
        model,
        arguments,
        callbacks=[peft_subspace.GradientInitCallback()] if gradients else None,
        data_collator=task.collate,
        train_dataset=task.train,
        eval_dataset=task.validation,
        compute_metrics=_accuracy if task.measure == "accuracy" else None,
    )
    report.show_progress(trainer)
    if not _is_sharded(trainer):
        peft_subspace.prepare_for_ddp(model)
    return trainer


def _on_cpu() -> bool:
    """Whether accelerate has been told to leave accelerators alone."""
    return parse_flag_from_env("ACCELERATE_USE_CPU")


def _is_sharded(trainer: Trainer) -> bool:
    """Whether each process holds a part of the weights, by FSDP or ZeRO-3."""
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    guesses = np.asarray(prediction.predictions).argmax(-1)
    return {"accuracy": float(np.mean(guesses == prediction.label_ids))}


def _score(trainer: Trainer, task: Task) -> float:
    metrics = trainer.evaluate(task.test, metric_key_prefix="test")
    return metrics["test_accuracy"] if task.measure == "accuracy" else math.exp(metrics["test_loss"])


def _trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _linear_probe(task: Task, base: PreTrainedModel) -> report.Result:
    """Logistic regression on the frozen network's features; the validation rows choose its penalty."""
    started = time.perf_counter()
    train, validation, test = (_embed(task, base, rows) for rows in (task.train, task.validation, task.test))
    probes = [LogisticRegression(C=c, max_iter=5000).fit(*train) for c in (0.01, 0.1, 1, 10, 100)]
    best = max(probes, key=lambda probe: probe.score(*validation))
    seconds = time.perf_counter() - started
    return report.Result(
        "frozen, linear probe", float(best.score(*test)), best.coef_.size + best.intercept_.size, seconds
    )


@torch.inference_mode()
def _embed(task: Task, base: PreTrainedModel, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    if task.embed is None:
        raise ValueError(f"{task.name!r} defines no features for a linear probe; set its `embed`")
    base.eval()
    batches = list(DataLoader(rows, batch_size=32, collate_fn=task.collate))
    features = [task.embed(base, batch) for batch in batches]
    return torch.cat(features).numpy(), torch.cat([batch["labels"] for batch in batches]).numpy()

"""What must hold after training: the saved adapter gives the same outputs, and so does the exported one."""

from pathlib import Path

import peft
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

import peft_subspace
from support.task import Task

ROWS = 32
TOLERANCE, LOW_PRECISION_TOLERANCE = 1e-4, 5e-2
"""Largest accepted difference of outputs, relative to the largest output: in fp32, and with fewer bits."""


def reload_and_export(task: Task, model: peft.PeftModel, directory: Path) -> None:
    """Reloads the adapter into a fresh base, exports it, reloads the export, and compares all outputs."""
    reloaded = peft.PeftModel.from_pretrained(_fresh_base(task, model), directory)
    _compare(task, model, reloaded, f"adapter {directory}, reloaded into a fresh base")
    try:
        peft_subspace.export_lora(model, directory / "lora")
    except (TypeError, ValueError) as refusal:
        print(f"not exported as LoRA: {refusal}")
        _merge_and_compare(task, model, reloaded, directory / "merged")
    else:
        served = peft.PeftModel.from_pretrained(_fresh_base(task, model), directory / "lora")
        _compare(task, model, served, f"LoRA export {directory / 'lora'}, loaded by plain PEFT")


def _merge_and_compare(task: Task, model: peft.PeftModel, reloaded: peft.PeftModel, directory: Path) -> None:
    """Folds the adapter into the weights: the result is a plain checkpoint that any program can serve."""
    merged = reloaded.merge_and_unload()
    merged.save_pretrained(directory)
    plain = type(merged).from_pretrained(directory).to(merged.device)
    _compare(task, model, plain, f"merged checkpoint {directory}, loaded by plain transformers")


def _fresh_base(task: Task, model: peft.PeftModel) -> nn.Module:
    base = task.make_base()
    return base if _is_quantized(base) else base.to(next(model.parameters()).device)


def _is_quantized(model: nn.Module) -> bool:
    return bool(getattr(model, "is_quantized", False))


@torch.inference_mode()
def _outputs(task: Task, model: nn.Module) -> torch.Tensor:
    model.eval()
    device = next(model.parameters()).device
    rows = Subset(task.test, range(min(ROWS, len(task.test))))
    outputs = []
    for batch in DataLoader(rows, batch_size=8, collate_fn=task.collate):
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        outputs.append(model(**inputs).logits.flatten().cpu())
    return torch.cat(outputs)


def _compare(task: Task, trained: peft.PeftModel, other: nn.Module, what: str) -> None:
    """Prints how far the outputs are apart, and stops the script if they disagree."""
    expected, found = _outputs(task, trained), _outputs(task, other)
    full_precision = expected.dtype == torch.float32 and not _is_quantized(trained.get_base_model())
    difference = ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()
    print(f"{what}: largest relative difference of the outputs {difference:.1e}")
    if not difference <= (TOLERANCE if full_precision else LOW_PRECISION_TOLERANCE):
        raise SystemExit("the outputs do not agree with the trained model's")

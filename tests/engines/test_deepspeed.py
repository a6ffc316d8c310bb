"""DeepSpeed's ZeRO-2 and ZeRO-3 in two processes against one process without an engine, for every method."""

import json
import os
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

import models
from methods import METHODS
from peft_subspace import GradientInitCallback, RegularizationCallback
from processes import run_in_two_processes

LAUNCH = Path(__file__).parents[2] / "examples/launch"
STAGES = {"ZeRO-2": "zero2.json", "ZeRO-3": "zero3.json"}
STEPS, MODULES = 4, ["q_proj", "v_proj", "down_proj"]
NAMES = [*map(str, METHODS), "penalties", "lora"]
PENALTIES = {"orthogonality_weight": 0.1, "energy_weight": 0.1}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = torch.randint(3, 37, (10,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def adapted(name):
    torch.manual_seed(0)
    base = models.llama()
    if name == "lora":
        return get_peft_model(base, LoraConfig(r=4, target_modules=MODULES))
    method = next(m for m in METHODS if str(m) == {"penalties": "effort"}.get(name, name))
    options = PENALTIES if name == "penalties" else {}
    return get_peft_model(base, method.config(target_modules=MODULES, seed=0, **options))


def trainer(name, folder, batch_size, **options):
    """A run whose steps take 8 rows, whatever the number of processes."""
    AcceleratorState._reset_state()  # one process may not have two plugins for DeepSpeed
    arguments = TrainingArguments(
        str(folder), report_to=[], disable_tqdm=True, max_steps=STEPS, learning_rate=1e-2, logging_steps=1,
        per_device_train_batch_size=batch_size, save_steps=2, seed=5, max_grad_norm=1.0, **options,
    )  # fmt: skip
    callbacks = {"lora_sb": [GradientInitCallback(num_batches=2)], "penalties": [RegularizationCallback()]}
    return Trainer(adapted(name), arguments, train_dataset=Rows(), callbacks=callbacks.get(name))


def logged(run, key="loss"):
    return [entry[key] for entry in run.state.log_history if key in entry]


def launch(rank):
    """What `accelerate launch` tells each process; the group is there already, and no port is used."""
    import deepspeed.ops
    from accelerate import PartialState

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="0",
        DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true",
    )  # fmt: skip
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for minutes
    PartialState(backend="gloo")


def through_trainer(rank, folder):
    launch(rank)
    for stage, file in STAGES.items():
        options = {"deepspeed": json.loads((LAUNCH / file).read_text())}
        options["accelerator_config"] = {"use_configured_state": True}
        for name in NAMES:
            place = folder / stage / name
            run = trainer(name, place, 4, **options)
            run.train()
            run.save_model(str(place / "saved"))
            again = trainer(name, place / "again", 4, **options)
            again.train(resume_from_checkpoint=str(place / "checkpoint-2"))
            if rank == 0:
                torch.save((logged(run), logged(again)), place / "losses.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    os.environ["DS_ACCELERATOR"] = "cpu"
    folder = tmp_path_factory.mktemp("deepspeed")
    run_in_two_processes(through_trainer, folder, timeout=1500)
    return folder


def check(name, folder, tmp_path):
    losses, again = torch.load(folder / "losses.pt")
    run = trainer(name, tmp_path, 8, use_cpu=True)
    run.train()
    assert losses == pytest.approx(logged(run), rel=1e-4)
    assert losses[-1] < losses[0]
    assert again == pytest.approx(losses, rel=1e-5)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(models.llama(), folder / "saved")
    ids = torch.stack([Rows()[i]["input_ids"] for i in range(4)])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, run.model.eval()(ids).logits, rtol=1e-2, atol=2e-3)


@pytest.mark.feature("DeepSpeed ZeRO-2")
def test_zero2_trains_as_one_process(method, trained, tmp_path):
    check(str(method), trained / "ZeRO-2" / str(method), tmp_path)


@pytest.mark.feature("DeepSpeed ZeRO-3")
def test_zero3_trains_as_one_process(method, trained, tmp_path):
    check(str(method), trained / "ZeRO-3" / str(method), tmp_path)


@pytest.mark.parametrize("name", ["lora", "penalties"])
@pytest.mark.parametrize("stage", STAGES)
def test_so_does_lora_and_so_do_loss_terms(name, stage, trained, tmp_path):
    check(name, trained / stage / name, tmp_path)

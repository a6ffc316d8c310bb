"""Training that is killed and goes on from its last checkpoint ends as if nothing had happened."""

import os
import shutil
import signal
import sys

import pytest
import torch
from packaging.version import Version
from peft import get_peft_model
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import models
from methods import METHODS
from peft_subspace import (
    ContinualSVDConfig,
    GradientInitCallback,
    NextTaskCallback,
    RegularizationCallback,
)
from peft_subspace.continual import list_tasks

WEIGHTS = "adapter_model.safetensors"
LAST = 7
SAVED_EVERY = 3
KILLED_AT = {"effort": 4, "mos": 5, "lora_sb": 4}  # by default at 5; checkpoints are at 3 and 6

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),  # torch says that there is no accelerator
    pytest.mark.feature("resume after a kill"),
    pytest.mark.skipif(
        Version(torch.__version__) < Version("2.6"), reason="transformers resumes with PyTorch 2.6 or later"
    ),
]


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        ids = torch.randint(3, 37, (10,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


class Kill(TrainerCallback):
    """Ends the process as a power failure would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def trainer(method, folder, *callbacks):
    """A run with all that has a state: dropout, the order of rows, a schedule, starts from data."""
    options = {"dropout": 0.1} if method.has_dropout else {}
    if method.name == "effort":
        options = {"orthogonality_weight": 0.1, "energy_weight": 0.1}
        callbacks = (*callbacks, RegularizationCallback())
    if method.name == "lora_sb":
        callbacks = (*callbacks, GradientInitCallback(num_batches=2))
    torch.manual_seed(0)
    config = method.config(target_modules=["q_proj", "v_proj", "down_proj"], seed=0, **options)
    arguments = TrainingArguments(
        str(folder), report_to=[], use_cpu=True, disable_tqdm=True, max_steps=LAST, learning_rate=1e-2,
        per_device_train_batch_size=4, save_steps=SAVED_EVERY, logging_steps=1, seed=5,
    )  # fmt: skip
    model = get_peft_model(models.llama(attention_dropout=0.1), config)
    return Trainer(model, arguments, train_dataset=Rows(), callbacks=list(callbacks))


def trained(run):
    return {name: p.detach() for name, p in run.model.named_parameters() if p.requires_grad}


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def train_and_be_killed(folder):
    """Train each method in a process of its own, forked before torch has started any thread."""
    for method in METHODS:
        process = os.fork()
        if process == 0:
            torch.set_num_threads(1)
            trainer(method, f"{folder}/{method}", Kill(KILLED_AT.get(method.name, 5))).train()
            os._exit(0)
        status = os.waitpid(process, 0)[1]
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folder with what killed runs have left behind, one for each method."""
    folder = tmp_path_factory.mktemp("killed")
    context = torch.multiprocessing.get_context("spawn")
    process = context.Process(target=train_and_be_killed, args=(folder,))
    process.start()
    process.join(timeout=300)
    assert process.exitcode == 0
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked and killed by a signal")
def test_resumed_run_ends_with_the_same_weights(method, killed, tmp_path):
    checkpoint = get_last_checkpoint(str(killed / method.name))
    assert checkpoint.endswith(f"checkpoint-{SAVED_EVERY}")
    whole = trainer(method, tmp_path / "whole")
    whole.train()
    resumed = trainer(method, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == LAST
    assert losses(resumed) == losses(whole)
    wanted, found = trained(whole), trained(resumed)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    buffers = dict(resumed.model.named_buffers())
    assert all(torch.equal(buffers[name], tensor) for name, tensor in whole.model.named_buffers())


@pytest.mark.slow
def test_damaged_checkpoint_is_not_resumed(method, killed, tmp_path):
    """The Trainer loads through PEFT, not through `peft_subspace.load`."""
    last = f"checkpoint-{SAVED_EVERY}"
    shutil.copytree(killed / method.name / last, tmp_path / last)
    path = tmp_path / last / WEIGHTS
    data = path.read_bytes()
    run = trainer(method, tmp_path)
    for size in (0, 4, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(SafetensorError):
            run.train(resume_from_checkpoint=True)
    path.unlink()
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
        run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 0


def in_tasks(folder, keep="stack", **starts):
    torch.manual_seed(0)
    config = ContinualSVDConfig(r=2, target_modules=["q_proj", "v_proj"], seed=0)
    arguments = TrainingArguments(
        str(folder), report_to=[], use_cpu=True, disable_tqdm=True, max_steps=8, learning_rate=1e-2,
        per_device_train_batch_size=4, save_steps=2, logging_steps=1, seed=5,
    )  # fmt: skip
    callback = NextTaskCallback(starts.pop("starts", {3: "task2"}), keep=keep)
    model = get_peft_model(models.llama(), config)
    return Trainer(model, arguments, train_dataset=Rows(), callbacks=[callback])


@pytest.mark.slow
@pytest.mark.parametrize("start", [2, 4, 6], ids=["before", "between", "at-the-start-of-one"])
def test_tasks_of_a_run_are_resumed(start, tmp_path):
    starts = {3: "task2", 6: "task3"}
    whole = in_tasks(tmp_path / "whole", starts=starts)
    whole.train()
    resumed = in_tasks(tmp_path / "resumed", starts=starts)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{start}"))
    assert list_tasks(resumed.model) == {"default": "stack", "task2": "stack", "task3": "open"}
    assert losses(resumed) == losses(whole)
    wanted, found = trained(whole), trained(resumed)
    assert wanted
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    inputs = torch.stack([Rows()[i]["input_ids"] for i in range(4)])
    assert torch.equal(resumed.model.eval()(inputs).logits, whole.model.eval()(inputs).logits)


def test_tasks_that_were_merged_are_not_resumed_on_the_first_base(tmp_path):
    in_tasks(tmp_path, keep="merge").train()
    with pytest.raises(ValueError, match="the base weight is not the one whose directions"):
        in_tasks(tmp_path, keep="merge").train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_task_that_the_checkpoint_lacks(tmp_path):
    in_tasks(tmp_path, starts={}).train()
    again = in_tasks(tmp_path)
    with pytest.raises(
        ValueError, match="resumes at step 4, when task 'task2' had begun, but the checkpoint"
    ):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))

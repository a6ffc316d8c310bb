"""Training in two processes: replicated (DDP) and sharded (FSDP2), against one process with all the data."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import models
from methods import METHODS
from peft_subspace import GradientInitCallback, prepare_for_ddp, regularization_loss
from peft_subspace.core.delta import Delta
from peft_subspace.runtime.engines import read_whole
from processes import losses_of, run_in_two_processes, sharded

STEPS = 4
FSDP2 = Path(__file__).parents[1] / "examples/launch/fsdp2.yaml"


def launch(rank):
    """What `accelerate launch` tells each process; the group is there already, and no port is used."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="0",
        ACCELERATE_USE_CPU="true",
    )  # fmt: skip


def launch_fsdp2(rank):
    """The same with a file for FSDP2, in fp32; two functions of Accelerate allow it on accelerators only."""
    launch(rank)
    settings = yaml.safe_load(FSDP2.read_text())["fsdp_config"]
    os.environ.update({name.upper(): str(value) for name, value in settings.items()})
    os.environ.update(ACCELERATE_USE_FSDP="true", ACCELERATE_USE_CPU="false")
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


class Network(nn.Module):
    """Blocks of equal shape, so that methods can share between them, and a head."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(12, 12) for _ in range(3)])
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


def adapted(method):
    torch.manual_seed(0)
    config = method.config(target_modules=["blocks.0", "blocks.1", "blocks.2"], seed=0)
    return get_peft_model(Network(), config)


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 12, generator=generator), torch.randn(8, 4, generator=generator)


def train(model, x, y):
    """Losses of a few steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return losses_of(partial(model, x), optimizer, y, STEPS)


def train_in_parallel(rank, folder, wrap):
    x, y = data()
    mine = slice(4 * rank, 4 * rank + 4)
    for method in METHODS:
        model = adapted(method)
        losses = train(wrap(model), x[mine], y[mine])
        torch.distributed.all_reduce(losses)
        # accelerate gathers the weights of sharded models like this
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        state = get_model_state_dict(model, options=options)
        if rank == 0:
            model.save_pretrained(folder / method.name, state_dict=state)
            torch.save(losses / 2, folder / f"{method.name}.pt")


def replicated(rank, folder):
    train_in_parallel(rank, folder, DistributedDataParallel)


def accelerated(rank, folder):
    launch(rank)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2

    def wrap(model):
        prepare_for_ddp(model)
        return accelerator.prepare(model)

    train_in_parallel(rank, folder, wrap)


def sharded_in_parallel(rank, folder):
    train_in_parallel(rank, folder, sharded)


def penalized():
    model = adapted(next(method for method in METHODS if method.name == "effort"))
    for module in model.modules():
        if isinstance(module, Delta):
            module.penalty_weights = {"orthogonality": 0.5, "energy": 0.1}
    return model


def train_penalized(model, x, y):
    """Losses of a few steps, the two loss terms included."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = nn.functional.mse_loss(model(x), y) + regularization_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def penalized_in_parallel(rank, folder):
    x, y = data()
    mine = slice(4 * rank, 4 * rank + 4)
    losses = train_penalized(sharded(penalized()), x[mine], y[mine])
    torch.distributed.all_reduce(losses)
    torch.save(losses / 2, folder / f"{rank}.pt")


def test_loss_terms_of_sharded_tensors_train_as_whole_ones_do(tmp_path):
    run_in_two_processes(penalized_in_parallel, tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "0.pt"), train_penalized(penalized(), *data()))


WAYS = [  # what Accelerate leaves behind comes last
    pytest.param(replicated, marks=pytest.mark.feature("DDP")),
    pytest.param(sharded_in_parallel, marks=pytest.mark.feature("FSDP2 through torch's fully_shard")),
    pytest.param(accelerated, marks=pytest.mark.feature("DDP through Accelerate")),
]


def each_way(rank, folder):
    for way in WAYS:
        way.values[0](rank, folder / way.values[0].__name__)


@pytest.fixture(scope="module")
def trained_each_way(tmp_path_factory):
    """Folders with what two processes made of every method."""
    folder = tmp_path_factory.mktemp("trained")
    for way in WAYS:
        (folder / way.values[0].__name__).mkdir()
    run_in_two_processes(each_way, folder)
    return folder


@pytest.fixture(params=WAYS)
def trained(request, trained_each_way):
    return trained_each_way / request.param.__name__


def test_two_processes_train_as_one_does(method, trained):
    x, y = data()
    model = adapted(method)
    losses = train(model, x, y)
    assert losses[-1] < losses[0]
    torch.testing.assert_close(torch.load(trained / f"{method.name}.pt"), losses, rtol=1e-5, atol=1e-6)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Network(), trained / method.name)
    torch.testing.assert_close(loaded(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    saved = get_peft_model_state_dict(loaded)
    assert saved.keys() == get_peft_model_state_dict(model).keys()


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        ids = torch.randint(3, 37, (10,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def trainer(method, folder, batch_size, use_cpu=True):
    """A run whose steps take 8 rows, whatever the number of processes."""
    options = {"orthogonality_weight": 0.1, "energy_weight": 0.1} if method.name == "effort" else {}
    callbacks = (
        [GradientInitCallback(num_batches=2, learning_rate="schedule")] if method.name == "lora_sb" else []
    )
    torch.manual_seed(0)
    config = method.config(target_modules=["q_proj", "v_proj", "down_proj"], seed=0, **options)
    arguments = TrainingArguments(
        str(folder), report_to=[], use_cpu=use_cpu, disable_tqdm=True, max_steps=STEPS, learning_rate=1e-2,
        per_device_train_batch_size=batch_size, save_steps=2, logging_steps=1, seed=5,
        gradient_checkpointing=True,
    )  # fmt: skip
    model = get_peft_model(models.llama(), config)
    return Trainer(model, arguments, train_dataset=Rows(), callbacks=callbacks)


def parameters(run):
    return {name: read_whole(p) for name, p in run.model.named_parameters() if p.requires_grad}


def logged(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def through_trainer(rank, folder, kind, use_cpu=True):
    for method in METHODS:
        for name, start in (("whole", None), ("resumed", "checkpoint-2")):
            run = trainer(method, folder / method.name / name, 4, use_cpu)
            prepare_for_ddp(run.model)
            run.train(resume_from_checkpoint=start and str(folder / method.name / "whole" / start))
            assert isinstance(run.model_wrapped, kind)
            found = logged(run), parameters(run)
            if rank == 0:
                torch.save(found, folder / method.name / f"{name}.pt")


def replicated_by_trainer(rank, folder):
    launch(rank)
    through_trainer(rank, folder, DistributedDataParallel)


def sharded_by_trainer(rank, folder):
    launch_fsdp2(rank)
    through_trainer(rank, folder, FSDPModule, use_cpu=False)


TRAINERS = [
    pytest.param(replicated_by_trainer, marks=pytest.mark.feature("DDP through Trainer")),
    pytest.param(
        sharded_by_trainer,
        marks=pytest.mark.feature(
            "FSDP2 through Accelerate and Trainer, two functions of Accelerate replaced"
        ),
    ),
]


@pytest.fixture(scope="module", params=TRAINERS)
def trained_by_trainer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    run_in_two_processes(request.param, folder)
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pin_memory.*")  # torch says that there is no accelerator
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_trainer_in_two_processes_trains_as_in_one(method, trained_by_trainer, tmp_path):
    folder = trained_by_trainer / method.name
    losses, tensors = torch.load(folder / "whole.pt")
    again, resumed = torch.load(folder / "resumed.pt")
    assert again == losses
    assert all(torch.equal(resumed[name], tensor) for name, tensor in tensors.items())
    run = trainer(method, tmp_path, 8)
    run.train()
    assert losses == pytest.approx(logged(run), rel=1e-4)
    assert losses[-1] < losses[0]
    loaded = PeftModel.from_pretrained(models.llama(), folder / "whole" / f"checkpoint-{STEPS}")
    ids = torch.stack([Rows()[i]["input_ids"] for i in range(4)])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, run.model.eval()(ids).logits, rtol=1e-2, atol=1e-3)


def on_two_cpus(rank, folder):
    launch(rank)
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    torch.save(Accelerator(cpu=True).distributed_type.value, folder / f"fsdp{rank}.pt")
    for method in METHODS:
        for prepared in (True, False):
            stays = frozen_tensors_stay(method, prepared, rank)
            torch.save(stays, folder / f"{method}-{prepared}-{rank}.pt")


def frozen_tensors_stay(method, prepared, rank):
    """Whether a change of frozen tensors in one process outlasts a step; all start with the first's."""
    model = adapted(method)
    frozen = [b for m in model.modules() if isinstance(m, Delta) for b in m.buffers(recurse=False)]
    wanted = [buffer.clone() for buffer in frozen]
    for buffer in frozen if rank == 1 else ():
        buffer.zero_()
    if prepared:
        prepare_for_ddp(model)
    wrapped = DistributedDataParallel(model)
    assert all(torch.equal(buffer, tensor) for buffer, tensor in zip(frozen, wanted, strict=True))
    for buffer in frozen if rank == 1 else ():
        buffer.zero_()
    wrapped(data()[0]).sum().backward()
    return not any(buffer.any() for buffer in frozen)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seen")
    run_in_two_processes(on_two_cpus, folder)
    return folder


def test_frozen_tensors_are_sent_once_if_asked_for(method, seen):
    frozen = any(
        buffer.any() for m in adapted(method).modules() if isinstance(m, Delta) for buffer in m.buffers()
    )
    assert torch.load(seen / f"{method}-True-1.pt")
    assert torch.load(seen / f"{method}-False-1.pt") == (not frozen)
    assert torch.load(seen / f"{method}-True-0.pt") == (not frozen)


def test_one_process_needs_no_preparation(method):
    model = adapted(method)
    prepare_for_ddp(model)
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")


def test_accelerate_has_no_fsdp_on_cpus_of_its_own(seen):
    assert torch.load(seen / "fsdp0.pt") == "MULTI_CPU"

"""Training in two processes: replicated (DDP) and sharded (FSDP2), against one process with all the data."""

import pytest
import torch
from methods import METHODS
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from processes import run_in_two_processes, sharded
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel

STEPS = 4


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
    """Losses of a few steps, and the outputs after them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


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


def sharded_in_parallel(rank, folder):
    train_in_parallel(rank, folder, sharded)


@pytest.fixture(scope="module", params=[replicated, sharded_in_parallel])
def trained(request, tmp_path_factory):
    """Folder with what two processes made of every method."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    run_in_two_processes(request.param, folder)
    return folder


@pytest.mark.filterwarnings("ignore:adapter .* trains in bases taken from the base weight")
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

"""Two processes on one machine, talking through gloo."""

from datetime import timedelta

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from peft_subspace.tuner.layer import SubspaceLayer


def run_in_two_processes(job, folder, timeout=300):
    """Run `job(rank, folder)`, a function of a module, in each of two processes, for `timeout` seconds."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=_run, args=(job, rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=timeout)
    assert [process.exitcode for process in processes] == [0, 0]


def _run(job, rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        job(rank, folder)
    finally:
        torch.distributed.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    """Shard a model by FSDP2: every adapted layer is a unit of its own, the rest is the root's."""
    for module in [*(m for m in model.modules() if isinstance(m, SubspaceLayer)), model]:
        fully_shard(module)
    assert all(hasattr(parameter, "device_mesh") for parameter in model.parameters())
    return model


def losses_of(call, optimizer, y, steps):
    """Losses of a few steps of what `call()` gives."""
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(call(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)

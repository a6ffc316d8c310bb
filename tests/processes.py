"""Two processes on one machine, talking through gloo."""

import os
from datetime import timedelta

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from peft_subspace.tuner.layer import SubspaceLayer


def run_in_two_processes(job, folder, timeout=300):
    """Run `job(rank, folder)`, a function of a module, in each of two processes, for `timeout` seconds.

    Raises: what the job raised, with its traceback.
    """
    context = torch.multiprocessing.spawn(_run, args=(job, folder), nprocs=2, join=False)
    try:
        ended = context.join(timeout=timeout) or context.join(timeout=timeout)
    finally:
        for process in context.processes:
            process.kill()
    assert ended, f"two processes have not ended in {timeout} s"


def _run(rank, job, folder):
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        job(rank, folder)
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
    # Models that live until the interpreter ends keep threads of gloo's, which abort the process there.
    os._exit(0)


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

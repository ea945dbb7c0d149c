"""Several processes, started by torchrun: who this one is, what it shares with the others, how models are cut up.

Each rank trains on its share of every batch. Small models are replicated: each rank has all of them, and gradients are
averaged before the optimizer's step. Of large ones weights, gradients and optimizer states are sharded over the ranks
(FSDP2), layer by layer, and within a layer the mixer by itself, since align runs mixers alone. There the order matters:
what is trained is decided first (a gathered copy keeps the flag it was made with), then models are sharded, then the
optimizer is made, of the shards.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from .signals import Stopped

BUCKET = 2**26  # numbers of gradients that are averaged at a time


def start_ranks() -> None:
    """Where several GPUs are visible, runs this command again under torchrun, a process each, and does not return.

    On several nodes, start torchrun there yourself: torchrun --nnodes 2 ... -m deltify.cli distill recipe.yaml.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus > 1 and "RANK" not in os.environ:
        options = ["--standalone", f"--nproc-per-node={gpus}", "-m", "deltify.cli", *sys.argv[1:]]
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *options])


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Joins the other processes, if torchrun started this one; gives the device that is this one's."""
    if "RANK" not in os.environ or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield device
    except Stopped:  # which all ranks raise
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()  # not after an error: others may wait for this rank, and this call for them


def barrier() -> None:
    if count() > 1:
        dist.barrier()


def mean(x: Tensor) -> Tensor:
    """The mean over all ranks."""
    if count() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / count()


def largest(number: float, device: torch.device) -> float:
    """The largest over all ranks: what one decides, all do."""
    if count() == 1:
        return number
    x = torch.tensor(float(number), dtype=torch.float64, device=device)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return float(x)


def average(gradients: list[Tensor]) -> None:
    """Puts the mean over all ranks in the place of each gradient."""
    bucket: list[Tensor] = []
    size = 0
    for number, gradient in enumerate(gradients, 1):
        bucket.append(gradient)
        size += gradient.numel()
        if size < BUCKET and number < len(gradients):
            continue
        flat = torch.cat([x.flatten() for x in bucket])
        dist.all_reduce(flat)
        means = flat.div_(count()).split([x.numel() for x in bucket])
        torch._foreach_copy_(bucket, [mean.view_as(x) for mean, x in zip(means, bucket)])
        bucket, size = [], 0


def shards(choice: str, size: int, memory: float | None) -> bool:
    """Whether several ranks cut their models up: run.data_parallel, for models and optimizer of `size` bytes on GPUs of
    so much memory; None on a CPU, where auto replicates."""
    return choice == "shard" or (choice == "auto" and memory is not None and 2 * size > memory)


def memory_of(device: torch.device) -> int | None:
    """Bytes of a GPU; None for other devices."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def whole(x: Tensor) -> Tensor:
    """A tensor that may be sharded, in one piece."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard(model: nn.Module, layers: nn.ModuleList, root: nn.Module) -> None:
    """Cuts up `root`, a part of `model` or all of it, over the ranks: mixer by mixer, layer by layer, then the rest."""
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (count(),))
    for layer in layers:
        fully_shard(layer.self_attn, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(root, mesh=mesh)


def shard_student(student: nn.Module) -> None:
    shard(student, student.model.layers, student)
    register_fsdp_forward_method(student, "whole")


def shard_teacher(teacher: nn.Module) -> None:
    shard(teacher, teacher.model.layers, teacher.model)

"""Several processes under torchrun: ranks, collectives, work that is shared out, and sharding.

In training, each rank trains on its share of every batch. Small models are replicated: each rank has a full copy, and
gradients are averaged before the optimizer step. Large models are sharded over the ranks (FSDP2): weights, gradients
and optimizer states. Each layer is one unit, and its mixer another, because align runs mixers alone. In bfloat16,
so is the MLP of a student. The order matters.
First decide which parameters train, because a gathered copy keeps the flag it was made with. Then shard the models, on
the meta device, and fill the shards (`model/shards.py`). Then make the optimizer from the shards.

Evaluation and sampling divide their work by `share_out`, whose results do not depend on the number of ranks.
"""

import hashlib
import os
import sys
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from transformers import PreTrainedModel

from ..config import Recipe, check_shares
from ..model import DeltifyForCausalLM
from ..utils.console import console, log
from .signals import Stopped

T = TypeVar("T")
R = TypeVar("R")
LONG_WAIT = timedelta(days=7)  # of a rank for others, where their work may take long; torchrun sees which ones failed
BUCKET = 2**26  # gradient elements that are averaged at a time


def relaunch_with_torchrun(recipe: Recipe) -> None:
    """Replace this process by torchrun with one process per GPU, for as many visible GPUs as can share the batches.

    For several nodes, start torchrun on each of them: torchrun --nnodes 2 ... -m deltify.cli distill recipe.yaml.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus < 2 or "RANK" in os.environ:
        return
    used = next((n for n in range(gpus, 0, -1) if can_share(recipe, n)), gpus)  # else the processes say why
    if used < gpus:
        log(f"{used} of {gpus} GPUs are used: more cannot share the batches of all stages equally")
    if used > 1:
        options = ["--standalone", f"--nproc-per-node={used}", "-m", "deltify.cli", *sys.argv[1:]]
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *options])


def can_share(recipe: Recipe, processes: int) -> bool:
    """Return whether `check_shares` accepts a number of processes."""
    with suppress(ValueError):
        check_shares(recipe, processes)
        return True
    return False


def rank() -> int:
    """Return the number of this process, or 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes, or 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def sole_writer(lock: Path, refusal: str) -> Generator[None]:
    """Hold the lock file `lock` on the first process, and create its folder.

    Raises:
        ValueError: With the message `refusal`, if another program holds it.
    """
    if rank() > 0:
        yield
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(lock).acquire(timeout=0)
    except Timeout:
        raise ValueError(refusal) from None
    with held:
        yield


@contextmanager
def process_group(device: torch.device, timeout: timedelta | None = None) -> Generator[torch.device]:
    """Join the process group if torchrun started this process, and yield the process's own device.

    A group that exists, such as that of Ray Train, Lightning or accelerate, is used and left to its owner. Ranks other
    than the first no longer print.

    Args:
        device: Device that was asked for.
        timeout: Time that a rank waits for others. Defaults to PyTorch's, which is 10 minutes on GPUs.
    """
    if dist.is_initialized():
        console.quiet = rank() > 0
        yield own_device(device)
        return
    if "RANK" not in os.environ:
        yield device
        return
    device = own_device(device)
    gpu = device if device.type == "cuda" else None
    if gpu is not None:
        torch.cuda.set_device(gpu)
    store, number, size = next(rendezvous("env://"))
    store = new_store(store, number, size)
    backend = "gloo" if gpu is None else "nccl"
    dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=timeout, device_id=gpu)
    console.quiet = rank() > 0
    try:
        yield device
    except Stopped:  # all ranks raise it
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()  # not after an error: it would wait for ranks that may wait for this one


def new_store(store: dist.Store, rank: int, ranks: int) -> dist.Store:
    """Return a part of a store that all ranks share, and that has been used by no earlier group.

    torchrun keeps a store when it restarts processes. A group would find the addresses of processes that have died. So
    each rank says hello under a random name, until the first one has told it the name of the new part.
    """
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello {rank}", name)
        part = store.get(f"part for {name}").decode()
        store.set(f"{rank} joined {part}", "")
        return dist.PrefixStore(part, store)
    waiting = set(range(1, ranks))
    while waiting:
        for other in [other for other in waiting if store.check([f"hello {other}"])]:
            store.set(f"part for {store.get(f'hello {other}').decode()}", name)  # it may be the name of a dead process
        waiting = {other for other in waiting if not store.check([f"{other} joined {name}"])}
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


def own_device(device: torch.device) -> torch.device:
    """Return the GPU of this process, if `device` is a GPU: number LOCAL_RANK, or the current one if it sees fewer."""
    if device.type != "cuda":
        return device
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank is None or int(local_rank) >= torch.cuda.device_count():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cuda", int(local_rank))


def row_group(size: int) -> dist.ProcessGroup | None:
    """Return the group of `size` consecutive ranks that share rows with this one, or None if rows are not cut.

    All ranks must call it.
    """
    if size == 1:
        return None
    group, _ = dist.new_subgroups(size)
    assert isinstance(group, dist.ProcessGroup)  # every rank is in one
    return group


def save_group() -> dist.ProcessGroup:
    """Return a group of all ranks on the CPU, for a thread that saves checkpoints. All ranks must call it."""
    group = dist.new_group(backend="gloo", timeout=LONG_WAIT)
    assert isinstance(group, dist.ProcessGroup)  # every rank is in it
    return group


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def from_first(make: Callable[[], T]) -> T:
    """Return on all ranks what `make` returns on the first one, the only one that calls it."""
    if world_size() == 1:
        return make()
    made = [make() if rank() == 0 else None]
    dist.broadcast_object_list(made, src=0)
    return made[0]  # pyrefly: ignore[bad-return]  # the first rank's


def all_gather(x: T) -> list[T]:
    """Return the objects of all ranks."""
    if world_size() == 1:
        return [x]
    gathered: list = [None] * world_size()
    dist.all_gather_object(gathered, x)
    return gathered


def check_same(what: str, value: Callable[[], object]) -> None:
    """Raise ValueError if the values of the ranks, as text, differ. Their work would then not fit together.

    Args:
        what: What is compared.
        value: Function that returns the value. It is called if there are several ranks.
    """
    if world_size() > 1 and len(set(all_gather(hashlib.sha256(repr(value()).encode()).hexdigest()))) > 1:
        raise ValueError(f"The {world_size()} processes have different {what}. Give all of them the same files.")


def share_out(items: Iterable[T], work: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """Yield each item with the result of its work, in the order of the items.

    In each round, every rank works on one item, and all ranks get all results. So neighbours should take equally long.

    Args:
        items: The same items on all ranks.
        work: Function whose result can be pickled. It depends neither on the rank nor on earlier items.
    """
    items = iter(items)
    while batch := list(islice(items, world_size())):
        result = work(batch[rank()]) if rank() < len(batch) else None
        yield from zip(batch, all_gather(result))  # pyrefly: ignore[invalid-yield]  # ranks without an item are last


def all_reduce_mean(x: Tensor) -> Tensor:
    """Return the mean over all ranks."""
    if world_size() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / world_size()


def all_reduce_max(number: float, device: torch.device) -> float:
    """Return the largest number of all ranks. For booleans: whether it is true on any rank."""
    if world_size() == 1:
        return number
    x = torch.tensor(float(number), dtype=torch.float64, device=device)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return float(x)


def all_reduce_mean_(gradients: list[Tensor]) -> None:
    """Replace each gradient by its mean over all ranks."""
    bucket: list[Tensor] = []
    size = 0
    for number, gradient in enumerate(gradients, 1):
        bucket.append(gradient)
        size += gradient.numel()
        if size < BUCKET and number < len(gradients):
            continue
        flat = torch.cat([x.flatten() for x in bucket])
        dist.all_reduce(flat)
        means = flat.div_(world_size()).split([x.numel() for x in bucket])
        torch._foreach_copy_(bucket, [mean.view_as(x) for mean, x in zip(means, bucket)])
        bucket, size = [], 0


def should_shard(choice: str, size: int, memory: float | None) -> bool:
    """Return whether to shard the models over the ranks.

    Args:
        choice: Value of run.data_parallel.
        size: Bytes of models and optimizer states.
        memory: Bytes of a GPU, or None on a CPU, where `auto` replicates.
    """
    return choice in ("shard", "hybrid") or (choice == "auto" and memory is not None and 2 * size > memory)


def memory_of(device: torch.device) -> int | None:
    """Return the bytes of a GPU's memory, or None for other devices."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def sharding_mesh(device: str, per_node: bool) -> DeviceMesh:
    """Return the mesh of all ranks or, with `per_node`, that of nodes and of the ranks of a node.

    Raises:
        ValueError: If the launcher does not say how many ranks a node has, or nodes differ.
    """
    ranks = world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) if per_node else ranks
    if not local or ranks % local:
        raise ValueError(
            f"run.data_parallel: hybrid needs nodes of equally many processes, in LOCAL_WORLD_SIZE, which torchrun "
            f"sets. It is {local or 'not set'}, and there are {ranks} processes. Start them with torchrun, or choose "
            "shard"
        )
    if local == ranks:
        return init_device_mesh(device, (ranks,))
    return init_device_mesh(device, (ranks // local, local), mesh_dim_names=("replicate", "shard"))


def shard(
    root: nn.Module, layers: nn.ModuleList, device: torch.device, per_node: bool, autocast: torch.dtype | None = None
) -> None:
    """Shard `root` over the ranks: each mixer, each MLP, each layer's other parameters, and those of no layer.

    Args:
        root: Model, or the part of it to shard, on `device` or on the meta device.
        layers: Its layers.
        device: Device that the ranks compute on.
        per_node: Whether to shard over the ranks of a node only. Nodes then hold the same (HSDP).
        autocast: Data type of autocast, if the model always runs under it. MLPs, which are linear layers only, are then
            gathered in it, and their gradients are averaged in float32. Autocast does the same after a gather.
    """
    mesh = sharding_mesh(device.type, per_node)
    reduced = torch.float32 if autocast else None
    policy = MixedPrecisionPolicy(param_dtype=autocast, reduce_dtype=reduced, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer.get_submodule("self_attn"), mesh=mesh)
        if autocast:
            fully_shard(layer.get_submodule("mlp"), mesh=mesh, mp_policy=policy)
        fully_shard(layer, mesh=mesh)
    fully_shard(root, mesh=mesh)


def shard_student(
    student: DeltifyForCausalLM, device: torch.device, per_node: bool = False, autocast: torch.dtype | None = None
) -> None:
    """Shard a student, and let `run_with_full_weights` gather it. For the arguments see `shard`."""
    shard(student, student.model.layers, device, per_node, autocast)
    register_fsdp_forward_method(student, "run_with_full_weights")


def shard_teacher(teacher: PreTrainedModel, device: torch.device, per_node: bool = False) -> None:
    """Shard a teacher's layers, norm and embeddings. Its head stays whole, tied or not, because every step needs it."""
    shard(teacher.model, teacher.model.layers, device, per_node)

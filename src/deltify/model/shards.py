"""Load, fill and save models that are sharded over processes (FSDP2), so that no process ever holds a whole one.

A model is made on the meta device, sharded, and allocated. Then each process fills its own rows of every tensor.
"""

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..utils.fingerprint import full_tensor
from .loading import StoredTensor, Tensors, with_prefix

M = TypeVar("M", bound=nn.Module)

FILE_BYTES = 5 * 2**30  # of a safetensors file, unless a tensor is larger
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def is_sharded(module: nn.Module) -> bool:
    """Return whether any parameter is sharded."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def own_rows(x: Tensor) -> slice:
    """Return the rows of a tensor that this process holds: all of them, unless it is sharded."""
    start, stop = 0, len(x)
    for dim, placement in enumerate(x.placements if isinstance(x, DTensor) else ()):
        if placement.is_replicate():
            continue
        assert isinstance(x, DTensor) and placement == Shard(0)  # as FSDP2 shards by default
        rows = -(-len(x) // x.device_mesh.size(dim))
        start = min(rows * x.device_mesh.get_local_rank(dim), len(x))
        stop = min(start + rows, len(x))
    return slice(start, stop)


def own_part(x: Tensor) -> Tensor:
    """Return the rows of a tensor that this process holds, as a view."""
    return x.to_local() if isinstance(x, DTensor) else x


@torch.no_grad()
def allocate(model: PreTrainedModel, device: torch.device) -> None:
    """Move a model, sharded or not, from the meta device to `device`. Its parameters then have any values.

    Buffers that checkpoints do not have are computed: the frequencies of rotary embeddings, on the CPU.

    Raises:
        ValueError: If there are others.
    """
    model.to_empty(device=device)
    if not is_sharded(model):
        model.tie_weights()
    stored = model.state_dict().keys()
    for prefix, module in model.named_modules():
        buffers = {n: x for n, x in module.named_buffers(prefix, recurse=False) if n not in stored}
        if not buffers:
            continue
        if "RotaryEmbedding" not in type(module).__name__:
            raise ValueError(
                f"{', '.join(buffers)} of {type(model).__name__} cannot be computed in each process. Choose "
                "run.data_parallel: replicate"
            )
        computed = type(module)(cast(Any, module.config))
        for name, buffer in buffers.items():
            buffer.copy_(computed.get_buffer(name.rpartition(".")[2]))


def load_shards(model: PreTrainedModel, tensors: Tensors, shard: Callable[[Any], object], device: torch.device) -> None:
    """Shard a model on the meta device, and read this process's rows of its tensors.

    Args:
        model: Model, changed in place.
        tensors: Tensors of the files by name. They fit the model.
        shard: Function that shards a model over the processes.
        device: Device of the rows.

    Raises:
        ValueError: If the model has buffers that cannot be computed.
    """
    shard(model)
    allocate(model, device)
    fill(model, tensors)


@torch.no_grad()
def fill(model: PreTrainedModel, tensors: Tensors) -> None:
    """Read this process's rows of all tensors of a model from safetensors files, converted to its data types.

    Args:
        model: Allocated model. A head that has no tensor of its own is filled from that of the embeddings.
        tensors: Tensors of the files by name. They fit the model.
    """
    tensors = with_prefix(tensors)
    for name, x in model.state_dict().items():
        stored = tensors[EMBEDDINGS if name == HEAD and HEAD not in tensors else name]
        if own_part(x).numel():  # there may be more processes than rows
            own_part(x).copy_(read_rows(stored, own_rows(x)))


def read_rows(stored: StoredTensor, rows: slice) -> Tensor:
    """Return some rows of a tensor in a safetensors file. Other rows are not read."""
    with safe_open(stored.file, framework="pt") as opened:
        return opened.get_slice(stored.name)[rows]


def same_values(a: StoredTensor, b: StoredTensor, dtype: torch.dtype) -> bool:
    """Return whether two stored tensors are equal as `dtype`. They are read piece by piece."""
    pieces = (slice(start, start + 4096) for start in range(0, a.shape[0], 4096))
    return a.shape == b.shape and all(
        torch.equal(read_rows(a, rows).to(dtype), read_rows(b, rows).to(dtype)) for rows in pieces
    )


@contextmanager
def whole(module: nn.Module, make: Callable[[], M]) -> Generator[M]:
    """Yield a module to change: the module itself or, if it is sharded, a whole copy.

    Afterwards the shards get the values of the first process's copy. All processes must take part.

    Args:
        make: Function that returns a module of the same kind.
    """
    if not is_sharded(module):
        yield cast(M, module)
        return
    with torch.device("meta"):
        copy = make()
    copy.load_state_dict({name: full_tensor(x) for name, x in module.state_dict().items()}, assign=True)
    yield copy
    for name, x in module.named_parameters():
        value = copy.get_parameter(name)
        dist.broadcast(value, src=0)
        own_part(x).copy_(value[own_rows(x)])


def read_generation_config(model: PreTrainedModel, folder: str, **options) -> None:
    """Give a model the generation settings of its folder or hub id."""
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder, **options)
    except OSError:  # as from_pretrained of a model does
        file = {"config_file_name": "config.json", "_from_model_config": True}
        model.generation_config = GenerationConfig.from_pretrained(folder, **file, **options)


def save_shards(model: PreTrainedModel, folder: Path) -> None:
    """Write a sharded model as `save_pretrained` does. All processes must take part; the first one writes.

    Processes gather one tensor at a time. The first one holds those of a file of FILE_BYTES on the CPU.
    """
    first = dist.get_rank() == 0
    tied = {HEAD} if model.config.tie_word_embeddings else set()
    tensors = {name: x for name, x in model.state_dict().items() if name not in tied}

    def gather(names: list[str]) -> dict[str, Tensor]:
        gathered = {}
        for name in names:
            x = full_tensor(tensors[name])
            if first:
                gathered[name] = x.cpu()
        return gathered

    if first:
        model.config.dtype, model.config.architectures = model.dtype, [type(model).__name__.removeprefix("FSDP")]
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
    write_tensors(folder, {name: x.nbytes for name, x in tensors.items()}, gather, write=first)


def write_tensors(
    folder: Path, sizes: dict[str, int], read: Callable[[list[str]], dict[str, Tensor]], *, write: bool = True
) -> None:
    """Write tensors as safetensors files of at most FILE_BYTES. A larger tensor gets a file of its own.

    Args:
        folder: Folder that exists.
        sizes: Bytes of each tensor by name.
        read: Function that returns the tensors of a file. It is called for one file at a time.
        write: Whether to write what `read` returns.
    """
    groups: list[list[str]] = [[]]
    bytes_left = FILE_BYTES
    for name, size in sizes.items():
        if size > bytes_left and groups[-1]:
            groups.append([])
            bytes_left = FILE_BYTES
        groups[-1].append(name)
        bytes_left -= size
    files = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    files = [SAFE_WEIGHTS_NAME] if len(groups) == 1 else files
    for file, names in zip(files, groups):
        tensors = read(names)
        if write:
            save_file(tensors, folder / file, {"format": "pt"})
    if write and len(groups) > 1:
        weight_map = {name: file for file, names in zip(files, groups) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index))

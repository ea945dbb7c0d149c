"""The kernel `prepare` in CUDA C++: its launch.

It computes what `prepare_kernel` of ../triton/prepare.py does.
"""

import functools
import struct

import torch
from torch import Tensor

from .compiler import Kernel, join_sources, load

THREADS = 256
# struct Call of prepare.cu
CALL = struct.Struct("@10P3i2f2i4x")


def source_of(K: int, bounded: bool) -> str:
    """Return the source for a width of heads and a kind of gate."""
    return join_sources({"K": K, "BOUNDED": int(bounded)}, "chunks.h", "prepare.cu")


def shared_bytes(K: int) -> int:
    """Return the bytes of shared memory of a block: SHARED_BYTES of prepare.cu."""
    return 4 * 64 * K + 29696 + 512 + 256 + 256 + 2048 + 48 * K + 16


@functools.cache
def kernel(device: int, K: int, bounded: bool) -> Kernel:
    return load(device, source_of(K, bounded), "kda_prepare", THREADS, shared_bytes(K))


def pack_arguments(
    q: Tensor, k: Tensor, f: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, bounds: Tensor | None, wide: Tensor,
    square: Tensor, ends: Tensor, documents: int, lower_bound: float, scale: float, first: int,
) -> bytes:  # fmt: skip
    """Return the kernel's arguments. q is [B, T, H, K]; `documents` is B or the number of packed documents.

    `first` is the slot of the first block.
    """
    pointers = [0 if x is None else x.data_ptr() for x in (q, k, f, b, A_log, dt_bias, wide, square, ends, bounds)]
    return CALL.pack(*pointers, documents, *q.shape[1:3], lower_bound, scale, ends.shape[0], first)


def prepare(
    q: Tensor, k: Tensor, f: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, bounds: Tensor | None, wide: Tensor,
    square: Tensor, ends: Tensor, documents: int, lower_bound: float | None, scale: float, slots: range,
) -> None:  # fmt: skip
    """Write `wide` [3, all slots, C, K], `square` [2, all slots, C, C] and `ends` [all slots, K] at some of the slots.

    They are what `prepare_kernel` of ../triton/prepare.py writes. A slot is a head of a chunk. All tensors are
    contiguous, and `fits` of inputs.py holds.
    """
    tensors = (q, k, f, b, A_log, dt_bias, bounds, wide, square, ends)
    arguments = pack_arguments(*tensors, documents, lower_bound or 0.0, scale, slots.start)
    run = kernel(q.device.index, q.shape[-1], lower_bound is not None)
    run(len(slots), arguments, torch.cuda.current_stream(q.device).cuda_stream)

"""The kernel `finish` in CUDA C++: the parallel part of the backward pass. Its launch.

It computes what `pairs_kernel` and `finish_kernel` of ../triton/finish.py do.
"""

import functools
import struct

import torch
from torch import Tensor

from .compiler import Kernel, join_sources, load, tensor_map

# struct Call of finish.cu
CALL = struct.Struct("@" + 8 * "128s" + "12P3i2f12x")


def source_of(K: int, bounded: bool) -> str:
    """Return the source for a width of heads and a kind of gate."""
    return join_sources({"K": K, "BOUNDED": int(bounded)}, "pipeline.h", "chunks.h", "finish.cu")


def shared_bytes(K: int) -> int:
    """Return the bytes of shared memory of a block: SHARED_BYTES of finish.cu."""
    return 7 * 128 * K + 4 * K * K + 2 * 8192 + 36 * K + 5 * 256 + 32


@functools.cache
def kernel(device: int, K: int, bounded: bool) -> Kernel:
    return load(device, source_of(K, bounded), "kda_finish", 4 * K, shared_bytes(K))


def pack_arguments(
    q: Tensor, k: Tensor, f: Tensor, v: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, bounds: Tensor | None,
    lower_bound: float, scale: float, o: Tensor, u: Tensor, do: Tensor, dv: Tensor, states: Tensor, dstates: Tensor,
    out: tuple[Tensor, ...], map_of=tensor_map,
) -> bytes:  # fmt: skip
    """Return the kernel's arguments. `map_of` gives the map of a matrix from its address, columns and rows."""
    (batch, tokens, heads, K), V = q.shape, v.shape[-1]
    matrices = [(x, heads * K) for x in (q, k, f)] + [(x, heads * V) for x in (u, do, dv)]
    matrices += [(states, K), (dstates, K)]
    maps = [map_of(x.data_ptr(), columns, x.numel() // columns) for x, columns in matrices]
    pointers = [0 if x is None else x.data_ptr() for x in (o, v, b, A_log, dt_bias, *out, bounds)]
    documents = batch if bounds is None else len(bounds) - 1
    return CALL.pack(*maps, *pointers, documents, tokens, heads, lower_bound, scale)


def finish(
    q: Tensor, k: Tensor, f: Tensor, v: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, bounds: Tensor | None,
    lower_bound: float | None, scale: float, o: Tensor, u: Tensor, do: Tensor, dv: Tensor, states: Tensor,
    dstates: Tensor, out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Write gradients from the states before each chunk and the gradients of those after it.

    Args:
        q: [B, T, H, K], as are k, f, v, o, u, do and dv; b is [B, T, H]. All tensors are contiguous and begin at
            multiples of 16 bytes.
        states: [slots, K, K], values by keys, as are `dstates`.
        out: Gradients of q, k, f, b, and of A_log and dt_bias of each chunk, [slots, K] in float32.
    """
    tensors = (q, k, f, v, b, A_log, dt_bias, bounds, lower_bound or 0.0, scale, o, u, do, dv, states, dstates, out)
    run = kernel(q.device.index, q.shape[-1], lower_bound is not None)
    run(states.shape[0], pack_arguments(*tensors), torch.cuda.current_stream(q.device).cuda_stream)

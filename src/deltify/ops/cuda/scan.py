"""The kernel `scan` in CUDA C++: the run over the chunks, in order and in reverse. Its launch.

It computes what `scan_kernel` and `reverse_kernel` of ../triton/scan.py do without segments.
"""

import functools
import struct

import torch
from torch import Tensor

from .compiler import Kernel, join_sources, load, tensor_map

THREADS = 160
# struct Call of scan.cu
CALL = struct.Struct("@128s128s128s6P7i52x")
OUTPUTS, KEEP, REVERSE = range(3)  # MODE of scan.cu
ALL = range(2**30)  # chunks


def source_of(K: int, mode: int) -> str:
    """Return the source for a width of keys and a mode."""
    return join_sources({"K": K, "MODE": mode}, "pipeline.h", "chunks.h", "scan.cu")


def shared_bytes(K: int, mode: int) -> int:
    """Return the bytes of shared memory of a block: SHARED_BYTES of scan.cu."""
    tile, wide = 64 * 64 * 2, 64 * K * 2
    first = {OUTPUTS: 2 * wide + 2 * tile, KEEP: wide + 2 * tile, REVERSE: wide + 3 * tile}[mode]
    last = {OUTPUTS: wide + tile, KEEP: wide, REVERSE: 2 * wide}[mode]
    firsts, lasts = 3, 2 if mode == REVERSE else 3
    kept = 0 if mode == OUTPUTS else 128 * K
    return firsts * first + lasts * last + tile + kept + lasts * 4 * K + 16 * (firsts + lasts)


@functools.cache
def kernel(device: int, K: int, mode: int) -> Kernel:
    return load(device, source_of(K, mode), "kda_scan", THREADS, shared_bytes(K, mode))


def pack_arguments(
    wide: Tensor, square: Tensor, ends: Tensor, values: Tensor, bounds: Tensor | None, before: Tensor | None,
    after: Tensor, out: Tensor, states: Tensor | None, chunks: range, map_of=tensor_map,
) -> bytes:  # fmt: skip
    """Return the kernel's arguments. `map_of` gives the map of a matrix from its address, columns and rows."""
    batch, tokens, heads, V = values.shape
    maps = [
        map_of(x.data_ptr(), columns, x.numel() // columns)
        for x, columns in ((wide, wide.shape[-1]), (square, square.shape[-1]), (values, heads * V))
    ]
    pointers = [0 if x is None else x.data_ptr() for x in (ends, before, after, out, states, bounds)]
    documents = batch if bounds is None else len(bounds) - 1
    return CALL.pack(*maps, *pointers, documents, tokens, heads, V, ends.shape[0], chunks.start, chunks.stop)


def scan(
    mode: int, wide: Tensor, square: Tensor, ends: Tensor, values: Tensor, bounds: Tensor | None,
    before: Tensor | None, after: Tensor, out: Tensor, states: Tensor | None = None, chunks: range = ALL,
) -> None:  # fmt: skip
    """Run over some chunks of each document.

    Args:
        mode: OUTPUTS writes o. KEEP writes u instead, and the state before each chunk. REVERSE runs from the last chunk
            to the first, and writes dv and the gradient of the state after each chunk.
        wide: What `prepare` wrote, [3, slots, C, K] in any shape that ends with K.
        square: What `prepare` wrote, [2, slots, C, C] in any shape that ends with C.
        ends: What `prepare` wrote, [slots, K].
        values: v, in reverse the gradient of o, [B, T, H, V]. It begins at a multiple of 16 bytes, as `out` does. All
            tensors are contiguous.
        bounds: Bounds of packed documents, int32, or None.
        before: States before the first of the chunks [documents, H, K, V], float32; None for zeros. In reverse, the
            gradients of the states after the last.
        after: The other states, written.
        out: o, u or dv [B, T, H, V], written.
        states: [slots, V, K], written, but with OUTPUTS.
        chunks: Chunks of each document.
    """
    arguments = pack_arguments(wide, square, ends, values, bounds, before, after, out, states, chunks)
    run = kernel(values.device.index, wide.shape[-1], mode)
    blocks = after.shape[0] * after.shape[1] * values.shape[-1] // 64
    run(blocks, arguments, torch.cuda.current_stream(values.device).cuda_stream)

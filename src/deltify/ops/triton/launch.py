"""Launch the kernels: allocate tensors, choose grids, and run the kernels of a forward or backward pass in order."""

import contextlib
import functools
import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..cuda.finish import finish
from ..cuda.prepare import prepare
from ..cuda.scan import ALL, KEEP, OUTPUTS, REVERSE
from ..cuda.scan import scan as cuda_scan
from .finish import ROWS, finish_kernel, pairs_kernel
from .prepare import prepare_kernel
from .scan import combine_kernel, reverse_kernel, scan_kernel
from .tiles import CHUNK, gate_dtype, make_tables

C = CHUNK.value
BV, COMBINE_BV = 64, 16  # value columns of a program of the scan (as many as four warps can hold) and of combine


@dataclass(frozen=True)
class Plan:
    """How a call is divided among programs."""

    segment: int  # number of chunks of a segment
    split: bool  # whether a document has several segments
    stages: int = 3  # number of loads in flight in the scan
    cuda: bool = False  # whether the kernels are those in CUDA C++, but for a scan that is split
    pieces: int = 1  # with them, in a forward pass: a piece is prepared while the scan is at those before it
    beside: bool = False  # whether the two scans of the backward pass run at the same time
    channels: int = 64  # of a slice in prepare and finish; with 32 or 16, Triton 3.6 gives wrong results on Hopper


class Opened(threading.local):
    def __init__(self):
        self.devices: set[torch.device] = set()


OPENED = Opened()


def open_context(device: torch.device) -> None:
    """Open the GPU's context in this thread, once.

    A tensor descriptor needs the context. Autograd's threads begin without one, and Triton opens it at a thread's first
    launch only.
    """
    if device not in OPENED.devices:
        torch.zeros(1, device=device)
        OPENED.devices.add(device)


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)  # its blocks go first


@contextlib.contextmanager
def on_side_stream(enabled: bool, device: torch.device) -> Iterator[None]:
    """Run kernels on a second stream, after all earlier ones of the current stream. The caller waits for them."""
    if not enabled:
        yield
        return
    side = side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        yield


class Prepared:
    """The inputs of a call, and what prepare writes: k e^G, q e^G and k e^{G_C - G} in `wide`, A and P in `square`."""

    def __init__(self, q, k, v, f, b, A_log, dt_bias, cu_seqlens, lower_bound, scale, plan: Plan):
        open_context(q.device)
        batch, tokens, heads, K = q.shape
        self.packed = cu_seqlens is not None
        self.documents = len(cu_seqlens) - 1 if self.packed else batch
        # the largest possible number of chunks: reading the bounds would wait for the GPU
        self.chunks = tokens // C + self.documents if self.packed else batch * triton.cdiv(tokens, C)
        self.slots = self.chunks * heads
        self.bounds, self.tokens, self.heads = cu_seqlens, tokens, heads
        self.sizes = (self.documents, tokens, heads)
        self.widths = {"K": K, "V": v.shape[-1]}
        self.documents_are = {"PACKED": self.packed, "N2": triton.next_power_of_2(self.documents) if self.packed else 1}
        self.gate = (0.0 if lower_bound is None else lower_bound, scale)
        self.bounded = {"BOUNDED": lower_bound is not None}
        self.dtype, self.device = q.dtype, q.device
        self.wide = torch.empty(3 * self.slots * C, K, dtype=q.dtype, device=q.device)
        self.square = torch.empty(2 * self.slots * C, C, dtype=q.dtype, device=q.device)
        self.ends = torch.empty(self.slots, K, dtype=torch.float32, device=q.device)
        if plan.cuda:
            out, numbers = (self.wide, self.square, self.ends), (self.documents, lower_bound, scale)
            self.run = functools.partial(prepare, q, k, f, b, A_log, dt_bias, cu_seqlens, *out, *numbers)
            if plan.pieces == 1 or plan.split:
                self.run(range(self.slots))
            return
        slices = TensorDescriptor.from_tensor(self.wide, [C, plan.channels])
        prepare_kernel[(self.chunks, heads)](
            *self.tables(), q, k, f, b, A_log, dt_bias, cu_seqlens, slices, self.tiles()[1], self.ends,
            *self.sizes, self.slots, *self.gate,
            K=K, BK=plan.channels, **self.bounded, **self.documents_are, num_warps=4,
        )  # fmt: skip

    def tables(self) -> tuple[Tensor, Tensor]:
        """Return the tables of the Triton kernels."""
        return make_tables(self.device, gate_dtype(self.dtype)), make_tables(self.device, self.dtype)

    def tiles(self) -> tuple[TensorDescriptor, TensorDescriptor]:
        """Return `wide` and `square` as the Triton kernels load them."""
        K = self.widths["K"]
        return TensorDescriptor.from_tensor(self.wide, [C, K]), TensorDescriptor.from_tensor(self.square, [C, C])

    def scan(self, v: Tensor, state: Tensor | None, plan: Plan, out: Tensor, keep: bool = False):
        """Write o (with `keep`: u) to `out`. Return the final states and, with `keep`, the states before each chunk."""
        K, V = self.widths.values()
        if plan.cuda and not plan.split:
            return self.scan_in_cuda(v, state, plan, out, keep)
        units = self.tokens // (plan.segment * C) + self.documents
        if not self.packed:
            units = self.documents * triton.cdiv(self.tokens, plan.segment * C)
        numbers = {"dtype": torch.float32, "device": v.device}
        final = torch.empty(self.documents, self.heads, K, V, **numbers)
        states = torch.empty(self.slots, V, K, dtype=v.dtype, device=v.device) if keep else None
        maps = local = None
        if plan.split:
            maps = torch.empty(units, self.heads, K, K, **numbers)
            local = torch.empty(units, self.heads, V, K, **numbers)
        for is_first in (True, False) if plan.split else (False,):
            tiles = (K + V if is_first else V) // BV
            scan_kernel[(self.heads * tiles, units)](
                *self.tiles(), self.ends, v, self.bounds, state, maps, local, out, final, states,
                *self.sizes, self.slots, plan.segment,
                **self.widths, BV=BV, MAPS=is_first, KEEP=keep and not is_first, SPLIT=plan.split,
                HAS_STATE=state is not None, **self.documents_are, STAGES=plan.stages, num_warps=4,
            )  # fmt: skip
            if is_first:
                combine_kernel[(self.heads * V // COMBINE_BV, self.documents)](
                    maps, local, self.bounds, *self.sizes, plan.segment,
                    **self.widths, BV=COMBINE_BV, **self.documents_are, num_warps=4,
                )  # fmt: skip
        return final, states

    def scan_in_cuda(self, v: Tensor, state: Tensor | None, plan: Plan, out: Tensor, keep: bool):
        """Do what `scan` does. With several pieces, each is prepared while the scan is at those before it."""
        K, V = self.widths.values()
        prepared = self.wide, self.square, self.ends, v, self.bounds
        states = torch.empty(self.slots, V, K, dtype=v.dtype, device=v.device) if keep else None
        in_pieces = plan.pieces > 1
        cuts = [n * self.chunks // plan.pieces for n in range(plan.pieces + 1)]
        before = [state]  # of each piece, kept until the second stream has read them
        for first, last in itertools.pairwise(cuts):
            chunks = range(first, last) if in_pieces else ALL
            if in_pieces:
                self.run(range(first * self.heads, last * self.heads))
            final = torch.empty(self.documents, self.heads, K, V, dtype=torch.float32, device=v.device)
            with on_side_stream(in_pieces, v.device):
                cuda_scan(KEEP if keep else OUTPUTS, *prepared, before[-1], final, out, states, chunks)
            before.append(final)
        if in_pieces:
            torch.cuda.current_stream(v.device).wait_stream(side_stream(v.device))
        return before[-1], states


def forward(q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound, scale, plan: Plan, out: Tensor) -> Tensor:
    """Write o to `out` and return the final states. Arguments are those of `deltify.ops.kda`, contiguous."""
    prepared = Prepared(q, k, v, f, b, A_log, dt_bias, cu_seqlens, lower_bound, scale, plan)
    return prepared.scan(v, state, plan, out)[0]


def backward(
    q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound, scale, plan: Plan, o, do, dfinal, out: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the gradients of q, k, v, f and b to `out`. Return those of A_log, dt_bias and the initial states.

    All intermediate results of the forward pass but its output `o` are computed again. `do` and `dfinal` are the
    gradients of the output and of the final states; `dfinal` may be None.
    """
    plan = replace(plan, pieces=1, split=plan.split and not plan.cuda)
    p = Prepared(q, k, v, f, b, A_log, dt_bias, cu_seqlens, lower_bound, scale, plan)
    dq, dk, dv, df, db = out
    if plan.cuda and do.data_ptr() % 16:  # as a tensor map needs
        do = do.clone()
    u = torch.empty_like(v)
    K, V = p.widths.values()
    dstates = torch.empty(p.slots, V, K, dtype=v.dtype, device=v.device)
    dstate = torch.empty(p.documents, p.heads, K, V, dtype=torch.float32, device=v.device)
    with on_side_stream(plan.beside, v.device):
        if plan.cuda:
            prepared = p.wide, p.square, p.ends, do, cu_seqlens
            cuda_scan(REVERSE, *prepared, dfinal, dstate, dv, dstates)
        else:
            reverse_kernel[(p.heads * (V // BV), p.documents)](
                *p.tiles(), p.ends, do, cu_seqlens, dfinal, dv, dstate, dstates, *p.sizes, p.slots,
                **p.widths, BV=BV, HAS_DFINAL=dfinal is not None, **p.documents_are, STAGES=plan.stages, num_warps=4,
            )  # fmt: skip
    if plan.beside:  # reverse takes as long as a scan that is not split
        plan = replace(plan, segment=triton.cdiv(p.tokens, C), split=False)
    _, states = p.scan(v, state, plan, u, keep=True)
    if plan.beside:
        torch.cuda.current_stream(v.device).wait_stream(side_stream(v.device))
    del p.wide, p.square, p.ends
    numbers = {"dtype": torch.float32, "device": v.device}
    dA_log, ddt_bias = (torch.empty(p.chunks, p.heads, K, **numbers) for _ in range(2))
    if plan.cuda:
        gates, found = (A_log, dt_bias, cu_seqlens, lower_bound, scale), (dq, dk, df, db, dA_log, ddt_bias)
        finish(q, k, f, v, b, *gates, o, u, do, dv, states, dstates, found)
        return dA_log.sum((0, 2)), ddt_bias.sum(0).flatten(), dstate
    pairs = torch.empty(4, p.slots, C, C, dtype=v.dtype, device=v.device)
    rows = torch.empty(p.slots, ROWS.value, C, **numbers)
    pairs_kernel[(p.chunks, p.heads)](
        q, k, v, b, cu_seqlens, u, o, do, dv, db, pairs, rows, *p.sizes, p.slots, scale,
        **p.widths, **p.documents_are, num_warps=4,
    )  # fmt: skip
    partial = torch.empty(q.shape, **numbers)
    for queries in (True, False):
        finish_kernel[(p.chunks, p.heads * (K // plan.channels))](
            *p.tables(), q, k, f, A_log, dt_bias, cu_seqlens, u, do, dv, states, dstates, pairs, rows,
            partial, dq, dk, df, dA_log, ddt_bias, *p.sizes, p.slots, *p.gate,
            **p.widths, BK=plan.channels, **p.bounded, **p.documents_are, QUERIES=queries, num_warps=4,
        )  # fmt: skip
    return dA_log.sum((0, 2)), ddt_bias.sum(0).flatten(), dstate

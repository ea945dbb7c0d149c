"""From tensors to launches: how a call is cut up, and the forward and backward as sequences of kernels."""

import threading
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .finish import ROWS, finish_kernel, pairs_kernel
from .prepare import prepare_kernel
from .scan import combine_kernel, reverse_kernel, scan_kernel
from .tiles import CHUNK, gate_dtype, make_tables

C = CHUNK.value
BV, COMBINE_BV = 64, 16  # value columns of a program of the scan, which four warps hold, and of combine


@dataclass(frozen=True)
class Plan:
    """How a call is cut up."""

    segment: int  # chunks of a segment
    split: bool  # whether a document has several segments
    stages: int = 3  # loads in flight in the scan
    channels: int = 64  # of a slice, in prepare and finish; Triton 3.6 computes slices of 32 and 16 wrong on Hopper


class Opened(threading.local):
    def __init__(self):
        self.devices: set[torch.device] = set()


OPENED = Opened()


def open_context(device: torch.device) -> None:
    """Gives this thread the GPU's context, once. Autograd's threads begin without one, which a tensor descriptor needs;
    Triton would open it at its first launch."""
    if device not in OPENED.devices:
        torch.zeros(1, device=device)
        OPENED.devices.add(device)


class Prepared:
    """A call's inputs, and what `prepare_kernel` makes of them."""

    def __init__(self, q, k, v, f, b, A_log, dt_bias, cu_seqlens, lower_bound, scale, plan: Plan):
        open_context(q.device)
        batch, tokens, heads, K = q.shape
        self.packed = cu_seqlens is not None
        self.documents = len(cu_seqlens) - 1 if self.packed else batch
        # without looking at the bounds, which would wait for the GPU: as many as there can be
        self.chunks = tokens // C + self.documents if self.packed else batch * triton.cdiv(tokens, C)
        self.slots = self.chunks * heads
        self.bounds, self.tokens, self.heads = cu_seqlens, tokens, heads
        self.sizes = (self.documents, tokens, heads)
        self.widths = {"K": K, "V": v.shape[-1]}
        self.documents_are = {"PACKED": self.packed, "N2": triton.next_power_of_2(self.documents) if self.packed else 1}
        self.gate = (0.0 if lower_bound is None else lower_bound, scale)
        self.bounded = {"BOUNDED": lower_bound is not None}
        wide = torch.empty(3 * self.slots * C, K, dtype=q.dtype, device=q.device)
        square = torch.empty(2 * self.slots * C, C, dtype=q.dtype, device=q.device)
        self.ends = torch.empty(self.slots, K, dtype=torch.float32, device=q.device)
        self.wide = TensorDescriptor.from_tensor(wide, [C, K])
        self.square = TensorDescriptor.from_tensor(square, [C, C])
        self.tables = make_tables(q.device, gate_dtype(q.dtype)), make_tables(q.device, q.dtype)
        slices = TensorDescriptor.from_tensor(wide, [C, plan.channels])
        prepare_kernel[(self.chunks, heads)](
            *self.tables, q, k, f, b, A_log, dt_bias, cu_seqlens, slices, self.square, self.ends,
            *self.sizes, self.slots, *self.gate,
            K=K, BK=plan.channels, **self.bounded, **self.documents_are, num_warps=4,
        )  # fmt: skip

    def scan(self, v: Tensor, state: Tensor | None, plan: Plan, out: Tensor, keep: bool = False):
        """Writes o, or with `keep` u, to `out`; returns the final states, and with `keep` those before each chunk."""
        K, V = self.widths.values()
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
                self.wide, self.square, self.ends, v, self.bounds, state, maps, local, out, final, states,
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


def forward(q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound, scale, plan: Plan, out: Tensor) -> Tensor:
    """Writes o to `out`, returns the final states; arguments as in `deltify.ops.kda`, contiguous, `state` or None."""
    prepared = Prepared(q, k, v, f, b, A_log, dt_bias, cu_seqlens, lower_bound, scale, plan)
    return prepared.scan(v, state, plan, out)[0]


def backward(
    q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound, scale, plan: Plan, o, do, dfinal, out: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes the gradients of q, k, v, f and b to `out`; returns those of A_log, dt_bias and the initial states.

    Everything but the inputs and `o`, the forward's output, is computed again.

    Args:
        do, dfinal: gradients of the output and of the final states; the latter may be None.
    """
    p = Prepared(q, k, v, f, b, A_log, dt_bias, cu_seqlens, lower_bound, scale, plan)
    dq, dk, dv, df, db = out
    u = torch.empty_like(v)
    _, states = p.scan(v, state, plan, u, keep=True)
    K, V = p.widths.values()
    dstates = torch.empty_like(states)
    dstate = torch.empty(p.documents, p.heads, K, V, dtype=torch.float32, device=v.device)
    reverse_kernel[(p.heads * (V // BV), p.documents)](
        p.wide, p.square, p.ends, do, cu_seqlens, dfinal, dv, dstate, dstates, *p.sizes, p.slots,
        **p.widths, BV=BV, HAS_DFINAL=dfinal is not None, **p.documents_are, STAGES=plan.stages, num_warps=4,
    )  # fmt: skip
    del p.wide, p.square, p.ends
    numbers = {"dtype": torch.float32, "device": v.device}
    pairs = torch.empty(4, p.slots, C, C, dtype=v.dtype, device=v.device)
    rows = torch.empty(p.slots, ROWS.value, C, **numbers)
    pairs_kernel[(p.chunks, p.heads)](
        q, k, v, b, cu_seqlens, u, o, do, dv, db, pairs, rows, *p.sizes, p.slots, scale,
        **p.widths, **p.documents_are, num_warps=4,
    )  # fmt: skip
    dA_log, ddt_bias = (torch.empty(p.chunks, p.heads, K, **numbers) for _ in range(2))
    partial = torch.empty(q.shape, **numbers)
    for queries in (True, False):
        finish_kernel[(p.chunks, p.heads * (K // plan.channels))](
            *p.tables, q, k, f, A_log, dt_bias, cu_seqlens, u, do, dv, states, dstates, pairs, rows,
            partial, dq, dk, df, dA_log, ddt_bias, *p.sizes, p.slots, *p.gate,
            **p.widths, BK=plan.channels, **p.bounded, **p.documents_are, QUERIES=queries, num_warps=4,
        )  # fmt: skip
    return dA_log.sum((0, 2)), ddt_bias.sum(0).flatten(), dstate

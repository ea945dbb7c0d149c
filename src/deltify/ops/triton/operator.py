"""The operator and its gradients on a GPU: long sequences in parts, for autograd and for torch.compile.

Legend: B batch, T tokens, H heads, K key width, V value width, N documents (sequences, or packed).
"""

import functools
from dataclasses import replace

import torch
from torch import Tensor

from .launch import BV, C, Plan, backward, forward
from .selfcheck import failure, runs_in_cuda
from .tiles import wants_gradients

# token-heads of a part: what a part's intermediate results take, 1 KB and 2.5 KB a token-head, bounds the memory
PART, PART_BACKWARD = 2**20, 2**18
# token-heads of a piece that is prepared while the scan is at another, and of a backward pass whose scans run at the
# same time. Less is not worth the time of the launches. In a CUDA graph, launches cost next to nothing, so that plans
# of captured and of eager calls differ
PIECE = 2**17
# Only the scan in Triton splits a sequence into segments. With this many, it is faster than the one in CUDA C++
SEGMENTS = 8


@functools.cache
def processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def make_plan(documents: int, tokens: int, heads: int, V: int, count: int) -> Plan:
    """Return the plan for documents of `tokens` tokens on average, on a GPU with `count` multiprocessors.

    Splitting the sequence costs another pass. It pays off where less than half of the GPU would be busy. There, the two
    scans of the backward pass also run at the same time.
    """
    chunks, tiles = -(-tokens // C), documents * heads * V // BV
    few = tiles * 2 <= count
    parts = max(1, min(count // tiles, chunks // 16)) if few and chunks >= 64 else 1
    return Plan(max(1, -(-chunks // parts)), parts > 1, beside=few)


def plan_for(q, k, v, f, b, A_log, dt_bias, cu_seqlens: Tensor | None, gradients: bool) -> Plan:
    """Return the plan of a forward pass, or with `gradients` of a backward pass."""
    batch, tokens, heads, V = v.shape
    count = processors(v.device.index or 0)
    documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
    length = tokens if cu_seqlens is None else tokens // documents  # on average
    plan, chunks = make_plan(documents, length, heads, V, count), -(-length // C)
    captured = v.is_cuda and torch.cuda.is_current_stream_capturing()
    if runs_in_cuda(q, k, v, f, b, A_log, dt_bias, cu_seqlens, gradients):
        one_row = batch == 1 and cu_seqlens is None and plan.beside
        pieces = min(8, tokens * heads // PIECE) if one_row and not gradients else 0
        pieces = max(2 if captured and pieces else 1, pieces)
        split = plan.split and not gradients and -(-chunks // plan.segment) >= SEGMENTS
        split = split and not failure(v.device.index, "cuda split", v.shape[-1])
        plan = replace(plan, cuda=True, split=split, pieces=pieces)
    if cu_seqlens is not None and not plan.split:
        # reading the lengths of documents would wait for the GPU, so one document may have all tokens
        plan = replace(plan, segment=-(-tokens // C))
    pays = captured or batch * tokens * heads >= PIECE
    return replace(plan, beside=plan.beside and v.is_cuda and pays)


def parts(v: Tensor, cu_seqlens: Tensor | None, limit: int) -> list[slice]:
    """Return parts of whole chunks to process in turn. There is one part unless there is a single long sequence."""
    batch, tokens, heads, _ = v.shape
    count = -(-tokens * heads // limit) if batch == 1 and cu_seqlens is None else 1
    size = -(-tokens // (count * C)) * C
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def run_forward(
    q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound, scale, *, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return o and the states after each part, the last of which are the final ones.

    With `keep`, a backward pass follows, which needs smaller parts.
    """
    rows, gates = [x.contiguous() for x in (q, k, v, f, b)], (A_log.contiguous(), dt_bias.contiguous())
    o, states = torch.empty_like(rows[2]), []
    state, cu_seqlens = (None if x is None else x.contiguous() for x in (state, cu_seqlens))
    with torch.cuda.device_of(v):
        for part in parts(v, cu_seqlens, PART_BACKWARD if keep else PART):
            now = [x[:, part] for x in rows]
            plan = plan_for(*now, *gates, cu_seqlens, False)
            state = forward(*now, *gates, state, cu_seqlens, lower_bound, scale, plan, o[:, part])
            states.append(state)
    return o, states


def run_backward(
    q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound, scale, o, between, do, dstate
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v, f, b, A_log, dt_bias and the initial states.

    `between` has the states after all parts but the last. `dstate` is the gradient of the final states, or None.
    """
    rows, gates = [x.contiguous() for x in (q, k, v, f, b)], (A_log.contiguous(), dt_bias.contiguous())
    out = [torch.empty_like(x) for x in rows]
    do, shares = do.contiguous(), []
    state, cu_seqlens, dstate = (None if x is None else x.contiguous() for x in (state, cu_seqlens, dstate))
    with torch.cuda.device_of(v):
        for part, begin in reversed(list(zip(parts(v, cu_seqlens, PART_BACKWARD), [state, *between]))):
            now, here = [x[:, part] for x in rows], [x[:, part] for x in out]
            plan, gradients = plan_for(*now, *gates, cu_seqlens, True), (o[:, part], do[:, part], dstate, here)
            *share, dstate = backward(*now, *gates, begin, cu_seqlens, lower_bound, scale, plan, *gradients)
            shares.append(share)
    dA_log, ddt_bias = (functools.reduce(torch.add, x) for x in zip(*shares))
    return *out, dA_log.to(A_log.dtype), ddt_bias.to(dt_bias.dtype), dstate


class _Kda(torch.autograd.Function):
    """The operator with gradients. Saves its inputs, its output and one state for each part."""

    @staticmethod
    def forward(ctx, *arguments):
        o, states = run_forward(*arguments, keep=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments[:9], o, *states[:-1])
        ctx.options = arguments[9:]
        return o, states[-1]

    @staticmethod
    def backward(ctx, *gradients):
        do, dstate = gradients
        saved = ctx.saved_tensors  # read once: a layer with activation checkpointing returns them only once
        *arguments, o = saved[:10]
        do = torch.zeros_like(o) if do is None else do
        found = run_backward(*arguments, *ctx.options, o, saved[10:], do, dstate)
        return *found[:7], found[7] if arguments[7] is not None else None, None, None, None


# ---- for torch.compile, which sees only shapes -----------------------------------------------------------------------


@torch.library.custom_op("deltify::kda", mutates_args=())
def kda_op(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, state: Tensor | None,
    cu_seqlens: Tensor | None, lower_bound: float | None, scale: float,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    o, states = run_forward(q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound, scale, keep=True)
    return o, states[-1], states[:-1]


@torch.library.custom_op("deltify::kda_backward", mutates_args=())
def kda_backward_op(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, state: Tensor | None,
    cu_seqlens: Tensor | None, lower_bound: float | None, scale: float, o: Tensor, between: list[Tensor], do: Tensor,
    dstate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return run_backward(q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound, scale, o, between, do, dstate)


def new_state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    documents = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_empty(documents, *q.shape[2:], v.shape[-1], dtype=torch.float32)


@kda_op.register_fake
def _(q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound, scale):
    between = [new_state(q, v, cu_seqlens) for _ in parts(v, cu_seqlens, PART_BACKWARD)[1:]]
    return torch.empty_like(v), new_state(q, v, cu_seqlens), between


@kda_backward_op.register_fake
def _(q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound, scale, o, between, do, dstate):
    return *(torch.empty_like(x) for x in (q, k, v, f, b, A_log, dt_bias)), new_state(q, v, cu_seqlens)


def save_for_op(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:9], output[0], *output[2])
    ctx.options = inputs[9:]


def differentiate_op(ctx, do, dstate, _):
    saved = ctx.saved_tensors
    *arguments, o = saved[:10]
    found = torch.ops.deltify.kda_backward(*arguments, *ctx.options, o, list(saved[10:]), do, dstate)
    return *found[:7], found[7] if arguments[7] is not None else None, None, None, None


kda_op.register_autograd(differentiate_op, setup_context=save_for_op)


def kda_triton(q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound, scale) -> tuple[Tensor, Tensor]:
    """Return output and final states of KDA. Arguments are those of `deltify.ops.kda`; `state` may be None."""
    arguments = (q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound, scale)
    if wants_gradients(*arguments[:8]):
        return _Kda.apply(*arguments)
    o, states = run_forward(*arguments, keep=False)
    return o, states[-1]

"""The GPU backend: which calls it takes, how it cuts them up, and whether this machine computes them right.

Importing needs Triton, which comes with torch on Linux with CUDA.
"""

import functools

import torch
import triton
from torch import Tensor

from ..chunked import kda_chunked
from ..step import layer_step_torch
from .decode import layer_step
from .forward import CHUNK, Plan, forward

__all__ = ["forward", "kda_triton", "layer_step", "make_plan", "refusal"]

WIDTHS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16)
TOLERANCE = 0.01  # RMS of the difference over RMS of the reference


def refusal(q: Tensor, v: Tensor) -> str | None:
    """Why these inputs cannot run here, or None."""
    if q.dtype not in DTYPES or v.dtype != q.dtype:
        return f"{q.dtype} (fast are bfloat16 and float16)"
    if q.shape[-1] not in WIDTHS or v.shape[-1] not in WIDTHS:
        return f"heads of K={q.shape[-1]}, V={v.shape[-1]} (fast are 64 and 128)"
    return failure(q.device.index or 0)


@functools.cache
def failure(device: int) -> str | None:
    """What is wrong with the kernels on this device: a small comparison with the CPU's results, at the first use.

    Compilers differ in what they get wrong, and small chips in what they have room for; a wrong result is worse than a
    slow one.
    """
    name = f"this GPU ({torch.cuda.get_device_name(device)}, Triton {triton.__version__})"
    try:
        error = largest_error(f"cuda:{device}", torch.bfloat16)
    except Exception as error:  # what a compiler or driver raises has no common type
        return f"{name}: {type(error).__name__} {str(error)[:80]}"
    return None if error < TOLERANCE else f"{name}: wrong results, error {error:.2g}"


def largest_error(place: str, dtype: torch.dtype) -> float:
    """RMS of the difference over RMS of the reference, the largest of outputs and states of all kernels."""
    generator, pairs = torch.Generator().manual_seed(0), []
    draw = functools.partial(torch.randn, generator=generator)
    for width in WIDTHS:
        raw = [draw(1, 300, 2, width) for _ in range(4)] + [draw(1, 300, 2)]
        gates = [torch.rand(2, generator=generator), draw(2 * width)]
        zeros = torch.zeros(1, 2, width, width, dtype=torch.float64)
        want = kda_chunked(*(x.double() for x in raw + gates), zeros, None, None, width**-0.5)
        inputs = [x.to(place, dtype) for x in raw] + [x.to(place) for x in gates]
        for plan in (Plan(32, 8, False, 3), Plan(64, 8, False), Plan(32, 2, True, 3)):
            pairs += zip(forward(*inputs, None, None, None, width**-0.5, plan), want)

        x, past, taps = draw(3, 6 * width), draw(3, 6 * width, 3), draw(6 * width, 1, 4)
        rest = [draw(3, 2 * width), draw(3, 2), draw(3, 2 * width), *gates, torch.ones(width)]
        state, results = draw(3, 2, width, width), []
        for step, where in ((layer_step_torch, "cpu"), (layer_step, place)):
            states = [t.to(where, copy=True) for t in (past, state)]
            arguments = (x.to(where), states[0], taps.to(where), *(t.to(where) for t in rest), states[1])
            results.append([step(*arguments, norm_eps=1e-5, lower_bound=None) for _ in range(4)] + states)
        pairs += zip(results[1], results[0])
    errors = [(got.cpu().double() - ref).square().mean() / ref.double().square().mean() for got, ref in pairs]
    return float(torch.stack(errors).max().sqrt())  # NaN, if any is


@functools.cache
def processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def make_plan(documents: int, tokens: int, heads: int, V: int, count: int) -> Plan:
    """How to cut up documents of `tokens` tokens on average for a chip of `count` multiprocessors.

    A wide tile of value columns reads less, a narrow one has shorter steps and leaves fewer processors idle. Splitting
    the sequence costs a pass more: it pays where less than half of the chip would work.
    """
    chunks = -(-tokens // CHUNK.value)
    BV = 64 if documents * heads * V // 64 >= 0.9 * count else 32
    tiles = documents * heads * V // BV
    parts = max(1, min(count // tiles, chunks // 8)) if tiles * 2 <= count else 1
    return Plan(BV, max(1, -(-chunks // parts)), parts > 1, stages=2 if BV == 64 else 3)


@torch.library.custom_op("deltify::kda_forward", mutates_args=())
def kda_forward(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, state: Tensor | None,
    cu_seqlens: Tensor | None, lower_bound: float | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, tokens, heads, _ = q.shape
    documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
    plan = make_plan(documents, batch * tokens // documents, heads, v.shape[-1], processors(q.device.index))
    inputs = (x.contiguous() for x in (q, k, v, f, b, A_log, dt_bias))
    state = None if state is None else state.contiguous()
    return forward(*inputs, state, cu_seqlens, lower_bound, scale, plan)


@kda_forward.register_fake
def _(q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound, scale):
    documents = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.empty_like(v), q.new_empty(documents, *q.shape[2:], v.shape[-1], dtype=torch.float32)


def kda_triton(q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound, scale):
    """Output and final state of KDA; arguments are those of `deltify.ops.kda`, `state` may be None. No gradients."""
    return kda_forward(q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound, scale)

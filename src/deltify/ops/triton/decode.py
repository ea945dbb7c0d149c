"""Decode one token of a KDA layer in one launch: convolutions, norms, gates, state, output, gated RMSNorm.

Legend: B batch, H heads, K key width, V value width, W taps of the convolutions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import L2NORM_EPS
from .tiles import LOG2E, log2_decay

EPS = tl.constexpr(L2NORM_EPS)


@triton.jit
def convolve(x_ptr, past_ptr, taps_ptr, channel, row, width, W: tl.constexpr):
    """Return SiLU of the convolution of some channels at the new token."""
    past_at = past_ptr + (row * width + channel) * (W - 1)
    x = tl.load(x_ptr + row * width + channel).to(tl.float32)
    y = x * tl.load(taps_ptr + channel * W + W - 1).to(tl.float32)
    for w in tl.static_range(W - 1):
        y += tl.load(past_at + w).to(tl.float32) * tl.load(taps_ptr + channel * W + w).to(tl.float32)
    return y / (1.0 + tl.exp2(y * -LOG2E))


@triton.jit
def decode_kernel(
    x_ptr, past_ptr, taps_ptr, f_ptr, b_ptr, gate_ptr, A_log_ptr, dt_bias_ptr, weight_ptr, state_ptr, out_ptr, row_ptr,
    heads, scale, lower_bound, norm_eps,
    K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Compute one head of one sequence."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    keys, values = tl.arange(0, K), tl.arange(0, V)
    of_state = keys[:, None] * V + values[None, :]
    state_ptr += (row * heads + head) * K * V
    S = tl.load(state_ptr + of_state)
    width = heads * (2 * K + V)
    of_q, of_k, of_v = head * K + keys, (heads + head) * K + keys, 2 * heads * K + head * V + values
    q = convolve(x_ptr, past_ptr, taps_ptr, of_q, row, width, W)
    k = convolve(x_ptr, past_ptr, taps_ptr, of_k, row, width, W)
    v = convolve(x_ptr, past_ptr, taps_ptr, of_v, row, width, W)
    q *= scale * tl.rsqrt(tl.sum(q * q, 0) + EPS)
    k *= tl.rsqrt(tl.sum(k * k, 0) + EPS)
    f = tl.load(f_ptr + (row * heads + head) * K + keys).to(tl.float32)
    bias = tl.load(dt_bias_ptr + head * K + keys).to(tl.float32)
    rate = tl.exp(tl.load(A_log_ptr + head).to(tl.float32))
    decay = tl.exp2(log2_decay(f, bias, rate, lower_bound, BOUNDED))
    # each value was computed by one thread; through memory it reaches all threads with a part of its row of the state
    mine = row_ptr + (row * heads + head) * (3 * K + 2 * V)
    tl.store(mine + keys, q)
    tl.store(mine + K + keys, k)
    tl.store(mine + 2 * K + keys, decay)
    tl.store(mine + 3 * K + values, v)
    tl.debug_barrier()
    q, k, decay = tl.load(mine + keys), tl.load(mine + K + keys), tl.load(mine + 2 * K + keys)
    beta = tl.sigmoid(tl.load(b_ptr + row * heads + head).to(tl.float32))
    at = mine + 3 * K + values
    S *= decay[:, None]
    u = beta * (tl.load(at) - tl.sum(S * k[:, None], 0))
    S += k[:, None] * u[None, :]
    o = tl.sum(S * q[:, None], 0)
    tl.store(state_ptr + of_state, S)
    squares = tl.sum(o * o, 0)
    tl.store(at + V, o)
    tl.debug_barrier()
    at = (row * heads + head) * V + values
    gate = tl.load(gate_ptr + at).to(tl.float32)
    o = (
        tl.load(mine + 3 * K + V + values)
        * tl.rsqrt(squares / V + norm_eps)
        * tl.load(weight_ptr + values).to(tl.float32)
    )
    tl.store(out_ptr + at, (o / (1.0 + tl.exp2(gate * -LOG2E))).to(out_ptr.dtype.element_ty))
    # several threads may hold the same channel, so a barrier before each store keeps them from reading new values
    x_at, past_at = x_ptr + row * width, past_ptr + row * width * (W - 1)
    for w in tl.static_range(W - 1):
        if w < W - 2:
            new_q, new_k, new_v = (
                tl.load(past_at + of_q * (W - 1) + w + 1),
                tl.load(past_at + of_k * (W - 1) + w + 1),
                tl.load(past_at + of_v * (W - 1) + w + 1),
            )
        else:
            new_q, new_k, new_v = tl.load(x_at + of_q), tl.load(x_at + of_k), tl.load(x_at + of_v)
        tl.debug_barrier()
        tl.store(past_at + of_q * (W - 1) + w, new_q)
        tl.store(past_at + of_k * (W - 1) + w, new_k)
        tl.store(past_at + of_v * (W - 1) + w, new_v)


def layer_step(
    x: Tensor, past: Tensor, taps: Tensor, f: Tensor, b: Tensor, gate: Tensor, A_log: Tensor, dt_bias: Tensor,
    weight: Tensor, state: Tensor, *, norm_eps: float, lower_bound: float | None,
) -> Tensor:  # fmt: skip
    """Compute `deltify.ops.kda_layer_step` on contiguous tensors."""
    batch, heads, K, V = state.shape
    out = torch.empty(batch, heads * V, dtype=x.dtype, device=x.device)
    row = torch.empty(batch, heads, 3 * K + 2 * V, dtype=torch.float32, device=x.device)
    decode_kernel[(heads, batch)](
        x, past, taps, f, b, gate, A_log, dt_bias, weight, state, out, row,
        heads, K**-0.5, lower_bound or 0.0, norm_eps,
        K=K, V=V, W=taps.shape[-1], BOUNDED=lower_bound is not None,
        num_warps=4,
    )  # fmt: skip
    return out

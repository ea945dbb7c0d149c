"""One token of a whole KDA layer in one launch: convolutions, norms, gate, state, output, gated RMSNorm.

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
def convolve(x_ptr, past_ptr, taps_ptr, channel, row, width, W: tl.constexpr, W2: tl.constexpr):
    """SiLU of the convolution of some channels at the new token, and their next past, which is for the caller to store.

    Not here: threads may hold the same channel, and one would read what another has stored.
    """
    w = tl.arange(0, W2)[None, :]
    past_at = past_ptr + (row * width + channel[:, None]) * (W - 1) + w
    x = tl.load(x_ptr + row * width + channel)[:, None]
    window = tl.where(w == W - 1, x, tl.load(past_at, mask=w < W - 1, other=0.0))
    taps = tl.load(taps_ptr + channel[:, None] * W + w, mask=w < W, other=0.0)
    y = tl.sum(window.to(tl.float32) * taps.to(tl.float32), 1)
    moved = tl.where(w == W - 2, x, tl.load(past_at + 1, mask=w < W - 2, other=0.0))
    return y / (1.0 + tl.exp2(y * -LOG2E)), moved, past_at


@triton.jit
def decode_kernel(
    x_ptr, past_ptr, taps_ptr, f_ptr, b_ptr, gate_ptr, A_log_ptr, dt_bias_ptr, weight_ptr, state_ptr, out_ptr,
    heads, scale, lower_bound, norm_eps,
    K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, W2: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    keys, values = tl.arange(0, K), tl.arange(0, V)
    state_at = state_ptr + ((row * heads + head) * K + keys[:, None]) * V + values[None, :]
    S = tl.load(state_at)
    width = heads * (2 * K + V)
    q, q_past, q_at = convolve(x_ptr, past_ptr, taps_ptr, head * K + keys, row, width, W, W2)
    k, k_past, k_at = convolve(x_ptr, past_ptr, taps_ptr, (heads + head) * K + keys, row, width, W, W2)
    v, v_past, v_at = convolve(x_ptr, past_ptr, taps_ptr, 2 * heads * K + head * V + values, row, width, W, W2)
    tl.debug_barrier()
    kept = tl.arange(0, W2)[None, :] < W - 1
    tl.store(q_at, q_past, mask=kept)
    tl.store(k_at, k_past, mask=kept)
    tl.store(v_at, v_past, mask=kept)
    q *= scale * tl.rsqrt(tl.sum(q * q, 0) + EPS)
    k *= tl.rsqrt(tl.sum(k * k, 0) + EPS)
    f = tl.load(f_ptr + (row * heads + head) * K + keys).to(tl.float32)
    bias = tl.load(dt_bias_ptr + head * K + keys).to(tl.float32)
    rate = tl.exp(tl.load(A_log_ptr + head).to(tl.float32))
    beta = tl.sigmoid(tl.load(b_ptr + row * heads + head).to(tl.float32))
    S *= tl.exp2(log2_decay(f, bias, rate, lower_bound, BOUNDED))[:, None]
    u = beta * (v - tl.sum(S * k[:, None], 0))
    S += k[:, None] * u[None, :]
    tl.store(state_at, S)
    o = tl.sum(S * q[:, None], 0)
    at = (row * heads + head) * V + values
    gate = tl.load(gate_ptr + at).to(tl.float32)
    o *= tl.rsqrt(tl.sum(o * o, 0) / V + norm_eps) * tl.load(weight_ptr + values).to(tl.float32)
    tl.store(out_ptr + at, (o / (1.0 + tl.exp2(gate * -LOG2E))).to(out_ptr.dtype.element_ty))


def layer_step(
    x: Tensor, past: Tensor, taps: Tensor, f: Tensor, b: Tensor, gate: Tensor, A_log: Tensor, dt_bias: Tensor,
    weight: Tensor, state: Tensor, *, norm_eps: float, lower_bound: float | None,
) -> Tensor:  # fmt: skip
    """As `deltify.ops.kda_layer_step`, on contiguous tensors."""
    batch, heads, K, V = state.shape
    out = torch.empty(batch, heads * V, dtype=x.dtype, device=x.device)
    decode_kernel[(heads, batch)](
        x, past, taps, f, b, gate, A_log, dt_bias, weight, state, out,
        heads, K**-0.5, lower_bound or 0.0, norm_eps,
        K=K, V=V, W=taps.shape[-1], W2=triton.next_power_of_2(taps.shape[-1]), BOUNDED=lower_bound is not None,
        num_warps=8 if K * V > 4096 else 4,
    )  # fmt: skip
    return out

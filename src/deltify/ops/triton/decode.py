"""One token of a whole KDA layer in one launch: convolutions, norms, gate, state, output, gated RMSNorm.

Legend: B batch, H heads, K key width, V value width, W taps of the convolutions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import L2NORM_EPS
from .forward import LOG2E, log2_decay

EPS = tl.constexpr(L2NORM_EPS)


@triton.jit
def convolve(x_ptr, past_ptr, taps_ptr, channel, row, width, W: tl.constexpr):
    """SiLU of the convolution of some channels at the new token, whose input joins the past."""
    past_at = past_ptr + (row * width + channel) * (W - 1)
    x = tl.load(x_ptr + row * width + channel)
    y = x.to(tl.float32) * tl.load(taps_ptr + channel * W + W - 1).to(tl.float32)
    for w in tl.static_range(W - 1):
        before = tl.load(past_at + w)
        y += before.to(tl.float32) * tl.load(taps_ptr + channel * W + w).to(tl.float32)
        if w > 0:
            tl.store(past_at + w - 1, before)
    tl.store(past_at + W - 2, x.to(past_ptr.dtype.element_ty))
    return y / (1.0 + tl.exp2(y * -LOG2E))


@triton.jit
def decode_kernel(
    x_ptr, past_ptr, taps_ptr, f_ptr, b_ptr, gate_ptr, A_log_ptr, dt_bias_ptr, weight_ptr, state_ptr, out_ptr,
    heads, scale, lower_bound, norm_eps,
    K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    keys, values = tl.arange(0, K), tl.arange(0, V)
    state_at = state_ptr + ((row * heads + head) * K + keys[:, None]) * V + values[None, :]
    S = tl.load(state_at)
    width = heads * (2 * K + V)
    q = convolve(x_ptr, past_ptr, taps_ptr, head * K + keys, row, width, W)
    k = convolve(x_ptr, past_ptr, taps_ptr, (heads + head) * K + keys, row, width, W)
    v = convolve(x_ptr, past_ptr, taps_ptr, 2 * heads * K + head * V + values, row, width, W)
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
    weight: Tensor, state: Tensor, *, norm_eps: float, lower_bound: float | None, scale: float,
) -> Tensor:  # fmt: skip
    """As `deltify.ops.kda_layer_step`, on contiguous tensors."""
    batch, heads, K, V = state.shape
    out = torch.empty(batch, heads * V, dtype=x.dtype, device=x.device)
    decode_kernel[(heads, batch)](
        x, past, taps, f, b, gate, A_log, dt_bias, weight, state, out,
        heads, scale, lower_bound or 0.0, norm_eps,
        K=K, V=V, W=taps.shape[-1], BOUNDED=lower_bound is not None, num_warps=8 if K * V > 4096 else 4,
    )  # fmt: skip
    return out

"""The Kimi Delta Attention (KDA) operator: one entry, several backends.

Legend: B batch, T tokens, H heads, K key width, V value width, N states.
"""

from itertools import pairwise

import torch
from torch import Tensor

from .chunked import kda_chunked
from .conv import short_conv, short_conv_step
from .reference import L2NORM_EPS, kda_reference, log_decay

__all__ = ["BACKENDS", "kda", "kda_step", "short_conv", "short_conv_step"]

BACKENDS = {"reference": kda_reference, "chunked": kda_chunked}


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    lower_bound: float | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Output and final state of Kimi Delta Attention (arXiv 2510.26692, section 3), from raw inputs.

    Per head, with q and k L2-normalised, g the log-decay, beta = sigmoid(b) and S [K, V] the state::

        S  <- Diag(exp(g_t)) S
        u   = beta_t (v_t - S^T k_t)
        S  <- S + k_t u^T
        o_t = scale * S^T q_t

    Args:
        q, k: [B, T, H, K], after convolution and SiLU, not yet normalised.
        v: [B, T, H, V].
        f: [B, T, H, K], gate logits.
        b: [B, T, H], beta logits.
        A_log: [H], float32. g = -exp(A_log) softplus(f + dt_bias).
        dt_bias: [H * K], float32.
        state: [N, H, K, V], float32 (float64 if v is), N = B or the number of documents; zeros if absent.
        cu_seqlens: document bounds of a packed row, [documents + 1] int32, from 0 to T; then B = 1.
        lower_bound: in [-5, 0); selects g = lower_bound * sigmoid(exp(A_log) (f + dt_bias)) instead.
        scale: of the output, K^-1/2 if absent.
        backend: "auto", "chunked" or "reference".

    Returns:
        (o, state): [B, T, H, V] in v's dtype, and [N, H, K, V] in the state's dtype.

    Raises:
        ValueError: for a shape, bound or backend that does not fit; the message names it.
    """
    check_arguments(q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound)
    if backend == "auto":
        backend = "chunked"
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {['auto', *BACKENDS]}")
    if state is None:
        documents = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        dtype = torch.promote_types(v.dtype, torch.float32)
        state = torch.zeros(documents, *q.shape[2:], v.shape[-1], dtype=dtype, device=v.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return BACKENDS[backend](q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound, scale)


def kda_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    *,
    lower_bound: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """Output [B, H, V] of one token; `state` [B, H, K, V] is updated in place. For use under `torch.no_grad()`.

    Args:
        q, k, f: [B, H, K]. v: [B, H, V]. b: [B, H]. The rest as in `kda`.
    """
    work = state.dtype
    S = state.flatten(0, 1)
    kq = torch.stack((k, q), dim=2).flatten(0, 1).to(work)  # [B * H, 2, K]
    kq = kq * torch.linalg.vector_norm(kq, dim=-1, keepdim=True).square_().add_(L2NORM_EPS).rsqrt_()
    rate, bias = A_log.to(work).exp().unsqueeze(-1), dt_bias.to(work).view(f.shape[1:])
    decay = log_decay(f.to(work), rate, bias, lower_bound).exp_().view(len(S), -1, 1)
    read_k, read_q = torch.bmm(kq, S.mul_(decay)).unbind(1)
    u = torch.sigmoid(b.to(work)).reshape(-1, 1) * (v.to(work).reshape(read_k.shape) - read_k)
    k_unit, q_unit = kq.unbind(1)
    S.addcmul_(k_unit.unsqueeze(2), u.unsqueeze(1))
    o = torch.addcmul(read_q, (q_unit * k_unit).sum(-1, keepdim=True), u)
    return o.mul_(q.shape[-1] ** -0.5 if scale is None else scale).view(v.shape).to(v.dtype)


def check_arguments(q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound) -> None:
    """Raises ValueError, naming the argument, what was found and what is allowed."""
    if q.dim() != 4 or 0 in q.shape[:1] + q.shape[2:] or q.shape[1] < 1:
        raise ValueError(f"q has shape {tuple(q.shape)}; [B, T, H, K] with no empty dimension is needed")
    batch, tokens, heads, width = q.shape
    value_width = v.shape[-1]
    documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
    expected = {
        "k": (k, (batch, tokens, heads, width)),
        "v": (v, (batch, tokens, heads, value_width)),
        "f": (f, (batch, tokens, heads, width)),
        "b": (b, (batch, tokens, heads)),
        "A_log": (A_log, (heads,)),
        "dt_bias": (dt_bias, (heads * width,)),
        "state": (state, (documents, heads, width, value_width)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; with q {tuple(q.shape)} it must be {shape}")
    if lower_bound is not None and not -5 <= lower_bound < 0:
        raise ValueError(f"lower_bound={lower_bound} is not in [-5, 0); leave it out for the softplus gate")
    if cu_seqlens is None:
        return
    if batch != 1:
        raise ValueError(f"cu_seqlens needs one packed row, but q has {batch} rows; flatten them first")
    bounds = cu_seqlens.tolist()
    if bounds[:1] != [0] or bounds[-1] != tokens or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens={bounds} must rise from 0 to T={tokens}")

"""One decoding step in PyTorch: the recurrence, and a layer from its input projections to the input of `o_proj`.

Legend: B batch, H heads, K key width, V value width.
"""

import torch
from torch import Tensor

from .conv import short_conv_step
from .reference import L2NORM_EPS, gated_rms_norm, log_decay


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
    """Return the output [B, H, V] for one token, and update `state` in place. For use under `torch.no_grad()`.

    Args:
        q: Queries [B, H, K].
        k: Keys [B, H, K].
        v: Values [B, H, V].
        f: Decay logits [B, H, K].
        b: Beta logits [B, H].
        A_log: As in `kda`.
        dt_bias: As in `kda`.
        state: Recurrent states [B, H, K, V].
        lower_bound: As in `kda`.
        scale: As in `kda`.

    Raises:
        ValueError: If the state has another shape.
    """
    if state.shape != (*q.shape, v.shape[-1]):
        raise ValueError(f"state has shape {tuple(state.shape)}; with q {tuple(q.shape)} it must be [B, H, K, V]")
    work = state.dtype
    S = state.flatten(0, 1)  # a copy, if the state is not contiguous
    kq = torch.stack((k, q), dim=2).flatten(0, 1).to(work)  # [B * H, 2, K]
    kq = kq * torch.linalg.vector_norm(kq, dim=-1, keepdim=True).square_().add_(L2NORM_EPS).rsqrt_()
    rate, bias = A_log.to(work).exp().unsqueeze(-1), dt_bias.to(work).view(f.shape[1:])
    decay = log_decay(f.to(work), rate, bias, lower_bound).exp_().view(len(S), -1, 1)
    read_k, read_q = torch.bmm(kq, S.mul_(decay)).unbind(1)
    u = torch.sigmoid(b.to(work)).reshape(-1, 1) * (v.to(work).reshape(read_k.shape) - read_k)
    k_unit, q_unit = kq.unbind(1)
    S.addcmul_(k_unit.unsqueeze(2), u.unsqueeze(1))
    if not state.is_contiguous():
        state.copy_(S.view_as(state))
    o = torch.addcmul(read_q, (q_unit * k_unit).sum(-1, keepdim=True), u)
    return o.mul_(q.shape[-1] ** -0.5 if scale is None else scale).view(v.shape).to(v.dtype)


def layer_step_torch(
    x, conv_state, taps, f, b, gate, A_log, dt_bias, norm_weight, state, *, norm_eps: float, lower_bound: float | None
) -> Tensor:
    """Compute `deltify.ops.kda_layer_step` in PyTorch, on any device."""
    heads, K, V = state.shape[1:]
    q, k, v = short_conv_step(x, taps, conv_state).split([heads * K, heads * K, heads * V], dim=-1)
    q, k, v, f = (t.unflatten(-1, (heads, -1)) for t in (q, k, v, f))
    o = kda_step(q, k, v, f, b, A_log, dt_bias, state, lower_bound=lower_bound)
    return gated_rms_norm(o, gate.view_as(o), norm_weight, norm_eps).flatten(1)

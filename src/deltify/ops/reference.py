"""KDA token by token: the definition that every other backend is tested against.

Legend: B batch, T tokens, H heads, K key width, V value width, N states (of sequences, or of documents of a packed
sequence).
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

L2NORM_EPS = 1e-6


def l2norm(x: Tensor) -> Tensor:
    """Return x / sqrt(sum x^2 + 1e-6) over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2NORM_EPS)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return weight * RMSNorm(x) * sigmoid(gate) over the last dimension, computed in float32, in x's dtype."""
    work = torch.promote_types(x.dtype, torch.float32)
    y = x.to(work)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.to(work) * y * torch.sigmoid(gate.to(work))).to(x.dtype)


def log_decay(f: Tensor, rate: Tensor, bias: Tensor, lower_bound: float | None) -> Tensor:
    """Return the log-decay g <= 0 of each key channel from decay logits f.

    `rate` = exp(A_log) and `bias` = dt_bias broadcast to f.

    Without `lower_bound`: g = -rate softplus(f + bias) (Kimi Linear, arXiv 2510.26692, section 3).
    With it: g = lower_bound * sigmoid(rate (f + bias)), so that g stays above `lower_bound`.
    """
    x = f + bias
    if lower_bound is not None:
        return lower_bound * torch.sigmoid(rate * x)
    # torch's default threshold of 20 costs 2e-9; 80 is exact in float64 and does not overflow in float32
    return -rate * F.softplus(x, threshold=80)


def kda_reference(q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound, scale):
    """Compute the recurrence in the docstring of `deltify.ops.kda` by a Python loop. Autograd differentiates it.

    Arguments are those of `deltify.ops.kda` with defaults filled in. Computes in float64 if v is, else in float32.
    """
    work = torch.promote_types(v.dtype, torch.float32)
    q, k = (l2norm(x.to(work)) for x in (q, k))
    rate, bias = A_log.to(work).exp().view(-1, 1), dt_bias.to(work).view(f.shape[2:])
    decay = log_decay(f.to(work), rate, bias, lower_bound).exp()
    beta = torch.sigmoid(b.to(work))
    rows, states = [], []
    for n, (row, start, end) in enumerate(document_spans(v.shape[0], v.shape[1], cu_seqlens)):
        S_HKV = state[n].to(work)
        for t in range(start, end):
            S_HKV = decay[row, t].unsqueeze(-1) * S_HKV
            read_HV = torch.einsum("hkv,hk->hv", S_HKV, k[row, t])
            u_HV = beta[row, t].unsqueeze(-1) * (v[row, t].to(work) - read_HV)
            S_HKV = S_HKV + k[row, t].unsqueeze(-1) * u_HV.unsqueeze(-2)
            rows.append(scale * torch.einsum("hkv,hk->hv", S_HKV, q[row, t]))
        states.append(S_HKV)
    out = torch.stack(rows).view_as(v)
    return out.to(v.dtype), torch.stack(states)


def count_documents(batch: int, cu_seqlens: Tensor | None) -> int:
    """Return the number of documents, each of which has a state."""
    return batch if cu_seqlens is None else len(cu_seqlens) - 1


def document_spans(batch: int, tokens: int, cu_seqlens: Tensor | None) -> list[tuple[int, int, int]]:
    """Return (sequence, first token, end) of every document, in the order of the states."""
    if cu_seqlens is None:
        return [(row, 0, tokens) for row in range(batch)]
    bounds = cu_seqlens.tolist()
    return [(0, start, end) for start, end in pairwise(bounds)]

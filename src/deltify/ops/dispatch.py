"""One entry for each operation, which checks its arguments and chooses a backend.

Legend: B batch, T tokens, H heads, K key width, V value width, N states.
"""

import functools
import importlib
import logging
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from .chunked import kda_chunked
from .conv import short_conv_split_torch
from .reference import gated_rms_norm as gated_rms_norm_torch
from .reference import kda_reference
from .step import layer_step_torch

BACKENDS = {"reference": kda_reference, "chunked": kda_chunked}
LAYER_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
logger = logging.getLogger(__name__)


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
        cu_seqlens: document bounds of a packed row, [documents + 1] int32, from 0 to T; then B = 1. An empty document
            keeps its state, as all do where T = 0.
        lower_bound: in [-5, 0); selects g = lower_bound * sigmoid(exp(A_log) (f + dt_bias)) instead.
        scale: of the output, K^-1/2 if absent.
        backend: "auto", "triton" (kernels for NVIDIA GPUs), "chunked" or "reference".

    Returns:
        (o, state): [B, T, H, V] in v's dtype, and [N, H, K, V] in the state's dtype.

    Raises:
        ValueError: for a shape, bound or backend that does not fit; the message names it.
    """
    check_arguments(q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound)
    if not q.shape[1]:
        return torch.zeros_like(v), new_state(q, v, cu_seqlens) if state is None else state.clone()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    inputs = (q, k, v, f, b, A_log, dt_bias, state)
    gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if backend == "auto":
        backend = "chunked" if refused(q, v, gradients) else "triton"
    elif backend == "triton" and (reason := refused(q, v, gradients)):
        raise ValueError(f"backend='triton' cannot run this: {reason}; choose 'auto' or 'chunked'")
    if backend == "triton":
        if torch.compiler.is_compiling():
            return torch.ops.deltify.kda(*inputs, cu_seqlens, lower_bound, scale)[:2]
        return triton_kernels().kda_triton(*inputs, cu_seqlens, lower_bound, scale)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {['auto', 'triton', *BACKENDS]}")
    state = new_state(q, v, cu_seqlens) if state is None else state
    return BACKENDS[backend](q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound, scale)


def new_state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    documents = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    dtype = torch.promote_types(v.dtype, torch.float32)
    return torch.zeros(documents, *q.shape[2:], v.shape[-1], dtype=dtype, device=v.device)


@functools.cache
def triton_kernels() -> ModuleType | None:
    """The GPU kernels, or None where Triton is not installed."""
    try:
        return importlib.import_module("deltify.ops.triton")
    except ImportError:
        return None


def refused(q: Tensor, v: Tensor, gradients: bool) -> str | None:
    """Why the GPU kernels cannot take these inputs, or None; on a GPU said once."""
    return refusal(q.device.type, q.device.index or 0, q.dtype, v.dtype, q.shape[-1], v.shape[-1], gradients)


@torch.compiler.assume_constant_result  # torch.compile asks, and looks no further
def refusal(place: str, index: int, dtype: torch.dtype, v_dtype: torch.dtype, K: int, V: int, gradients: bool):
    if place != "cuda":
        return f"the inputs are on {place}, not on an NVIDIA GPU"
    kernels = triton_kernels()
    unfit = "Triton is not installed" if kernels is None else kernels.refusal(index, dtype, v_dtype, K, V, gradients)
    if unfit:
        notice(f"deltify: KDA runs without its GPU kernels: {unfit}")
    return unfit


@functools.cache
def notice(text: str) -> None:
    logger.warning(text)


def kda_layer_step(
    x: Tensor,
    conv_state: Tensor,
    taps: Tensor,
    f: Tensor,
    b: Tensor,
    gate: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    state: Tensor,
    *,
    norm_eps: float,
    lower_bound: float | None = None,
) -> Tensor:
    """A KDA layer for one token, from its input projections to what o_proj reads, [B, H * V]; on a GPU in one launch.

    Both states are updated in place. For use under `torch.no_grad()`.

    Args:
        x: [B, 2 H K + H V], the projections to q, k and v side by side, before the convolutions.
        conv_state: [B, 2 H K + H V, taps - 1], their last inputs.
        taps: [2 H K + H V, 1, taps].
        f: [B, H * K], gate logits. b: [B, H], beta logits. gate: [B, H * V], logits of the output gate.
        norm_weight: [V], of the gated RMSNorm, whose epsilon is `norm_eps`.
        state: [B, H, K, V], float32. The rest as in `kda`.
    """
    K, V = state.shape[2:]
    step = layer_step_torch
    in_place = conv_state.is_contiguous() and state.is_contiguous()
    if state.is_cuda and in_place and (kernels := triton_kernels()) and {K, V} <= set(kernels.WIDTHS):
        if reason := kernels.failure(state.device.index, "step", K) or kernels.failure(state.device.index, "step", V):
            notice(f"deltify: KDA runs without its GPU kernels: {reason}")
        else:
            step = kernels.layer_step
            x, taps, f, b, gate = (t.contiguous() for t in (x, taps, f, b, gate))
    arguments = (x, conv_state, taps, f, b, gate, A_log, dt_bias, norm_weight, state)
    return step(*arguments, norm_eps=norm_eps, lower_bound=lower_bound)


def short_conv_split(
    x: Tensor, taps: Tensor, parts: int, *, state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """`short_conv` of inputs that lie side by side, each part's outputs apart; on a GPU in one launch.

    Args:
        x: inputs, [B, T, D]; B = 1 with `cu_seqlens`.
        taps: [D, 1, W], no bias; the kernels take W = 4, as many as three parts, and use them in float32.
        parts: how many of equal width there are; a divisor of D.
        state: the W - 1 inputs before each document, [N, D, W - 1]; zeros if absent.
        cu_seqlens: document bounds of a packed row, [N + 1] int32; empty documents keep their state.

    Returns:
        (parts, state): contiguous tensors [B, T, D / parts], and [N, D, W - 1], in x's dtype.

    Raises:
        ValueError: if D is not a multiple of `parts`.
    """
    if x.shape[-1] % parts:
        raise ValueError(f"x has {x.shape[-1]} channels, which are not {parts} parts of equal width")
    kernels = layer_kernels(x, taps, x if state is None else state)
    if kernels is None or taps.shape[-1] != kernels.TAPS or parts > kernels.MAX_PARTS:
        return short_conv_split_torch(x, taps, parts, state, cu_seqlens)
    with torch.cuda.device_of(x):
        return kernels.short_conv_split(x, taps, parts, state, cu_seqlens)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * RMSNorm(x) * sigmoid(gate) over the last dimension, computed in float32, in x's dtype.

    Args:
        x, gate: [..., V]. weight: [V].
    """
    kernels = layer_kernels(x, gate, weight)
    if kernels is None or x.shape[-1] > kernels.MAX_WIDTH:
        return gated_rms_norm_torch(x, gate, weight, eps)
    with torch.cuda.device_of(x):
        return kernels.norm(x, gate, weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * RMSNorm(x) over the last dimension; what the weight meets is computed in float32 and in x's dtype.

    Args:
        x: [..., D]. weight: [D].

    Returns:
        [..., D], in the dtype that x's and the weight's promote to.
    """
    kernels = layer_kernels(x, weight)
    if kernels is None or x.shape[-1] > kernels.MAX_WIDTH:
        work = x.to(torch.promote_types(x.dtype, torch.float32))
        work = work * torch.rsqrt(work.pow(2).mean(-1, keepdim=True) + eps)
        return weight * work.to(x.dtype)
    with torch.cuda.device_of(x):
        return kernels.norm(x, None, weight, eps)


def layer_kernels(*tensors: Tensor) -> ModuleType | None:
    """The GPU kernels around the operator, if they take these tensors; torch.compile fuses the PyTorch forms itself."""
    if any(not x.is_cuda or x.dtype not in LAYER_DTYPES for x in tensors) or not tensors[0].numel():
        return None
    if torch.compiler.is_compiling() or (kernels := triton_kernels()) is None:
        return None
    if reason := kernels.failure(tensors[0].device.index, "layer"):
        notice(f"deltify: KDA runs without its GPU kernels: {reason}")
        return None
    return kernels


def check_arguments(q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound) -> None:
    """Raises ValueError, naming the argument, what was found and what is allowed."""
    if q.dim() != 4 or 0 in q.shape[:1] + q.shape[2:]:
        raise ValueError(f"q has shape {tuple(q.shape)}; [B, T, H, K] with no empty dimension but T is needed")
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
    if cu_seqlens.is_cuda:
        return  # to look at them would wait for the GPU; the kernels stay within T whatever they are
    bounds = cu_seqlens.tolist()
    if bounds[:1] != [0] or bounds[-1] != tokens or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens={bounds} must rise from 0 to T={tokens}")

"""One entry for each operation, which checks its arguments and chooses a backend.

Legend: B batch, T tokens, H heads, K key width, V value width, N states.
"""

import functools
import importlib
import logging
import os
from itertools import pairwise
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunked import kda_chunked
from .conv import short_conv_split_torch
from .reference import count_documents, kda_reference
from .reference import gated_rms_norm as gated_rms_norm_torch
from .step import layer_step_torch

BACKENDS = {"reference": kda_reference, "chunked": kda_chunked}
LAYER_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PARTS = {
    "layer": "short convolutions and norms run",
    "activation": "relu(x)^2 and its gradient run",
    "row product": "products of one row run",
}
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
    """Return output and final state of Kimi Delta Attention (arXiv 2510.26692, section 3), from raw inputs.

    Per head, with q and k L2-normalised, g the log-decay, beta = sigmoid(b) and S [K, V] the state::

        S  <- Diag(exp(g_t)) S
        u   = beta_t (v_t - S^T k_t)
        S  <- S + k_t u^T
        o_t = scale * S^T q_t

    Args:
        q: Queries [B, T, H, K], after convolution and SiLU, not normalised.
        k: Keys [B, T, H, K], likewise.
        v: Values [B, T, H, V].
        f: Decay logits [B, T, H, K].
        b: Beta logits [B, T, H].
        A_log: Logarithm of the decay rate, [H], float32. g = -exp(A_log) softplus(f + dt_bias).
        dt_bias: Bias of the decay logits, [H * K], float32.
        state: Initial states [N, H, K, V], float32 (float64 if v is). N is B or the number of documents. Defaults to
            zeros.
        cu_seqlens: Bounds of the documents of one packed sequence (B = 1), [documents + 1] int32, from 0 to T. An empty
            document keeps its state, as do all where T = 0.
        lower_bound: Lower bound of the log-decay, in [-5, 0). It selects g = lower_bound * sigmoid(exp(A_log)
            (f + dt_bias)) instead.
        scale: Factor of the output. Defaults to K^-1/2.
        backend: "auto", "triton" (kernels for NVIDIA GPUs), "chunked" or "reference".

    Returns:
        (o, state): [B, T, H, V] in v's dtype, and [N, H, K, V] in the state's dtype.

    Raises:
        ValueError: If a shape, a bound or the backend does not fit.
    """
    check_arguments(q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound)
    if not q.shape[1]:
        return torch.zeros_like(v), new_state(q, v, cu_seqlens) if state is None else state.clone()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    inputs = (q, k, v, f, b, A_log, dt_bias)
    gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*inputs, state))
    if backend == "auto":
        backend = "chunked" if refused(inputs, cu_seqlens, gradients) else "triton"
    elif backend == "triton" and (reason := refused(inputs, cu_seqlens, gradients)):
        raise ValueError(f"backend='triton' cannot run this: {reason}. Choose 'auto' or 'chunked'")
    if backend == "triton":
        if torch.compiler.is_compiling():
            return torch.ops.deltify.kda(*inputs, state, cu_seqlens, lower_bound, scale)[:2]
        kernels = triton_kernels()
        assert kernels is not None  # else the inputs are refused
        return kernels.kda_triton(*inputs, state, cu_seqlens, lower_bound, scale)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose from {['auto', 'triton', *BACKENDS]}")
    state = new_state(q, v, cu_seqlens) if state is None else state
    return BACKENDS[backend](q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound, scale)


def new_state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return initial states of zeros."""
    documents = count_documents(q.shape[0], cu_seqlens)
    dtype = torch.promote_types(v.dtype, torch.float32)
    return torch.zeros(documents, *q.shape[2:], v.shape[-1], dtype=dtype, device=v.device)


@functools.cache
def triton_kernels() -> ModuleType | None:
    """Return the GPU kernels, or None if Triton is not installed or the kernels are those of an older deltify."""
    try:
        kernels = importlib.import_module("deltify.ops.triton")
    except ImportError:
        return None
    # the code of a saved folder may be newer than the installed deltify, whose kernels it uses
    return kernels if hasattr(kernels, "row_product") else None


def refused(inputs: tuple[Tensor, ...], cu_seqlens: Tensor | None, gradients: bool) -> str | None:
    """Return why the GPU kernels cannot take these inputs (q, k, v, f, b, A_log, dt_bias), or None.

    On a GPU the reason is logged once.
    """
    q, _, v, *_ = inputs
    kernels = None if torch.compiler.is_compiling() or not q.is_cuda else triton_kernels()
    cuda = kernels is not None and kernels.fits(*inputs, cu_seqlens)
    return refusal(q.device.type, q.device.index or 0, q.dtype, v.dtype, q.shape[-1], v.shape[-1], gradients, cuda)


@torch.compiler.assume_constant_result  # torch.compile calls it and does not trace into it
def refusal(
    device_type: str, index: int, dtype: torch.dtype, v_dtype: torch.dtype, K: int, V: int, gradients: bool, cuda: bool
) -> str | None:
    """Return why the GPU kernels cannot take inputs of these types and sizes, or None.

    `cuda` says that those in CUDA C++ take them, on GPUs that run them.
    """
    if device_type != "cuda":
        return f"the inputs are on {device_type}, not on an NVIDIA GPU"
    kernels = triton_kernels()
    given = index, dtype, v_dtype, K, V, gradients, cuda
    unfit = "Triton is not installed" if kernels is None else kernels.refusal(*given)
    if unfit:
        notice(f"deltify: KDA runs without its GPU kernels: {unfit}")
    return unfit


def kernel_refusals(index: int) -> dict[str, str | None]:
    """Return for each part of the GPU kernels why this GPU does not run it, or None. Each part is compiled and run."""
    kernels = triton_kernels()
    if kernels is None:
        return {"all": "Triton is not installed"}
    return {
        part: next(filter(None, (kernels.failure(index, part, width) for width in kernels.WIDTHS)), None)
        for part in kernels.CHECKS
    }


def cuda_refusal(index: int, gradients: bool) -> str | None:
    """Return why this GPU runs KDA's forward or (`gradients`) backward pass in Triton and not in CUDA C++, or None.

    The kernels are compiled and run.
    """
    kernels = triton_kernels()
    assert kernels is not None  # else there is nothing to refuse
    if os.environ.get(kernels.KERNELS) == "triton":
        return f"{kernels.KERNELS}=triton"
    return next(filter(None, (kernels.cuda_refusal(index, width, gradients) for width in kernels.WIDTHS)), None)


@functools.cache
def notice(text: str) -> None:
    """Log a warning once."""
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
    """Return the input of `o_proj`, [B, H * V], for one token of a KDA layer; on a GPU in one launch.

    Both states are updated in place. For use under `torch.no_grad()`.

    Args:
        x: Projections to q, k and v side by side, before the convolutions, [B, 2 H K + H V].
        conv_state: Last inputs of the convolutions, [B, 2 H K + H V, taps - 1].
        taps: Taps of the convolutions, [2 H K + H V, 1, taps].
        f: Decay logits [B, H * K].
        b: Beta logits [B, H].
        gate: Logits of the output gate, [B, H * V].
        A_log: As in `kda`.
        dt_bias: As in `kda`.
        norm_weight: Weight of the gated RMSNorm, [V].
        state: Recurrent states [B, H, K, V], float32.
        norm_eps: Epsilon of the gated RMSNorm.
        lower_bound: As in `kda`.
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
    """Apply `short_conv` to concatenated inputs and return a tensor for each part; on a GPU in one launch.

    Args:
        x: Inputs [B, T, D] of all parts side by side. B = 1 with `cu_seqlens`.
        taps: Taps [D, 1, W], without bias. The GPU kernels support W = 4 and up to three parts, and use float32 taps.
        parts: Number of parts of equal width.
        state: The W - 1 inputs before each document, [N, D, W - 1]. Defaults to zeros.
        cu_seqlens: Bounds of the documents of a packed sequence, [N + 1] int32. Empty documents keep their state.

    Returns:
        (parts, state): contiguous tensors [B, T, D / parts], and [N, D, W - 1], in x's dtype.

    Raises:
        ValueError: If D is not a multiple of `parts`.
    """
    if x.shape[-1] % parts:
        raise ValueError(f"x has {x.shape[-1]} channels, which cannot be divided into {parts} equal parts")
    kernels = layer_kernels(x, taps, x if state is None else state)
    if kernels is None or taps.shape[-1] != kernels.TAPS or parts > kernels.MAX_PARTS:
        return short_conv_split_torch(x, taps, parts, state, cu_seqlens)
    with torch.cuda.device_of(x):
        return kernels.short_conv_split(x, taps, parts, state, cu_seqlens)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return weight * RMSNorm(x) * sigmoid(gate) over the last dimension, computed in float32, in x's dtype.

    Args:
        x: Inputs [..., V].
        gate: Logits of the gate, [..., V].
        weight: Weight [V].
        eps: Added to the mean square.
    """
    kernels = layer_kernels(x, gate, weight)
    if kernels is None or x.shape[-1] > kernels.MAX_WIDTH:
        return gated_rms_norm_torch(x, gate, weight, eps)
    with torch.cuda.device_of(x):
        return kernels.norm(x, gate, weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return weight * RMSNorm(x) over the last dimension.

    RMSNorm(x) is computed in float32 and rounded to x's dtype before the product with the weight.

    Args:
        x: Inputs [..., D].
        weight: Weight [D].
        eps: Added to the mean square.

    Returns:
        [..., D], in the dtype to which those of x and the weight promote.
    """
    kernels = layer_kernels(x, weight)
    if kernels is None or x.shape[-1] > kernels.MAX_WIDTH:
        work = x.to(torch.promote_types(x.dtype, torch.float32))
        work = work * torch.rsqrt(work.pow(2).mean(-1, keepdim=True) + eps)
        return weight * work.to(x.dtype)
    with torch.cuda.device_of(x):
        return kernels.norm(x, None, weight, eps)


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + y and its `rms_norm`; on a GPU without gradients in one launch."""
    plain = not torch.is_grad_enabled() and x.dtype == y.dtype and x.shape == y.shape
    kernels = layer_kernels(x, y, weight) if plain else None
    if kernels is None or x.shape[-1] > kernels.MAX_WIDTH:
        total = x + y
        return total, rms_norm(total, weight, eps)
    with torch.cuda.device_of(x):
        return kernels.add_norm(x, y, weight, eps)


def relu_squared(x: Tensor) -> Tensor:
    """Return relu(x)^2, the activation of AFM-4.5B's MLP (arXiv 2109.08668), in x's shape and dtype.

    On a GPU, it is one kernel. In PyTorch it is two, which take 8 % of the time of reading a text at AFM-4.5B's shape.
    """
    kernels = layer_kernels(x, part="activation")
    if kernels is None:
        return torch.relu(x).square()
    with torch.cuda.device_of(x):
        return kernels.relu_squared(x)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `torch.nn.functional.linear`. On a GPU, one row without gradients has a faster kernel than cuBLAS's."""
    kernels = triton_kernels() if input.is_cuda else None
    if kernels and kernels.suits(input, weight, bias) and layer_kernels(input, weight, part="row product"):
        with torch.cuda.device_of(input):
            return kernels.row_product(input, weight)
    return F.linear(input, weight, bias)


def layer_kernels(*tensors: Tensor, part: str = "layer") -> ModuleType | None:
    """Return the GPU kernels of a part if they support these tensors, else None.

    Under torch.compile it is None: the compiler fuses the PyTorch code itself.
    """
    if any(not x.is_cuda or x.dtype not in LAYER_DTYPES for x in tensors) or not tensors[0].numel():
        return None
    if torch.compiler.is_compiling() or (kernels := triton_kernels()) is None:
        return None
    if reason := kernels.failure(tensors[0].device.index, part):
        notice(f"deltify: {PARTS[part]} without their GPU kernels: {reason}")
        return None
    return kernels


def check_arguments(q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound) -> None:
    """Check shapes and bounds of the arguments of `kda`.

    Raises:
        ValueError: If one does not fit.
    """
    if q.dim() != 4 or 0 in q.shape[:1] + q.shape[2:]:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be [B, T, H, K], and only T may be 0")
    batch, tokens, heads, width = q.shape
    value_width = v.shape[-1]
    documents = count_documents(batch, cu_seqlens)
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
    wanted = torch.float64 if v.dtype == torch.float64 else torch.float32
    if state is not None and state.dtype != wanted:
        raise ValueError(f"state is {state.dtype}; with v in {v.dtype} it must be {wanted}")
    if lower_bound is not None and not -5 <= lower_bound < 0:
        raise ValueError(f"lower_bound={lower_bound} is not in [-5, 0). Leave it out for the softplus gate")
    if cu_seqlens is None:
        return
    if batch != 1:
        raise ValueError(f"cu_seqlens needs one packed sequence, but q has {batch}. Flatten them first")
    if cu_seqlens.is_cuda:
        return  # reading them would wait for the GPU; the kernels in CUDA C++ stay within T for any bounds
    bounds = cu_seqlens.tolist()
    if bounds[:1] != [0] or bounds[-1] != tokens or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens={bounds} must rise from 0 to T={tokens}")

"""Decide which calls the GPU kernels take, by a comparison with CPU results at the first use of each part."""

import functools
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
import triton
from torch import Tensor

from ..chunked import kda_chunked
from ..conv import short_conv_split_torch
from ..cuda import finish, prepare, scan
from ..cuda.compiler import cubin_of
from ..cuda.inputs import fits
from ..cuda.inputs import refusal as unfit_for_cuda
from ..cuda.scan import KEEP, OUTPUTS, REVERSE
from ..reference import gated_rms_norm
from ..step import layer_step_torch
from .activation import relu_squared
from .conv import short_conv_split
from .decode import layer_step
from .launch import Plan, backward, forward
from .norms import add_norm, norm
from .products import STEPS, row_product

WIDTHS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16)
WHOLE, SPLIT = Plan(8, False), Plan(2, True)
# fast, slow and bounded gates: what is added to the decay logits, and the lower bound of the log-decay
GATES = ((0.0, None), (-6.0, None), (0.0, -5.0))
TOLERANCE = 0.02  # RMS of the difference over RMS of the reference
KERNELS = "DELTIFY_KERNELS"  # environment variable that chooses between kernels in Triton and in CUDA C++
logger = logging.getLogger(__name__)


def refusal(
    device: int, dtype: torch.dtype, v_dtype: torch.dtype, K: int, V: int, gradients: bool, cuda: bool = False
) -> str | None:
    """Return why the kernels cannot run such inputs, or None if they can.

    `cuda` says that the kernels in CUDA C++ take the inputs. Where they run, those in Triton are not compiled.
    """
    if cuda and os.environ.get(KERNELS) != "triton":
        if not any(cuda_refusal(device, K, backward) for backward in {False, gradients}):
            return None
    if dtype not in DTYPES or v_dtype != dtype:
        return f"{dtype} (fast are bfloat16 and float16)"
    if gradients and dtype != torch.bfloat16:
        return "gradients in float16 (fast in bfloat16)"  # whose range small gradients leave
    if K not in WIDTHS or V not in WIDTHS:
        return f"heads of K={K}, V={V} (fast are 64 and 128)"
    return next(
        filter(None, (failure(device, "backward" if gradients else "forward", width) for width in {K, V})), None
    )


@functools.cache
def failure(device: int, part: str, width: int = WIDTHS[0]) -> str | None:
    """Return what is wrong with a part of the kernels on this device, or None.

    At its first use, each part computes a small example and its results are compared with the CPU's. Compilers have
    different bugs, and small GPUs may lack shared memory. A wrong result is worse than a slow one. Only the part about
    to be used is compiled.

    Args:
        device: Index of the GPU.
        part: One of `CHECKS` or `CUDA_CHECKS`.
        width: Width of the heads.
    """
    name = f"this GPU ({torch.cuda.get_device_name(device)}, Triton {triton.__version__})"
    try:
        with torch.cuda.device(device):
            error = largest_error(part, width, f"cuda:{device}", torch.bfloat16)
    except Exception as error:  # what a compiler or driver raises has no common type
        return f"{name}: {type(error).__name__} {str(error)[:80]}"
    return None if error < TOLERANCE else f"{name}: wrong results, error {error:.2g}"


def runs_in_cuda(q, k, v, f, b, A_log, dt_bias, bounds: Tensor | None, gradients: bool) -> bool:
    """Return whether the kernels in CUDA C++ run such inputs, or with `gradients` those of the backward pass.

    The environment variable DELTIFY_KERNELS chooses: "auto", "triton" or "cuda".

    Raises:
        ValueError: If the variable has another value.
        RuntimeError: If it is "cuda" and the kernels cannot run.
    """
    choice = os.environ.get(KERNELS, "auto")
    if choice not in ("auto", "triton", "cuda"):
        raise ValueError(f"{KERNELS}={choice} is unknown; choose from auto, triton, cuda")
    if choice == "triton" or not q.is_cuda:
        return False
    if not fits(q, k, v, f, b, A_log, dt_bias, bounds):
        reason = "they need bfloat16, float32 gate parameters, heads of K = V and rows at multiples of 16 bytes"
    else:
        reason = cuda_refusal(q.device.index, q.shape[-1], gradients)
    if reason and choice == "cuda":
        raise RuntimeError(f"{KERNELS}=cuda, but the CUDA kernels cannot run: {reason}. Choose auto or triton")
    return not reason


@functools.cache
def cuda_refusal(device: int, width: int, gradients: bool) -> str | None:
    """Return why the kernels in CUDA C++ do not run on this device, or None. Logs one line about it."""
    unfit = unfit_for_cuda(device)
    reason = unfit or failure(device, "cuda backward" if gradients else "cuda", width)
    kind = f"in Triton, not in CUDA C++: {reason}" if reason else "in CUDA C++"
    level = logging.WARNING if reason and not unfit else logging.INFO
    logger.log(level, f"deltify: KDA's {'backward' if gradients else 'forward'} pass runs {kind}")
    return reason


@torch.inference_mode(False)
@torch.enable_grad()
def largest_error(part: str, width: int, place: str, dtype: torch.dtype, tokens: int = 300) -> float:
    """Return the largest relative error of a part's outputs, states and gradients.

    The relative error of a tensor is the RMS of its difference from the reference over the RMS of the reference.
    """
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    # Hide the saved tensors from activation checkpointing, which would not find them when it recomputes a layer.
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        pairs = list((CHECKS | CUDA_CHECKS)[part](draw, width, place, dtype, tokens))
    errors = [(x.cpu().double() - y.detach()).square().mean() / y.detach().double().square().mean() for x, y in pairs]
    return float(torch.stack(errors).max().sqrt())  # NaN, if any is


def operator_pairs(
    draw, width: int, place: str, dtype: torch.dtype, tokens: int, gradients: bool,
    plans: tuple[Plan, ...] = (WHOLE, SPLIT), shift: float = 0.0, lower_bound: float | None = None,
    bounds: tuple[int, ...] | None = None,
):  # fmt: skip
    """Return results and references of the operator for each plan: output, states and, for the last plan, gradients.

    `shift` is added to the decay logits. `bounds` are those of packed documents.
    """
    raw = [draw(1, tokens, 2, width) for _ in range(4)] + [draw(1, tokens, 2)]
    gates = [draw(2).sigmoid(), draw(2 * width) + shift]
    state, dfinal = (draw(1 if bounds is None else len(bounds) - 1, 2, width, width) for _ in range(2))
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    leaves = [x.double().requires_grad_() for x in (*raw, *gates, state)]
    want = kda_chunked(*leaves, cu_seqlens, lower_bound, width**-0.5)
    inputs, pairs = [x.to(place, dtype) for x in raw] + [x.to(place) for x in (*gates, state)], []
    packed = None if cu_seqlens is None else cu_seqlens.to(place)
    for plan in plans:
        o, call = torch.empty_like(inputs[2]), (*inputs, packed, lower_bound, width**-0.5, plan)
        pairs += zip((o, forward(*call, o)), want)
    if gradients:
        do, out = draw(1, tokens, 2, width), [torch.empty_like(x) for x in inputs[:5]]
        rest = backward(*call, o, do.to(o), dfinal.to(place), out)
        total = (want[0] * do.double()).sum() + (want[1] * dfinal.double()).sum()
        exact = torch.autograd.grad(total, leaves)
        found = [x.cpu().double() for x in (*out, *rest)]
        # of A_log: much cancels in this sum, so that its errors are larger and may be five times the others'
        found[5] = exact[5] + (found[5] - exact[5]) / 5
        pairs += zip(found, exact)
    return pairs


def cuda_pairs(draw, width: int, place: str, dtype: torch.dtype, tokens: int, gradients: bool):
    """Yield results and references of the kernels in CUDA C++: fast, slow and bounded gates, and packed documents."""
    compile_kernels(width, gradients)
    plans = (replace(WHOLE, cuda=True), *([] if gradients else [replace(WHOLE, cuda=True, pieces=2)]))
    for shift, lower_bound in GATES:
        yield from operator_pairs(draw, width, place, dtype, tokens, gradients, plans, shift, lower_bound)
    plans = (replace(WHOLE, cuda=True, beside=True),)
    yield from operator_pairs(draw, width, place, dtype, tokens, gradients, plans, bounds=(0, 70, 70, tokens))


def split_pairs(draw, width: int, place: str, dtype: torch.dtype, tokens: int):
    """Yield results and references of the scan in Triton, which splits a sequence, after prepare in CUDA C++."""
    plans = (replace(SPLIT, cuda=True),)
    for shift, lower_bound in GATES:
        yield from operator_pairs(draw, width, place, dtype, tokens, False, plans, shift, lower_bound)


def compile_kernels(width: int, gradients: bool) -> None:
    """Compile all kernels in CUDA C++ of a pass in parallel, except those that are on the disk."""
    sources = [prepare.source_of(width, bounded) for bounded in (False, True)]
    sources += [scan.source_of(width, mode) for mode in ((OUTPUTS, KEEP, REVERSE) if gradients else (OUTPUTS,))]
    sources += [finish.source_of(width, bounded) for bounded in (False, True)] if gradients else []
    with ThreadPoolExecutor(len(sources)) as threads:
        list(threads.map(cubin_of, sources))


def step_pairs(draw, width: int, place: str, dtype: torch.dtype, tokens: int):
    """Return results and references of four decoding steps: outputs, and the states after them."""
    x, past, taps = draw(3, 6 * width), draw(3, 6 * width, 3), draw(6 * width, 1, 4)
    rest = [draw(3, 2 * width), draw(3, 2), draw(3, 2 * width), draw(2).sigmoid(), draw(2 * width), torch.ones(width)]
    state, results = draw(3, 2, width, width), []
    for step, where in ((layer_step_torch, "cpu"), (layer_step, place)):
        states = [t.to(where, copy=True) for t in (past, state)]
        arguments = (x.to(where), states[0], taps.to(where), *(t.to(where) for t in rest), states[1])
        results.append([step(*arguments, norm_eps=1e-5, lower_bound=None) for _ in range(4)] + states)
    return zip(results[1], results[0])


def layer_pairs(draw, width: int, place: str, dtype: torch.dtype, tokens: int):
    """Yield results and references of short convolution and gated norm, with their gradients."""
    x, past, taps = draw(1, tokens, 3 * width), draw(1, 3 * width, 3), draw(3 * width, 1, 4)
    run = lambda x, w, s: short_conv_split(x, w, 3, s, None)[0]  # noqa: E731
    yield from gradient_pairs(run, short_conv_split_reference, (x, taps, past), place, dtype)
    run = lambda x, g, w: [norm(x, g, w, 1e-5)]  # noqa: E731
    wanted = lambda x, g, w: [gated_rms_norm(x, g, w, 1e-5)]  # noqa: E731
    tensors = draw(1, tokens, width), draw(1, tokens, width), draw(width)
    yield from gradient_pairs(run, wanted, tensors, place, dtype)
    with torch.no_grad():
        x, y, weight = (z.to(place, dtype) for z in tensors)
        total = (x + y).cpu().double()
        exact = weight.cpu().double() * total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5)
        yield from zip(add_norm(x, y, weight, 1e-5), (total, exact))


def activation_pairs(draw, width: int, place: str, dtype: torch.dtype, tokens: int):
    """Return results and references of relu(x)^2 and its gradient."""
    wanted = lambda x: [torch.relu(x).square()]  # noqa: E731
    return gradient_pairs(lambda x: [relu_squared(x)], wanted, (draw(tokens, width),), place, dtype)


def row_product_pairs(draw, width: int, place: str, dtype: torch.dtype, tokens: int):
    """Yield results and references of products of one row, for each number of channels that is read at a time."""
    for step in STEPS:
        x, weight = (draw(rows, 3 * step).to(place, dtype) for rows in (1, tokens))
        yield row_product(x, weight), x.cpu().double() @ weight.cpu().double().t()


CHECKS = {
    "forward": functools.partial(operator_pairs, gradients=False),
    "backward": functools.partial(operator_pairs, gradients=True),
    "step": step_pairs,
    "layer": layer_pairs,
    "activation": activation_pairs,
    "row product": row_product_pairs,
}
CUDA_CHECKS = {
    "cuda": functools.partial(cuda_pairs, gradients=False),
    "cuda split": split_pairs,
    "cuda backward": functools.partial(cuda_pairs, gradients=True),
}


def short_conv_split_reference(x: Tensor, taps: Tensor, state: Tensor) -> list[Tensor]:
    return short_conv_split_torch(x, taps, 3, state, None)[0]


def gradient_pairs(run, reference, tensors, place: str, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of results on the device and references in float64 on the CPU.

    The results are the outputs and the gradients of the sum of their squares.
    """
    results = []
    for function, where, kind in ((run, place, dtype), (reference, "cpu", torch.float64)):
        leaves = [x.to(where, kind).requires_grad_() for x in tensors]
        outputs = function(*leaves)
        results.append([*outputs, *torch.autograd.grad(sum(o.double().square().sum() for o in outputs), leaves)])
    return [(got.detach(), want.detach()) for got, want in zip(*results)]

"""The GPU backend: which calls it takes, and whether this machine computes them right.

Importing needs Triton, which comes with torch on Linux with CUDA.
"""

import functools

import torch
import triton
from torch import Tensor

from ..chunked import kda_chunked
from ..conv import short_conv_split_torch
from ..reference import gated_rms_norm
from ..step import layer_step_torch
from .conv import MAX_PARTS, TAPS, short_conv_split
from .decode import layer_step
from .launch import Plan, backward, forward
from .norms import MAX_WIDTH, norm
from .operator import kda_triton

__all__ = ["MAX_PARTS", "MAX_WIDTH", "TAPS", "kda_triton", "layer_step", "norm", "refusal", "short_conv_split"]

WIDTHS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16)
TOLERANCE = 0.02  # RMS of the difference over RMS of the reference


def refusal(device: int, dtype: torch.dtype, v_dtype: torch.dtype, K: int, V: int, gradients: bool) -> str | None:
    """Why such inputs cannot run here, or None."""
    if dtype not in DTYPES or v_dtype != dtype:
        return f"{dtype} (fast are bfloat16 and float16)"
    if gradients and dtype != torch.bfloat16:
        return "gradients in float16 (fast in bfloat16)"  # whose range small gradients leave
    if K not in WIDTHS or V not in WIDTHS:
        return f"heads of K={K}, V={V} (fast are 64 and 128)"
    return failure(device)


@functools.cache
def failure(device: int) -> str | None:
    """What is wrong with the kernels on this device: a small comparison with the CPU's results, at the first use.

    Compilers differ in what they get wrong, and small chips in what they have room for; a wrong result is worse than a
    slow one.
    """
    name = f"this GPU ({torch.cuda.get_device_name(device)}, Triton {triton.__version__})"
    try:
        error = largest_error(f"cuda:{device}", torch.bfloat16)
    except Exception as error:  # what a compiler or driver raises has no common type
        return f"{name}: {type(error).__name__} {str(error)[:80]}"
    return None if error < TOLERANCE else f"{name}: wrong results, error {error:.2g}"


@torch.enable_grad()
def largest_error(place: str, dtype: torch.dtype, tokens: int = 300) -> float:
    """RMS of the difference over RMS of the reference, the largest of outputs and states of all kernels."""
    generator, pairs = torch.Generator().manual_seed(0), []
    draw = functools.partial(torch.randn, generator=generator)
    for width in WIDTHS:
        raw = [draw(1, tokens, 2, width) for _ in range(4)] + [draw(1, tokens, 2)]
        gates = [torch.rand(2, generator=generator), draw(2 * width)]
        zeros = torch.zeros(1, 2, width, width, dtype=torch.float64)
        leaves = [x.double().requires_grad_() for x in raw + gates]
        want = kda_chunked(*leaves, zeros, None, None, width**-0.5)
        inputs = [x.to(place, dtype) for x in raw] + [x.to(place) for x in gates]
        for plan in (Plan(8, False), Plan(2, True)):
            o, call = torch.empty_like(inputs[2]), (*inputs, None, None, None, width**-0.5, plan)
            pairs += zip((o, forward(*call, o)), want)
        do, out = draw(1, tokens, 2, width), [torch.empty_like(x) for x in inputs[:5]]
        rest = backward(*call, o, do.to(o), None, out)
        pairs += zip([*out, *rest], torch.autograd.grad(want[0], leaves, do.double()))

        x, past, taps = draw(3, 6 * width), draw(3, 6 * width, 3), draw(6 * width, 1, 4)
        rest = [draw(3, 2 * width), draw(3, 2), draw(3, 2 * width), *gates, torch.ones(width)]
        state, results = draw(3, 2, width, width), []
        for step, where in ((layer_step_torch, "cpu"), (layer_step, place)):
            states = [t.to(where, copy=True) for t in (past, state)]
            arguments = (x.to(where), states[0], taps.to(where), *(t.to(where) for t in rest), states[1])
            results.append([step(*arguments, norm_eps=1e-5, lower_bound=None) for _ in range(4)] + states)
        pairs += zip(results[1], results[0])
        x, past, gate = draw(1, tokens, 3 * width), draw(1, 3 * width, 3), draw(1, tokens, width)
        for run, reference, tensors in (
            (
                lambda x, w, s: short_conv_split(x, w, 3, s, None)[0],
                short_conv_split_reference,
                (x, taps[: 3 * width], past),
            ),
            (
                lambda x, g, w: [norm(x, g, w, 1e-5)],
                lambda x, g, w: [gated_rms_norm(x, g, w, 1e-5)],
                (do[:, :, 0], gate, taps[:width, 0, 0]),
            ),
        ):
            pairs += gradient_pairs(run, reference, tensors, place, dtype)
    errors = [(x.cpu().double() - y.detach()).square().mean() / y.detach().double().square().mean() for x, y in pairs]
    return float(torch.stack(errors).max().sqrt())  # NaN, if any is


def short_conv_split_reference(x: Tensor, taps: Tensor, state: Tensor) -> list[Tensor]:
    return short_conv_split_torch(x, taps, 3, state, None)[0]


def gradient_pairs(run, reference, tensors, place: str, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Outputs of two functions and gradients of their squares' sum: on the device, and in float64 on the CPU."""
    results = []
    for function, where, kind in ((run, place, dtype), (reference, "cpu", torch.float64)):
        leaves = [x.to(where, kind).requires_grad_() for x in tensors]
        outputs = function(*leaves)
        results.append([*outputs, *torch.autograd.grad(sum(o.double().square().sum() for o in outputs), leaves)])
    return [(got.detach(), want.detach()) for got, want in zip(*results)]

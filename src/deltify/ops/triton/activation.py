"""relu(x)^2 in one pass over memory, forward and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .tiles import wants_gradients

BLOCK = 4096  # elements of a program


@triton.jit
def relu_squared_kernel(x_ptr, dy_ptr, out_ptr, count, BLOCK: tl.constexpr, BACKWARD: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    x = tl.where(x < 0.0, 0.0, x)  # NaN stays
    if BACKWARD:
        y = 2.0 * x * tl.load(dy_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    else:
        y = x * x
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=at < count)


def launch(x: Tensor, dy: Tensor | None) -> Tensor:
    out = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), BLOCK),)
    relu_squared_kernel[grid](x, x if dy is None else dy, out, x.numel(), BLOCK=BLOCK, BACKWARD=dy is not None)
    return out


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return launch(x, None)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        return launch(ctx.saved_tensors[0], gradients[0].contiguous())


def relu_squared(x: Tensor) -> Tensor:
    """Compute `deltify.ops.relu_squared`."""
    x = x.contiguous()
    return _ReluSquared.apply(x) if wants_gradients(x) else launch(x, None)

"""RMS norms with and without a gate. Forward and backward take one pass over memory each."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .tiles import sigmoid, wants_gradients

MAX_WIDTH = 8192  # supported by the kernels
NORM_ELEMENTS = 2048  # smallest number of elements that a program handles at a time
NORM_WARPS = 2048  # of a backward pass: enough to fill a GPU, and no more, since each program writes a weight gradient


@triton.jit
def norm_kernel(
    x_ptr, gate_ptr, weight_ptr, added_ptr, sum_ptr, out_ptr, rows, width, eps,
    R: tl.constexpr, BW: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    column = tl.arange(0, BW)[None, :]
    at, kept = row.to(tl.int64) * width + column, (row < rows) & (column < width)
    x = tl.load(x_ptr + at, mask=kept, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    if ADDED:
        total = (x + tl.load(added_ptr + at, mask=kept, other=0.0).to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, total, mask=kept)
        x = total.to(tl.float32)
    n = x * tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None]
    if GATED:
        n *= sigmoid(tl.load(gate_ptr + at, mask=kept, other=0.0).to(tl.float32))
    else:
        n = n.to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + at, (weight * n).to(out_ptr.dtype.element_ty), mask=kept)


@triton.jit
def norm_backward_kernel(
    x_ptr, gate_ptr, weight_ptr, dy_ptr, dx_ptr, dgate_ptr, dweight_ptr, rows, width, eps,
    R: tl.constexpr, BW: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Write the gradients of every n-th block of rows, for n programs, and their sum of the weight's gradient."""
    column = tl.arange(0, BW)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    dweight = tl.zeros([R, BW], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0)):
        row = block * R + tl.arange(0, R)[:, None]
        at, kept = row.to(tl.int64) * width + column, (row < rows) & (column < width)
        x = tl.load(x_ptr + at, mask=kept, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=kept, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None]
        n = x * r
        dn = dy * weight
        if GATED:
            s = sigmoid(tl.load(gate_ptr + at, mask=kept, other=0.0).to(tl.float32))
            dgate = dn * n * s * (1.0 - s)
            tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=kept)
            dweight += dy * n * s
            dn *= s
        else:
            dweight += dy * n.to(x_ptr.dtype.element_ty).to(tl.float32)
        dx = r * (dn - n * (tl.sum(dn * n, 1) / width)[:, None])
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=kept)
    share = tl.sum(dweight, 0)[None, :]
    tl.store(dweight_ptr + tl.program_id(0) * width + column, share, mask=column < width)


def norm_plan(width: int) -> dict[str, int]:
    """Return launch options for a norm of this width, with 16 elements for each thread."""
    block = triton.next_power_of_2(width)
    rows = max(1, NORM_ELEMENTS // block)
    return {"R": rows, "BW": block, "num_warps": rows * block // 512}


def norm_forward(
    x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, added: Tensor | None = None, total: Tensor | None = None
) -> Tensor:
    """Return the norm of x, or of x + `added`, which is written to `total`."""
    width, dtype = x.shape[-1], x.dtype if gate is not None else torch.promote_types(x.dtype, weight.dtype)
    out, plan = torch.empty(x.shape, dtype=dtype, device=x.device), norm_plan(width)
    rows = x.numel() // width
    kinds = {"GATED": gate is not None, "ADDED": added is not None}
    norm_kernel[(triton.cdiv(rows, plan["R"]),)](x, gate, weight, added, total, out, rows, width, eps, **kinds, **plan)
    return out


def add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute `deltify.ops.add_rms_norm` without gradients, for x and y of one shape and dtype."""
    x, y = x.contiguous(), y.contiguous()
    total = torch.empty_like(x)
    return total, norm_forward(x, None, weight.contiguous(), eps, y, total)


class _Norm(torch.autograd.Function):
    """Norm with gradients. Saves only its inputs."""

    @staticmethod
    def forward(ctx, x, gate, weight, eps):
        ctx.save_for_backward(x, gate, weight)
        ctx.eps = eps
        return norm_forward(x, gate, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        x, gate, weight = ctx.saved_tensors
        dx, dgate = torch.empty_like(x), None if gate is None else torch.empty_like(gate)
        width, plan = x.shape[-1], norm_plan(x.shape[-1])
        rows = x.numel() // width
        programs = min(triton.cdiv(rows, plan["R"]), NORM_WARPS // plan["num_warps"])
        dweight = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        norm_backward_kernel[(programs,)](
            x, gate, weight, gradients[0].contiguous(), dx, dgate, dweight, rows, width, ctx.eps,
            GATED=gate is not None, **plan,
        )  # fmt: skip
        return dx, dgate, dweight.sum(0).to(weight.dtype), None


def norm(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Compute `deltify.ops.gated_rms_norm`, or `rms_norm` without a gate, for widths up to MAX_WIDTH."""
    x, gate, weight = x.contiguous(), None if gate is None else gate.contiguous(), weight.contiguous()
    run = _Norm.apply if wants_gradients(x, gate, weight) else norm_forward
    return run(x, gate, weight, eps)

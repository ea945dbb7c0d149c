"""The product of one row with a weight, as in decoding. It reads the weight once and nearly as fast as memory is."""

import torch
import triton
import triton.language as tl
from torch import Tensor

STEPS = (2048, 1024, 512)  # channels that a program reads at a time: the first of them that divides the width
LEAST = 2**21  # smallest number of elements of a weight for which this is faster than cuBLAS


@triton.jit
def row_product_kernel(x_ptr, weight_ptr, out_ptr, K: tl.constexpr, BK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BK)
    total = tl.zeros([BK], tl.float32)
    for k in range(0, K, BK):
        x = tl.load(x_ptr + k + column).to(tl.float32)
        total += x * tl.load(weight_ptr + row.to(tl.int64) * K + k + column).to(tl.float32)
    tl.store(out_ptr + row, tl.sum(total, 0).to(out_ptr.dtype.element_ty))


def suits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether `row_product` computes this linear layer, and faster than cuBLAS. It has no gradients."""
    if bias is not None or torch.is_grad_enabled() or type(weight) not in (Tensor, torch.nn.Parameter):
        return False
    fits = weight.dim() == 2 and x.numel() == x.shape[-1] == weight.shape[1] and x.device == weight.device
    half = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    return fits and half and weight.is_contiguous() and weight.numel() >= LEAST and not weight.shape[1] % STEPS[-1]


def row_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T [..., N] for one row x [..., K] and a weight [N, K]."""
    rows, K = weight.shape
    out = x.new_empty(*x.shape[:-1], rows)
    step = next(size for size in STEPS if K % size == 0)
    row_product_kernel[(rows,)](x.contiguous(), weight, out, K=K, BK=step, num_warps=4)
    return out

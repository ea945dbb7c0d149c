"""Which GPUs and inputs the kernels in CUDA C++ take."""

import torch
from torch import Tensor

CAPABILITY = (9, 0)
WIDTHS = (64, 128)


def refusal(device: int) -> str | None:
    """Return why a GPU does not run the kernels, or None if it may."""
    if torch.version.hip or torch.cuda.get_device_capability(device) != CAPABILITY:
        return "they need compute capability 9.0"
    return None


def fits(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, bounds: Tensor | None
) -> bool:
    """Return whether the kernels take such tensors, all contiguous."""
    given = [x for x in (k, v, f, b, A_log, dt_bias, bounds) if x is not None]
    types = all(x.dtype == torch.bfloat16 for x in (q, k, v, f, b)) and A_log.dtype == dt_bias.dtype == torch.float32
    aligned = all(x.data_ptr() % 16 == 0 for x in (q, k, v, f)) and dt_bias.data_ptr() % 8 == 0
    widths = q.shape[-1] == v.shape[-1] and q.shape[-1] in WIDTHS
    here = all(x.device == q.device for x in given)
    return here and types and aligned and widths and (bounds is None or bounds.dtype == torch.int32)

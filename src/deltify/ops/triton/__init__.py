"""The GPU kernels: the operator, the operations around it, and the check of what this machine computes right.

Importing needs Triton, which comes with torch on Linux with CUDA.
"""

from .conv import MAX_PARTS, TAPS, short_conv_split
from .decode import layer_step
from .norms import MAX_WIDTH, norm
from .operator import kda_triton
from .selfcheck import CHECKS, KERNELS, WIDTHS, cuda_refusal, failure, refusal

__all__ = [
    "CHECKS",
    "KERNELS",
    "MAX_PARTS",
    "MAX_WIDTH",
    "TAPS",
    "WIDTHS",
    "cuda_refusal",
    "failure",
    "kda_triton",
    "layer_step",
    "norm",
    "refusal",
    "short_conv_split",
]

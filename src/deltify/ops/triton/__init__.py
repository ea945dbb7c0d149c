"""The GPU kernels: the operator, the operations around it, and the check of what this machine computes right.

Importing needs Triton, which comes with torch on Linux with CUDA.
"""

from ..cuda.inputs import fits
from .activation import relu_squared
from .conv import MAX_PARTS, TAPS, short_conv_split
from .decode import layer_step
from .norms import MAX_WIDTH, add_norm, norm
from .operator import kda_triton
from .products import row_product, suits
from .selfcheck import CHECKS, KERNELS, WIDTHS, cuda_refusal, failure, refusal

__all__ = [
    "CHECKS",
    "KERNELS",
    "MAX_PARTS",
    "MAX_WIDTH",
    "TAPS",
    "WIDTHS",
    "add_norm",
    "cuda_refusal",
    "failure",
    "fits",
    "kda_triton",
    "layer_step",
    "norm",
    "refusal",
    "relu_squared",
    "row_product",
    "short_conv_split",
    "suits",
]

"""The Kimi Delta Attention (KDA) operator and the operations around it in a layer."""

from .context_parallel import CutRows, earlier_keys, gather, inputs_before, kda_context_parallel
from .conv import short_conv, short_conv_step
from .dispatch import (
    BACKENDS,
    add_rms_norm,
    gated_rms_norm,
    kda,
    kda_layer_step,
    linear,
    relu_squared,
    rms_norm,
    short_conv_split,
)
from .step import kda_step

__all__ = [
    "BACKENDS",
    "CutRows",
    "add_rms_norm",
    "earlier_keys",
    "gated_rms_norm",
    "gather",
    "inputs_before",
    "kda",
    "kda_context_parallel",
    "kda_layer_step",
    "kda_step",
    "linear",
    "relu_squared",
    "rms_norm",
    "short_conv",
    "short_conv_split",
    "short_conv_step",
]

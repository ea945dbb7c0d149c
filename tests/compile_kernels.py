"""Compiles every kernel for a Hopper GPU, which needs none: the interpreter accepts what the compiler refuses.

Run without TRITON_INTERPRET; test_triton.py does.
"""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltify.ops.triton import activation, decode, finish, kl, prepare, products, scan

FLOATS = {"lower_bound", "scale", "norm_eps", "per_degree", "kl_scale", "ce_scale"}
WHOLE = {"documents", "tokens", "heads", "slots", "segment", "words", "count"}
FP32 = {
    "A_log_ptr",
    "dt_bias_ptr",
    "end_ptr",
    "state_ptr",
    "map_ptr",
    "local_ptr",
    "final_ptr",
    "dfinal_ptr",
    "row_ptr",
}
FP32 |= {"dstate_ptr", "rows_ptr", "partial_ptr", "dA_log_ptr", "ddt_bias_ptr", "kl_ptr", "ce_ptr", "t_ptr", "s_ptr"}
FP32 |= {"counts_ptr", "weight_ptr"}


def kind_of(name: str, dtype: str, constants: dict) -> str:
    if name in WHOLE | FLOATS:
        return "i32" if name in WHOLE else "fp32"
    if name in ("wide", "square"):
        width = constants["BK" if "BK" in constants else "K"] if name == "wide" else 64
        return f"tensordesc<{dtype}[64,{width}]>"
    special = {"bounds": "*i32", "label_ptr": "*i64", "gate_tables": "*fp16"}
    return special.get(name, "*fp32" if name in FP32 else f"*{dtype}")


def cases():
    """Each kernel, and each of its branches, at least once."""
    for K, packed in ((128, False), (64, True)):
        documents = {"PACKED": packed, "N2": 8 if packed else 1}
        gates = {"BOUNDED": packed, "BK": 64, "K": K, **documents}
        yield prepare.prepare_kernel, gates
        yield finish.finish_kernel, {**gates, "V": K, "QUERIES": packed}
        of_scan = {"K": K, "V": K, "BV": 64, "STAGES": 3, **documents}
        yield scan.scan_kernel, {**of_scan, "MAPS": packed, "KEEP": False, "SPLIT": packed, "HAS_STATE": packed}
        yield scan.reverse_kernel, {**of_scan, "HAS_DFINAL": packed}
    yield scan.scan_kernel, {**of_scan, "MAPS": False, "KEEP": True, "SPLIT": True, "HAS_STATE": True}
    yield scan.combine_kernel, {"K": K, "V": K, "BV": 16, **documents}
    yield finish.pairs_kernel, {"K": K, "V": K, **documents}
    yield decode.decode_kernel, {"K": K, "V": K, "W": 4, "BOUNDED": False}
    yield products.row_product_kernel, {"K": 2560, "BK": 512}
    for backward in (False, True):
        yield activation.relu_squared_kernel, {"BLOCK": 4096, "BACKWARD": backward}
    for kind in range(3):
        yield kl.divergence_kernel, {"KIND": kind, "BLOCK": 4096, "LABELS": True, "COUNTS": True, "GRADIENT": True}


if __name__ == "__main__":
    target = GPUTarget("cuda", 90, 32)
    for kernel, constants in cases():
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        kinds = {n: "constexpr" if n in constants else kind_of(n, "bf16", constants) for n in kernel.arg_names}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, kinds, constexprs=places)
        triton.compile(source, target=target, options={"num_warps": 4})
        print(kernel.fn.__name__, constants, flush=True)

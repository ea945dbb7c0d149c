"""The operator on a GPU, beside flash-linear-attention's and NVIDIA's kernels and cuDNN's attention, in bfloat16.

All start from the same raw inputs; L2 norms, gate and sigmoid are inside. Beside the times of a forward pass stand the
errors against float64. NVIDIA's kernel for Hopper has bounded gates only, and no gradients of the raw inputs.
Attention has 20 query heads over 4 key/value heads, as AFM-4.5B has.
Run: python benchmarks/kda_gpu.py [parts of cases' names] (needs a CUDA GPU; flash-linear-attention==0.6.0 and
nvidia-cudnn-frontend==1.32.0 for the peers)
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from common import TRITON, eager_seconds, graph_seconds, in_triton, keep, row, write

from deltify.ops import kda, kda_layer_step

try:
    from fla.ops.kda import chunk_kda, fused_recurrent_kda
except ImportError:
    chunk_kda = fused_recurrent_kda = None

try:
    from cudnn.linear_attention.ops import kimi_delta_attention
except ImportError:
    kimi_delta_attention = None

PEER = "fla chunk_kda" if chunk_kda else "fla chunk_kda: not installed"
NVIDIA = "nvidia kda_hopper_cuda"
K = 128
# (B, T, H) and the gates it is timed with
FORWARD = [
    ((1, 32768, 20), ("slow", "library", "fast", "bounded", "bounded-slow", "zero")),
    ((1, 2048, 20), ("library",)),
    ((1, 8192, 20), ("slow", "library", "fast", "bounded")),
    ((1, 8192, 64), ("slow", "library", "fast", "bounded")),
    ((8, 1024, 20), ("library",)),
    ((4, 8192, 20), ("library",)),
    ((1, 131072, 20), ("library",)),
    ((1, 16384, 16), ("library",)),
    ((1, 16384, 4), ("library",)),
    ((8, 1024, 64), ("library",)),
]
# forward and backward: gates, shape
TRAINING = [
    ((1, 32768, 20), ("library", "slow", "fast", "bounded", "zero")),
    ((1, 2048, 20), ("library",)),
    ((1, 8192, 20), ("library",)),
    ((8, 1024, 20), ("library",)),
]
ATTENTION = [(1, 2048, 20), (1, 4096, 20), (1, 8192, 20), (1, 16384, 20), (1, 32768, 20)]
DECODE = [1, 8, 64, 256]


def make_inputs(B: int, T: int, H: int, gates: str) -> list[Tensor]:
    """q, k, v, f, b in bfloat16 and A_log, dt_bias for one of the regimes, f ~ N(0, 1) but for `zero`."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, f = (torch.randn(B, T, H, K, device="cuda", generator=generator) for _ in range(4))
    b = torch.randn(B, T, H, device="cuda", generator=generator)
    A_log = torch.empty(H, device="cuda").uniform_(1, 16, generator=generator).log()
    dt_bias = torch.empty(H * K, device="cuda").uniform_(-6.9, -2.3, generator=generator).exp().expm1().log()
    if gates == "slow":
        A_log, dt_bias = torch.zeros_like(A_log), torch.full_like(dt_bias, -5)
    if gates == "fast":
        dt_bias = torch.zeros_like(dt_bias)
    if gates in ("bounded", "bounded-slow"):
        A_log, dt_bias = torch.zeros_like(A_log), torch.full_like(dt_bias, 0 if gates == "bounded" else -6)
    if gates == "zero":
        f = torch.full_like(f, -60)
    return [x.bfloat16() for x in (q, k, v, f, b)] + [A_log, dt_bias]


def error(forward, gates: str, H: int, lower_bound: float | None) -> float:
    """RMS of the difference to float64 over RMS of the reference, at 2,000 tokens of the same heads."""
    inputs = make_inputs(1, 2000, H, gates)
    want = kda(*(x.double() for x in inputs), lower_bound=lower_bound, backend="chunked")[0]
    got = forward(inputs, lower_bound)[0].view_as(want)
    return float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt())


def our_forward(inputs: list[Tensor], lower_bound: float | None, cu_seqlens: Tensor | None = None):
    return kda(*inputs, lower_bound=lower_bound, cu_seqlens=cu_seqlens, backend="triton")


def nvidia_forward(inputs: list[Tensor], lower_bound: float):
    q, k, v, f, b, A_log, dt_bias = inputs
    B, T, H, _ = q.shape
    rows = torch.arange(0, B * T + 1, T, device="cuda", dtype=torch.int32)
    options = {"use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "output_final_state": True}
    options |= {"safe_gate": True, "gate_lower_bound": lower_bound, "plan_name": "kda_hopper_cuda"}
    flat = [x.flatten(0, 1) for x in (q, k, v, f, b)]
    return kimi_delta_attention(*flat, rows, a_log=A_log, dt_bias=dt_bias.view(H, K), **options)


def peer_forward(inputs: list[Tensor], lower_bound: float | None, cu_seqlens: Tensor | None = None):
    q, k, v, f, b, A_log, dt_bias = inputs
    options = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    bounded = {"safe_gate": lower_bound is not None, "lower_bound": lower_bound}
    packed = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens.long()}
    return chunk_kda(
        q, k, v, f, b, A_log=A_log, dt_bias=dt_bias, output_final_state=True, **options, **bounded, **packed
    )


@torch.no_grad()
def forward_rows(wanted: list[str]) -> Iterator[list[dict]]:
    cases = [(shape, g, None) for shape, gates in FORWARD for g in gates]
    bounds = torch.tensor([0, 100, 5000, 5000, 6024, 14000, 20000, 32768], device="cuda", dtype=torch.int32)
    cases.append(((1, 32768, 20), "library", bounds))
    for (B, T, H), gates, packed in cases:
        case = f"forward/{gates}/B{B}-T{T}-H{H}-K{K}" + ("" if packed is None else "-packed7")
        if not any(part in case for part in wanted):
            continue
        inputs, lower_bound = make_inputs(B, T, H, gates), -5.0 if gates.startswith("bounded") else None
        rows = []
        ours = lambda: our_forward(inputs, lower_bound, packed)
        theirs = lambda: peer_forward(inputs, lower_bound, packed)
        nvidia = lambda: nvidia_forward(inputs, lower_bound)
        for metric, seconds in (("eager seconds", eager_seconds), ("graph seconds", graph_seconds)):
            peer = None
            if chunk_kda and seconds is eager_seconds:  # its autotuner cannot be captured
                peer = seconds(theirs)
            rows.append(row(case, metric, seconds(ours), peer, PEER))
        with in_triton():
            rows.append(row(case, "graph seconds", rows[-1]["ours"], graph_seconds(ours), TRITON))
        error_of = lambda forward: error(forward, gates, H, lower_bound)
        peer_error = error_of(peer_forward) if chunk_kda else None
        rows.append(row(case, "relative error", our_error := error_of(our_forward), peer_error, PEER))
        if kimi_delta_attention and lower_bound is not None:
            rows.append(row(case, "eager seconds", rows[0]["ours"], eager_seconds(nvidia), NVIDIA))
            rows.append(row(case, "relative error", our_error, error_of(nvidia_forward), NVIDIA))
        yield rows


def training_rows(wanted: list[str]) -> Iterator[list[dict]]:
    """Forward and backward through autograd, and the most memory it takes besides inputs that require no copy; and the
    backward alone, again and again from one forward."""
    for (B, T, H), regimes in TRAINING:
        for gates in regimes:
            case = f"training/{gates}/B{B}-T{T}-H{H}-K{K}"
            if not any(part in case for part in wanted):
                continue
            inputs, lower_bound = make_inputs(B, T, H, gates), -5.0 if gates == "bounded" else None
            leaves, do = [x.requires_grad_() for x in inputs], torch.randn_like(inputs[2])
            ours = lambda: kda(*leaves, lower_bound=lower_bound, backend="triton")[0]
            theirs = lambda: peer_forward(leaves, lower_bound)[0]
            found = [training_figures(ours, leaves, do)]
            found.append(training_figures(theirs, leaves, do) if chunk_kda else (None, None, None))
            with in_triton():
                triton = training_figures(ours, leaves, do)
            metrics = ("eager seconds", "peak MiB", "backward seconds")
            rows = [row(case, metric, *pair, PEER) for metric, pair in zip(metrics, zip(*found))]
            yield rows + [row(case, metric, *pair, TRITON) for metric, pair in zip(metrics, zip(found[0], triton))]


def training_figures(forward, leaves: list[Tensor], do: Tensor) -> tuple[float, float, float]:
    """(seconds of forward and backward, MiB at the peak of both, seconds of the backward alone)."""
    both = lambda: torch.autograd.grad(forward(), leaves, do)
    seconds = eager_seconds(both, calls=5)
    torch.cuda.reset_peak_memory_stats()
    both()
    peak, o = torch.cuda.max_memory_allocated() / 2**20, forward()
    return seconds, peak, eager_seconds(lambda: torch.autograd.grad(o, leaves, do, retain_graph=True), calls=5)


@torch.no_grad()
def attention_rows(wanted: list[str]) -> Iterator[list[dict]]:
    """One forward of ours against one of cuDNN's causal attention: where the lines cross."""
    for B, T, H in ATTENTION:
        case = f"crossover/library/B{B}-T{T}-H{H}-K{K}"
        if not any(part in case for part in wanted):
            continue
        inputs = make_inputs(B, T, H, "library")
        q, k, v = (torch.randn(B, heads, T, K, device="cuda", dtype=torch.bfloat16) for heads in (H, 4, 4))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            peer = graph_seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
        ours = graph_seconds(lambda: kda(*inputs, backend="triton"))
        yield [row(case, "graph seconds", ours, peer, "SDPA, cuDNN, 20 over 4 heads")]


@torch.no_grad()
def decode_rows(wanted: list[str]) -> Iterator[list[dict]]:
    """One token. Ours is the whole layer between its projections, convolutions and gated norm included; fla's is the
    recurrence alone. The rate counts the state, read and written, for both."""
    H = 20
    for B in DECODE:
        case = f"decode/library/B{B}-T1-H{H}-K{K}"
        if not any(part in case for part in wanted):
            continue
        q, k, v, f, b, A_log, dt_bias = make_inputs(B, 1, H, "library")
        state = torch.zeros(B, H, K, K, device="cuda")
        x = torch.cat([t.flatten(1) for t in (q, k, v)], -1)
        conv_state = torch.randn(B, x.shape[1], 3, device="cuda", dtype=x.dtype)
        taps, norm = torch.randn(x.shape[1], 1, 4, device="cuda", dtype=x.dtype), torch.ones(K, device="cuda")
        gate = torch.randn(B, H * K, device="cuda", dtype=x.dtype)
        gates = (f.flatten(1), b[:, 0], gate, A_log, dt_bias)
        ours = graph_seconds(lambda: kda_layer_step(x, conv_state, taps, *gates, norm, state, norm_eps=1e-5))
        options = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
        peer = None
        if fused_recurrent_kda:
            step = lambda: fused_recurrent_kda(
                q,
                k,
                v,
                f,
                b,
                A_log=A_log,
                dt_bias=dt_bias,
                initial_state=state,
                output_final_state=True,
                **options,
            )
            peer = graph_seconds(step)
        moved = 2 * state.numel() * 4 / 1e12
        theirs, peer_name = None if peer is None else moved / peer, "fla fused_recurrent_kda"
        seconds = row(case, "graph seconds", ours, peer, peer_name)
        yield [seconds, row(case, "TB/s of state", moved / ours, theirs, peer_name, rate=True)]


if __name__ == "__main__":
    wanted, rows = sys.argv[1:] or [""], []
    for part in (decode_rows, training_rows, forward_rows, attention_rows):
        for new in part(wanted):
            rows += new
            keep("kda_gpu", rows)
            print(new[0]["case"], *(f"{r['metric']} {r['ours']:.3g} ({r['peer'] or 0:.3g})" for r in new), flush=True)
    write("kda_gpu", rows)

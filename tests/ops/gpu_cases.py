"""Inputs and comparisons of the tests on a GPU."""

import torch

from deltify.ops import kda

# RMS of the difference over RMS of the reference, as the field's tests have it. Where nothing is forgotten and keys
# repeat, u = A v - W S is a small difference of large numbers, and shows the rounding of its bfloat16 operands. Bounded
# gates of high rate are open or shut: few tokens add up in an output, and their roundings do not cancel.
BOUNDS = {"zero": 8e-3, "collinear": 1.5e-2, "bounded": 6e-3}


def make_inputs(B, T, H, K, V, gates="library", dtype=torch.bfloat16):
    q, k, f = (torch.randn(B, T, H, K) for _ in range(3))
    v, b = torch.randn(B, T, H, V), torch.randn(B, T, H)
    A_log = torch.rand(H).mul(15).add(1).log()
    dt_bias = torch.rand(H * K).mul(4.6).sub(6.9).exp().expm1().log()
    if gates in ("slow", "strong", "mixed"):
        A_log, dt_bias = torch.zeros(H), torch.full((H * K,), -5.0)
    if gates == "fast":
        dt_bias = torch.zeros(H * K)
    if gates == "zero":
        f = torch.full_like(f, -60)
    if gates in ("strong", "mixed"):  # -50 a token, in all channels or in half of them
        f = torch.full_like(f, 55).where(torch.tensor(gates == "strong") | (torch.rand_like(f) < 0.5), -60)
    if gates == "collinear":
        k, b, f = torch.randn(H, K) + 0.01 * k, b * 0 + 8, torch.full_like(f, -60)
    return [x.to("cuda", dtype) for x in (q, k, v, f, b)] + [A_log.cuda(), dt_bias.cuda()]


def error(got, want):
    return float((got.cpu().double() - want.cpu()).square().mean().sqrt() / want.cpu().square().mean().sqrt())


NAMES = "o state dq dk dv df db dA_log ddt_bias dstate".split()
# the field's bounds in bfloat16: docs/log/benchmarks.md
GRADIENT_BOUNDS = dict(zip(NAMES, (5e-3, 5e-3, 8e-3, 8e-3, 8e-3, 2e-2, 2e-2, 2e-2, 1e-2, 8e-3)))


def all_results(inputs, state, weights, backend, **options):
    leaves = [x.clone().requires_grad_() for x in (*inputs, state)]
    o, final = kda(*leaves[:7], state=leaves[7], backend=backend, **options)
    loss = (o * weights[0]).sum() + (final * weights[1]).sum()
    return [x.detach() for x in (o, final, *torch.autograd.grad(loss, leaves))]


def too_large(errors: dict[str, float]) -> dict[str, float]:
    return {name: e for name, e in errors.items() if not e < GRADIENT_BOUNDS[name]}


def check_gradients(B, T, H, K, V, gates, bounds=None, dtype=torch.bfloat16):
    documents = B if bounds is None else len(bounds) - 1
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device="cuda")
    options = {"lower_bound": -5.0 if gates == "bounded" else None, "cu_seqlens": cu_seqlens}
    inputs, state = make_inputs(B, T, H, K, V, gates, dtype), torch.randn(documents, H, K, V, device="cuda")
    weights = torch.randn(B, T, H, V, device="cuda", dtype=dtype), torch.randn(documents, H, K, V, device="cuda")
    exact = [x.double() for x in inputs], state.double(), [x.double() for x in weights]
    want = all_results(*exact, "chunked", **options)
    got = all_results(inputs, state, weights, "triton" if dtype is torch.bfloat16 else "chunked", **options)
    return {name: error(x, y) for name, x, y in zip(NAMES, got, want)}

"""The GPU kernels in Triton's interpreter, on a CPU, against the token loop in float64."""

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from deltify.ops import kda, kda_layer_step

pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available():
    pytest.skip("compiled kernels are tested in test_gpu.py", allow_module_level=True)

from deltify.ops.triton import layer_step
from deltify.ops.triton.launch import Plan, backward, forward
from deltify.ops.triton.operator import make_plan, parts, run_backward, run_forward

GATES = ("library", "fast", "zero", "strong", "mixed", "collinear")
WHOLE, SPLIT = Plan(100, False), Plan(2, True)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel reads without having written it gives NaN."""
    empty = torch.empty

    def poison(*size, **options):
        x = empty(*size, **options)
        with torch.no_grad():  # checkpoints make a leaf so
            return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(99)

    monkeypatch.setattr(torch, "empty", poison)


def make_inputs(B, T, H, K, V, gates="library", dtype=torch.float32):
    q, k, f = (torch.randn(B, T, H, K) for _ in range(3))
    v, b = torch.randn(B, T, H, V), torch.randn(B, T, H)
    A_log = torch.rand(H).mul(15).add(1).log()
    dt_bias = torch.rand(H * K).mul(4.6).sub(6.9).exp().expm1().log()
    if gates == "fast":
        dt_bias = torch.zeros(H * K)
    if gates == "zero":
        f = torch.full_like(f, -60)
    if gates in ("strong", "mixed"):  # -50 a token, in all channels or in half of them
        f, A_log = torch.full_like(f, 50), torch.zeros(H)
        f = f.where(torch.tensor(gates == "strong") | (torch.rand_like(f) < 0.5), -60)
    if gates == "collinear":
        k, b, f = torch.randn(H, K) + 0.01 * k, b * 0 + 8, torch.full_like(f, -60)
    return [x.to(dtype) for x in (q, k, v, f, b)] + [A_log, dt_bias]


def error(got, want):
    return float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt())


def check(inputs, plan, bound, state=None, cu_seqlens=None, lower_bound=None):
    options = {"cu_seqlens": cu_seqlens, "lower_bound": lower_bound, "backend": "reference"}
    want = kda(*(x.double() for x in inputs), state=None if state is None else state.double(), **options)
    o = torch.empty_like(inputs[2])
    final = forward(*inputs, state, cu_seqlens, lower_bound, inputs[0].shape[-1] ** -0.5, plan, o)
    assert error(o, want[0]) < bound and error(final, want[1]) < bound


@pytest.mark.parametrize("plan", [WHOLE, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("gates", GATES)
def test_all_gates_in_float32_and_float16(gates, plan):
    for dtype, bound in ((torch.float32, 2e-6), (torch.float16, 2e-3)):
        inputs = make_inputs(1, 270, 1, 64, 64, gates, dtype)
        check(inputs, plan, bound, state=torch.randn(1, 1, 64, 64))


@pytest.mark.parametrize("plan", [WHOLE, Plan(1, True)], ids=["whole", "split"])
def test_documents_of_a_packed_row(plan):
    bounds = torch.tensor([0, 70, 70, 150, 151, 290], dtype=torch.int32)
    check(make_inputs(1, 290, 2, 64, 64), plan, 2e-6, torch.randn(5, 2, 64, 64), bounds)


@pytest.mark.parametrize("plan", [WHOLE, Plan(1, True)], ids=["whole", "split"])
@pytest.mark.parametrize("K, V", [(64, 128), (128, 64)])
def test_rows_of_odd_length_with_other_widths_and_the_bounded_gate(plan, K, V):
    check(make_inputs(2, 131, 2, K, V), plan, 2e-6, lower_bound=-5.0)


@pytest.mark.parametrize("T", [1, 63, 64, 65])
def test_short_rows(T):
    check(make_inputs(2, T, 1, 64, 64), WHOLE, 2e-6)


def test_the_future_changes_no_bit_of_the_past():
    inputs = make_inputs(1, 200, 1, 64, 64, "library", torch.float16)
    changed = [x.clone() for x in inputs]
    for x in changed[:5]:
        x[:, 130:] = torch.randn_like(x[:, 130:]) * 20
    a, b = (torch.empty_like(inputs[2]) for _ in range(2))
    for x, o in ((inputs, a), (changed, b)):
        forward(*x, None, None, None, 0.125, SPLIT, o)
    assert torch.equal(a[:, :128], b[:, :128])


@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_a_layer_step_in_one_kernel_equals_the_torch_form(lower_bound):
    B, H, K, V, taps = 2, 2, 64, 128, 4
    width = H * (2 * K + V)
    x, conv_state, weight = torch.randn(B, width), torch.randn(B, width, taps - 1), torch.randn(width, 1, taps)
    f, b, gate, norm = torch.randn(B, H * K), torch.randn(B, H), torch.randn(B, H * V), torch.rand(V) + 0.5
    gates, state = (torch.rand(H), torch.randn(H * K) - 2), torch.randn(B, H, K, V)
    results = []
    for step in (kda_layer_step, layer_step):
        states = conv_state.clone(), state.clone()
        out = [
            step(x, states[0], weight, f, b, gate, *gates, norm, states[1], norm_eps=1e-5, lower_bound=lower_bound)
            for _ in range(5)
        ]
        results.append([*out, *states])
    for want, got in zip(*results):
        assert torch.allclose(want, got, atol=1e-5)


@pytest.fixture
def bfloat16(monkeypatch):
    """The interpreter with products and rounding of bfloat16, which its own lacks."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def widened(x):
        return (x.data.astype(np.uint32) << 16).view(np.float32) if x.dtype.scalar == tl.bfloat16 else x.data

    def rounded(x):
        bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
        return np.where(np.isnan(x), 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

    def dot(self, a, b, d, *_):
        return TensorHandle(np.matmul(widened(a), widened(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)

    def convert(self, x, to):
        pair = (x.dtype.scalar, to.scalar)
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(widened(x), tl.float32)
        return TensorHandle(rounded(x.data), tl.bfloat16) if pair == (tl.float32, tl.bfloat16) else cast(self, x, to)

    def product(self, a, b):
        x = widened(a) * widened(b)
        return TensorHandle(rounded(x) if a.dtype.scalar == tl.bfloat16 else x, a.dtype.scalar)

    for name, method in {"create_dot": dot, "create_fmul": product}.items():
        monkeypatch.setattr(InterpreterBuilder, name, method)
    for name in ("cast_impl", "create_fp_ext", "create_fp_trunc"):
        monkeypatch.setattr(InterpreterBuilder, name, convert)


# RMS of the difference over RMS of the reference, as the field's tests have it
BOUNDS = {"q": 8e-3, "k": 8e-3, "v": 8e-3, "f": 2e-2, "b": 2e-2, "A_log": 2e-2, "dt_bias": 1e-2, "state": 8e-3}


@pytest.mark.parametrize("gates", ["library", "fast", "zero", "bounded"])
def test_gradients_in_bfloat16(gates, bfloat16):
    T, H, K, lower_bound = 256, 2, 64, -5.0 if gates == "bounded" else None
    inputs = [
        *make_inputs(1, T, H, K, K, "fast" if gates == "bounded" else gates, torch.bfloat16),
        torch.randn(1, H, K, K),
    ]
    weights = torch.randn(1, T, H, K).bfloat16(), torch.randn(1, H, K, K)

    def exact(leaves):
        return kda(*leaves[:7], state=leaves[7], lower_bound=lower_bound, backend="chunked")

    want = gradients(exact, [x.double().requires_grad_() for x in inputs], [w.double() for w in weights])
    call, o = (*inputs, None, lower_bound, K**-0.5, WHOLE), torch.empty_like(inputs[2])
    out = [torch.empty_like(x) for x in inputs[:5]]
    forward(*call, o)
    for name, x, y in zip(BOUNDS, [*out, *backward(*call, o, *weights, out)], want):
        assert error(x, y) < BOUNDS[name], name


def test_plans_split_only_where_the_chip_would_idle():
    assert make_plan(1, 32768, 20, 128, 132).segment == 171  # 40 tiles: three segments fill the chip
    assert make_plan(1, 16384, 4, 128, 132).segment == 16  # 8 tiles
    assert not make_plan(1, 8192, 64, 128, 132).split  # 128 tiles
    assert not make_plan(1, 2048, 20, 128, 132).split  # too short for a second pass
    assert not make_plan(8, 64, 1, 64, 132).split


@pytest.mark.parametrize("tokens", [64, 200, 1000])
def test_long_rows_go_through_in_equal_parts(tokens, monkeypatch):
    v = torch.empty(1, tokens, 2, 64)
    cut = parts(v, None, 256)
    assert cut[0].start == 0 and cut[-1].stop == tokens
    assert all(a.stop == b.start and a.stop % 64 == 0 for a, b in itertools.pairwise(cut))
    assert max(s.stop - s.start for s in cut) <= 128
    assert parts(v, torch.tensor([0, tokens]), 256) == parts(v.expand(2, -1, -1, -1), None, 256) == [slice(0, tokens)]


def test_a_row_in_parts_equals_the_row_as_a_whole(monkeypatch):
    import deltify.ops.triton.operator as operator

    monkeypatch.setattr(operator, "processors", lambda device: 1)
    inputs, state = make_inputs(1, 200, 1, 64, 64), torch.randn(1, 1, 64, 64)
    do, dstate = torch.randn(1, 200, 1, 64), torch.randn(1, 1, 64, 64)
    found = []
    for limit in (10**6, 64):
        monkeypatch.setattr(operator, "PART_BACKWARD", limit)
        call = (*inputs, state, None, None, 0.125)
        o, states = run_forward(*call, keep=True)
        found.append([o, states[-1], *run_backward(*call, o, states[:-1], do, dstate)])
        assert len(states) == (1 if limit > 64 else 4)
    for whole, split in zip(*found):
        assert torch.allclose(whole, split, atol=2e-5, rtol=1e-4)


def test_a_document_much_longer_than_the_others_is_one_segment(monkeypatch):
    import deltify.ops.triton.operator as operator

    monkeypatch.setattr(operator, "processors", lambda device: 1)
    bounds = torch.tensor([0, 10, 700], dtype=torch.int32)
    inputs = make_inputs(1, 700, 1, 64, 64)
    o, states = run_forward(*inputs, None, bounds, None, 0.125, keep=False)
    want = kda(*(x.double() for x in inputs), cu_seqlens=bounds, backend="reference")
    assert error(o, want[0]) < 2e-6 and error(states[-1], want[1]) < 2e-6


def test_layers_may_be_checkpointed(monkeypatch):
    import deltify.ops.triton.operator as operator

    monkeypatch.setattr(operator, "processors", lambda device: 1)
    leaves = [x.requires_grad_() for x in make_inputs(1, 70, 1, 64, 64)]
    run = lambda *x: operator._Kda.apply(*x, None, None, None, 0.125)[0].square()  # noqa: E731
    want = torch.autograd.grad(run(*leaves).sum(), leaves)
    got = torch.autograd.grad(checkpoint(run, *leaves, use_reentrant=False).sum(), leaves)
    assert all(torch.equal(x, y) for x, y in zip(got, want))


def gradients(run, leaves, weights):
    """Of every leaf, for a loss that reads both the output and the final states."""
    o, state = run(leaves)
    return torch.autograd.grad((o * weights[0]).sum() + (state * weights[1]).sum(), leaves)


@pytest.mark.parametrize("bounds", [None, [0, 70, 70, 131, 180]], ids=["rows", "packed"])
@pytest.mark.parametrize("gates", [*GATES, "bounded"])
def test_gradients_equal_those_of_the_token_loop(gates, bounds):
    B, T, H, K, V = (2, 100, 1, 64, 128) if bounds is None else (1, 180, 2, 64, 64)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    documents = B if bounds is None else len(bounds) - 1
    lower_bound = -5.0 if gates == "bounded" else None
    inputs = [*make_inputs(B, T, H, K, V, gates), torch.randn(documents, H, K, V)]
    weights = torch.randn(B, T, H, V), torch.randn(documents, H, K, V)

    def reference(leaves):
        return kda(*leaves[:7], state=leaves[7], cu_seqlens=cu_seqlens, lower_bound=lower_bound, backend="reference")

    want = gradients(reference, [x.double().requires_grad_() for x in inputs], [w.double() for w in weights])
    call = (*inputs, cu_seqlens, lower_bound, K**-0.5, WHOLE)
    o, out = torch.empty_like(inputs[2]), [torch.empty_like(x) for x in inputs[:5]]
    forward(*call, o)
    got = [*out, *backward(*call, o, *weights, out)]
    for name, x, y in zip("q k v f b A_log dt_bias state".split(), got, want):
        largest = float(y.abs().max())  # where nothing is forgotten or all is, some gradients are zero but for rounding
        assert float((x.double() - y).abs().max()) < 1e-4 * largest + 1e-5, name


@pytest.mark.parametrize(
    "part, kernel",
    [("forward", "forward"), ("backward", "backward"), ("step", "layer_step"), ("layer", "norm")]
    + [("activation", "relu_squared"), ("row product", "row_product")],
)
def test_the_check_at_first_use_tells_right_kernels_from_wrong_ones(part, kernel, monkeypatch):
    import deltify.ops.triton.selfcheck as kernels

    right = getattr(kernels, kernel)
    assert kernels.largest_error(part, 64, "cpu", torch.float32, 130) < 1e-5

    def wrong(*arguments, by, **options):
        found = right(*arguments, **options)
        return [x * by for x in found] if isinstance(found, tuple) else found * by

    for by in (1.05, float("nan")):
        monkeypatch.setattr(kernels, kernel, functools.partial(wrong, by=by))
        assert not kernels.largest_error(part, 64, "cpu", torch.float32, 70) < kernels.TOLERANCE


@pytest.mark.parametrize("part", ["forward", "layer", "activation"])
def test_the_check_may_run_in_inference_mode(part):
    import deltify.ops.triton.selfcheck as kernels

    with torch.inference_mode():
        assert kernels.largest_error(part, 64, "cpu", torch.float32, 70) < 1e-5


def test_products_of_one_row_are_refused_for_other_inputs():
    from deltify.ops.triton import suits

    x, weight = torch.zeros(1, 1, 2048).bfloat16(), torch.zeros(2048, 2048).bfloat16()
    assert not suits(x, weight, None)  # with gradients
    with torch.no_grad():
        assert suits(x, weight, None) and suits(x, torch.nn.Parameter(weight), None)
        others = [(x.float(), weight), (x, weight.float()), (x[..., :1024], weight), (x.expand(2, 1, -1), weight)]
        others += [(x, weight[:, :512].contiguous()), (x, weight.t()), (x, weight[:512])]
        assert not any(suits(*pair, None) for pair in others) and not suits(x, weight, x[0, 0])


def test_kernels_of_an_older_deltify_are_not_used(monkeypatch):
    from deltify.ops import dispatch

    monkeypatch.setitem(sys.modules, "deltify.ops.triton", SimpleNamespace())
    dispatch.triton_kernels.cache_clear()
    assert dispatch.triton_kernels() is None
    dispatch.triton_kernels.cache_clear()


@pytest.mark.parametrize("part", ["backward", "layer"])
def test_the_check_may_run_inside_a_layer_that_is_recomputed(part):
    import deltify.ops.triton.selfcheck as kernels

    left, x = [part], torch.randn(8, requires_grad=True)

    def layer(x):
        if left:  # at first use, and not when the layer is computed again
            assert kernels.largest_error(left.pop(), 64, "cpu", torch.float32, 130) < 1e-5
        return x.sin().square()

    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert torch.allclose(x.grad, (2 * x).sin())


def test_every_kernel_compiles_for_a_gpu_that_is_not_here():
    script = Path(__file__).parents[1] / "compile_kernels.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("_kernel ") == 18

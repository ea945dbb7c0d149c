"""The GPU kernels in Triton's interpreter, on a CPU, against the token loop in float64."""

import pytest
import torch

from deltify.ops import kda, kda_layer_step

pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available():
    pytest.skip("compiled kernels are tested in test_gpu.py", allow_module_level=True)

from deltify.ops.triton import Plan, forward, layer_step, make_plan

GATES = ("library", "fast", "zero", "strong", "mixed", "collinear")
WHOLE, SPLIT = Plan(64, 100, False), Plan(32, 2, True)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel reads without having written it gives NaN."""
    empty = torch.empty

    def poison(*size, **options):
        x = empty(*size, **options)
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
    got = forward(*inputs, state, cu_seqlens, lower_bound, inputs[0].shape[-1] ** -0.5, plan)
    for x, y in zip(got, want):
        assert error(x, y) < bound


@pytest.mark.parametrize("plan", [WHOLE, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("gates", GATES)
def test_all_gates_in_float32_and_float16(gates, plan):
    for dtype, bound in ((torch.float32, 2e-6), (torch.float16, 2e-3)):
        inputs = make_inputs(1, 270, 1, 64, 64, gates, dtype)
        check(inputs, plan, bound, state=torch.randn(1, 1, 64, 64))


@pytest.mark.parametrize("plan", [WHOLE, Plan(32, 1, True)], ids=["whole", "split"])
def test_documents_of_a_packed_row(plan):
    bounds = torch.tensor([0, 70, 70, 150, 151, 290], dtype=torch.int32)
    check(make_inputs(1, 290, 2, 64, 64), plan, 2e-6, torch.randn(5, 2, 64, 64), bounds)


@pytest.mark.parametrize("plan", [WHOLE, Plan(32, 1, True)], ids=["whole", "split"])
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
    a, b = (forward(*x, None, None, None, 0.125, SPLIT)[0][:, :128] for x in (inputs, changed))
    assert torch.equal(a, b)


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


def test_plans_split_only_where_the_chip_would_idle():
    assert not make_plan(1, 32768, 20, 128, 132).split  # 80 narrow tiles
    assert make_plan(1, 8192, 64, 128, 132) == Plan(64, 128, False)
    few = make_plan(1, 16384, 4, 128, 132)  # 16 narrow tiles
    assert few.split and few.segment * few_segments(few, 16384) >= 256 and few_segments(few, 16384) <= 132 // 16
    assert not make_plan(8, 64, 1, 64, 132).split  # nothing to split


def few_segments(plan, tokens):
    return -(-tokens // 64 // plan.segment)


def test_the_check_at_first_use_tells_right_kernels_from_wrong_ones(monkeypatch):
    import deltify.ops.triton as kernels

    right = kernels.forward
    assert kernels.largest_error("cpu", torch.float32) < 1e-5
    for wrong in (1.02, float("nan")):
        monkeypatch.setattr(kernels, "forward", lambda *a, by=wrong: tuple(x * by for x in right(*a)))
        assert not kernels.largest_error("cpu", torch.float32) < kernels.TOLERANCE

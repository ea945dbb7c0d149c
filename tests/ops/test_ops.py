"""The operator: chunks against the token loop, in float64 and float32, with all gradients."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from deltify.ops import kda, kda_step, short_conv, short_conv_step

NAMES = "o state dq dk dv df db dA_log ddt_bias dstate".split()


def make_inputs(B, T, H, K, V, dtype, gates="random"):
    """Return raw inputs of the operator; `gates` selects the strength of the log-decay."""
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, H, K), torch.randn(B, T, H, V)
    f, b = torch.randn(B, T, H, K), torch.randn(B, T, H)
    A_log, dt_bias = torch.rand(H) * 2 - 1, torch.randn(H * K) - 2
    if gates == "zero":  # softplus underflows: no decay at all
        f = f - 1e4
    if gates == "strong":  # about -50 a token
        f, A_log, dt_bias = f * 0.1 + 50, A_log * 0, dt_bias * 0
    if gates == "mixed":  # some channels forget everything, their neighbours nothing
        A_log, dt_bias = A_log * 0, dt_bias * 0
        f = torch.where(torch.rand(K) < 0.5, torch.tensor(50.0), torch.tensor(-1e4)).expand_as(f)
        f = torch.where(torch.rand(B, T, 1, 1) < 0.3, -f, f).clamp(max=50)
    if gates == "collinear":  # keys nearly parallel and beta near 1, the worst case of the triangular system
        k = torch.randn(B, 1, H, K) + 1e-3 * k
        b, f = b.abs() + 8, f - 8
    return [x.to(dtype) for x in (q, k, v, f, b, A_log, dt_bias)]


def run(inputs: list[Tensor], state: Tensor | None, backend: str, **options) -> list[Tensor]:
    """Return output, state and all gradients of a fixed random loss."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    state = None if state is None else state.detach().clone().requires_grad_()
    o, final = kda(*inputs, state=state, backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (o, final)]
    loss = (o * weights[0]).sum() + (final * weights[1]).sum()
    gradients = torch.autograd.grad(loss, inputs + ([] if state is None else [state]))
    return [o.detach(), final.detach(), *gradients]


def error(got: Tensor, want: Tensor) -> float:
    """Return the RMS of the difference over the RMS of the reference, which is at least a small constant."""
    scale = want.double().square().mean().sqrt().clamp(min=1e-12)
    return float((got.double() - want.double()).square().mean().sqrt() / scale)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize(
    "T, K, V", [(T, *KV) for T in (1, 2, 63, 64, 65) for KV in ((16, 16), (24, 40))] + [(1000, 16, 16)]
)
def test_chunks_equal_the_token_loop_in_float64(T, K, V, lower_bound):
    inputs = make_inputs(2, T, 2, K, V, torch.float64)
    state = torch.randn(2, 2, K, V, dtype=torch.float64)
    want = run(inputs, state, "reference", lower_bound=lower_bound)
    got = run(inputs, state, "chunked", lower_bound=lower_bound)
    for name, g, w in zip(NAMES, got, want):
        assert error(g, w) < 1e-10, name


@pytest.mark.parametrize("gates", ["zero", "strong", "mixed", "collinear"])
def test_extreme_gates_and_keys_are_exact_in_float64(gates):
    inputs = make_inputs(1, 130, 2, 16, 16, torch.float64, gates)
    state = torch.randn(1, 2, 16, 16, dtype=torch.float64)
    for name, g, w in zip(NAMES, run(inputs, state, "chunked"), run(inputs, state, "reference")):
        assert torch.allclose(g, w, rtol=1e-10, atol=1e-10 * max(1.0, float(w.abs().max()))), name


@pytest.mark.parametrize("width", [16, 64, 256])
def test_widths_up_to_256(width):
    inputs = make_inputs(1, 40, 1, width, 256 // 2, torch.float64)
    for name, g, w in zip(NAMES, run(inputs, None, "chunked"), run(inputs, None, "reference")):
        assert error(g, w) < 1e-10, name


@pytest.mark.parametrize("gates", ["random", "zero", "mixed", "collinear"])
@pytest.mark.parametrize("T", [65, 1000])
def test_float32_is_as_good_as_the_float32_token_loop(T, gates):
    H = 8  # dA_log has one element a head; with two heads, the loop's error may be small by chance
    exact_inputs = make_inputs(1, T, H, 32, 32, torch.float64, gates)
    state = torch.randn(1, H, 32, 32, dtype=torch.float64)
    exact_inputs = [x.float().double() for x in exact_inputs]
    inputs = [x.float() for x in exact_inputs]
    want = run(exact_inputs, state.float().double(), "reference")
    loop = run(inputs, state.float(), "reference")
    got = run(inputs, state.float(), "chunked")
    for name, g, other, w in zip(NAMES, got, loop, want):
        size = float(w.abs().max())
        if size < 1e-30:  # a gradient that is zero, or nearly so
            assert float(g.abs().max()) < 1e-6, name
        else:
            assert error(g, w) < max(3 * error(other, w), 2e-6), (name, error(g, w), error(other, w))


def test_document_bounds_keep_documents_apart():
    bounds = [0, 3, 3, 70, 71, 200]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    inputs = make_inputs(1, 200, 2, 16, 16, torch.float64)
    state = torch.randn(5, 2, 16, 16, dtype=torch.float64)
    got = run(inputs, state, "chunked", cu_seqlens=cu_seqlens)
    for name, g, w in zip(NAMES, got, run(inputs, state, "reference", cu_seqlens=cu_seqlens)):
        assert error(g, w) < 1e-10, name
    for n, (start, end) in enumerate(pairwise(bounds)):
        if start < end:
            alone = [x[:, start:end] if x.dim() > 2 else x for x in inputs]
            o, final = kda(*alone, state=state[n : n + 1])
            assert torch.allclose(o, got[0][:, start:end], atol=1e-12)
            assert torch.allclose(final[0], got[1][n], atol=1e-12)
    assert torch.equal(got[1][1], state[1])  # the empty document


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
def test_no_token_changes_no_state(backend):
    inputs, state = make_inputs(1, 0, 2, 16, 8, torch.float32), torch.randn(3, 2, 16, 8, requires_grad=True)
    bounds = torch.zeros(4, dtype=torch.int32)
    o, final = kda(*inputs, state=state, cu_seqlens=bounds, backend=backend)
    assert o.shape == (1, 0, 2, 8) and torch.equal(final, state) and final is not state
    final.sum().backward()
    assert torch.equal(state.grad, torch.ones_like(state))
    assert torch.equal(kda(*inputs, cu_seqlens=bounds, backend=backend)[1], torch.zeros(3, 2, 16, 8))
    x, kept = torch.randn(1, 0, 12), torch.randn(3, 12, 3)
    y, after = short_conv(x, torch.randn(12, 1, 4), state=kept, cu_seqlens=bounds)
    assert y.shape == (1, 0, 12) and torch.equal(after, kept)


def test_the_future_changes_no_past_output_and_gets_no_gradient_from_it():
    inputs = make_inputs(1, 150, 2, 16, 16, torch.float32)
    changed = [x.clone() for x in inputs]
    for x in changed[:5]:
        x[:, 100:] = torch.randn_like(x[:, 100:]) * 30
    o, _ = kda(*inputs)
    assert torch.equal(o[:, :100], kda(*changed)[0][:, :100])
    inputs = [x.requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(kda(*inputs)[0][:, :100].sum(), inputs[:5])
    assert all(float(g[:, 100:].abs().max()) == 0 for g in gradients)


def test_state_carries_a_sequence_over():
    inputs = make_inputs(2, 100, 2, 16, 24, torch.float64)
    o, final = kda(*inputs)
    first, middle = kda(*[x[:, :37] if x.dim() > 2 else x for x in inputs])
    second, end = kda(*[x[:, 37:] if x.dim() > 2 else x for x in inputs], state=middle)
    assert torch.allclose(torch.cat([first, second], 1), o, atol=1e-12)
    assert torch.allclose(end, final, atol=1e-12)


def test_many_segments_give_the_result_of_one(monkeypatch):
    inputs = make_inputs(2, 512, 2, 16, 16, torch.float64)
    want = run(inputs, None, "chunked")
    monkeypatch.setitem(__import__("deltify.ops.chunked").ops.chunked.SEGMENT_ELEMENTS, "cpu", 1)
    for name, g, w in zip(NAMES, run(inputs, None, "chunked"), want):
        assert error(g, w) < 1e-12, name


@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_a_step_equals_a_sequence_of_one(lower_bound):
    inputs = make_inputs(3, 6, 2, 16, 24, torch.float64)
    state = torch.randn(3, 2, 16, 24, dtype=torch.float64)
    o, final = kda(*inputs, state=state, lower_bound=lower_bound)
    steps = []
    for t in range(6):
        now = [x[:, t] for x in inputs[:5]]
        steps.append(kda_step(*now, *inputs[5:], state, lower_bound=lower_bound))
    assert torch.allclose(torch.stack(steps, 1), o, atol=1e-12)
    assert torch.allclose(state, final, atol=1e-12)


def test_a_step_updates_a_state_that_is_not_contiguous():
    inputs = [x[:, 0] if x.dim() > 2 else x for x in make_inputs(2, 1, 2, 16, 24, torch.float64)]
    states = torch.randn(2, 3, 2, 16, 24, dtype=torch.float64)  # of three layers
    want, before = states[:, 1].clone(), states.clone()
    assert torch.equal(kda_step(*inputs, states[:, 1]), kda_step(*inputs, want))
    assert torch.equal(states[:, 1], want) and torch.equal(states[:, ::2], before[:, ::2])


def test_half_precision_inputs_compute_in_float32():
    inputs = make_inputs(1, 100, 2, 16, 16, torch.float32)
    half = [x.bfloat16() if x.dim() > 2 else x for x in inputs]
    o, final = kda(*half)
    want, state = kda(*[x.float() for x in half])
    assert o.dtype == torch.bfloat16 and final.dtype == torch.float32
    assert torch.equal(final, state) and torch.equal(o, want.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kda(*half)[1], state)


def test_convolution_equals_torch_and_its_own_pieces():
    x, weight = torch.randn(2, 20, 6, dtype=torch.float64), torch.randn(6, 1, 4, dtype=torch.float64)
    y, state = short_conv(x, weight)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (3, 0))
    want = torch.nn.functional.silu(torch.nn.functional.conv1d(padded, weight, groups=6)).transpose(1, 2)
    assert torch.allclose(y, want, atol=1e-12)
    assert torch.equal(state, x[:, -3:].transpose(1, 2))
    first, middle = short_conv(x[:, :2], weight)
    second, end = short_conv(x[:, 2:], weight, state=middle)
    assert torch.allclose(torch.cat([first, second], 1), y, atol=1e-12)
    assert torch.equal(end, state)
    steps = [short_conv_step(x[:, t], weight, middle) for t in range(2, 20)]
    assert torch.allclose(torch.stack(steps, 1), y[:, 2:], atol=1e-12)


def test_convolution_respects_bounds_and_has_right_gradients():
    x, weight = torch.randn(1, 9, 3, dtype=torch.float64), torch.randn(3, 1, 4, dtype=torch.float64)
    state, bounds = torch.randn(4, 3, 3, dtype=torch.float64), torch.tensor([0, 2, 2, 8, 9], dtype=torch.int32)
    y, final = short_conv(x, weight, state=state, cu_seqlens=bounds)
    for n, (start, end) in enumerate(zip(bounds.tolist(), bounds.tolist()[1:])):
        if start < end:
            alone, after = short_conv(x[:, start:end], weight, state=state[n : n + 1])
            assert torch.allclose(alone, y[:, start:end], atol=1e-12)
            assert torch.equal(after[0], final[n])
    assert torch.equal(final[1], state[1])
    x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, w: short_conv(a, w, cu_seqlens=bounds)[0], (x, weight))
    assert torch.autograd.gradcheck(lambda a, w: short_conv(a, w)[0], (x, weight))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lower_bound": -7.0}, "lower_bound=-7.0"),
        ({"backend": "cuda"}, "backend='cuda'"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens"),
        ({"state": torch.zeros(1, 2, 16, 8)}, "state has shape"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        kda(*make_inputs(1, 4, 2, 16, 16, torch.float32), **change)

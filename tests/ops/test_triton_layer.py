"""The kernels around KDA against their PyTorch forms: in Triton's interpreter in float32, on a GPU in bfloat16."""

from itertools import pairwise

import pytest
import torch

from deltify.ops import add_rms_norm, gated_rms_norm, relu_squared, rms_norm, short_conv_split
from deltify.ops.conv import short_conv_split_torch

pytest.importorskip("triton", reason="Triton is not installed")

from deltify.ops.triton import activation, conv, norms

BOUNDS = [0, 1, 1, 3, 36, 36, 70, 72, 130, 130]  # empty, of one and two tokens, across tiles, at a tile's end
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted kernels are for machines without a GPU")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel reads without having written it gives NaN."""

    def poison(make):
        def made(*arguments, **options):
            x = make(*arguments, **options)
            return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(99)

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


def error(got, want):
    got, want = got.detach(), want.detach()
    return float((got.cpu().double() - want.cpu()).square().mean().sqrt() / want.cpu().square().mean().sqrt())


def compare(kernel, reference, leaves, bound):
    """Outputs and all gradients of both, for a loss that reads every output; the reference in float64."""
    results = []
    for run, dtype in ((kernel, None), (reference, torch.float64)):
        inputs = [x.to(dtype).detach().requires_grad_() for x in leaves]
        outputs = run(*inputs)
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
        loss = sum((y * w).double().sum() for y, w in zip(outputs, weights))
        results.append([*outputs, *torch.autograd.grad(loss, inputs)])
    for i, (got, want) in enumerate(zip(*results)):
        assert got.shape == want.shape and error(got, want) < bound, i
    assert all(x.dtype == y.dtype for x, y in zip(leaves, results[0][-len(leaves) :]))


def check_conv(B, T, D, parts, bounds, has_state, bound, read_state=True, **place):
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    N = B if bounds is None else len(bounds) - 1
    leaves = [torch.randn(B, T, D), torch.randn(D, 1, 4)] + [torch.randn(N, D, 3)] * has_state
    leaves = [x.to(**place) for x in leaves]

    def run(call, bounds):
        def outputs(x, taps, state=None):
            out, last = call(x, taps, parts, state, bounds)
            assert all(y.is_contiguous() for y in out)
            return [*out, last] if read_state else out

        return outputs

    on_device = None if bounds is None else cu_seqlens.to(leaves[0].device)
    compare(run(conv.short_conv_split, on_device), run(short_conv_split_torch, on_device), leaves, bound)


@interpreted
@pytest.mark.parametrize("has_state", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("T", [1, 2, 63, 65, 130])
def test_convolutions_of_rows(T, has_state):
    check_conv(2 if T < 100 else 1, T, 2 * 40, 2, None, has_state, 1e-6)


@interpreted
@pytest.mark.parametrize("has_state", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("bounds", [BOUNDS, [0, 65], [0, 0, 1, 2, 3, 4, 4]], ids=["many", "one", "short"])
def test_convolutions_of_packed_documents(bounds, has_state):
    check_conv(1, bounds[-1], 2 * 40, 2, bounds, has_state, 1e-6)


@interpreted
def test_convolutions_with_other_parts_and_where_nothing_reads_the_state():
    check_conv(1, 37, 300, 1, None, False, 1e-6, read_state=False)
    check_conv(1, 36, 3 * 24, 3, BOUNDS[:6], True, 1e-6, read_state=False)


@interpreted
def test_convolutions_without_gradients_and_of_one_part_alone():
    x, taps, state = torch.randn(2, 34, 96), torch.randn(96, 1, 4), torch.randn(2, 96, 3)
    want, got = (call(x, taps, 3, state, None) for call in (short_conv_split_torch, conv.short_conv_split))
    for a, b in zip([*want[0], want[1]], [*got[0], got[1]]):
        assert torch.allclose(a, b, atol=1e-5) and not b.requires_grad
    gradients = []
    for call in (short_conv_split_torch, conv.short_conv_split):
        leaf = x.clone().requires_grad_()
        gradients += torch.autograd.grad(call(leaf, taps, 3, None, None)[0][1].square().sum(), leaf)
    assert torch.allclose(*gradients, atol=1e-4)


@interpreted
def test_a_document_sees_no_other_and_one_in_pieces_is_the_same():
    x, taps, bounds = torch.randn(1, 72, 64), torch.randn(64, 1, 4), BOUNDS[:8]
    packed, states = conv.short_conv_split(x, taps, 1, None, torch.tensor(bounds, dtype=torch.int32))
    for n, (start, end) in enumerate(pairwise(bounds)):
        if start < end:
            alone, state = conv.short_conv_split(x[:, start:end], taps, 1, None, None)
            assert torch.equal(alone[0], packed[0][:, start:end]) and torch.equal(state[0], states[n])
    first, state = conv.short_conv_split(x[:, :34], taps, 1, None, None)
    second, _ = conv.short_conv_split(x[:, 34:], taps, 1, state, None)
    whole, _ = conv.short_conv_split(x, taps, 1, None, None)
    assert torch.equal(torch.cat([first[0], second[0]], 1), whole[0])


@interpreted
@pytest.mark.parametrize("width", [64, 128, 1024])
def test_gated_norms(width):
    leaves = [torch.randn(3, 35, width), torch.randn(3, 35, width) * 3, torch.rand(width) + 0.5]
    compare(lambda x, g, w: [norms.norm(x, g, w, 1e-5)], lambda x, g, w: [gated_rms_norm(x, g, w, 1e-5)], leaves, 1e-6)


@interpreted
@pytest.mark.parametrize("rows, width", [(300, 8), (70, 576), (5, 2560), (3, 8192)])
def test_norms(rows, width):
    leaves = [torch.randn(rows, width), torch.rand(width) + 0.5]
    compare(lambda x, w: [norms.norm(x, None, w, 1e-5)], lambda x, w: [rms_norm(x, w, 1e-5)], leaves, 1e-6)


@interpreted
def test_norms_of_a_sum():
    x, y, weight = torch.randn(3, 70, 576), torch.randn(3, 70, 576), torch.rand(576)
    total, got = norms.add_norm(x, y, weight, 1e-5)
    assert torch.equal(total, x + y) and torch.allclose(got, rms_norm(x + y, weight, 1e-5), atol=1e-5)
    assert all(map(torch.equal, add_rms_norm(x, y, weight, 1e-5), (x + y, rms_norm(x + y, weight, 1e-5))))


@interpreted
@pytest.mark.parametrize("wide", [torch.float16, torch.float32])
def test_norms_have_the_dtypes_of_the_pytorch_form(wide):
    x, gate, weight = torch.randn(5, 64).half(), torch.randn(5, 64).half(), torch.rand(64).to(wide)
    want, got = rms_norm(x, weight, 1e-5), norms.norm(x, None, weight, 1e-5)
    assert got.dtype == want.dtype == wide and torch.allclose(got, want, rtol=2e-3)
    want, got = gated_rms_norm(x, gate, weight, 1e-5), norms.norm(x, gate, weight, 1e-5)
    assert got.dtype == want.dtype == torch.float16 and torch.allclose(got, want, rtol=2e-3, atol=1e-6)


@interpreted
def test_relu_squared():
    compare(lambda x: [activation.relu_squared(x)], lambda x: [relu_squared(x)], [torch.randn(3, 1700)], 1e-6)
    x = torch.tensor([float("nan"), float("-inf"), float("inf"), -1.0, 0.0])
    assert torch.equal(activation.relu_squared(x).nan_to_num(7.0), relu_squared(x).nan_to_num(7.0))


@interpreted
def test_more_rows_than_programs(monkeypatch):
    monkeypatch.setattr(norms, "NORM_WARPS", 12)
    test_gated_norms(64)
    test_norms(70, 576)


def test_without_a_gpu_the_pytorch_forms_run():
    x, taps = torch.randn(1, 9, 12, dtype=torch.float64), torch.randn(12, 1, 3, dtype=torch.float64)
    (y, z), state = short_conv_split(x, taps, 2)
    assert y.shape == z.shape == (1, 9, 6) and state.shape == (1, 12, 2) and y.is_contiguous()
    with pytest.raises(ValueError, match="12 channels"):
        short_conv_split(x, taps, 5)


GPU = {"device": "cuda", "dtype": torch.bfloat16}


@pytest.mark.gpu
@pytest.mark.parametrize("has_state", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("B, T, bounds", [(2, 1, None), (2, 1000, None), (1, 130, BOUNDS), (1, 65, [0, 0, 1, 65])])
def test_convolutions_in_bfloat16(B, T, bounds, has_state):
    check_conv(B, T, 3 * 576, 3, bounds, has_state, 5e-3, **GPU)
    check_conv(B, T, 3 * 100, 3, bounds, has_state, 5e-3, **GPU)  # no whole accesses of 16 bytes


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128, 576, 2560, 8192])
def test_norms_in_bfloat16(width):
    x, gate, weight = (torch.randn(2, 700, width).to(**GPU) for _ in range(3))
    leaves = [x, gate, weight[0, 0].abs() + 0.5]
    reference = lambda x, w: [rms_norm(x, w, 1e-5)]  # noqa: E731
    compare(lambda x, w: [norms.norm(x, None, w, 1e-5)], reference, leaves[::2], 5e-3)
    compare(lambda x, w: [norms.norm(x, None, w, 1e-5)], reference, [x, leaves[2].float()], 5e-3)
    compare(lambda x, g, w: [norms.norm(x, g, w, 1e-5)], lambda x, g, w: [gated_rms_norm(x, g, w, 1e-5)], leaves, 5e-3)


@pytest.mark.gpu
@torch.no_grad()
def test_norms_of_a_sum_in_bfloat16():
    x, y, weight = (torch.randn(2, 700, 2560).to(**GPU) for _ in range(3))
    total, got = add_rms_norm(x, y, weight[0, 0], 1e-5)
    assert torch.equal(total, x + y) and torch.equal(got, rms_norm(x + y, weight[0, 0], 1e-5))


@pytest.mark.gpu
def test_relu_squared_in_bfloat16():
    x = torch.randn(3, 70, 18432).to(**GPU)
    assert torch.equal(relu_squared(x), torch.relu(x).square())
    compare(lambda x: [activation.relu_squared(x)], lambda x: [torch.relu(x).square()], [x], 5e-3)


@pytest.mark.gpu
def test_two_runs_are_equal():
    x, taps = torch.randn(1, 5000, 3 * 256).to(**GPU), torch.randn(3 * 256, 1, 4).to(**GPU)
    results = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in (x, taps)]
        out, _ = short_conv_split(*leaves, 3)
        results.append([*out, *torch.autograd.grad(sum(y.float().square().sum() for y in out), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results))

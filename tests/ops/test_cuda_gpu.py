"""The kernels in CUDA C++ on a GPU of compute capability 9.0; skipped elsewhere."""

import pytest
import torch
from gpu_cases import BOUNDS, check_gradients, error, make_inputs, too_large

from deltify.ops import kda
from deltify.ops.cuda import finish, inputs, prepare, scan
from deltify.ops.triton import operator, selfcheck
from deltify.ops.triton.launch import Plan, Prepared

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != inputs.CAPABILITY,
        reason="the kernels need compute capability 9.0",
    ),
]


@pytest.fixture(autouse=True)
def cuda_alone(monkeypatch):
    """Inputs that the kernels refuse are an error."""
    monkeypatch.setenv("DELTIFY_KERNELS", "cuda")


@pytest.mark.parametrize("gates", ["library", "slow", "fast", "zero", "strong", "mixed", "collinear", "bounded"])
@pytest.mark.parametrize("B, T, H, K, V", [(2, 1000, 3, 128, 128), (1, 333, 2, 64, 64)])
def test_the_kernels_equal_float64(gates, B, T, H, K, V):
    options = {"lower_bound": -5.0 if gates == "bounded" else None}
    inputs, state = make_inputs(B, T, H, K, V, gates), torch.randn(B, H, K, V, device="cuda")
    want = kda(*(x.double() for x in inputs), state=state.double(), backend="chunked", **options)
    got = kda(*inputs, state=state, backend="triton", **options)
    bound = BOUNDS.get(gates, 5e-3)
    assert error(got[0], want[0]) < bound and error(got[1], want[1]) < bound


@pytest.mark.parametrize("K", [128, 64])
def test_packed_documents_empty_ones_included(K):
    bounds = torch.tensor([0, 100, 100, *range(101, 150), 333, 700, 5000], dtype=torch.int32, device="cuda")
    inputs, state = make_inputs(1, 5000, 3, K, K), torch.randn(len(bounds) - 1, 3, K, K, device="cuda")
    assert not operator.plan_for(*inputs, bounds, False).split
    want = kda(*(x.double() for x in inputs), state=state.double(), cu_seqlens=bounds.cpu(), backend="chunked")
    got = kda(*inputs, state=state, cu_seqlens=bounds, backend="triton")
    assert error(got[0], want[0]) < 5e-3 and error(got[1], want[1]) < 5e-3
    assert torch.equal(got[1][1], state[1])


def written(inputs, cuda, bounds=None, lower_bound=None):
    q, k, v, f, b, *gates = inputs
    p = Prepared(q, k, v, f, b, *gates, bounds, lower_bound, 0.1, Plan(8, False, cuda=cuda))
    return p.wide, p.square, p.ends


@pytest.mark.parametrize("gates", ["slow", "fast", "bounded"])
def test_every_element_is_written_and_twice_the_same(gates, monkeypatch):
    inputs, lower_bound = make_inputs(2, 1000, 3, 128, 128, gates), -5.0 if gates == "bounded" else None
    want, empty = written(inputs, False, None, lower_bound), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))
    first, second = (written(inputs, True, None, lower_bound) for _ in range(2))
    for x, y, z in zip(first, second, want):
        assert torch.equal(x, y) and error(x, z.double()) < 5e-3


def test_rows_that_do_not_fill_a_chunk_of_documents_are_zero():
    bounds = torch.tensor([0, 70, 150], dtype=torch.int32, device="cuda")
    wide = written(make_inputs(1, 150, 2, 64, 64), True, bounds)[0].view(3, -1, 2, 64, 64)
    assert (wide[:, 1, :, 6:] == 0).all() and (wide[:, 3, :, 16:] == 0).all()


def skip_without_100_gb():
    if torch.cuda.get_device_properties(0).total_memory < 100e9:
        pytest.skip("needs a GPU with 100 GB")


def test_offsets_beyond_32_bits():
    skip_without_100_gb()
    T, H, K = 140_000, 128, 128
    q, k, f = (torch.randn(1, T, H, K, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    b = torch.randn(1, T, H, device="cuda", dtype=torch.bfloat16)
    gates = [torch.zeros(H, device="cuda"), torch.full((H * K,), -5.0, device="cuda")]
    whole = written([q, k, q, f, b, *gates], True)
    chunks, first = -(-T // 64), T // 64 - 10  # the last ten whole chunks, of the last two heads
    part = [x[:, first * 64 : first * 64 + 640, -2:].contiguous() for x in (q, k, q, f, b)]
    alone = written([*part, gates[0][-2:], gates[1][-2 * K :]], True)
    for x, y, rows in zip(whole, alone, (64, 64, 1)):
        x = x.view(-1, chunks, H, rows, x.shape[-1])[:, first : first + 10, -2:]
        assert torch.equal(x, y.view(x.shape))


def test_offsets_beyond_32_bits_in_the_scan():
    skip_without_100_gb()
    T, H, K = 140_000, 128, 128
    inputs = make_inputs(1, T, H, K, K, "slow")
    p = Prepared(*inputs, None, None, 0.1, Plan(T, False, cuda=True))
    results = []
    for plan in (Plan(T, False, cuda=True), Plan(T, False)):
        o = torch.empty_like(inputs[2])
        results.append((o[:, -600:, -2:], p.scan(inputs[2], None, plan, o)[0]))
    assert all(error(x, y.double()) < 5e-3 for x, y in zip(*results))


@pytest.mark.parametrize("gates", ["library", "slow", "fast", "bounded"])
@pytest.mark.parametrize("B, T, H, K", [(1, 333, 4, 128), (2, 300, 3, 64)])
def test_gradients_equal_float64(gates, B, T, H, K):
    assert not too_large(check_gradients(B, T, H, K, K, gates))


@pytest.mark.parametrize("K", [128, 64])
def test_gradients_of_packed_documents(K):
    assert not too_large(check_gradients(1, 700, 3, K, K, "library", [0, 100, 100, *range(101, 150), 333, 700]))


def test_a_long_row_is_prepared_in_pieces(monkeypatch):
    inputs = make_inputs(1, 8300, 32, 128, 128)
    assert operator.plan_for(*inputs, None, False).pieces == 2
    got = kda(*inputs, backend="triton")
    monkeypatch.setenv("DELTIFY_KERNELS", "triton")
    want = kda(*inputs, backend="triton")
    assert all(error(x, y.double()) < 5e-3 for x, y in zip(got, want))


def test_gradients_are_written_everywhere_and_twice_the_same(monkeypatch):
    inputs = [x.requires_grad_() for x in make_inputs(2, 500, 3, 128, 128)]
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda x: empty_like(x).fill_(float("nan")))

    def results():
        o, state = kda(*inputs, backend="triton")
        return [o, state, *torch.autograd.grad(o.square().sum() + state.sum(), inputs)]

    for first, second in zip(results(), results()):
        assert torch.isfinite(first).all() and torch.equal(first, second)


def test_a_captured_call_gives_the_eager_result():
    inputs = make_inputs(1, 300, 2, 64, 64)
    want = kda(*inputs, backend="triton")[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = kda(*inputs, backend="triton")[0]
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "module, right, wrong, which",
    [
        (prepare, "on = diagonal[row]", "on = 0.f", "forward"),
        (scan, "multiply64<1>(x, c + 4 * i", "multiply64<-1>(x, c + 4 * i", "forward"),
        (scan, "MULTIPLY_STATE<-1>", "MULTIPLY_STATE<1>", "backward"),
        (finish, "2.f * sums[4]", "sums[4]", "backward"),
    ],
)
def test_a_wrong_kernel_is_not_used(monkeypatch, caplog, module, right, wrong, which):
    monkeypatch.setenv("DELTIFY_KERNELS", "auto")
    caches, original = (selfcheck.cuda_refusal, selfcheck.failure, module.kernel), module.source_of
    inputs = [x.requires_grad_() for x in make_inputs(1, 100, 2, 64, 64)]
    results = lambda: torch.autograd.grad(kda(*inputs, backend="triton")[0].sum(), inputs)  # noqa: E731
    want = results()
    assert right in original(64, 0)
    monkeypatch.setattr(module, "source_of", lambda *kind: original(*kind).replace(right, wrong))
    for x in caches:
        x.cache_clear()
    assert all(error(x, y.double()) < 2e-2 for x, y in zip(results(), want))
    assert f"KDA's {which} pass runs in Triton, not in CUDA C++" in caplog.text and "wrong results" in caplog.text
    monkeypatch.undo()
    for x in caches:
        x.cache_clear()

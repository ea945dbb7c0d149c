"""The CUDA kernels on a CPU: their sources as they are, compiled by g++ over emulator.h, against float64."""

import ctypes
import functools
import itertools
import logging
import math
import shutil
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deltify.ops import kda
from deltify.ops.cuda import compiler, finish, prepare, scan
from deltify.ops.cuda.inputs import WIDTHS, fits

C, HEADS = 64, 2
GATES = ("slow", "library", "middle", "fast", "bounded", "zero", "mixed", "strong", "turns", "collinear")

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")


def cpp_of(source, kernel):
    """Return a kernel's source for a CPU."""
    for name in ("machine.h", "pipeline.h"):  # emulator.h has their names
        source = source.replace(Path(compiler.__file__).with_name(name).read_text(), "")
    sizes = 'extern "C" int size_of(int shared) { return shared ? SHARED_BYTES : sizeof(Call); }'
    return f'#include "emulator.h"\n{source}\nRUN({kernel})\n{sizes}\n'


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """Return a function that gives the kernels for a width and a kind of gate."""
    folder = tmp_path_factory.mktemp("emulator")

    @functools.cache
    def build(source, kernel, threads):
        path = folder / f"{len(list(folder.iterdir()))}.cpp"
        path.write_text(cpp_of(source, kernel))
        command = ["g++", "-O1", "-w", "-Wno-psabi", "-std=c++17", "-fPIC", "-shared", "-U_FORTIFY_SOURCE"]
        command += [f"-DTHREADS={threads}", f"-I{Path(__file__).parent}", "-o", path.with_suffix(".so"), path]
        subprocess.run(list(map(str, command)), check=True)
        return ctypes.CDLL(str(path.with_suffix(".so")))

    def kernels(K, bounded):
        return SimpleNamespace(
            prepare=build(prepare.source_of(K, bounded), "kda_prepare", prepare.THREADS),
            scan=lambda mode: build(scan.source_of(K, mode), "kda_scan", scan.THREADS),
            finish=lambda: build(finish.source_of(K, bounded), "kda_finish", 4 * K),
        )

    return kernels


def map_of(pointer, columns, rows):
    """Return emulator.h's TensorMap of a matrix."""
    return struct.pack("@Pqq", pointer, columns, rows).ljust(128, b"\0")


def run(kernel, arguments, blocks):
    assert len(arguments) == kernel.size_of(0)
    assert kernel.run(ctypes.create_string_buffer(arguments, len(arguments)), blocks) == 0


def make_inputs(B, T, K, V, gates):
    """q, k, v, f, b in bfloat16 and A_log, dt_bias, as in test_gpu.py."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(len(gates) + T))
    q, k, f = (draw(B, T, HEADS, K) for _ in range(3))
    v, b = draw(B, T, HEADS, V), draw(B, T, HEADS)
    A_log, dt_bias = torch.linspace(1, 16, HEADS).log(), torch.linspace(-6.9, -2.3, HEADS * K).exp().expm1().log()
    dt_bias = dt_bias[torch.randperm(HEADS * K, generator=torch.Generator().manual_seed(0))]
    if gates in ("slow", "middle", "mixed", "strong", "turns"):  # "middle" decays by about 2^-150 over a chunk
        A_log, dt_bias = torch.zeros(HEADS), torch.full((HEADS * K,), 1.2 if gates == "middle" else -5.0)
    if gates in ("fast", "bounded"):
        dt_bias = torch.zeros(HEADS * K)
    if gates == "bounded":
        A_log = torch.zeros(HEADS)
    if gates == "zero":
        f = torch.full_like(f, -60)
    if gates in ("strong", "mixed"):  # -50 a token, in all channels or in half of them
        f = torch.full_like(f, 55).where(torch.tensor(gates == "strong") | (f < 0), -60)
    if gates == "turns":  # -50 a token in eight tokens, nothing in the next eight
        strong = (torch.arange(T)[:, None] // 8 + torch.arange(K)) % 2 == 0
        f = torch.full_like(f, 55).where(strong[None, :, None], -60)
    if gates == "collinear":
        k, b, f = draw(HEADS, K) + 0.01 * k, b * 0 + 8, torch.full_like(f, -60)
    return [x.bfloat16() for x in (q, k, v, f, b)] + [A_log, dt_bias]


def nan(*size, dtype=torch.bfloat16):
    return torch.full(size, torch.nan, dtype=dtype)


def run_prepare(kernels, inputs, lower_bound, bounds, scale):
    """Return what the kernel writes: `wide`, `square` and `ends`, NaN where it writes nothing."""
    q, k, v, f, b, A_log, dt_bias = inputs
    batch, tokens, heads, K = q.shape
    documents = batch if bounds is None else len(bounds) - 1
    slots = heads * (batch * math.ceil(tokens / C) if bounds is None else tokens // C + documents)
    wide, square, ends = nan(3, slots, C, K), nan(2, slots, C, C), nan(slots, K, dtype=torch.float32)
    assert fits(q, k, v, f, b, A_log, dt_bias, bounds)
    tensors = (q, k, f, b, A_log, dt_bias, bounds, wide, square, ends)
    for first, end in ((0, slots // 2), (slots // 2, slots)):  # as two launches
        call = prepare.pack_arguments(*tensors, documents, lower_bound or 0.0, scale, first)
        run(kernels.prepare, call, end - first)
    return wide, square, ends


def run_scan(kernels, mode, prepared, values, bounds, before, chunks=scan.ALL):
    """Return what the kernel writes: o, u or dv, the other states, and the states of all chunks."""
    out, after = torch.full_like(values, torch.nan), torch.full_like(before, torch.nan)
    slots, K, V = prepared[2].shape[0], *before.shape[2:]
    states = None if mode == scan.OUTPUTS else nan(slots, V, K)
    call = scan.pack_arguments(*prepared, values, bounds, before, after, out, states, chunks, map_of)
    run(kernels.scan(mode), call, before.shape[0] * before.shape[1] * V // 64)
    return out, after, states


def error(got, want):
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


def make_case(gates, B, T, K, bounds):
    """Return inputs, states, their bounds as a tensor, and options."""
    inputs, documents = make_inputs(B, T, K, K, gates), B if bounds is None else len(bounds) - 1
    state = torch.randn(documents, HEADS, K, K, generator=torch.Generator().manual_seed(1))
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    return inputs, state, cu_seqlens, {"lower_bound": -5.0 if gates == "bounded" else None, "cu_seqlens": cu_seqlens}


def check(emulated, gates, B, T, K, bounds=None):
    """Compare output and states with float64, in one launch of the scan, and of a single row in two."""
    inputs, state, cu_seqlens, options = make_case(gates, B, T, K, bounds)
    o, final = kda(*(x.double() for x in inputs), state=state.double(), backend="reference", **options)
    kernels, v = emulated(K, options["lower_bound"] is not None), inputs[2]
    prepared = run_prepare(kernels, inputs, options["lower_bound"], cu_seqlens, K**-0.5)
    cuts = [0, 1, 10**6] if B == 1 and bounds is None else [0, 10**6]
    parts = []
    for chunks in itertools.pairwise(cuts):
        out, state, _ = run_scan(kernels, scan.OUTPUTS, prepared, v, cu_seqlens, state, range(*chunks))
        parts.append(out)
    for later in parts[1:]:
        parts[0][:, C:] = later[:, C:]
    bound = 3e-2 if gates == "collinear" else 5e-3
    assert error(parts[0].double(), o) < bound and error(state.double(), final) < bound


# those of gpu_cases.py, but that of A_log: much cancels in this sum
GRADIENT_BOUNDS = {"dq": 8e-3, "dk": 8e-3, "dv": 8e-3, "df": 2e-2, "db": 2e-2, "dA_log": 3e-2, "ddt_bias": 1e-2}


def run_backward(emulated, inputs, state, cu_seqlens, lower_bound, o, do, dfinal):
    """Return the gradients of the inputs and of the states."""
    kernels, (q, k, v, f, b, *gate), K = emulated(inputs[0].shape[-1], lower_bound is not None), inputs, state.shape[2]
    prepared = run_prepare(kernels, inputs, lower_bound, cu_seqlens, K**-0.5)
    u, _, states = run_scan(kernels, scan.KEEP, prepared, v, cu_seqlens, state)
    dv, dstate, dstates = run_scan(kernels, scan.REVERSE, prepared, do, cu_seqlens, dfinal)
    slots = states.shape[0]
    dq, dk, df, db = (torch.full_like(x, torch.nan) for x in (q, k, f, b))
    dA_log, ddt_bias = (nan(slots, K, dtype=torch.float32) for _ in range(2))
    tensors = (o, u, do, dv, states, dstates, (dq, dk, df, db, dA_log, ddt_bias))
    call = finish.pack_arguments(q, k, f, v, b, *gate, cu_seqlens, lower_bound or 0.0, K**-0.5, *tensors, map_of)
    run(kernels.finish(), call, slots)
    sums = dA_log.view(-1, HEADS, K).sum((0, 2)), ddt_bias.view(-1, HEADS, K).sum(0).flatten()
    return dq, dk, dv, df, db, *sums, dstate


def check_gradients(emulated, gates, B, T, K, bounds=None):
    """Compare gradients with float64."""
    inputs, state, cu_seqlens, options = make_case(gates, B, T, K, bounds)
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(5))
    do, dfinal = draw(B, T, HEADS, K).bfloat16(), draw(*state.shape)
    leaves = [x.double().requires_grad_() for x in (*inputs, state)]
    o, final = kda(*leaves[:7], state=leaves[7], backend="reference", **options)
    want = torch.autograd.grad((o * do.double()).sum() + (final * dfinal.double()).sum(), leaves)
    got = run_backward(emulated, inputs, state, cu_seqlens, options["lower_bound"], o.detach().bfloat16(), do, dfinal)
    names = (*GRADIENT_BOUNDS, "dstate")
    errors = {n: error(x.double(), y) for n, x, y in zip(names, got, want)}
    bounds_of = GRADIENT_BOUNDS | {"dstate": 8e-3}
    if gates in ("strong", "mixed", "turns"):  # nearly 0: what a token forgets is held at 2^-25
        assert max(float(got[n].abs().max()) for n in (3, 5, 6)) < 1e-4
        bounds_of = {n: bounds_of[n] for n in ("dq", "dk", "dv", "db")}
    if gates == "collinear":  # u is a small difference of large numbers
        bounds_of = {n: 0.1 for n in bounds_of}
    assert not {n: e for n, e in errors.items() if n in bounds_of and not e < bounds_of[n]}


@pytest.mark.parametrize("K", [128, 64])
@pytest.mark.parametrize("gates", GATES)
def test_all_gates_equal_float64(emulated, gates, K):
    check(emulated, gates, 1, 130, K)


@pytest.mark.parametrize("K, gates", [*((64, gates) for gates in GATES), (128, "library"), (128, "turns")])
def test_gradients_equal_float64(emulated, gates, K):
    check_gradients(emulated, gates, 1, 130, K)


@pytest.mark.parametrize("B, T", [(1, 1), (2, 63), (2, 65)])
def test_short_rows(emulated, B, T):
    check(emulated, "library", B, T, 64)
    check_gradients(emulated, "library", B, T, 64)


def test_packed_documents_empty_ones_included(emulated):
    check(emulated, "fast", 1, 290, 64, [0, 70, 70, 150, 151, 290])
    check(emulated, "slow", 1, 130, 64, [0, *range(1, 66), 130])  # more than a warp finds at once
    check_gradients(emulated, "fast", 1, 290, 64, [0, 70, 70, 150, 151, 290])
    check_gradients(emulated, "slow", 1, 130, 64, [0, *range(1, 66), 130])


def test_infinite_gradients_of_a_row_do_not_reach_the_row_before(emulated):
    inputs, state, _, _ = make_case("library", 2, 20, 64, None)
    do = torch.randn(2, 20, HEADS, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    do[1] = torch.inf
    found = run_backward(emulated, inputs, state, None, None, torch.zeros_like(do), do, torch.zeros_like(state))
    assert all(torch.isfinite(x[0]).all() for x in found[:5])


@pytest.mark.parametrize("bounds", [[-64, 130], [0, 130, 0, 130, 0, 130], [0, 500]])
def test_nothing_is_written_outside_for_any_bounds(emulated, bounds):
    inputs, state, cu_seqlens, _ = make_case("library", 1, 130, 64, bounds)
    kernels, documents, outside = emulated(64, False), len(bounds) - 1, nan(1000, HEADS, 64)
    prepared = run_prepare(kernels, inputs, None, cu_seqlens, 0.125)
    out, slots = torch.cat([outside, torch.zeros(130, HEADS, 64).bfloat16(), outside]), prepared[2].shape[0]
    states = torch.cat([nan(64, 64, 64), torch.zeros(slots, 64, 64).bfloat16(), nan(64, 64, 64)])
    call = (
        inputs[2],
        cu_seqlens,
        state,
        torch.empty_like(state),
        out[1000:1130],
        states[64 : 64 + slots],
        scan.ALL,
        map_of,
    )
    run(kernels.scan(scan.KEEP), scan.pack_arguments(*prepared, *call), documents * HEADS)
    assert out[:1000].isnan().all() and out[1130:].isnan().all()
    assert states[:64].isnan().all() and states[64 + slots :].isnan().all()


@pytest.mark.parametrize("K", WIDTHS)
def test_the_structs_of_arguments_and_the_shared_memory_are_those_of_the_sources(emulated, K):
    kernels = emulated(K, False)
    sizes = [(kernels.prepare, prepare.CALL.size, prepare.shared_bytes(K))]
    sizes += [(kernels.scan(mode), scan.CALL.size, scan.shared_bytes(K, mode)) for mode in range(3)]
    sizes += [(kernels.finish(), finish.CALL.size, finish.shared_bytes(K))]
    for kernel, arguments, shared in sizes:
        assert (kernel.size_of(0), kernel.size_of(1)) == (arguments, shared)


def test_inputs_that_the_kernels_do_not_take():
    q, k, v, f, b, *gates = make_inputs(1, 8, 64, 64, "slow")
    assert fits(q, k, v, f, b, *gates, None)
    assert not fits(q.half(), k.half(), v.half(), f.half(), b.half(), *gates, None)
    assert not fits(q, k, v, f, b.float(), *gates, None)
    assert not fits(q, k, v, f, b, *gates, torch.tensor([0, 8]))
    odd = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view_as(q)
    assert not fits(odd, k, v, f, b, *gates, None) and not fits(q, k, odd, f, b, *gates, None)
    assert not fits(*(x[..., :32].contiguous() for x in (q, k, v, f)), b, *gates, None)
    assert not fits(q, k, torch.cat([v, v], -1), f, b, *gates, None)


def test_few_heads_and_documents_choose_the_scan(monkeypatch):
    operator = pytest.importorskip("deltify.ops.triton.operator", reason="Triton is not installed")
    monkeypatch.setattr(operator, "runs_in_cuda", lambda *_: True)
    monkeypatch.setattr(operator, "failure", lambda *_: None)
    monkeypatch.setattr(operator, "processors", lambda index: 132)

    def plan_of(T, H, documents=None, gradients=False):
        v = torch.empty(1, T, H, 128, device="meta")
        bounds = None if documents is None else torch.arange(documents + 1)
        return operator.plan_for(v, v, v, v, v, v, v, bounds, gradients)

    for T in (8192, 8256):  # Triton's scan has eight segments or more
        assert plan_of(T, 4).split and not plan_of(T, 4, gradients=True).split
    assert not plan_of(8192, 20).split and not plan_of(32768, 20).split
    assert not any(plan_of(32768, 20, documents).split for documents in (2, 8, 16, 64))
    pieces = [plan_of(T, 20).pieces for T in (2048, 8192, 32768, 131072)]
    assert pieces == [1, 1, 5, 8] and plan_of(32768, 20, 2).pieces == plan_of(32768, 64).pieces == 1


def test_machine_code_is_compiled_once_and_kept(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setenv("DELTIFY_CACHE", str(tmp_path))
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: "13.0")
    monkeypatch.setattr(compiler, "compile_source", lambda source: compiled.append(source) or source.encode())
    assert compiler.cubin_of("one") == compiler.cubin_of("one") == b"one"
    assert compiler.cubin_of("two") == b"two"
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: "13.1")
    compiler.cubin_of("one")
    assert compiled == ["one", "two", "one"]
    monkeypatch.setenv("DELTIFY_CACHE", "/proc/nowhere")
    assert compiler.cubin_of("one") == b"one"


def test_the_kernels_are_chosen_by_hand_or_by_the_gpu_and_the_check(monkeypatch, caplog):
    selfcheck = pytest.importorskip("deltify.ops.triton.selfcheck", reason="Triton is not installed")
    caplog.set_level(logging.INFO)
    q, k, v, f, b, *gates = make_inputs(1, 8, 64, 64, "slow")
    anywhere = type("Anywhere", (), {"index": 0, "__eq__": lambda *_: True})()
    facts = {"dtype": q.dtype, "shape": q.shape, "data_ptr": q.data_ptr, "device": anywhere}
    on_gpu = SimpleNamespace(is_cuda=True, **facts)
    state = {"capability": (9, 0), "failure": None}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: state["capability"])
    monkeypatch.setattr(selfcheck, "failure", lambda *part: state["failure"])

    def chosen(choice, q=on_gpu, **changes):
        state.update(changes)
        selfcheck.cuda_refusal.cache_clear()
        monkeypatch.setenv("DELTIFY_KERNELS", choice)
        return selfcheck.runs_in_cuda(q, k, v, f, b, *gates, None, False)

    assert chosen("auto") and chosen("cuda") and not chosen("triton")
    assert caplog.messages[-1] == "deltify: KDA's forward pass runs in CUDA C++"
    assert not chosen("cuda", q)  # on a CPU
    with pytest.raises(ValueError, match="choose from auto, triton, cuda"):
        chosen("nonsense")
    assert not chosen("auto", failure="wrong results") and caplog.records[-1].levelname == "WARNING"
    assert not chosen("auto", capability=(8, 0)) and caplog.records[-1].levelname == "INFO"
    with pytest.raises(RuntimeError, match=r"they need compute capability 9\.0. Choose auto or triton"):
        chosen("cuda")
    on_gpu.dtype = torch.float16
    assert not chosen("auto", capability=(9, 0), failure=None)
    with pytest.raises(RuntimeError, match="they need bfloat16"):
        chosen("cuda")
    selfcheck.cuda_refusal.cache_clear()

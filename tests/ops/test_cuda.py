"""The CUDA kernel on a CPU: prepare.cu as it is, compiled by g++ over emulator.h, against float64."""

import ctypes
import functools
import itertools
import logging
import math
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deltify.ops import kda
from deltify.ops.cuda import compiler, prepare

C, HEADS = 64, 2
GATES = ("slow", "library", "middle", "fast", "bounded", "zero", "mixed", "strong", "turns", "collinear")

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """Return a function that gives `run` of emulator.h for a width and a kind of gate."""
    folder = tmp_path_factory.mktemp("emulator")

    @functools.cache
    def build(K, bounded):
        path = folder / f"{K}-{bounded}.cpp"
        source = prepare.source_of(K, bounded)
        source = source.replace(Path(prepare.__file__).with_name("machine.h").read_text(), "")
        path.write_text('#include "emulator.h"\n' + source + "RUN_PREPARE\n")
        command = ["g++", "-O1", "-std=c++17", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", f"-I{Path(__file__).parent}"]
        subprocess.run([*command, "-o", str(path.with_suffix(".so")), str(path)], check=True)
        return ctypes.CDLL(str(path.with_suffix(".so"))).run

    return build


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


def run_prepare(run, inputs, lower_bound, bounds, scale):
    """Return what the kernel writes: `wide`, `square` and `ends`, NaN where it writes nothing."""
    q, k, _, f, b, A_log, dt_bias = inputs
    batch, tokens, heads, K = q.shape
    documents = batch if bounds is None else len(bounds) - 1
    slots = heads * (batch * math.ceil(tokens / C) if bounds is None else tokens // C + documents)
    wide, square = (torch.full((n, slots, C, m), torch.nan, dtype=torch.bfloat16) for n, m in ((3, K), (2, C)))
    ends = torch.full((slots, K), torch.nan)
    assert prepare.fits(q, k, f, b, A_log, dt_bias, bounds)
    tensors = (q, k, f, b, A_log, dt_bias, bounds, wide, square, ends)
    for first, end in ((0, slots // 2), (slots // 2, slots)):  # as two launches
        call = prepare.pack_arguments(*tensors, documents, lower_bound or 0.0, scale, first)
        assert run(call, end - first) == 0
    return wide.double(), square.double(), ends.double()


def scan(wide, square, ends, v, state, documents):
    """Return o and the final states from what prepare wrote, in float64. `documents` has (row, first, end) of each."""
    o, states, slot = torch.empty_like(v), [], 0
    for document, (row, first, end) in enumerate(documents):
        S = state[document].clone()  # [heads, K, V]
        for begin in range(first, end, C):
            here, count = slice(slot, slot + HEADS), min(C, end - begin)
            values = torch.zeros(HEADS, C, v.shape[-1]).double()
            values[:, :count] = v[row, begin : begin + count].transpose(0, 1)
            u = square[0, here] @ (values - wide[0, here] @ S)
            o[row, begin : begin + count] = (wide[1, here] @ S + square[1, here] @ u).transpose(0, 1)[:count]
            S = ends[here, :, None] * S + wide[2, here].transpose(1, 2) @ u
            slot += HEADS
        states.append(S)
    return o, torch.stack(states)


def error(got, want):
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


def check(emulated, gates, B, T, K, V, bounds=None):
    lower_bound, scale = -5.0 if gates == "bounded" else None, K**-0.5
    inputs = make_inputs(B, T, K, V, gates)
    documents = [(row, 0, T) for row in range(B)] if bounds is None else [(0, *x) for x in itertools.pairwise(bounds)]
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    state = torch.randn(len(documents), HEADS, K, V, generator=torch.Generator().manual_seed(1)).double()
    exact = [x.double() for x in inputs]
    want = kda(*exact, state=state, lower_bound=lower_bound, cu_seqlens=cu_seqlens, backend="reference")
    written = run_prepare(emulated(K, lower_bound is not None), inputs, lower_bound, cu_seqlens, scale)
    got = scan(*written, exact[2], state, documents)
    assert error(got[0], want[0]) < 5e-3 and error(got[1], want[1]) < 5e-3


@pytest.mark.parametrize("K", [128, 64])
@pytest.mark.parametrize("gates", GATES)
def test_all_gates_equal_float64(emulated, gates, K):
    check(emulated, gates, 1, 130, K, 64)


@pytest.mark.parametrize("B, T", [(1, 1), (2, 63), (2, 65)])
def test_short_rows(emulated, B, T):
    check(emulated, "library", B, T, 64, 64)


def test_packed_documents_empty_ones_included(emulated):
    check(emulated, "fast", 1, 290, 64, 64, [0, 70, 70, 150, 151, 290])
    check(emulated, "slow", 1, 130, 64, 64, [0, *range(1, 66), 130])  # more than a warp finds at once


def test_the_struct_of_arguments_and_the_shared_memory_are_those_of_the_source(tmp_path):
    source = '#include "emulator.h"\n' + Path(prepare.__file__).with_name("prepare.cu").read_text()
    source += '\nint main() { printf("%d %d", (int)sizeof(Call), SHARED_BYTES); }\n'
    (tmp_path / "sizes.cpp").write_text(source)
    for K in prepare.WIDTHS:
        program = str(tmp_path / f"sizes{K}")
        command = ["g++", "-w", "-std=c++17", f"-I{Path(__file__).parent}", f"-DK={K}", "-DBOUNDED=0", "-o", program]
        subprocess.run([*command, str(tmp_path / "sizes.cpp")], check=True)
        printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
        assert printed == f"{prepare.CALL.size} {prepare.shared_bytes(K)}"


def test_inputs_that_the_kernel_does_not_take():
    q, k, _, f, b, *gates = make_inputs(1, 8, 64, 64, "slow")
    assert prepare.fits(q, k, f, b, *gates, None)
    assert not prepare.fits(q.half(), k.half(), f.half(), b.half(), *gates, None)
    assert not prepare.fits(q, k, f, b.float(), *gates, None)
    assert not prepare.fits(q, k, f, b, *gates, torch.tensor([0, 8]))
    odd = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view_as(q)
    assert not prepare.fits(odd, k, f, b, *gates, None)
    assert not prepare.fits(*(x[..., :32].contiguous() for x in (q, k, f)), b, *gates, None)


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


def test_the_kernel_is_chosen_by_hand_or_by_the_gpu_and_the_check(monkeypatch, caplog):
    selfcheck = pytest.importorskip("deltify.ops.triton.selfcheck", reason="Triton is not installed")
    caplog.set_level(logging.INFO)
    q, k, _, f, b, *gates = make_inputs(1, 8, 64, 64, "slow")
    facts = {"dtype": q.dtype, "shape": q.shape, "data_ptr": q.data_ptr, "device": SimpleNamespace(index=0)}
    on_gpu = SimpleNamespace(is_cuda=True, **facts)
    state = {"capability": (9, 0), "failure": None}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: state["capability"])
    monkeypatch.setattr(selfcheck, "failure", lambda *part: state["failure"])

    def chosen(choice, q=on_gpu, **changes):
        state.update(changes)
        selfcheck.cuda_refusal.cache_clear()
        monkeypatch.setenv("DELTIFY_PREPARE", choice)
        return selfcheck.prepares_in_cuda(q, k, f, b, *gates, None)

    assert chosen("auto") and chosen("cuda") and not chosen("triton")
    assert caplog.messages[-1] == "deltify: KDA prepares chunks in CUDA C++"
    assert not chosen("cuda", q)  # on a CPU
    with pytest.raises(ValueError, match="choose from auto, triton, cuda"):
        chosen("nonsense")
    assert not chosen("auto", failure="wrong results") and caplog.records[-1].levelname == "WARNING"
    assert not chosen("auto", capability=(8, 0)) and caplog.records[-1].levelname == "INFO"
    with pytest.raises(RuntimeError, match=r"it needs compute capability 9\.0. Choose auto or triton"):
        chosen("cuda")
    on_gpu.dtype = torch.float16
    assert not chosen("auto", capability=(9, 0), failure=None)
    with pytest.raises(RuntimeError, match="it needs bfloat16"):
        chosen("cuda")
    selfcheck.cuda_refusal.cache_clear()

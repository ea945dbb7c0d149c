#!/bin/bash
# One run on an H200 that tells everything about the CUDA prepare, in about 150 seconds. Results under $OUT.
# Needs src, tests, benchmarks, pyproject.toml and prepare_tiles.cu beside it.
cd "$(dirname "$0")" || exit 1
export OUT=${OUT:-/tmp/out} PYTHONPATH=/tmp/check:$PWD/src${PYTHONPATH:+:$PYTHONPATH} HERE=$PWD PYTHONUNBUFFERED=1 DELTIFY_CACHE=/tmp/deltify_cache HF_HUB_OFFLINE=1
LIMIT=${LIMIT:-150}
mkdir -p "$OUT" /tmp/check
SECONDS=0
left() { local x=$((LIMIT - SECONDS)); [ $x -gt "$1" ] && x=$1; [ $x -lt 1 ] && x=1; echo $x; }

cat > /tmp/check/sitecustomize.py <<'EOF'
# deltify without its __init__, which needs packages that the machine may lack
import os, sys, types
m = types.ModuleType("deltify"); m.__path__ = [os.environ["HERE"] + "/src/deltify"]; sys.modules["deltify"] = m
EOF

cat > /tmp/check/bench.py <<'EOF'
import json, os, statistics, sys, time, traceback
from concurrent.futures import ThreadPoolExecutor
start = time.time()
sys.path.insert(0, "benchmarks")
import torch, triton
import kda_gpu
from common import graph_seconds, eager_seconds
from deltify.ops import kda
from deltify.ops.cuda import compiler, prepare
from deltify.ops.triton import selfcheck
from deltify.ops.triton.launch import Plan, Prepared
OUT, results = os.environ["OUT"], {"rows": []}
GATES = ("slow", "library", "fast", "bounded", "zero")
VARIANTS = [{"BLOCKS": 3}, {"BLOCKS": 2}, {"BLOCKS": 3, "RANGE": 224, "TILES": 1}, {"BLOCKS": 2, "RANGE": 100, "TILES": 1}]
new_source = prepare.source_of
def source_of(K, bounded, v):  # TILES: the version before, in tiles that are anchored one by one
    if "TILES" not in v: return new_source(K, bounded, v)
    v = {"K": K, "BOUNDED": int(bounded)} | v
    return "".join(f"#define {n} {x}\n" for n, x in v.items() if n != "TILES") + open("src/deltify/ops/cuda/machine.h").read() + open("prepare_tiles.cu").read()
prepare.source_of = source_of
if os.environ.get("VARIANTS"):
    VARIANTS = json.loads(os.environ["VARIANTS"])
name = lambda v: "cuda " + " ".join(f"{k}{x}" for k, x in v.items())
def save():
    with open(f"{OUT}/cuda_prepare.json", "w") as file:
        json.dump(results, file, indent=1)
def row(case, **figures):
    results["rows"].append({"case": case, **figures})
    print(f"{case:52s}", "  ".join(f"{n} {x:.4f}" if isinstance(x, float) else f"{n} {x}" for n, x in figures.items()), flush=True)
    save()
def part(function):
    print(f"---- {function.__name__} at {time.time() - start:.0f} s", flush=True)
    try:
        function()
    except Exception:
        traceback.print_exc()
        results.setdefault("failures", []).append(traceback.format_exc())
    save()
def select(v):
    os.environ["DELTIFY_PREPARE"] = "cuda" if v else "triton"
    if v: prepare.VARIANT.clear(); prepare.VARIANT.update(v)
def bound(gates): return -5.0 if gates == "bounded" else None
def inputs_of(T, H, gates, K=128, B=1):
    kda_gpu.K = K
    return kda_gpu.make_inputs(B, T, H, gates)
def error(got, want): return float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt())

def device():
    results["device"] = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton.__version__}, NVRTC {compiler.nvrtc_version()}"
    print(results["device"], "fla:", kda_gpu.chunk_kda is not None)
    x = torch.empty(2**30, dtype=torch.uint8, device="cuda"); y = torch.empty_like(x)
    row("copy of 1 GiB", TBps=2 * 2**30 / graph_seconds(lambda: y.copy_(x), 3) / 1e12)

def compile_all():
    cases = [(v, K, b) for v in VARIANTS for K in (128, 64) for b in (False, True)]
    def one(case):
        v, K, b = case
        begin = time.time()
        cubin, log = compiler.compile_source(prepare.source_of(K, b, v))
        return time.time() - begin, log
    with ThreadPoolExecutor(8) as pool:
        for (v, K, b), (seconds, log) in zip(cases, pool.map(one, cases)):
            lines = [x.replace("ptxas info    :", "").strip() for x in log.splitlines() if "Used" in x or "spill" in x or "warn" in x.lower()]
            print(f"{name(v)} K{K} bounded {b}: {seconds:.1f} s", "; ".join(lines), flush=True)
    for v in VARIANTS:
        k = prepare.kernel(0, 128, False, tuple(v.items()))
        print(name(v), "blocks a multiprocessor:", k.blocks_of_a_multiprocessor(), "shared", k.shared)

def first_use():
    select(VARIANTS[0])
    begin = time.time(); reason = selfcheck.failure(0, "forward", 128); triton_seconds = time.time() - begin
    begin = time.time(); refused = selfcheck.cuda_refusal(0, 128)
    row("first use, K128", triton_s=triton_seconds, cuda_s=time.time() - begin, triton=str(reason), cuda=str(refused))

def correct():
    from importlib import import_module
    sys.path.insert(0, "tests/ops")
    for K in (128, 64):
        for gates in GATES:
            inputs = inputs_of(2000, 3, gates, K)
            want = kda(*(x.double() for x in inputs), lower_bound=bound(gates), backend="chunked")
            found = {}
            for v in [None, *VARIANTS]:
                select(v)
                try:
                    got = kda(*inputs, lower_bound=bound(gates), backend="triton")
                    torch.cuda.synchronize()
                    found[name(v) if v else "triton"] = error(got[0], want[0])
                except Exception as e:
                    traceback.print_exc(); found[name(v)] = float("nan")
            row(f"error K{K} {gates}", **found)

def raw(inputs, gates, cuda, bounds=None):
    q, k, v, f, b, A, dt = inputs
    return Prepared(q, k, v, f, b, A, dt, bounds, bound(gates), 0.088, Plan(8, False, cuda=cuda))

@torch.no_grad()
def time_prepare():
    packed = torch.tensor([0, 100, 5000, 5000, 6024, 14000, 20000, 32768], device="cuda", dtype=torch.int32)
    cases = [(32768, 20, g, 128, None) for g in GATES] + [(32768, 20, "library", 128, packed)]
    cases += [(32768, 20, g, 64, None) for g in ("slow", "fast", "bounded")] + [(8192, 20, "library", 128, None), (2048, 20, "library", 128, None)]
    for T, H, g, K, bounds in cases:
        inputs, found = inputs_of(T, H, g, K), {}
        for v in [*VARIANTS, None, VARIANTS[0]]:
            if v: prepare.VARIANT.clear(); prepare.VARIANT.update(v)
            ms = 1e3 * graph_seconds(lambda: raw(inputs, g, bool(v), bounds), 5, 5)
            n = name(v) if v else "triton"
            found[n + " again" if n in found else n] = ms
        row(f"prepare ms T{T} H{H} K{K} {g}" + (" packed7" if bounds is not None else ""), **found)

@torch.no_grad()
def time_forward():
    from deltify.ops.triton import operator
    packed = torch.tensor([0, 100, 5000, 5000, 6024, 14000, 20000, 32768], device="cuda", dtype=torch.int32)
    cases = [(1, 32768, 20, g, 128, None) for g in GATES] + [(1, 32768, 20, "library", 128, packed)]
    cases += [(1, 32768, 20, g, 64, None) for g in ("slow", "library", "fast")] + [(1, 32768, 20, "library", 64, packed)]
    cases += [(1, 8192, 64, "slow", 128, None), (1, 8192, 64, "fast", 128, None), (1, 8192, 20, "library", 128, None), (1, 2048, 20, "library", 128, None), (8, 1024, 20, "library", 128, None), (1, 131072, 20, "library", 128, None)]
    for B, T, H, g, K, bounds in cases:
        inputs, found = inputs_of(T, H, g, K, B), {}
        for v, overlap in ((None, False), (VARIANTS[0], False), (VARIANTS[0], True), (VARIANTS[1], False)):
            select(v)
            run = lambda: kda(*inputs, lower_bound=bound(g), cu_seqlens=bounds, backend="triton")
            operator.OVERLAP = overlap
            n = (name(v) if v else "triton") + (" overlap" if overlap else "")
            found[n] = 1e3 * graph_seconds(run, 4, 5)
            if overlap: found["overlap differs"] = float(not all(torch.equal(x, y) for x, y in zip(run(), plain)))
            elif v is VARIANTS[0]: plain = run()
            if v is not VARIANTS[1]: found[n + " eager"] = 1e3 * eager_seconds(run, 10, 3)
        if kda_gpu.chunk_kda and (T, K, bounds) == (32768, 128, None) and g in ("slow", "library", "fast"):
            try: found["fla eager"] = 1e3 * eager_seconds(lambda: kda_gpu.peer_forward(inputs, bound(g), bounds), 10, 3)
            except Exception as e: found["fla"] = repr(e)[:80]
        row(f"forward ms B{B} T{T} H{H} K{K} {g}" + (" packed7" if bounds is not None else ""), **found)

def time_training():
    from dataclasses import replace
    from deltify.ops.triton import operator
    make_plan = operator.make_plan
    for g in ("library", "slow", "fast", "bounded"):
        leaves = [x.requires_grad_() for x in inputs_of(32768, 20, g)]
        do, found = torch.randn_like(leaves[2]), {}
        for v, beside in ((None, False), (None, True), (VARIANTS[0], False), (VARIANTS[0], True)):
            select(v)
            operator.make_plan = lambda *x: replace(make_plan(*x), beside=beside)
            both = lambda: torch.autograd.grad(kda(*leaves, lower_bound=bound(g), backend="triton")[0], leaves, do)
            key = (name(v) if v else "triton") + (" beside" if beside else "")
            found[key] = 1e3 * eager_seconds(both, 5, 3)
            got = both()
            want = got if not (v or beside) else want
            found[key + " MiB"] = float(torch.cuda.max_memory_allocated() / 2**20); torch.cuda.reset_peak_memory_stats()
            if v or beside: found[key + " from triton"] = max(error(x, y.double()) for x, y in zip(got, want))
        row(f"forward+backward ms T32768 H20 K128 {g}", **found)

mode = sys.argv[1]
if mode.startswith("warm"):  # run everything once, so that Triton's kernels are compiled
    eager_seconds = graph_seconds = lambda run, *_: (run(), torch.cuda.synchronize(), 0.0)[-1]
    row = lambda case, **figures: print("warmed", case, f"{time.time() - start:.0f} s", flush=True)
    save = lambda: None
    for f in (time_training,) if mode == "warm-training" else (time_prepare, correct, time_forward):
        part(f)
elif mode == "training":
    if os.path.exists(f"{OUT}/cuda_prepare.json"): results = json.load(open(f"{OUT}/cuda_prepare.json"))
    part(time_training)
else:
    for f in (device, compile_all, first_use, time_prepare, correct, time_forward):
        part(f)
print(f"bench done at {time.time() - start:.0f} s")
EOF

cat > /tmp/check/small.py <<'EOF'
# prepare alone, without Triton and transformers: for compute-sanitizer and ncu. T H variants
import sys, types, torch, json
for n in ("deltify", "deltify.ops"):
    m = types.ModuleType(n); m.__path__ = ["src/" + n.replace(".", "/")]; sys.modules[n] = m
from deltify.ops.cuda import prepare
T, H, variants = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
torch.manual_seed(0)
for v in variants:
    prepare.VARIANT.clear(); prepare.VARIANT.update(v)
    for K in (128, 64) if T < 5000 else (128,):
        for kind in ("slow", "mixed", "fast", "bounded", "packed"):
            q, k, f = (torch.randn(1, T, H, K, device="cuda").bfloat16() for _ in range(3))
            b = torch.randn(1, T, H, device="cuda").bfloat16()
            A, dt = torch.full((H,), 1.0, device="cuda"), torch.full((H * K,), -5.0 if kind == "slow" else 0.0, device="cuda")
            if kind == "mixed": dt[: H * K // 2] = -5.0
            bounds = torch.tensor([0, 7, 7, T // 2, T], dtype=torch.int32, device="cuda") if kind == "packed" else None
            docs = 4 if kind == "packed" else 1
            slots = H * (T // 64 + docs if kind == "packed" else -(-T // 64))
            wide, square = torch.zeros(3, slots, 64, K, device="cuda").bfloat16(), torch.zeros(2, slots, 64, 64, device="cuda").bfloat16()
            ends = torch.zeros(slots, K, device="cuda")
            prepare.prepare(q, k, f, b, A, dt, bounds, wide, square, ends, docs, -5.0 if kind == "bounded" else None, K**-0.5, range(slots))
            torch.cuda.synchronize()
            if T < 5000: print(v, K, kind, float(wide.float().abs().sum()), bool(torch.isfinite(square).all()), flush=True)
EOF

which nvcc ncu compute-sanitizer; nvidia-smi --query-gpu=name,driver_version,clocks.sm --format=csv,noheader
V='[{"BLOCKS":3},{"BLOCKS":2}]'
SAN=$(which compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1)
if [ -n "$SAN" ]; then
  for tool in memcheck racecheck; do
    (PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 65 "$SAN" --tool $tool python3 /tmp/check/small.py 150 2 "$V" > "$OUT/$tool.log" 2>&1; echo "rc $? at $SECONDS s" >> "$OUT/$tool.log") &
  done
fi
(timeout 70 python3 /tmp/check/bench.py warm > "$OUT/warm.log" 2>&1; echo "rc $? at $SECONDS s" >> "$OUT/warm.log") &
(timeout 70 python3 /tmp/check/bench.py warm-training > "$OUT/warm_training.log" 2>&1; echo "rc $? at $SECONDS s" >> "$OUT/warm_training.log") &
timeout 70 python3 -m pytest -v -p no:cacheprovider --durations=6 tests/ops/test_cuda_gpu.py > "$OUT/pytest.log" 2>&1
echo "==== pytest: rc $?, ended at $SECONDS s"; grep -vE "^$|site-packages|Warning" "$OUT/pytest.log" | tail -90
wait
echo "==== sanitizers and warm-up ended at $SECONDS s"
for x in memcheck racecheck; do [ -f "$OUT/$x.log" ] && { echo "== $x"; tail -12 "$OUT/$x.log"; }; done
for x in warm warm_training; do echo "== $x"; tail -3 "$OUT/$x.log"; grep -A12 Traceback "$OUT/$x.log" | head -40; done
timeout "$(left 60)" python3 /tmp/check/bench.py main 2>&1 | tee "$OUT/bench.log"
echo "==== bench ended at $SECONDS s"
[ $SECONDS -lt $((LIMIT - 15)) ] && timeout "$(left 40)" python3 /tmp/check/bench.py training 2>&1 | tee -a "$OUT/bench.log"
echo "==== training ended at $SECONDS s"
if which ncu >/dev/null && [ $SECONDS -lt $((LIMIT - 8)) ]; then
  timeout "$(left 25)" ncu --clock-control none --kernel-name kda_prepare --section SpeedOfLight --section WarpStateStats --section SchedulerStats \
    --section Occupancy --section MemoryWorkloadAnalysis --section InstructionStats --section LaunchStats \
    python3 /tmp/check/small.py 16384 20 "$V" > "$OUT/ncu.log" 2>&1
  grep -E "kda_prepare|Duration|Issue Slots Busy|Executed Ipc Active|Registers Per|Theoretical Occ|Achieved Occ|DRAM Throughput|L1/TEX Hit|Mem Busy|Warp Cycles Per Issued|conflict|Executed Instructions" "$OUT/ncu.log" | head -60
fi
echo "==== all ended at $SECONDS s"

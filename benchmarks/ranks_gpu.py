"""The training loop on several GPUs of one host: every process with whole models, beside sharded ones and one process.

SmolLM2-135M-Instruct, match in rows of 2,048 tokens, 4 a GPU, on synthetic text; tokens a second are the median of the
steps after those that compile and capture, as metrics.jsonl has them.
Run: python benchmarks/ranks_gpu.py [--field value of the recipe] (needs two CUDA GPUs or more)
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import keep, row, write

RECIPE = Path(__file__).parent.parent / "recipes" / "smollm2-135m-kda.yaml"
ROWS, LENGTH, STEPS, WARM = 4, 2048, 60, 20


def rate(folder: Path, processes: int, how: str, extra: list[str]) -> float:
    """Tokens a second of match."""
    batch = ROWS * processes
    fields = {
        "name": f"{processes}-{how}", "output": folder, "student.start": "library", "align.tokens": 0,
        "extend.tokens": 0, "match.tokens": STEPS * batch * LENGTH, "match.batch": batch, "match.length": LENGTH,
        "data.train": '{"recall": 1.0}', "data.folder": folder / "data", "data.max_tokens": "null",
        "run.heldout_tokens": LENGTH, "run.heldout_steps": STEPS, "run.checkpoint_minutes": 60,
        "run.data_parallel": how,
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in fields.items()] + extra
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "4"}
    subprocess.run(
        [sys.executable, *start, "-m", "deltify.cli", "distill", str(RECIPE), *flags], check=True, env=environment
    )
    lines = map(json.loads, (folder / f"{processes}-{how}" / "metrics.jsonl").read_text().splitlines())
    return statistics.median([x["tokens_per_second"] for x in lines if "loss" in x][WARM:])


def main() -> None:
    most, extra, rows = torch.cuda.device_count(), sys.argv[1:], []
    with tempfile.TemporaryDirectory() as folder:
        alone = rate(Path(folder), 1, "replicate", extra)
        for processes in (n for n in (2, 4, 8) if n <= most):
            case = f"match/smollm2-135m/{ROWS}x{LENGTH}-a-gpu/{processes}-gpus"
            found = {how: rate(Path(folder), processes, how, extra) for how in ("replicate", "shard")}
            rows += [
                row(case, "tokens/s", found["replicate"], found["shard"], "sharded (FSDP2)", rate=True),
                row(case, "tokens/s of all", found["replicate"], alone, "one process", rate=True),
            ]
            keep("ranks_gpu", rows)
            print(f"{case}: {found}, one process {alone:,.0f}", flush=True)
    write("ranks_gpu", rows)


if __name__ == "__main__":
    main()

"""The training loop on several GPUs of one host: every process with whole models, beside sharded ones and one process.

SmolLM2-135M-Instruct, match in rows of 2,048 tokens, 4 a GPU, and align in rows of 512, 32 a GPU, on synthetic text;
tokens a second are the median of the steps after those that compile and capture, as metrics.jsonl has them.
Run: python benchmarks/ranks_gpu.py [--stages match] [--processes 4] [--field=value of the recipe ...]
(needs two CUDA GPUs or more)
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import keep, row, torchrun, write

from deltify.config import STAGES

RECIPE = "smollm2-135m-kda"
SHAPES = {"match": (4, 2048), "align": (32, 512)}  # rows a GPU, tokens of a row
STEPS, WARM = 40, 15


def rate(folder: Path, stage: str, processes: int, how: str, extra: list[str]) -> float:
    """Tokens a second of a stage."""
    rows, length = SHAPES[stage]
    batch, name = rows * processes, f"{stage}-{processes}-{how}"
    fields = {
        "name": name, "output": folder, "student.init": "library", "data.train": '{"recall": 1.0}',
        "data.folder": folder / "data", "data.max_tokens": "null", "run.heldout_tokens": 2048,
        "run.eval_every": STEPS, "run.save_every_minutes": 60, "run.data_parallel": how,
    } | {f"{other}.tokens": 0 for other in STAGES}  # fmt: skip
    fields |= {f"{stage}.tokens": STEPS * batch * length, f"{stage}.batch_size": batch}
    fields |= {f"{stage}.sequence_length": length}
    flags = [f"--{field}={value}" for field, value in fields.items()] + extra
    torchrun(processes, "-m", "deltify.cli", "distill", RECIPE, *flags)
    lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    return statistics.median([x["tokens_per_second"] for x in lines if "loss" in x][WARM:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--processes", nargs="+", type=int, help="2, 4 and 8, as far as there are GPUs")
    options, extra = parser.parse_known_args()
    most, rows = torch.cuda.device_count(), []
    numbers = options.processes or [n for n in (2, 4, 8) if n <= most]
    if not numbers or min(numbers) < 2 or max(numbers) > most:
        parser.error(f"--processes {numbers}: from 2 to the number of GPUs here, {most}")
    with tempfile.TemporaryDirectory() as folder:
        for stage in options.stages:
            batch, length = SHAPES[stage]
            alone = rate(Path(folder), stage, 1, "replicate", extra)
            for processes in numbers:
                case = f"{stage}/smollm2-135m/{batch}x{length}-a-gpu/{processes}-gpus"
                found = {how: rate(Path(folder), stage, processes, how, extra) for how in ("replicate", "shard")}
                rows += [
                    row(case, "tokens/s", found["replicate"], found["shard"], "sharded (FSDP2)", rate=True),
                    row(case, "tokens/s of all", found["replicate"], alone, "one process", rate=True),
                ]
                keep("ranks_gpu", rows)
                print(f"{case}: {found}, one process {alone:,.0f}", flush=True)
    write("ranks_gpu", rows)


if __name__ == "__main__":
    main()

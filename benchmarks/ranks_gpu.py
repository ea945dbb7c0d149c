"""The training loop on several GPUs of one host: every process with whole models, beside sharded ones and one process.

| case | model | text |
|---|---|---|
| match, align | SmolLM2-135M-Instruct, replicated and sharded | 4 x 2,048 and 32 x 512 tokens a GPU |
| afm | AFM-4.5B's shape, random weights, sharded | match, 1 x 16,384 tokens a GPU, recomputed |
| llama-8b | Llama-3.1-8B's shape, random weights, sharded; without one process | match, 1 x 8,192 a GPU, recomputed |
| load | Llama-3.1-8B's shape: memory of a process while it loads and converts its shards | that of calibration |

Tokens a second are the median of the steps after those that compile and capture, as metrics.jsonl has them. Memory is
beside the plan's. Rows of 128k that are cut over GPUs: cut_rows_gpu.py.
Run: python benchmarks/ranks_gpu.py [--cases match] [--processes 4] [--field=value of the recipe ...]
(needs two CUDA GPUs or more, and 16 GB of disk; with --tiny it tries itself on a CPU and keeps no result)
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from common import AFM, keep, row, torchrun, write

from deltify import distill, load_recipe
from deltify.config import STAGES
from deltify.conversion.teacher import byte_tokenizer
from deltify.training.estimate import loading_bytes, plan_stage, skeletons

RECIPE = "smollm2-135m-kda"
LLAMA = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
LLAMA |= {"num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 32, "tie_word_embeddings": False}
SHAPES = {"afm": ("arcee", AFM | {"num_hidden_layers": 36}), "llama-8b": ("llama", LLAMA)}
TINY = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2}


@dataclass(frozen=True)
class Case:
    """What is trained. `shape` names random weights, unless it is the teacher of RECIPE."""

    shape: str
    stage: str
    rows: int  # a GPU
    length: int  # tokens of a row
    sharding: tuple[str, ...] = ("replicate", "shard")
    alone: bool = True  # whether one GPU can hold it
    fields: dict[str, Any] = field(default_factory=dict)


AGAIN = {"match.activation_checkpointing": "true"}
CASES = {
    "match": Case("smollm2-135m", "match", 4, 2048),
    "align": Case("smollm2-135m", "align", 32, 512),
    "afm": Case("afm", "match", 1, 16384, ("shard",), fields=AGAIN),
    "llama-8b": Case("llama-8b", "match", 1, 8192, ("shard",), alone=False, fields=AGAIN),
    "load": Case("llama-8b", "match", 1, 8192, ("shard",), alone=False),
}


def write_teacher(folder: Path, shape: str, tiny: bool) -> str:
    """Write random weights of a shape in bfloat16 with a byte tokenizer, and return the folder."""
    if not folder.exists():
        architecture, facts = SHAPES[shape]
        facts = (facts | TINY if tiny else facts) | {"max_position_embeddings": 2**20}
        with torch.device("cpu" if tiny else "cuda"):
            config = AutoConfig.for_model(architecture, **facts)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        del model
        torch.cuda.empty_cache()
    return str(folder)


class Bench:
    """Runs cases in a temporary folder, with further fields of the recipe."""

    def __init__(self, folder: Path, extra: list[str], tiny: bool):
        self.folder, self.extra, self.tiny = folder, extra, tiny
        self.steps, self.warm = (4, 2) if tiny else (40, 15)

    def flags(self, case: Case, name: str, processes: int, how: str) -> list[str]:
        batch = case.rows * processes
        length = 64 if self.tiny else case.length
        fields = {
            "name": name, "output": self.folder, "data.train": '{"recall": 1.0}',
            "data.folder": self.folder / "data", "data.max_tokens": "null", "run.heldout_tokens": 2048,
            "run.eval_every": self.steps, "run.save_every_minutes": 60, "run.data_parallel": how,
            "student.init": "calibrated" if name.startswith("load") else "library",
        } | {f"{other}.tokens": 0 for other in STAGES} | case.fields  # fmt: skip
        fields |= {f"{case.stage}.tokens": self.steps * batch * length, f"{case.stage}.batch_size": batch}
        fields |= {f"{case.stage}.sequence_length": length}
        if case.shape in SHAPES:
            fields["teacher.model"] = write_teacher(self.folder / case.shape, case.shape, self.tiny)
        elif self.tiny:
            fields["teacher.model"] = "random:llama"
        if self.tiny:
            fields |= {"run.device": "cpu", "run.heldout_sequence_length": 64}
            fields |= {"student.calibration_tokens": 256, "student.calibration_sequence_length": 64}
        return [f"--{name}={value}" for name, value in fields.items()] + self.extra

    def train(self, case: Case, processes: int, how: str) -> tuple[float, float | None, float]:
        """Return tokens a second, GiB at the peak (none on a CPU) and GiB that the plan says."""
        name = f"{case.shape}-{case.stage}-{processes}-{how}"
        flags = self.flags(case, name, processes, how)
        torchrun(processes, "-m", "deltify.cli", "distill", RECIPE, *flags, threads=1 if self.tiny else 4)
        lines = map(json.loads, (self.folder / name / "metrics.jsonl").read_text().splitlines())
        steps = [x for x in lines if x["stage"] == case.stage and "loss" in x]
        recipe = load_recipe(RECIPE, flags)
        models = skeletons(recipe)
        planned = plan_stage(case.stage, recipe.stage(case.stage), *models, "h200", processes, how == "shard").total
        peak = steps[-2].get("peak_memory_bytes")  # before validation
        rate = statistics.median(x["tokens_per_second"] for x in steps[self.warm :])
        return rate, peak and peak / 2**30, planned / 2**30

    def load(self, case: Case, processes: int) -> list[dict]:
        """Return the memory of the processes while they load and convert."""
        flags = self.flags(case, f"load-{processes}", processes, "shard")
        torchrun(processes, __file__, f"--load-to={self.folder}", *flags, threads=1 if self.tiny else 4)
        found = [json.loads((self.folder / f"loaded-{rank}.json").read_text()) for rank in range(processes)]
        planned = loading_bytes(*skeletons(load_recipe(RECIPE, flags)), processes)
        name = f"load/{case.shape}/{processes}-gpus"
        peaks = {what: max(x[what] for x in found) / 2**30 for what in ("gpu", "host")}
        rows = [row(name, "peak GiB, host", peaks["host"], None, "")]
        if peaks["gpu"]:
            rows.append(row(name, "peak GiB, GPU", peaks["gpu"], planned / 2**30, "plan, of weights"))
        return rows


def load_and_convert(folder: Path, flags: list[str]) -> None:
    """Load and convert in this process, one of several, and write its memory at the peak. Host memory: resident."""
    distill(load_recipe(RECIPE, flags), stages=())
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    found = {"gpu": gpu, "host": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    (folder / f"loaded-{os.environ['RANK']}.json").write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--processes", nargs="+", type=int, help="2, 4 and 8, as far as there are GPUs")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--load-to", type=Path, help=argparse.SUPPRESS)
    options, extra = parser.parse_known_args()
    if options.load_to:
        return load_and_convert(options.load_to, extra)
    most, rows = 2 if options.tiny else torch.cuda.device_count(), []
    numbers = options.processes or [n for n in (2, 4, 8) if n <= most]
    if not numbers or min(numbers) < 2 or max(numbers) > most:
        parser.error(f"--processes {numbers}: from 2 to the number of GPUs here, {most}")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), extra, options.tiny)
        for name in options.cases:
            case = CASES[name]
            alone = bench.train(case, 1, "replicate")[0] if case.alone else None
            for processes in numbers:
                if name == "load":
                    new = bench.load(case, processes)
                else:
                    label = f"{case.stage}/{case.shape}/{case.rows}x{case.length}-a-gpu/{processes}-gpus"
                    new = []
                    for how in case.sharding:
                        rate, peak, planned = bench.train(case, processes, how)
                        most_rate = alone and processes * alone
                        new.append(row(label, f"tokens/s, {how}", rate, most_rate, "N x one process", rate=True))
                        if peak is not None:
                            new.append(row(label, f"peak GiB, {how}", peak, planned, "plan"))
                for line in new:
                    print(line, flush=True)
                rows += new
                if not options.tiny:
                    keep("ranks_gpu", rows)
    if not options.tiny:
        write("ranks_gpu", rows)


if __name__ == "__main__":
    main()

"""A match step on rows that are cut over several GPUs of one host, beside whole rows on one GPU.

AFM-4.5B's shape with random weights, KDA only, float32 weights, bfloat16 products, activation checkpointing, without
the optimizer; each GPU has the same number of tokens, so that N GPUs have rows N times as long. Before it, the largest
difference of a small hybrid model's gradients from those of whole rows, relative to their norm, in float32 and in
bfloat16, which uses the kernels.
Run: python benchmarks/cut_rows_gpu.py [--processes 2 4] [--tokens 32768] [--layers 36]
(needs two CUDA GPUs or more; with --tiny it tries itself on a CPU and keeps no result)
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import ArceeConfig, ArceeForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from common import AFM, row, torchrun, write

from deltify.config import Stage
from deltify.conversion.teacher import FAMILIES, Teacher, byte_tokenizer, freeze
from deltify.data.batches import Batch
from deltify.model import ArceeKDAConfig, ArceeKDAForCausalLM
from deltify.training import distributed
from deltify.training.steps import match_step, segment
from deltify.training.teachers import LiveTeacher

SMALL = {"vocab_size": 300, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": False}


def make(layers: int, shape: dict, device: torch.device) -> tuple[LiveTeacher, ArceeKDAForCausalLM]:
    """Return a teacher in bfloat16 and a student in float32, equal on all ranks."""
    torch.manual_seed(0)
    with device:
        config = ArceeConfig(**shape, num_hidden_layers=layers, max_position_embeddings=2**20, dtype="bfloat16")
        teacher = freeze(ArceeForCausalLM._from_config(config, attn_implementation="sdpa").bfloat16().eval())
        student = ArceeKDAForCausalLM(ArceeKDAConfig(**shape, num_hidden_layers=layers)).float().train()
    student.gradient_checkpointing_enable()
    return LiveTeacher(Teacher(teacher, byte_tokenizer(), FAMILIES["arcee"])), student


def text(tokens: int, device: torch.device) -> Batch:
    place = torch.arange(tokens, device=device)[None]
    return Batch(place * 7919 % 256, place)


def gradient_error(group: dist.ProcessGroup, tokens: int, device: torch.device, autocast: bool) -> float:
    """Return the largest relative error of a parameter's gradient, of a hybrid model with float32 weights."""
    torch.manual_seed(0)
    kinds = ["linear_attention"] * 3 + ["full_attention"]
    with device:
        model = ArceeKDAForCausalLM(ArceeKDAConfig(**SMALL, num_hidden_layers=4, layer_types=kinds)).float()
    ids, found = text(tokens, device).input_ids, []
    for row_group in (None, group):
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits = model(segment(ids, row_group), row_group=row_group).logits.float()
        logits.log_softmax(-1).square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    distributed.all_reduce_mean_(found[1])
    return max(float((got - want).norm() / want.norm()) for want, got in zip(*found))


def worker(options: argparse.Namespace) -> None:
    device = torch.device("cpu" if options.tiny else "cuda")
    with distributed.process_group(device) as device:
        ranks = distributed.world_size()
        group = dist.group.WORLD if ranks > 1 else None
        errors = [gradient_error(group, 256 * ranks, device, autocast) for autocast in (False, True)] if group else []
        teacher, student = make(options.layers, SMALL if options.tiny else AFM, device)
        batch = text(options.tokens * ranks, device)
        seconds = []
        for _ in range(options.steps):
            started = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16):
                losses = match_step(teacher, student, batch, Stage(), 1.0, row_group=group)
            if ranks > 1:
                distributed.all_reduce_mean_([p.grad for p in student.parameters()])
            student.zero_grad()
            assert torch.isfinite(losses["loss"]).item()  # waits for the GPU
            seconds.append(time.perf_counter() - started)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
        if distributed.rank() == 0:
            torch.save((options.tokens / min(seconds[1:]), peak, errors), options.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of each GPU")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.out:
        return worker(options)
    rows, found = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, *options.processes):
            out = Path(folder) / f"{processes}.pt"
            torchrun(processes, __file__, *sys.argv[1:], f"--out={out}", threads=1 if options.tiny else 4)
            rate, peak, errors = found[processes] = torch.load(out)
            case = f"cut-rows/afm-{options.layers}-layers/{processes}x{options.tokens}"
            print(f"{case}: {rate:,.0f} tokens/s a GPU, {peak:.1f} GiB, gradient errors {errors}", flush=True)
            rows.append(row(case, "tokens/s a GPU", rate, found[1][0], "one GPU", rate=True))
            rows.append(row(case, "peak GiB", peak, found[1][1] or None, "one GPU"))
            names = ("gradient error, float32", "gradient error, bfloat16")
            rows += [row(case, name, error, None, "") for name, error in zip(names, errors)]
    if not options.tiny:
        write("cut_rows_gpu", rows)


if __name__ == "__main__":
    main()

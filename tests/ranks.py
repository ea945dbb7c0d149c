"""Functions that tests run in several processes, see processes.py. As a program, this file runs a recipe:

ranks.py RECIPE [--resume] [--stop]     --stop ends the run after one step
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from deltify import distill, load_recipe
from deltify.config import Recipe, RunSpec, Stage
from deltify.conversion import teacher as teacher_module
from deltify.conversion.student import convert
from deltify.conversion.teacher import random_teacher
from deltify.data.batches import MixedBatches
from deltify.data.token_files import TokenFile
from deltify.model.shards import full_tensor
from deltify.training import distributed
from deltify.training.optimizers import choose_trained
from deltify.training.teachers import LiveTeacher
from deltify.training.trainer import RunContext, StageTrainer


def steps(name: str, how: str, out: Path) -> None:
    """Train ten steps in float64. Write the gradients of the first and the weights after the last.

    Args:
        name: align or match.
        how: replicate or shard; nodes-shard, with two processes per node; or cut or cut-shard, which cut each row over
            two processes.
        out: File to write.
    """
    torch.manual_seed(0)
    teacher = random_teacher("llama")
    student = convert(teacher, full_attention_layers="3:1", init="library").double()
    teacher.model.double()
    stage = Stage(
        tokens=10 * 4 * 32,
        sequence_length=32,
        batch_size=4,
        micro_batch_size=1 if name == "match" else 0,
        ce_weight=0.2,
    )
    run = RunSpec(context_parallel=2 if how.startswith("cut") else 1)
    if how == "nodes-shard":
        os.environ["LOCAL_WORLD_SIZE"] = "2"  # what torchrun would set
        run = replace(run, data_parallel="hybrid")
    recipe = replace(Recipe("steps", output=str(out.parent / f"{out.stem}-run"), run=run), **{name: stage})
    tokens = torch.randint(0, 250, (4000,), generator=torch.Generator().manual_seed(1)).numpy()
    bounds = torch.arange(0, 4001, 50).numpy()
    mix = MixedBatches([TokenFile(tokens, bounds, "")], [1.0], stage.sequence_length, stage.batch_size, 0)
    metrics = SimpleNamespace(truncate=lambda *_: None, write=lambda **_: None)
    stopper, cpu = SimpleNamespace(signal=0), torch.device("cpu")
    with distributed.process_group(cpu):
        context = RunContext(
            recipe,
            cpu,
            "fp32",
            train=[],
            mixes={name: mix},
            heldout=[],
            probes=[],
            prompts=torch.empty(0, 1),
            metrics=metrics,
            stopper=stopper,
            row_group=distributed.row_group(run.context_parallel),
        )
        sharded = how.endswith("shard")
        live = LiveTeacher(teacher)
        if sharded:
            per_node = run.data_parallel == "hybrid"
            choose_trained(student, stage, name)
            distributed.shard_student(student, cpu, per_node)
            live.shard(per_node)
        trainer = StageTrainer(context, name, live, student)
        if sharded:
            assert {p.device_mesh.ndim for p in student.parameters()} == {2 if how == "nodes-shard" else 1}
        trainer.evaluate = lambda: ({}, [])
        trainer.accumulate_gradients(trainer.batch(0))
        gradients = {n: full_tensor(p.grad) for n, p in student.named_parameters() if p.grad is not None}
        student.zero_grad(set_to_none=True)
        trainer.run()
        weights = {n: full_tensor(p.detach()) for n, p in student.named_parameters()}
        norms = torch.stack([x.norm() for x in weights.values()])
        assert torch.equal(distributed.all_reduce_mean(norms), norms)  # equal on all ranks, bit for bit
        if distributed.rank() == 0:
            torch.save((gradients, weights), out)


def distill_first(recipe: str, first: int, cache: str) -> None:
    """Run a recipe. Rank `first` begins to unpack its GGUF teacher before the others do."""
    teacher_module.CACHE = Path(cache)
    unpack = teacher_module.unpack_gguf
    if distributed.rank() != first:
        teacher_module.unpack_gguf = lambda path: (time.sleep(3), unpack(path))[1]
    distill(load_recipe(recipe))


if __name__ == "__main__":
    torch.set_num_threads(1)
    recipe, *options = sys.argv[1:]
    minutes = -time.monotonic() / 60 if "--stop" in options else None  # a deadline that has passed
    distill(load_recipe(recipe), resume="--resume" in options, max_minutes=minutes)

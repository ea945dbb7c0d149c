"""The program that tests run in one process, and in two under torchrun.

ranks.py steps STAGE HOW OUT  ten steps in float64; writes the gradients of the first and the weights after the last;
                              HOW is replicate or shard
ranks.py distill RECIPE [--resume] [--stop] [--first RANK]    a run; --stop ends it after one step, --first lets a rank
                              begin before the others
ranks.py measure RUN DATA OUT...    an evaluation of a run, and samples of it, into each folder; prints the tokens read
"""

import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager

from deltify import distill, evaluate, load_recipe
from deltify.config import Recipe, Stage
from deltify.conversion import teacher as teacher_module
from deltify.conversion.student import convert
from deltify.conversion.teacher import random_teacher
from deltify.data.batches import MixedBatches
from deltify.data.token_files import TokenFile
from deltify.evaluation import heldout, lm_eval_cache, lm_eval_tasks, needles, recall_curve, runner
from deltify.evaluation.settings import BenchmarkSpec, DecodeSpec, EvaluationSpec, NeedleSpec, PositionSpec, RecallSpec
from deltify.inference.sample import sample
from deltify.training import distributed
from deltify.training.teachers import LiveTeacher
from deltify.training.trainer import RunContext, StageTrainer


def steps(name: str, how: str, out: Path) -> None:
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
    recipe = replace(Recipe("steps", output=str(out.parent / f"{out.stem}-run")), **{name: stage})
    tokens = torch.randint(0, 250, (4000,), generator=torch.Generator().manual_seed(1)).numpy()
    bounds = torch.arange(0, 4001, 50).numpy()
    mix = MixedBatches([TokenFile(tokens, bounds, "")], [1.0], stage.sequence_length, stage.batch_size, 0)
    metrics = SimpleNamespace(truncate=lambda *_: None, write=lambda **_: None)
    stopper, cpu = SimpleNamespace(signal=0), torch.device("cpu")
    context = RunContext(recipe, cpu, "fp32", [], {name: mix}, [], [], torch.empty(0, 1), metrics, stopper)
    with distributed.process_group(cpu):
        sharded = how == "shard"
        live = LiveTeacher(teacher)
        trainer = StageTrainer(context, name, live, student, sharded)
        if sharded:
            live.shard()
        trainer.evaluate = lambda: ({}, [])
        batch = mix.batch(0, distributed.rank(), distributed.world_size())
        trainer.accumulate_gradients(batch)
        gradients = {n: distributed.full_tensor(p.grad) for n, p in student.named_parameters() if p.grad is not None}
        student.zero_grad(set_to_none=True)
        trainer.run()
        weights = {n: distributed.full_tensor(p.detach()) for n, p in student.named_parameters()}
        norms = torch.stack([x.norm() for x in weights.values()])
        assert torch.equal(distributed.all_reduce_mean(norms), norms)  # equal on all ranks, bit for bit
        if distributed.rank() == 0:
            torch.save((gradients, weights), out)


def measure(run: Path, data: Path, out: Path) -> int:
    """Evaluate a run and sample from it, in small pieces that two processes can share. Return the tokens read here."""
    text, read = str(data / "text.jsonl"), []
    arc = TaskManager(include_path=Path(lm_eval.__file__).parent / "tasks" / "arc", include_defaults=False)
    spec = EvaluationSpec(
        benchmarks=BenchmarkSpec(("arc_easy",), data=data),
        needles=NeedleSpec(("niah_single_1", "niah_single_2"), lengths=(512, 600), samples=1, haystack=text),
        recall=RecallSpec(max_tokens=1024, samples=1, haystack=text),
        positions=PositionSpec(text, max_tokens=150, documents=3),
        decode=DecodeSpec((64,)),
        controls=False,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval_tasks, "task_manager", lambda: arc)  # an index of all tasks takes seconds
        patch.setattr(recall_curve, "SHORTEST", 1024)  # a byte is a token
        patch.setattr(lm_eval_cache, "PIECE_DOCUMENTS", 4)
        patch.setattr(needles, "GROUP_TOKENS", 512)  # one sample
        patch.setattr(runner, "NeedleMaker", partial(needles.NeedleMaker, answer_tokens=4))
        patch.setattr(runner, "PROMPT_TOKENS", 4)
        patch.setattr(heldout, "BATCH_SEQUENCES", 1)
        hook = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, args: read.append(args[0].numel()) if isinstance(module, torch.nn.Embedding) else None
        )
        evaluate(run, spec, output=out)
        sample(run, text, out / "own.jsonl", count=10, prompt_tokens=8, length=24, batch=3, device="cpu")
        hook.remove()
    return sum(read)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "steps":
        steps(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
    elif sys.argv[1] == "measure":
        run, data, *folders = map(Path, sys.argv[2:])
        for folder in folders:
            print(f"{folder.name} {measure(run, data, folder)}", flush=True)
    else:
        if "--first" in sys.argv and sys.argv[sys.argv.index("--first") + 1] != os.environ["RANK"]:
            unpack = teacher_module.unpack_gguf
            teacher_module.unpack_gguf = lambda path: (time.sleep(3), unpack(path))[1]
        minutes = -time.monotonic() / 60 if "--stop" in sys.argv else None  # a deadline that has passed
        distill(load_recipe(sys.argv[2]), resume="--resume" in sys.argv, max_minutes=minutes)

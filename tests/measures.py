"""The program that test_two_processes.py runs in two processes: measures.py RUN DATA OUT...

It evaluates a run and samples from it into each folder OUT, and prints the tokens that its process read.
"""

import sys
from functools import partial
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager

from deltify import evaluate
from deltify.evaluation import heldout, lm_eval_cache, lm_eval_tasks, needles, recall_curve, runner
from deltify.evaluation.settings import BenchmarkSpec, DecodeSpec, EvaluationSpec, NeedleSpec, PositionSpec, RecallSpec
from deltify.inference.sample import sample


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
    run, data, *folders = map(Path, sys.argv[1:])
    for folder in folders:
        print(f"{folder.name} {measure(run, data, folder)}", flush=True)

"""Functions that tests run in several processes, see processes.py. As a program, this file runs a recipe:

ranks.py RECIPE [--resume] [--stop] [--die]
    --stop ends the run after one step; --die kills the second process in the sixth step, unless torchrun restarted it
"""

import os
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
from weakref import WeakSet

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deltify import distill, load_recipe
from deltify.config import Recipe, RunSpec, Stage
from deltify.conversion import teacher as teacher_module
from deltify.conversion.student import convert
from deltify.conversion.teacher import load_teacher, random_teacher
from deltify.data.batches import Batch, MixedBatches
from deltify.data.token_files import TokenFile
from deltify.model import shards
from deltify.model.shards import full_tensor
from deltify.training import distributed, trainer
from deltify.training.estimate import loading_bytes
from deltify.training.optimizers import choose_trained
from deltify.training.steps import match_step
from deltify.training.teachers import LiveTeacher
from deltify.training.trainer import RunContext, StageTrainer, micro_step
from deltify.utils.fingerprint import fingerprint


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
        micro_batch_size=1 if name == "match" or distributed.world_size() > 1 else 0,
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
            distributed.shard_teacher(live.model, cpu, per_node)
        stage_trainer = StageTrainer(context, name, live, student)
        if sharded:
            assert {p.device_mesh.ndim for p in student.parameters()} == {2 if how == "nodes-shard" else 1}
            with torch.no_grad():
                for p in student.parameters():
                    assert torch.equal(shards.own_part(p), full_tensor(p)[shards.own_rows(p)])
        stage_trainer.evaluate = lambda: ({}, [])
        if how == "replicate":
            with mock.patch("torch.distributed.all_reduce", None):  # a micro-batch waits for no other rank
                micro_step(context, name, live, student, 1.0, stage_trainer.batch(0))
            student.zero_grad(set_to_none=True)
        stage_trainer.accumulate_gradients(stage_trainer.batch(0))
        gradients = {n: full_tensor(p.grad) for n, p in student.named_parameters() if p.grad is not None}
        student.zero_grad(set_to_none=True)
        stage_trainer.run()
        weights = {n: full_tensor(p.detach()) for n, p in student.named_parameters()}
        norms = torch.stack([x.norm() for x in weights.values()])
        assert torch.equal(distributed.all_reduce_mean(norms), norms)  # equal on all ranks, bit for bit
        if distributed.rank() == 0:
            torch.save((gradients, weights), out)


def bfloat16_gradients() -> None:
    """Compare the gradients of a student under autocast, sharded with MLPs in bfloat16 and whole."""
    cpu, found = torch.device("cpu"), []
    for autocast in (None, torch.bfloat16):
        torch.manual_seed(0)
        teacher = random_teacher("llama")
        student = convert(teacher, full_attention_layers="3:1", init="library").requires_grad_(True)
        student.gradient_checkpointing_enable()
        if autocast:
            distributed.shard_student(student, cpu, autocast=autocast)
        for seed in range(2):  # micro-batches, others on each rank
            generator = torch.Generator().manual_seed(2 * seed + distributed.rank())
            ids = torch.randint(0, 250, (2, 32), generator=generator)
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=autocast is None):
                match_step(LiveTeacher(teacher), student, Batch(ids, torch.arange(32).expand(2, -1)), Stage(), 0.5)
        gradients = {name: p.grad for name, p in student.named_parameters()}
        if not autocast:
            distributed.all_reduce_mean_(list(gradients.values()))
        found.append({name: full_tensor(x) for name, x in gradients.items()})
    for name, want in found[0].items():
        assert (found[1][name] - want).norm() <= 1e-6 * want.norm(), name  # sums in another order


def eight_bit_steps() -> None:
    """Compare ten steps of 8-bit Adam on shards with those on whole parameters, bit for bit, and their states."""
    from bitsandbytes.optim import AdamW8bit

    from deltify.training.adamw8bit import ShardedAdamW8bit

    torch.manual_seed(0)
    whole = [nn.Parameter(torch.randn(shape)) for shape in ((33, 256), (1, 8192), (301,), (40, 2, 128))]
    mesh = distributed.sharding_mesh("cpu", per_node=False)
    sharded = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in whole]
    reference, optimizer = AdamW8bit(whole, lr=0.01), ShardedAdamW8bit(sharded, lr=0.01)
    for _ in range(10):
        for p, part in zip(whole, sharded):
            p.grad = torch.randn_like(p)
            part.grad = distribute_tensor(p.grad, mesh, [Shard(0)])
        reference.step()
        optimizer.step()
    for p, part in zip(whole, sharded):
        assert torch.equal(full_tensor(part), p)
        want, got = reference.state[p], optimizer.state[part]
        assert want.keys() == got.keys() and want["step"] == got["step"] == 10
        for name in sorted({"state1", "state2", "absmax1", "absmax2"} & want.keys()):
            assert torch.equal(full_tensor(got[name]).flatten(), want[name].flatten()), name
            assert len(shards.own_part(got[name])) == len(shards.own_part(part))


def distill_here(recipe: str, file_bytes: int, options: dict) -> int:
    """Run a recipe, with small files of weights, and return the most bytes of tensors that were alive."""
    shards.FILE_BYTES = file_bytes
    with PeakBytes() as peak:
        distill(load_recipe(recipe), **options)
    return peak.peak


def open_in_shards(folder: str, options: dict) -> dict[str, int]:
    """Load a teacher and convert it, sharded and whole, and compare them bit for bit.

    Returns the bytes of both whole models, the most bytes of tensors that were alive while the sharded ones were made,
    what `plan` says of them, and the bytes that were read from files.
    """
    cpu, bytes_read, read_rows = torch.device("cpu"), [], shards.read_rows
    ids = torch.randint(0, 250, (2, 16), generator=torch.Generator().manual_seed(1))
    options |= {"calibration": Batch(ids, torch.arange(16).expand(2, -1))}
    shards.read_rows = lambda *args: (rows := read_rows(*args), bytes_read.append(rows.nbytes))[0]
    with PeakBytes() as peak:
        shard = partial(distributed.shard_teacher, device=cpu)
        teacher = load_teacher(folder, dtype=torch.bfloat16, shard=shard)
        student = convert(teacher, **options, shard=partial(distributed.shard_student, device=cpu))
    shards.read_rows = read_rows
    whole = load_teacher(folder, dtype=torch.bfloat16)
    whole_student = convert(whole, **options)
    for sharded, model in ((teacher.model, whole.model), (student, whole_student)):
        assert shards.is_sharded(sharded) and sharded.training == model.training
        assert fingerprint(sharded) == fingerprint(model)
        for kind in ("state_dict", "named_buffers"):
            got, want = dict(getattr(sharded, kind)()), dict(getattr(model, kind)())
            assert got.keys() == want.keys()
            for name in want:
                x = shards.full_tensor(got[name])
                assert x.dtype == want[name].dtype and torch.equal(x, want[name]), name
        assert sharded.config.to_dict() == model.config.to_dict()
        assert sharded.generation_config.to_dict() == model.generation_config.to_dict()
    tied = whole_student.config.tie_word_embeddings
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied
    size = sum(p.nbytes for model in (whole.model, whole_student) for p in model.parameters())
    planned = loading_bytes(whole, whole_student, 2)
    return {"whole": size, "peak": peak.peak, "read": sum(bytes_read), "planned": planned}


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, of those made inside. Files that are mapped to memory are not."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = WeakSet(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # its local operations come here
        made = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages((args, kwargs))}
        if new := [storage for storage in storages(made) if storage._cdata not in given]:
            self.alive.update(new)
            self.peak = max(self.peak, sum(storage.nbytes() for storage in self.alive))
        return made


def storages(tree: object) -> list[torch.UntypedStorage]:
    tensors = [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
    return [x.untyped_storage() for x in tensors]


def distill_first(recipe: str, first: int, cache: str) -> None:
    """Run a recipe. Rank `first` begins to unpack its GGUF teacher before the others do."""
    teacher_module.CACHE = Path(cache)
    unpack = teacher_module.unpack_gguf
    if distributed.rank() != first:
        teacher_module.unpack_gguf = lambda path: (time.sleep(3), unpack(path))[1]
    distill(load_recipe(recipe))


def die_in_sixth_step(run: Path) -> None:
    """Let align's sixth step kill this process, as a fault of its machine would, when the fourth step is saved."""
    calls, align_step = count(), trainer.align_step

    def dies(*args):
        if next(calls) == 5:
            while not (run / "checkpoints" / "align-0000004").is_dir():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return align_step(*args)

    trainer.align_step = dies


if __name__ == "__main__":
    torch.set_num_threads(1)
    recipe, *options = sys.argv[1:]
    if "--die" in options and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        die_in_sixth_step(load_recipe(recipe).folder)
    minutes = -time.monotonic() / 60 if "--stop" in options else None  # a deadline that has passed
    distill(load_recipe(recipe), resume="--resume" in options, max_minutes=minutes)

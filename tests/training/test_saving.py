"""Checkpoints of a run: which are kept, and what happens to damaged ones."""

import gc
import math
import re
import shutil
import weakref
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_same_weights, die_in_step, flip, tiny_recipe
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from deltify import distill
from deltify.config import Recipe, RunSpec, Stage
from deltify.training import checkpoint, distributed, trainer
from deltify.training.checkpoint import Progress


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """Return a run of the tiny recipe that died in the sixth step of align, with checkpoints of steps 2 and 4."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("broken"))
    die_in_step(recipe, 5)
    return recipe.folder


def test_a_folder_that_is_replaced_is_complete_at_any_time(tmp_path, monkeypatch):
    for name, text in (("model", "old"), ("model.unfinished", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)

    def dies(folder, **options):
        if folder.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", dies)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.replace_folder(tmp_path / "model.unfinished", tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "new"


def test_a_stage_does_not_begin_without_space_for_its_model(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, match=Stage())
    free = iter((10**9, 100_000))  # before the conversion, and before align
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: SimpleNamespace(free=next(free)))
    with pytest.raises(OSError, match=r"align would not be saved: .* 0 MiB of free space, .* takes 1 MiB"):
        distill(recipe)
    assert checkpoint.is_finished(recipe.folder / "converted")
    assert '"align"' not in (recipe.folder / "metrics.jsonl").read_text()
    monkeypatch.undo()
    assert checkpoint.is_finished(distill(recipe, resume=True) / "align")


@pytest.mark.parametrize("last, left", [(8.0, ["align-0000002"]), (4.0, [])])
def test_after_a_stage_a_better_checkpoint_is_left(last, left, tmp_path, monkeypatch):
    kls = iter([9.0, 5.0, 6.0, 7.0, last])  # after the conversion and steps 2, 4, 6 and 8
    seen = []
    save = checkpoint.save_model

    def look(folder, *args, **options):
        seen.append([path.name for path in checkpoint.checkpoints(folder.parent, "align")])
        save(folder, *args, **options)

    monkeypatch.setattr(checkpoint, "save_model", look)
    evaluate_heldout = lambda *args: {"heldout_kl": next(kls), "heldout_perplexity": 1.0}  # noqa: E731
    monkeypatch.setattr(trainer, "evaluate_heldout", evaluate_heldout)
    run = RunSpec(
        "cpu", "fp32", heldout_tokens=64, heldout_sequence_length=32, eval_every=2, save_every=3, keep_checkpoints=1
    )
    folder = distill(tiny_recipe(tmp_path, match=Stage(), run=run))
    assert seen == [[], ["align-0000002", "align-0000006"]]  # the best and the latest
    assert [path.name for path in checkpoint.checkpoints(folder, "align")] == left


def test_a_finished_stage_leaves_no_graphs_and_no_optimizer_in_memory(tmp_path, monkeypatch):
    class Graphed:
        def __init__(self, compute, parameters, log):
            made.append(weakref.ref(self))
            self.compute = compute

        def __call__(self, batch, device):
            return self.compute(batch.to(device), None)

    def make(*args):
        made.extend(map(weakref.ref, optimizers := make_optimizers(*args)))
        return optimizers

    made, make_optimizers = [], trainer.make_optimizers
    monkeypatch.setattr(trainer, "GraphedStep", Graphed)
    monkeypatch.setattr(trainer.StageTrainer, "can_be_graphed", lambda self: True)
    monkeypatch.setattr(trainer, "make_optimizers", make)
    gc.disable()  # large tensors do not make Python collect
    try:
        distill(tiny_recipe(tmp_path))
        assert len(made) == 4 and not any(ref() for ref in made)
    finally:
        gc.enable()


def test_a_thread_writes_the_state_at_the_time_of_saving(tmp_path, alone, monkeypatch):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(torch.ones(3)).sum().backward()
        optimizer.step()

    step()
    want, progress, group = model.weight.detach().clone(), Progress("match", 1, 6, 0.1), distributed.save_group()
    going_on = Event()
    publish = checkpoint.publish
    monkeypatch.setattr(checkpoint, "publish", lambda *args: (going_on.wait(30), publish(*args)))
    saved = checkpoint.save_checkpoint(tmp_path / "match-1", model, [optimizer], progress, group)
    step()  # while the thread waits
    assert not (tmp_path / "match-1").exists()
    going_on.set()
    saved.result()
    assert checkpoint.load_checkpoint(tmp_path / "match-1", model, [optimizer]) == progress
    assert torch.equal(model.weight, want) and optimizer.state[model.weight]["step"] == 1

    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "publish", fail)
    saved = checkpoint.save_checkpoint(tmp_path / "match-2", model, [optimizer], progress, group)
    with pytest.raises(OSError, match=r"could not save .*match-2: No space left on device\. Earlier"):
        saved.result()
    assert [path.name for path in tmp_path.glob("match*")] == ["match-1"]


def truncate(folder: Path) -> None:
    for path in folder.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    "damage, reason",
    [
        (truncate, r"__0_0\.distcp has 1,000 bytes of"),
        (lambda folder: flip(folder / "__0_0.distcp", -500), "the checksum of __0_0.distcp is not the one"),
        (lambda folder: flip(folder / "progress.json", 30), "the checksum of progress.json is not the one"),
        (lambda folder: (folder / ".metadata").unlink(), r"\.metadata has 0 bytes of"),
        (lambda folder: (folder / "manifest.json").unlink(), "it has no manifest.json, which is written last"),
        (lambda folder: (folder / "manifest.json").write_text('{"progr'), "align-0000004 cannot be read"),
    ],
    ids=["cut", "bit", "progress", "gone", "no-manifest", "half-manifest"],
)
def test_a_damaged_checkpoint_is_replaced_by_the_previous_one(damage, reason, tmp_path, broken, capsys, whole):
    recipe = replace(tiny_recipe(tmp_path), data=tiny_recipe(broken.parent).data)
    shutil.copytree(broken, recipe.folder)
    damage(recipe.folder / "checkpoints" / "align-0000004")
    run = distill(recipe, resume=True, max_minutes=None if damage is truncate else 0)
    said = capsys.readouterr().out
    assert "align-0000004 cannot be read" in said and re.search(reason, said) and "resuming from step 2" in said
    assert "trying the previous one" in said
    assert (run / "checkpoints" / "align-0000004.damaged").is_dir() == (damage is not truncate)  # until the stage ends
    if damage is truncate:
        assert_same_weights(run, whole, "align", "match")


def test_a_stage_with_damaged_checkpoints_only_is_refused(tmp_path, whole):
    recipe = tiny_recipe(tmp_path)
    die_in_step(recipe, 5)
    folders = checkpoint.checkpoints(recipe.folder, "align")
    truncate(folders[1])
    (folders[0] / "progress.json").write_text('{"stage')
    for _ in range(2):  # a second try must not restart the stage either
        with pytest.raises(ValueError, match=r"no checkpoint of align .*align-0000004, align-0000002.*delete them"):
            distill(recipe, resume=True)
    shutil.rmtree(recipe.folder / "checkpoints")
    assert_same_weights(distill(recipe, resume=True), whole, "align")


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, whole):
    recipe, saves, save = tiny_recipe(tmp_path), [], checkpoint.dcp.save

    def full(state, checkpoint_id):
        saves.append(1)
        if len(saves) == 3:
            (checkpoint_id / "half-written").write_bytes(b"x")
            raise CheckpointException("", {0: (OSError(28, "No space left on device"), None)})  # torch's wrapper
        return save(state, checkpoint_id=checkpoint_id)

    monkeypatch.setattr(checkpoint.dcp, "save", full)
    with pytest.raises(OSError, match=r"align-0000006.*No space left.*--resume"):
        distill(recipe)
    left = [path.name for path in sorted((tmp_path / "tiny" / "checkpoints").iterdir())]
    assert left == ["align-0000002", "align-0000004"]
    monkeypatch.undo()
    assert_same_weights(distill(recipe, resume=True), whole, "match")


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_checkpoints_and_the_best_one_are_kept(keep, tmp_path):
    for step in range(1, 7):
        (tmp_path / "checkpoints" / f"align-{step:07d}").mkdir(parents=True)
        checkpoint.prune(tmp_path, "align", keep, best_step=2)
        left = [int(checkpoint.step_of(path)) for path in checkpoint.checkpoints(tmp_path, "align")]
        assert left == sorted({*range(max(1, step - keep + 1), step + 1), *({2} if step >= 2 else {})})


@pytest.mark.parametrize("error", [None, OSError("the disk is full")])
def test_a_checkpoint_of_a_thread_is_finished_before_others_are_deleted(error, monkeypatch):
    """A validation after its step may have found a better model, which no checkpoint has yet."""
    pruned, written = [], Future()
    monkeypatch.setattr(checkpoint, "prune", lambda folder, name, kept, best: pruned.append(best))
    stage = object.__new__(trainer.StageTrainer)
    stage.recipe, stage.name = Recipe(name="tiny"), "align"
    stage.saving, stage.progress = (written, Progress("align", 2, 0, 0.0, 1.0, 2)), Progress("align", 3, 0, 0.0, 0.5, 3)
    if error is None:
        written.set_result(None)
        stage.finish_saving()
        assert pruned == [2]
    else:
        written.set_exception(error)
        with pytest.raises(OSError, match="the disk is full"):
            stage.finish_saving()
        assert pruned == []
    assert stage.saving is None


def test_a_divergence_that_is_not_a_number_is_never_the_best():
    found = iter([math.nan, 0.3, math.nan, 0.2])
    model = SimpleNamespace(eval=lambda: None, train=lambda: None)
    context = SimpleNamespace(validate=lambda *_: ({"heldout_kl": next(found), "heldout_perplexity": 9.0}, []))
    stage = SimpleNamespace(student=model, teacher=None, name="match", context=context)
    stage.progress = Progress("match", 0, 0, 0.0)
    best = []
    for _ in range(4):
        trainer.StageTrainer.evaluate(stage)
        best.append(stage.progress.best_kl)
    assert best == [None, 0.3, 0.3, 0.2]

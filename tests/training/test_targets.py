"""The teacher cache: what it stores, how exact it is, and runs that use it."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from helpers import records, tiny_recipe
from safetensors.torch import load_file

from deltify import distill
from deltify.cli import main
from deltify.config import TeacherSpec, write_recipe
from deltify.conversion.teacher import random_teacher
from deltify.data.batches import Batch
from deltify.data.token_files import open_data
from deltify.evaluation.runner import evaluate
from deltify.evaluation.settings import EvaluationSpec
from deltify.training import runner, steps, teacher_cache, trainer
from deltify.training.runner import capture_recipe
from deltify.training.teacher_cache import CachedTeacher, dequantize, quantize, sequence_key


@pytest.mark.parametrize("format, bound", [("int8", 0.01), ("bf16", 0.004)])
def test_stored_hidden_states_are_near_the_exact_ones(format, bound):
    hidden = torch.randn(2, 30, 64) * torch.rand(2, 30, 1) * 10
    assert float((dequantize(quantize(hidden, format)) - hidden).norm() / hidden.norm()) < bound


def test_a_run_continues_without_its_teacher_and_learns_the_same(tmp_path, monkeypatch, capsys):
    recipe = tiny_recipe(tmp_path / "runs")
    write_recipe(recipe, tmp_path / "recipe.yaml")
    folder = tmp_path / "targets"
    assert main(["capture", str(tmp_path / "recipe.yaml"), "-o", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "20 sequences, 640 tokens" in said  # 16 sequences of match and 4 held-out ones
    distill(recipe)
    want = records(recipe.folder)
    stored = replace(recipe, name="stored", teacher=replace(recipe.teacher, cache=str(folder)))
    distill(replace(stored, match=replace(stored.match, tokens=0)))
    (tmp_path / "runs" / "stored" / "recipe.yaml").unlink()  # the run above had no match

    def gone(*_):
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(runner, "open_teacher", gone)
    write_recipe(stored, tmp_path / "runs" / "stored" / "recipe.yaml")
    distill(stored, resume=True)
    got = [r for r in records(stored.folder) if r["stage"] == "match"]
    want = [r for r in want if r["stage"] == "match"]
    assert [r["step"] for r in got] == [r["step"] for r in want]
    for a, b in zip(got, want):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.03)  # of 0.011; outputs are bfloat16
    assert got[-1]["heldout_kl"] == pytest.approx(want[-1]["heldout_kl"], rel=0.03)
    assert load_file(stored.folder / "match" / "model.safetensors")


def test_the_teacher_is_freed_when_the_cache_replaces_it(tmp_path, monkeypatch):
    recipe, models = tiny_recipe(tmp_path), []
    capture_recipe(recipe, tmp_path / "targets", "bf16")

    def open_teacher(*_):
        teacher = random_teacher("llama")
        models.append(weakref.ref(teacher.model))
        return teacher

    def match_step(*args):
        gc.collect()
        assert [model() for model in models] == [None]
        return steps.match_step(*args)

    monkeypatch.setattr(runner, "open_teacher", open_teacher)
    monkeypatch.setattr(trainer, "match_step", match_step)
    distill(replace(recipe, teacher=replace(recipe.teacher, cache=str(tmp_path / "targets"))))


def test_an_interrupted_capture_resumes_and_stores_no_sequence_twice(tmp_path, monkeypatch):
    recipe, folder = tiny_recipe(tmp_path), tmp_path / "targets"
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", 1)  # a shard for each batch
    asked, run_teacher = [], teacher_cache.run_teacher

    def dies(teacher, batch):
        asked.append(len(batch.input_ids))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return run_teacher(teacher, batch)

    monkeypatch.setattr(teacher_cache, "run_teacher", dies)
    with pytest.raises(KeyboardInterrupt):
        capture_recipe(recipe, folder, "bf16")
    kept = len(teacher_cache.read_index(folder))
    assert 0 < kept < 20
    figures = capture_recipe(recipe, folder, "bf16")
    assert figures["rows"] == 20 and figures["kl"] < 1e-3 and 2 * 64 <= figures["bytes_per_token"] < 3 * 64
    names = [name for path in folder.glob("rows-*") for name in load_file(path)]
    assert len(names) == len(set(names)) == 20
    min(folder.glob("rows-*")).unlink()  # a lost shard is made again, and no other one is overwritten
    assert capture_recipe(recipe, folder, "bf16")["rows"] == len(teacher_cache.read_index(folder)) == 20
    with pytest.raises(ValueError, match=r"holds a cache of .*bf16.*, not of .*int8"):
        capture_recipe(recipe, folder, "int8")


def test_sequences_that_were_not_captured_are_refused_with_the_next_command(tmp_path):
    recipe = tiny_recipe(tmp_path)
    capture_recipe(recipe, tmp_path / "targets", "int8")
    teacher = CachedTeacher(tmp_path / "targets", torch.device("cpu"), torch.float32)
    ids, positions = torch.zeros(1, 32, dtype=torch.long), torch.arange(32)[None]
    with pytest.raises(ValueError, match=r"lacks a sequence of 32 tokens .* Run deltify capture again"):
        teacher.hidden_states(Batch(ids, positions))
    assert sequence_key(ids[0], positions[0]) != sequence_key(ids[0], positions[0] * 0)
    train, _ = open_data(recipe.data, recipe.teacher.model, teacher.tokenizer, 128, 32)
    assert len(train[0]) > 0  # the cache has the tokenizer
    with pytest.raises(FileNotFoundError, match="holds no teacher cache"):
        CachedTeacher(tmp_path / "nothing", torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="format='fp4' is unknown; choose one of int8, bf16"):
        capture_recipe(recipe, tmp_path / "targets", "fp4")


def replace_teacher(folder, seed):
    """Save a random teacher to a folder, over the one there."""
    teacher = random_teacher("llama", seed=seed, num_hidden_layers=2)
    teacher.model.save_pretrained(folder)
    teacher.tokenizer.save_pretrained(folder)
    return TeacherSpec(model=str(folder))


def test_a_cache_of_other_sequences_is_refused_before_anything_is_computed(tmp_path):
    recipe = tiny_recipe(tmp_path)
    capture_recipe(recipe, tmp_path / "targets", "bf16")
    other = replace(recipe, seed=recipe.seed + 1, teacher=replace(recipe.teacher, cache=str(tmp_path / "targets")))
    with pytest.raises(ValueError, match=r"lacks a sequence of 32 tokens .* Run deltify capture again"):
        distill(other)
    # a cache for fewer tokens, or of a capture that was stopped, has the first sequences
    short = replace(recipe, match=replace(recipe.match, tokens=recipe.match.tokens // 2))
    capture_recipe(short, tmp_path / "short", "bf16")
    longer = replace(recipe, teacher=replace(recipe.teacher, cache=str(tmp_path / "short")))
    with pytest.raises(ValueError, match=r"lacks a sequence of 32 tokens .* Run deltify capture again"):
        distill(longer)
    assert not (recipe.folder / "converted" / "config.json").exists()


def test_a_cache_of_other_weights_is_refused_before_anything_is_computed(tmp_path):
    one, two = (replace_teacher(tmp_path / name, seed) for name, seed in (("one", 0), ("two", 1)))
    recipe = tiny_recipe(tmp_path / "runs", teacher=one)
    capture_recipe(recipe, tmp_path / "targets", "bf16")
    mixed = replace(two, cache=str(tmp_path / "targets"))
    with pytest.raises(ValueError, match=r"was captured from other weights .* than those of the teacher .*two "):
        distill(replace(recipe, teacher=mixed))
    assert not (recipe.folder / "converted").exists()
    with pytest.raises(FileNotFoundError, match="holds no teacher cache"):
        distill(replace(recipe, teacher=replace(one, cache=str(tmp_path / "nowhere"))))
    distill(replace(recipe, teacher=replace(one, cache=str(tmp_path / "targets"))))
    # the teacher at that path is another one now
    replace_teacher(tmp_path / "one", 1)
    with pytest.raises(ValueError, match="holds a cache of"):
        capture_recipe(recipe, tmp_path / "targets", "bf16")


def test_a_capture_does_not_resume_with_other_weights(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path / "runs", teacher=replace_teacher(tmp_path / "teacher", 0))
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", 1)
    run_teacher, asked = teacher_cache.run_teacher, []

    def dies(teacher, batch):
        asked.append(batch)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return run_teacher(teacher, batch)

    monkeypatch.setattr(teacher_cache, "run_teacher", dies)
    with pytest.raises(KeyboardInterrupt):
        capture_recipe(recipe, tmp_path / "targets", "bf16")
    replace_teacher(tmp_path / "teacher", 1)
    with pytest.raises(ValueError, match="Delete it, or use another folder"):
        capture_recipe(recipe, tmp_path / "targets", "bf16")


def test_a_run_does_not_resume_after_its_teacher_changed(tmp_path):
    recipe = tiny_recipe(tmp_path / "runs", teacher=replace_teacher(tmp_path / "teacher", 0))
    run = distill(recipe, max_minutes=-1)
    replace_teacher(tmp_path / "teacher", 1)
    with pytest.raises(ValueError, match=r"has other weights \(fingerprint \w{16}\) than the teacher that"):
        distill(recipe, resume=True)
    with pytest.raises(ValueError, match="has other weights"):
        evaluate(run, EvaluationSpec(samples=False, controls=False, device="cpu"))
    replace_teacher(tmp_path / "teacher", 0)
    distill(recipe, resume=True)

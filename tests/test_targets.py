"""A teacher on file: what is stored, how near it is, and runs that need no other."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file
from test_distill import records, tiny_recipe

from deltify import distill
from deltify.cli import main
from deltify.config import TeacherSpec, write_recipe
from deltify.conversion.teacher import random_teacher
from deltify.data.token_files import open_data
from deltify.evaluation.runner import evaluate
from deltify.evaluation.settings import EvaluationSpec
from deltify.training import teacher_cache
from deltify.training.runner import capture_recipe
from deltify.training.teacher_cache import open_targets, pack, row_key, unpack

DISTILL = import_module("deltify.training.runner")


@pytest.mark.parametrize("format, bound", [("int8", 0.01), ("bf16", 0.004)])
def test_stored_rows_are_near_the_exact_ones(format, bound):
    hidden = torch.randn(2, 30, 64) * torch.rand(2, 30, 1) * 10
    assert float((unpack(pack(hidden, format)) - hidden).norm() / hidden.norm()) < bound


def test_a_run_goes_on_without_its_teacher_and_learns_the_same(tmp_path, monkeypatch, capsys):
    recipe = tiny_recipe(tmp_path / "runs")
    write_recipe(recipe, tmp_path / "recipe.yaml")
    folder = tmp_path / "targets"
    assert main(["capture", str(tmp_path / "recipe.yaml"), "-o", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "20 rows, 640 tokens" in said  # 16 rows of match and 4 held-out ones
    distill(recipe)
    want = records(recipe.folder)
    stored = replace(recipe, name="stored", teacher=replace(recipe.teacher, cache=str(folder)))
    distill(replace(stored, match=replace(stored.match, tokens=0)))
    (tmp_path / "runs" / "stored" / "recipe.yaml").unlink()  # the run above had no match

    def gone(*_):
        raise AssertionError("the teacher was asked for")

    monkeypatch.setattr(DISTILL, "open_teacher", gone)
    write_recipe(stored, tmp_path / "runs" / "stored" / "recipe.yaml")
    distill(stored, resume=True)
    got = [r for r in records(stored.folder) if r["stage"] == "match"]
    want = [r for r in want if r["stage"] == "match"]
    assert [r["step"] for r in got] == [r["step"] for r in want]
    for a, b in zip(got, want):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.01)
    assert got[-1]["heldout_kl"] == pytest.approx(want[-1]["heldout_kl"], rel=0.01)
    assert load_file(stored.folder / "match" / "model.safetensors")


def test_a_capture_that_was_cut_short_goes_on_and_stores_no_row_twice(tmp_path, monkeypatch):
    recipe, folder = tiny_recipe(tmp_path), tmp_path / "targets"
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", 1)  # a shard for each batch
    asked, read_rows = [], teacher_cache.read_rows

    def dies(teacher, batch):
        asked.append(len(batch.input_ids))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return read_rows(teacher, batch)

    monkeypatch.setattr(teacher_cache, "read_rows", dies)
    with pytest.raises(KeyboardInterrupt):
        capture_recipe(recipe, folder, "bf16")
    kept = len(teacher_cache.read_index(folder))
    assert 0 < kept < 20
    found = capture_recipe(recipe, folder, "bf16")
    assert found["rows"] == 20 and found["kl"] < 1e-3 and 2 * 64 <= found["bytes_per_token"] < 3 * 64
    names = [name for path in folder.glob("rows-*") for name in load_file(path)]
    assert len(names) == len(set(names)) == 20
    with pytest.raises(ValueError, match=r"holds targets of .*bf16.*, not of .*int8"):
        capture_recipe(recipe, folder, "int8")


def test_rows_that_were_not_captured_are_an_error_that_says_what_to_do(tmp_path):
    recipe = tiny_recipe(tmp_path)
    capture_recipe(recipe, tmp_path / "targets", "int8")
    teacher = open_targets(tmp_path / "targets", torch.device("cpu"), torch.float32)
    ids, positions = torch.zeros(1, 32, dtype=torch.long), torch.arange(32)[None]
    with pytest.raises(ValueError, match=r"no targets for a row of 32 tokens .* run deltify capture again"):
        teacher.model.model(ids, positions)
    assert row_key(ids[0], positions[0]) != row_key(ids[0], positions[0] * 0)
    train, _ = open_data(recipe.data, recipe.teacher.model, teacher.tokenizer, 128, 32)
    assert len(train[0]) > 0  # the tokenizer came along
    with pytest.raises(FileNotFoundError, match="there are no targets"):
        open_targets(tmp_path / "nothing", torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="format='fp4' is unknown; choose one of int8, bf16"):
        capture_recipe(recipe, tmp_path / "targets", "fp4")


def replace_teacher(folder, seed):
    """Puts another teacher of the same architecture at a path."""
    teacher = random_teacher("llama", seed=seed, num_hidden_layers=2)
    teacher.model.save_pretrained(folder)
    teacher.tokenizer.save_pretrained(folder)
    return TeacherSpec(model=str(folder))


def test_targets_of_other_weights_are_refused_before_anything_is_computed(tmp_path):
    one, two = (replace_teacher(tmp_path / name, seed) for name, seed in (("one", 0), ("two", 1)))
    recipe = tiny_recipe(tmp_path / "runs", teacher=one)
    capture_recipe(recipe, tmp_path / "targets", "bf16")
    mixed = replace(two, cache=str(tmp_path / "targets"))
    with pytest.raises(ValueError, match=r"holds targets of other weights .* than the teacher .*two has"):
        distill(replace(recipe, teacher=mixed))
    assert not (recipe.folder / "converted").exists()
    with pytest.raises(FileNotFoundError, match="there are no targets"):
        distill(replace(recipe, teacher=replace(one, cache=str(tmp_path / "nowhere"))))
    distill(replace(recipe, teacher=replace(one, cache=str(tmp_path / "targets"))))
    # the teacher at that path is another one now
    replace_teacher(tmp_path / "one", 1)
    with pytest.raises(ValueError, match="holds targets of"):
        capture_recipe(recipe, tmp_path / "targets", "bf16")


def test_a_capture_does_not_go_on_with_other_weights(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path / "runs", teacher=replace_teacher(tmp_path / "teacher", 0))
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", 1)
    read_rows, asked = teacher_cache.read_rows, []

    def dies(teacher, batch):
        asked.append(batch)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return read_rows(teacher, batch)

    monkeypatch.setattr(teacher_cache, "read_rows", dies)
    with pytest.raises(KeyboardInterrupt):
        capture_recipe(recipe, tmp_path / "targets", "bf16")
    replace_teacher(tmp_path / "teacher", 1)
    with pytest.raises(ValueError, match="delete it, or use another folder"):
        capture_recipe(recipe, tmp_path / "targets", "bf16")


def test_a_run_does_not_go_on_after_its_teacher_changed(tmp_path):
    recipe = tiny_recipe(tmp_path / "runs", teacher=replace_teacher(tmp_path / "teacher", 0))
    run = distill(recipe, max_minutes=-1)
    replace_teacher(tmp_path / "teacher", 1)
    with pytest.raises(ValueError, match=r"has other weights \(fingerprint \w{16}\) than the teacher that"):
        distill(recipe, resume=True)
    with pytest.raises(ValueError, match="has other weights"):
        evaluate(run, EvaluationSpec(samples=False, controls=False, device="cpu"))
    replace_teacher(tmp_path / "teacher", 0)
    distill(recipe, resume=True)

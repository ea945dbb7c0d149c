"""Models that are sharded over two processes are those of one process, though no process ever holds a whole one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import assert_same_weights, records, tiny_recipe
from processes import run_in_processes, run_under_torchrun
from ranks import bfloat16_gradients, distill_here, eight_bit_steps, open_in_shards
from safetensors.torch import load_file

from deltify.config import Recipe, Stage, TeacherSpec, write_recipe
from deltify.conversion.teacher import random_teacher

pytestmark = pytest.mark.slow

LARGER = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 16, "head_dim": 32}


def save_teacher(folder: Path, architecture: str, **facts) -> str:
    """Save a random teacher, whose biases are not zero, in several files."""
    teacher = random_teacher(architecture, **facts)
    for name, p in teacher.model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(p)
    teacher.model.save_pretrained(folder, max_shard_size="200KB")
    teacher.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "architecture, facts, options",
    [
        ("llama", {"tie_word_embeddings": True}, {"full_attention_layers": "measured:2", "retrieval_heads": 3}),
        ("qwen2", {}, {"full_attention_layers": "KS", "init": "calibrated-constant", "gate_bias": True}),
        ("arcee", {"num_attention_heads": 1, "num_key_value_heads": 1}, {"init": "library", "head_dim": 48}),
    ],
)
def test_models_loaded_and_converted_in_shards_equal_whole_ones(architecture, facts, options, tmp_path):
    folder = save_teacher(tmp_path / "teacher", architecture, **LARGER, **facts)
    for found in run_in_processes(open_in_shards, 2, tmp_path, folder, options):
        assert found["peak"] < 0.6 * found["whole"]
        assert found["peak"] == pytest.approx(found["planned"], rel=0.1)
        assert found["read"] < 0.6 * sum(path.stat().st_size for path in (tmp_path / "teacher").glob("*.safetensors"))


def run(recipe: Recipe, folder: Path, data_parallel: str, file_bytes: int = 2**18, **options) -> list[int]:
    """Run a recipe in two processes, and return the most bytes of tensors that were alive in each."""
    folder.mkdir()
    write_recipe(replace(recipe, run=replace(recipe.run, data_parallel=data_parallel)), folder / "recipe.yaml")
    return run_in_processes(distill_here, 2, folder, str(folder / "recipe.yaml"), file_bytes, options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


def test_a_sharded_run_converts_and_learns_what_a_replicated_one_does(tmp_path):
    teacher = save_teacher(tmp_path / "teacher", "llama", intermediate_size=512)
    stage = Stage(tokens=2 * 2 * 32, sequence_length=32, batch_size=2)
    match = replace(stage, optimizer="adamw8bit")
    recipe = tiny_recipe(tmp_path, teacher=TeacherSpec(teacher), align=stage, match=match)
    copies, parts = (replace(recipe, name=name) for name in ("copies", "parts"))
    run(copies, tmp_path / "1", "replicate")
    run(parts, tmp_path / "2", "shard")
    # moments of short rows have 8 bits only in whole models
    for name, most in {"converted": 0, "align": 1e-3, "match": 3e-3}.items():
        got, want = (weights(recipe.folder / name) for recipe in (parts, copies))
        assert got.keys() == want.keys()
        for key in want:
            assert (got[key] - want[key]).norm() <= most * want[key].norm(), key
        for file in ("config.json", "generation_config.json"):
            got, want = ((recipe.folder / name / file).read_text() for recipe in (parts, copies))
            assert json.loads(got) == json.loads(want)
    got, want = ([r["loss"] for r in records(recipe.folder) if "loss" in r] for recipe in (parts, copies))
    assert got[0] == want[0] and got == pytest.approx(want, rel=1e-4) and len(want) == 4
    again = replace(recipe, name="again", student=replace(recipe.student, init=str(copies.folder / "match")))
    run(again, tmp_path / "3", "shard", stages=())
    got, want = weights(again.folder / "converted"), weights(copies.folder / "match")
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_a_run_whose_process_is_killed_continues_after_torchruns_restart(tmp_path):
    teacher = save_teacher(tmp_path / "teacher", "llama", head_dim=64)  # rows of 256, for moments of 8 bits
    recipe = tiny_recipe(tmp_path, teacher=TeacherSpec(teacher), match=Stage())
    align, shard = replace(recipe.align, optimizer="adamw8bit"), replace(recipe.run, data_parallel="shard")
    recipe = replace(recipe, align=align, run=shard)
    unbroken, killed = (replace(recipe, name=name) for name in ("unbroken", "killed"))
    run(unbroken, tmp_path / "1", "shard", file_bytes=2**30)
    write_recipe(killed, tmp_path / "recipe.yaml")
    said = run_under_torchrun("ranks.py", tmp_path / "recipe.yaml", "--resume", "--die", restarts=1)
    assert said.count("align: resuming from step 4") == 1
    assert_same_weights(killed.folder, unbroken.folder, "converted", "align")


def test_gradients_of_a_sharded_student_in_bfloat16_equal_those_of_a_whole_one(tmp_path):
    run_in_processes(bfloat16_gradients, 2, tmp_path)


def test_eight_bit_adam_on_shards_equals_that_on_whole_parameters(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    run_in_processes(eight_bit_steps, 2, tmp_path)


def test_no_process_of_a_conversion_holds_a_whole_model(tmp_path):
    teacher = save_teacher(tmp_path / "teacher", "llama", **LARGER)
    recipe = tiny_recipe(tmp_path, teacher=TeacherSpec(teacher))
    recipe = replace(recipe, student=replace(recipe.student, init="library"))
    recipe = replace(recipe, run=replace(recipe.run, heldout_tokens=32))
    peaks = run(recipe, tmp_path / "run", "shard", stages=())
    sizes = [sum(x.nbytes for x in weights(folder).values()) for folder in (Path(teacher), recipe.folder / "converted")]
    assert max(peaks) < 0.65 * sum(sizes)

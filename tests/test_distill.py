"""Runs: every recipe in small, resuming after a kill, and what goes wrong."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deltify import checkpoint, distill, read_recipe
from deltify.cli import main
from deltify.config import STAGES, Recipe, RunSpec, Stage, StudentSpec, TeacherSpec, smoke, write_recipe
from deltify.data import Batch, TokenFile
from deltify.distill import align_step, hidden_states, match_step, next_tokens
from deltify.evaluate import count_models
from deltify.teacher import random_teacher

RECIPES = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))


def tiny_recipe(folder: Path, **changes) -> Recipe:
    stage = Stage(tokens=8 * 2 * 32, length=32, batch=2)
    recipe = Recipe(
        name="tiny",
        output=str(folder),
        teacher=TeacherSpec(model="random:llama"),
        student=StudentSpec(calibration_tokens=256, calibration_length=32),
        align=stage,
        match=stage,
        run=RunSpec("cpu", "fp32", heldout_tokens=128, heldout_length=32, heldout_steps=4, checkpoint_steps=2),
    )
    data = replace(recipe.data, folder=str(folder / "data"), max_tokens=5000)
    return replace(recipe, data=data, **changes)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_in_small(path, tmp_path):
    recipe = smoke(read_recipe(path, ["--output", str(tmp_path), "--data.folder", str(tmp_path / "data")]))
    run = distill(recipe)
    for name in ("converted", *(s for s in STAGES if recipe.stage(s).tokens)):
        model = AutoModelForCausalLM.from_pretrained(run / name)
        assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["heldout_kl"] >= 0 for line in lines if "heldout_kl" in line)


def test_training_lowers_the_loss_of_each_stage(tmp_path):
    longer = Stage(tokens=40 * 4 * 64, length=64, batch=4, lr_mixers=3e-3, lr_rest=1e-3)
    start = StudentSpec(start="library")
    run = distill(tiny_recipe(tmp_path, student=start, align=longer, match=longer))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for stage in ("align", "match"):
        losses = [line["loss"] for line in lines if line["stage"] == stage and "loss" in line]
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), stage


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    recipe = tiny_recipe(tmp_path)
    whole = distill(replace(recipe, name="whole"))
    write_recipe(recipe, tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "deltify.cli", "distill", str(tmp_path / "recipe.yaml")]
    for stage, steps in (("align", 3), ("match", 5)):
        resume = ["--resume"] if stage == "match" else []
        process = subprocess.Popen([*command, *resume], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_step(process, tmp_path / "tiny" / "metrics.jsonl", stage, steps)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "tiny" / stage / "config.json").exists()
    distill(recipe, resume=True)
    for stage in ("align", "match"):
        got, want = (load_file(folder / stage / "model.safetensors") for folder in (tmp_path / "tiny", whole))
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)
    steps = [json.loads(line)["step"] for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, *range(1, 9), *range(1, 9)]


def wait_for_step(process, metrics: Path, stage: str, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if metrics.is_file() and f'"stage": "{stage}", "step": {step},' in metrics.read_text():
            return
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    raise AssertionError(f"{stage} never came to step {step}")


def test_stopped_by_the_clock_goes_on_later(tmp_path):
    recipe = tiny_recipe(tmp_path)
    whole = distill(replace(recipe, name="whole"))
    run = distill(recipe, max_minutes=0)
    assert (run / "align" / "unfinished.json").is_file() and not (run / "match").exists()
    AutoModelForCausalLM.from_pretrained(run / "align")
    distill(recipe, resume=True)
    assert not (run / "align" / "unfinished.json").exists()
    got, want = (load_file(folder / "match" / "model.safetensors") for folder in (run, whole))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_count_models_equal_counting_by_hand():
    train = [TokenFile(np.array([1, 2, 1, 2, 3], np.uint16), np.array([0, 5]))]
    heldout = [Batch(torch.tensor([[1, 2, 4]]), torch.tensor([[0, 1, 2]]))]
    unigram, bigram = count_models(train, heldout, 5)
    p = {2: 3 / 10, 4: 1 / 10}
    assert unigram.perplexity == pytest.approx((p[2] * p[4]) ** -0.5)
    assert bigram.perplexity == pytest.approx(((2 + 5 * p[2]) / (2 + 5) * (5 * p[4]) / (2 + 5)) ** -0.5)


def test_an_existing_run_is_not_overwritten_nor_mixed_with_another_recipe(tmp_path):
    recipe = tiny_recipe(tmp_path, align=Stage(), match=Stage(tokens=64, length=32, batch=2))
    distill(recipe)
    with pytest.raises(FileExistsError, match="--resume"):
        distill(recipe)
    with pytest.raises(ValueError, match=r"match.lr_mixers: 0.001 then, 0.5 now"):
        distill(replace(recipe, match=replace(recipe.match, lr_mixers=0.5)), resume=True)


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path, monkeypatch):
    calls = []

    def poisoned(*args):
        calls.append(1)
        losses = align_step(*args)
        return {"loss": losses["loss"] * float("nan")} if len(calls) == 6 else losses

    monkeypatch.setattr(sys.modules["deltify.distill"], "align_step", poisoned)
    with pytest.raises(FloatingPointError, match=r"align, step 5.*align-0000004"):
        distill(tiny_recipe(tmp_path))
    monkeypatch.undo()
    run = distill(tiny_recipe(tmp_path), resume=True)
    assert (run / "match" / "config.json").is_file()


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    recipe, saves, save = tiny_recipe(tmp_path), [], checkpoint.dcp.save

    def full(state, checkpoint_id):
        saves.append(1)
        if len(saves) == 3:
            (checkpoint_id / "half-written").write_bytes(b"x")
            raise OSError(28, "No space left on device")
        return save(state, checkpoint_id=checkpoint_id)

    monkeypatch.setattr(checkpoint.dcp, "save", full)
    with pytest.raises(OSError, match=r"align-0000006.*No space left.*--resume"):
        distill(recipe)
    left = [path.name for path in sorted((tmp_path / "tiny" / "checkpoints").iterdir())]
    assert left == ["align-0000002", "align-0000004"]
    monkeypatch.undo()
    whole = distill(replace(recipe, name="whole"))
    run = distill(recipe, resume=True)
    got, want = (load_file(folder / "match" / "model.safetensors") for folder in (run, whole))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_each_layer_is_trained_on_the_teachers_own_input():
    teacher = random_teacher("llama")
    from deltify import convert

    student = convert(teacher, start="library")
    batch = Batch(torch.randint(0, 200, (2, 32)), torch.arange(32).expand(2, 32))
    student.requires_grad_(True)
    align_step(teacher, student, batch, Stage(), 1.0)
    want = student.model.layers[2].self_attn.q_proj.weight.grad.clone()
    student.zero_grad()
    with torch.no_grad():  # a ruined layer below must not matter
        student.model.layers[0].self_attn.o_proj.weight.fill_(9.0)
    align_step(teacher, student, batch, Stage(), 1.0)
    assert torch.equal(student.model.layers[2].self_attn.q_proj.weight.grad, want)
    assert student.model.layers[2].mlp.up_proj.weight.grad is None


def test_match_compares_packed_documents_apart():
    teacher = random_teacher("llama")
    from deltify import convert

    student = convert(teacher, full_attention_layers="3:1", start="library")
    ids = torch.randint(0, 200, (1, 48))
    packed = Batch(ids, torch.cat([torch.arange(20), torch.arange(28)])[None])
    first = hidden_states(student, Batch(ids[:, :20], torch.arange(20)[None]))
    second = hidden_states(student, Batch(ids[:, 20:], torch.arange(28)[None]))
    assert torch.allclose(hidden_states(student, packed), torch.cat([first, second]), atol=1e-5)
    assert next_tokens(packed)[0, 19] == -100 and next_tokens(packed)[0, 18] == ids[0, 19]
    student.requires_grad_(True)
    assert float(match_step(teacher, student, packed, Stage(ce_weight=0.5), 1.0)["ce"]) > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["distill", "absent.yaml"], "there is no recipe absent.yaml"),
        (["distill", "{recipe}", "--match.tokns", "5"], "did you mean match.tokens?"),
        (["distill", "{recipe}", "--match.tokens", "many"], "many"),
        (["distill", "{recipe}", "--teacher.model", "gpt-nowhere"], "'gpt-nowhere' is neither a folder"),
        (["distill", "{recipe}", "--data.train", '{"absent.txt": 1}'], "no text at 'absent.txt'"),
        (["distill", "{recipe}", "--run.log_to", "paper"], "run.log_to='paper'"),
        (["distill", "{recipe}", "--student.start", "cold"], "start='cold'"),
        (["report", "absent"], "deltify evaluate absent"),
        (["generate", "{folder}", "Hello"], "holds neither a model"),
    ],
)
def test_bad_input_is_named_on_the_command_line(arguments, message, tmp_path, capsys):
    write_recipe(tiny_recipe(tmp_path), tmp_path / "recipe.yaml")
    places = {"{recipe}": str(tmp_path / "recipe.yaml"), "{folder}": str(tmp_path)}
    filled = [places.get(argument, argument) for argument in arguments]
    assert main(filled) == 1
    assert message in capsys.readouterr().err


def test_unknown_fields_in_a_file_name_the_nearest(tmp_path):
    (tmp_path / "bad.yaml").write_text("name: x\nalign: {tokens: 4096, lenght: 32}\n")
    with pytest.raises(ValueError, match=r"unknown field align.lenght; did you mean align.length\?"):
        read_recipe(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text("name: x\nalign: {tokens: 64, length: 64, batch: 4}\n")
    with pytest.raises(ValueError, match=r"align\.tokens=64 is less than one step"):
        read_recipe(tmp_path / "bad.yaml")


def test_wrong_teachers_are_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    from deltify.teacher import load_teacher

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


def test_a_row_longer_than_the_teacher_reads_is_refused(tmp_path):
    teacher = random_teacher("llama", max_position_embeddings=64)
    for part in (teacher.model, teacher.tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    recipe = tiny_recipe(tmp_path, teacher=TeacherSpec(model=str(tmp_path / "teacher")))
    with pytest.raises(ValueError, match=r"match\.length=128 is longer than the teacher can read"):
        distill(replace(recipe, match=Stage(tokens=512, length=128, batch=2)))


def test_generate_streams_and_counts(tmp_path, capsys):
    run = distill(tiny_recipe(tmp_path, match=Stage()))
    assert main(["generate", str(run), "Hello", "--max-new-tokens", "5", "--device", "cpu"]) == 0
    assert "tokens/s" in capsys.readouterr().out

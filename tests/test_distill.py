"""Runs: every recipe in small, resuming after a kill, and what goes wrong."""

import json
import math
import os
import re
import shutil
import signal
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from soak import soak
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoModelForCausalLM

from deltify import distill, load_recipe
from deltify.cli import main
from deltify.config import (
    RENAMED,
    STAGES,
    DataSpec,
    Recipe,
    RunSpec,
    Stage,
    StudentSpec,
    TeacherSpec,
    smoke,
    value_of,
    write_recipe,
)
from deltify.conversion.student import convert
from deltify.conversion.teacher import random_teacher
from deltify.data.token_files import Batch, TokenFile
from deltify.evaluation.heldout import ngram_baselines
from deltify.model import DeltifyForCausalLM
from deltify.training import checkpoint
from deltify.training.optimizers import choose_trained, make_optimizers, trained
from deltify.training.runner import align_step, hidden_states, match_step, next_tokens, own_weights, share_frozen
from deltify.training.signals import Stopped

DISTILL = import_module("deltify.training.runner")
RECIPES = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))


def tiny_recipe(folder: Path, **changes) -> Recipe:
    stage = Stage(tokens=8 * 2 * 32, sequence_length=32, batch_size=2)
    recipe = Recipe(
        name="tiny",
        output=str(folder),
        teacher=TeacherSpec(model="random:llama"),
        student=StudentSpec(calibration_tokens=256, calibration_sequence_length=32),
        align=stage,
        match=stage,
        run=RunSpec("cpu", "fp32", heldout_tokens=128, heldout_sequence_length=32, eval_every=4, save_every=2),
    )
    data = replace(recipe.data, folder=str(folder / "data"), max_tokens=5000)
    return replace(recipe, data=data, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The tiny recipe's run, unbroken."""
    return distill(tiny_recipe(tmp_path_factory.mktemp("whole")))


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """The tiny recipe's run, which died in the sixth step of align: it has checkpoints of steps 2 and 4."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("broken"))
    die_in_step(recipe, 5)
    return recipe.folder


def assert_same_weights(run: Path, other: Path, *stages: str) -> None:
    for stage in stages:
        got, want = (load_file(folder / stage / "model.safetensors") for folder in (run, other))
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want), stage


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def die_in_step(recipe: Recipe, step: int) -> None:
    """Runs the recipe until the first stage's `step`, which ends it like a kill."""
    calls = []

    def dies(*args):
        calls.append(1)
        if len(calls) > step:
            raise KeyboardInterrupt
        return align_step(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DISTILL, "align_step", dies)
        distill(recipe)


def test_align_keeps_one_copy_of_what_is_frozen(tmp_path):
    teacher, rounded = random_teacher("llama"), random_teacher("llama").model.bfloat16()
    student = convert(teacher, full_attention_layers="none", init="library")
    choose_trained(student, Stage(), "align")
    share_frozen(rounded, student)
    assert student.model.layers[0].mlp.up_proj.weight.dtype == torch.float32  # which is not what was rounded
    own_weights(student, rounded)
    share_frozen(teacher.model, student)
    theirs = {p.data_ptr() for p in teacher.model.parameters()}
    shared = [name for name, p in student.named_parameters() if p.data_ptr() in theirs]
    assert len(shared) == sum(not p.requires_grad for p in student.parameters()) > 8
    own_weights(student, teacher.model)
    assert not any(p.data_ptr() in theirs for p in student.parameters())
    recipe = tiny_recipe(tmp_path, run=replace(tiny_recipe(tmp_path).run, precision="bf16"))
    distill(recipe)
    weights = load_file(recipe.folder / "align" / "model.safetensors")
    assert all(x.dtype == torch.float32 for x in weights.values())


def trains_and_resumes_to_the_same_bits(tmp_path: Path, stage: Stage) -> DeltifyForCausalLM:
    """Trains align and match so, at once and with a break, asserts that both agree; returns the model, to train on."""
    runs = [tiny_recipe(tmp_path / name, align=stage, match=stage) for name in ("whole", "broken")]
    distill(runs[0])
    die_in_step(runs[1], 5)
    distill(runs[1], resume=True)
    assert_same_weights(runs[1].folder, runs[0].folder, "align", "match")
    losses = [r["loss"] for r in records(runs[0].folder) if r["stage"] == "match" and r["step"]]
    assert losses[-1] < losses[0]
    return AutoModelForCausalLM.from_pretrained(runs[0].folder / "match").requires_grad_(True)


def test_eight_bit_moments_train_and_resume_to_the_same_bits(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    stage = replace(tiny_recipe(tmp_path).align, optimizer="adamw8bit")
    model = trains_and_resumes_to_the_same_bits(tmp_path, stage)
    (optimizer,) = make_optimizers(model, stage, "match")
    model(torch.arange(8)[None]).logits.sum().backward()
    optimizer.step()
    wide = model.model.layers[0].mlp.up_proj.weight
    assert optimizer.state[wide]["state1"].dtype == torch.uint8
    with pytest.raises(ValueError, match=r"match.optimizer='adamw8bit' cannot be sharded over processes"):
        make_optimizers(model, stage, "match", sharded=True)


def test_muon_trains_and_resumes_to_the_same_bits_and_equals_torchs(tmp_path):
    stage = replace(tiny_recipe(tmp_path).align, optimizer="muon")
    model = trains_and_resumes_to_the_same_bits(tmp_path, stage)
    adamw, muon = make_optimizers(model, replace(stage, weight_decay=0.1), "match")
    turned = {id(p) for p in trained([muon])}
    words = {id(model.model.embed_tokens.weight), id(model.lm_head.weight)}
    assert {id(p) for p in model.parameters() if p.dim() == 2} - turned == words
    assert {id(p) for p in trained([adamw, muon])} == {id(p) for p in model.parameters()}
    copies = [p.detach().clone() for p in trained([muon])]
    theirs = torch.optim.Muon(copies, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for group in muon.param_groups:
        group["lr"] = 0.01
    for seed in range(3):
        torch.manual_seed(seed)
        for mine, copy in zip(trained([muon]), copies):
            mine.grad = torch.randn_like(mine)
            copy.grad = mine.grad.clone()
        muon.step()
        theirs.step()
    for mine, copy in zip(trained([muon]), copies):
        torch.testing.assert_close(mine.detach(), copy, rtol=0, atol=2e-4)  # bfloat16 products in another order


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_in_small(path, tmp_path):
    recipe = smoke(load_recipe(path, ["--output", str(tmp_path), "--data.folder", str(tmp_path / "data")]))
    run = distill(recipe)
    for name in ("converted", *(s for s in STAGES if recipe.stage(s).tokens)):
        model = AutoModelForCausalLM.from_pretrained(run / name)
        assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["heldout_kl"] >= 0 for line in lines if "heldout_kl" in line)


def test_training_lowers_the_loss_of_each_stage(tmp_path):
    longer = Stage(tokens=40 * 4 * 64, sequence_length=64, batch_size=4, lr_mixers=3e-3, lr_other=1e-3)
    start = StudentSpec(init="library")
    run = distill(tiny_recipe(tmp_path, student=start, align=longer, match=longer))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for stage in ("align", "match"):
        losses = [line["loss"] for line in lines if line["stage"] == stage and "loss" in line]
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), stage


def test_a_run_killed_at_random_moments_resumes_to_the_same_bits(tmp_path):
    assert len(list(soak(tmp_path, 3, seed=80))) == 3  # two of them while a folder is written; `make soak` does 20


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_after_the_step_and_ends_the_run(number, code, tmp_path, monkeypatch, capsys, whole):
    recipe = tiny_recipe(tmp_path)
    write_recipe(recipe, tmp_path / "recipe.yaml")
    monkeypatch.setattr(DISTILL, "align_step", signalled(2, number))  # in the third step
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    assert main(["distill", str(tmp_path / "recipe.yaml")]) == code
    assert handlers == [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    assert f"stopped by {number.name}: saved {recipe.folder}/checkpoints/align-0000003; --resume goes on" in (
        capsys.readouterr().err
    )
    assert [record["step"] for record in records(recipe.folder)] == [0, 1, 2, 3]
    monkeypatch.undo()
    assert_same_weights(distill(recipe, resume=True), whole, "align", "match")
    assert [record["step"] for record in records(recipe.folder)] == [0, *range(1, 9), *range(1, 9)]
    assert "going on from step 3" in capsys.readouterr().out


def signalled(calls: int, *numbers: signal.Signals):
    """`align_step`, which sends this process signals after so many calls."""
    done = []

    def step(*args):
        done.append(1)
        if len(done) == calls + 1:
            for number in numbers:
                os.kill(os.getpid(), number)
        return align_step(*args)

    return step


def test_a_second_ctrl_c_does_not_wait_and_a_second_sigterm_does(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path)
    monkeypatch.setattr(DISTILL, "align_step", signalled(2, signal.SIGTERM, signal.SIGTERM))
    with pytest.raises(Stopped, match="SIGTERM: saved"):
        distill(recipe)
    monkeypatch.setattr(DISTILL, "align_step", signalled(1, signal.SIGINT, signal.SIGINT))
    with pytest.raises(Stopped, match="SIGINT: what was saved can be taken up"):
        distill(recipe, resume=True)
    assert checkpoint.checkpoints(recipe.folder, "align")[-1].name == "align-0000004"


def test_a_signal_outside_the_steps_ends_the_run_at_once(tmp_path, monkeypatch):
    def load(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it went on")

    monkeypatch.setattr(DISTILL, "open_teacher", load)
    with pytest.raises(Stopped, match="stopped by SIGTERM") as stopped:
        distill(tiny_recipe(tmp_path))
    assert stopped.value.exit_code == 143


def test_a_gpu_out_of_memory_names_the_settings_to_change(tmp_path, monkeypatch, capsys, whole):
    recipe = tiny_recipe(tmp_path)
    write_recipe(recipe, tmp_path / "recipe.yaml")

    def too_large(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(DISTILL, "match_step", too_large)
    assert main(["distill", str(tmp_path / "recipe.yaml")]) == 1
    said = capsys.readouterr().err
    assert "match does not fit in the GPU's memory: micro_batch_size=0 (2 at a time), sequence_length=32, act" in said
    advice = [
        "--resume --match.micro_batch_size 1",
        "--resume --match.activation_checkpointing true",
        "--match.sequence_length 16",
    ]
    assert all(way in said for way in advice) and "(CUDA out of memory. Tried to allocate 2.00 GiB.)" in said
    monkeypatch.undo()
    # the advice works, and what it changes is memory alone
    options = ["--resume", "--match.micro_batch_size", "1", "--match.activation_checkpointing", "true"]
    assert main(["distill", str(tmp_path / "recipe.yaml"), *options]) == 0
    got, want = (load_file(run / "match" / "model.safetensors") for run in (recipe.folder, whole))
    # as a whole: Adam turns the rounding of a gradient near zero, which differs between CPUs, into a step of any size
    for name in want:
        assert (got[name] - want[name]).norm() <= 1e-3 * want[name].norm(), name


def test_out_of_memory_where_nothing_is_left_to_lower_but_the_length():
    stage = Stage(sequence_length=4096, batch_size=8, micro_batch_size=1, activation_checkpointing=True)
    with pytest.raises(MemoryError) as error, DISTILL.naming_memory("extend", stage):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert "go on with --extend.sequence_length 2048 and another --name" in str(error.value)
    fewer = pytest.raises(MemoryError, match=r"--align.micro_batch_size 2, or with --align\.sequence_length")
    with fewer, DISTILL.naming_memory("align", replace(stage, micro_batch_size=4)):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_tokens_that_changed_since_the_start_are_refused(tmp_path, whole):
    recipe, text = tiny_recipe(tmp_path), tmp_path / "text.txt"
    text.write_text("A short text. " * 200)
    recipe = replace(recipe, data=replace(recipe.data, train={str(text): 1.0}, heldout="python-docs"))
    distill(recipe, max_minutes=0)
    text.write_text("Another text. " * 200)
    with pytest.raises(ValueError, match="changed since it was tokenized"):
        distill(recipe, resume=True)
    shutil.rmtree(tmp_path / "data")  # made anew, the tokens are others
    with pytest.raises(ValueError, match=r"the tokens of .*text\.txt are not those that .*tiny began with"):
        distill(recipe, resume=True)
    (tokens,) = (tmp_path / "data").rglob("*-all*/tokens.bin")
    flip(tokens, 100)  # a broken token file is made anew, of the text that is there
    with pytest.raises(ValueError, match=r"the tokens of .*text\.txt are not those that .*tiny began with"):
        distill(recipe, resume=True)
    shutil.rmtree(tmp_path / "data")
    text.write_text("A short text. " * 200)
    distill(recipe, resume=True)


def flip(path: Path, place: int) -> None:
    """Changes one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_stopped_by_the_clock_goes_on_later(tmp_path, whole):
    recipe = tiny_recipe(tmp_path)
    run = distill(recipe, max_minutes=0)
    assert (run / "align" / "unfinished.json").is_file() and not (run / "match").exists()
    AutoModelForCausalLM.from_pretrained(run / "align")
    distill(recipe, resume=True)
    assert not (run / "align" / "unfinished.json").exists()
    assert_same_weights(run, whole, "match")


def test_a_stage_stopped_by_the_clock_is_never_taken_for_done(tmp_path, monkeypatch, whole):
    recipe, publish = tiny_recipe(tmp_path), checkpoint.publish

    def dies_after(unfinished, folder):
        publish(unfinished, folder)
        if folder.name == "align":
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "publish", dies_after)
    with pytest.raises(KeyboardInterrupt):
        distill(recipe, max_minutes=0)
    monkeypatch.undo()
    assert_same_weights(distill(recipe, resume=True), whole, "match")


def test_a_folder_that_is_replaced_is_whole_at_any_time(tmp_path, monkeypatch):
    for name, text in (("model", "old"), ("model.unfinished", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)

    def dies(folder, **options):
        if folder.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", dies)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.publish(tmp_path / "model.unfinished", tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "new"


def test_the_best_checkpoint_is_kept(tmp_path, monkeypatch):
    judgements = iter([9.0, 5.0, 6.0, 7.0, 4.0])  # of the conversion, then of steps 2, 4, 6 and 8
    judge = lambda *args: {"heldout_kl": next(judgements), "heldout_perplexity": 1.0}  # noqa: E731
    monkeypatch.setattr(DISTILL, "judge", judge)
    run = RunSpec(
        "cpu", "fp32", heldout_tokens=64, heldout_sequence_length=32, eval_every=2, save_every=3, keep_checkpoints=1
    )
    folder = distill(tiny_recipe(tmp_path, match=Stage(), run=run))
    assert [path.name for path in checkpoint.checkpoints(folder, "align")] == ["align-0000002", "align-0000006"]


def test_a_run_that_dies_before_its_first_checkpoint_starts_the_stage_again(tmp_path, whole):
    recipe = tiny_recipe(tmp_path)
    die_in_step(recipe, 1)
    metrics = recipe.folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"stage": "align", "st')
    run = distill(recipe, resume=True)
    assert [record["step"] for record in records(run)] == [0, *range(1, 9), *range(1, 9)]
    assert_same_weights(run, whole, "match")


def test_a_damaged_line_of_metrics_is_named(tmp_path):
    recipe = tiny_recipe(tmp_path)
    die_in_step(recipe, 1)
    (recipe.folder / "metrics.jsonl").write_text('{"stage"\n{"stage": "align", "step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: '\{\"stage\"' is not a JSON object"):
        distill(recipe, resume=True)


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
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, reason, tmp_path, broken, capsys, whole):
    recipe = replace(tiny_recipe(tmp_path), data=tiny_recipe(broken.parent).data)
    shutil.copytree(broken, recipe.folder)
    damage(recipe.folder / "checkpoints" / "align-0000004")
    run = distill(recipe, resume=True, max_minutes=None if damage is truncate else 0)
    said = capsys.readouterr().out
    assert "align-0000004 cannot be read" in said and re.search(reason, said) and "going on from step 2" in said
    assert "trying the one before" in said and (run / "checkpoints" / "align-0000004.damaged").is_dir()
    if damage is truncate:
        assert_same_weights(run, whole, "align", "match")


def test_damaged_checkpoints_alone_are_named(tmp_path, whole):
    recipe = tiny_recipe(tmp_path)
    die_in_step(recipe, 5)
    folders = checkpoint.checkpoints(recipe.folder, "align")
    truncate(folders[1])
    (folders[0] / "progress.json").write_text('{"stage')
    for _ in range(2):  # a second try must not start the stage again unasked
        with pytest.raises(ValueError, match=r"no checkpoint of align .*align-0000004, align-0000002.*delete them"):
            distill(recipe, resume=True)
    shutil.rmtree(recipe.folder / "checkpoints")
    assert_same_weights(distill(recipe, resume=True), whole, "align")


@pytest.mark.parametrize(
    "wrong",
    [
        {"data": DataSpec(train={"absent.txt": 1.0})},
        {"teacher": TeacherSpec(model="gpt-nowhere")},
        {"match": Stage(tokens=2 * 4096, sequence_length=4096, batch_size=2)},  # a row longer than the text
        {"student": StudentSpec(full_attention_layers="KX", calibration_tokens=256, calibration_sequence_length=32)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_mistyped_first_run_does_not_take_the_name(wrong, tmp_path, monkeypatch):
    right, text = tiny_recipe(tmp_path, match=Stage()), tmp_path / "text.txt"
    text.write_text("A short text. " * 200)
    right = replace(right, data=replace(right.data, train={str(text): 1.0}, heldout=str(text), max_tokens=None))
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError)):
        distill(replace(right, **wrong))
    assert not (right.folder / "converted").exists()
    assert (distill(right) / "align" / "config.json").is_file()


def test_learning_rates_may_change_on_the_way_and_nothing_else(tmp_path, capsys):
    recipe = tiny_recipe(tmp_path)
    distill(recipe, max_minutes=0)
    lower = replace(recipe.align, lr_mixers=2e-4, min_lr_ratio=0.5, warmup_ratio=0.0, max_grad_norm=0.7)
    for changes, message in (
        ({"align": replace(lower, weight_decay=0.1)}, r"align\.weight_decay: 0\.0 then, 0\.1 now\)"),
        ({"match": replace(recipe.match, lr_other=0.0)}, r"match\.lr_other: 0\.0001 then, 0\.0 now\)"),
        ({"seed": 5}, r"seed: 0 then, 5 now\)"),
    ):
        with pytest.raises(ValueError, match=message):
            distill(replace(recipe, **changes), resume=True)
    run = distill(replace(recipe, align=lower), resume=True)
    said = capsys.readouterr().out
    assert "align.lr_mixers: 0.001 until now, 0.0002 from here on" in said
    assert "align.max_grad_norm: 1.0 until now, 0.7 from here on" in said
    rates = [record["lr_mixers"] for record in records(run) if record["stage"] == "align" and record["step"]]
    assert rates[:2] == [1e-3, 2e-4] and 1e-4 < rates[-1] < rates[-2] < 2e-4
    assert load_recipe(run / "recipe.yaml").align.lr_mixers == 2e-4


def test_another_precision_on_the_way_is_said(tmp_path, capsys):
    recipe = tiny_recipe(tmp_path, match=Stage())
    distill(recipe, max_minutes=0)
    run = replace(recipe.run, precision="bf16")
    distill(replace(recipe, run=run), max_minutes=0, resume=True)
    assert "warning: the run was on cpu in fp32, and goes on on cpu in bf16" in capsys.readouterr().out
    distill(replace(recipe, run=run), resume=True)
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("dead", ["o", "v", "q", "qkvo", "constant"])
def test_a_teacher_with_a_layer_that_says_nothing_trains(dead, tmp_path, monkeypatch):
    teacher = random_teacher("llama", attention_bias=dead == "constant")
    attention = teacher.model.model.layers[1].self_attn
    for name in "v" if dead == "constant" else dead:
        getattr(attention, f"{name}_proj").weight.zero_()
    if dead == "constant":
        attention.v_proj.bias.normal_(std=0.1)
    monkeypatch.setattr(DISTILL, "open_teacher", lambda *args: teacher)
    stage = Stage(tokens=2 * 2 * 32, sequence_length=32, batch_size=2)
    folder = distill(tiny_recipe(tmp_path, align=stage, match=replace(stage, hidden_state_weight=0.2)))
    rows = records(folder)
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    # where the teacher says the same of every token, nothing scores 10,000 (`LEAST_VARIANCE`), in one of four layers
    assert max(row["loss"] for row in rows if "loss" in row) < (5000 if dead == "constant" else 5)
    for name in ("converted", "align", "match"):
        assert all(x.isfinite().all() for x in load_file(folder / name / "model.safetensors").values())


class Tracker:
    """Stands for the modules wandb and trackio: what was opened, logged and finished."""

    def __init__(self):
        self.opened, self.logged, self.finished = [], [], 0

    def init(self, **settings):
        self.opened.append(settings)
        number = len(self.opened)
        return SimpleNamespace(id=settings.get("id", f"id-{number}"), name=f"{settings['name'].split('@')[0]}@{number}")

    def log(self, figures, step):
        self.logged.append((step, figures))

    def finish(self):
        self.finished += 1


def interrupted(recipe: Recipe) -> None:
    """Runs a recipe that dies in the sixth step of align, two steps after a checkpoint, and resumes it."""
    die_in_step(recipe, 5)
    distill(recipe, resume=True)


@pytest.mark.parametrize("name, key, known", [("wandb", "id", "id-1"), ("trackio", "name", "tiny@1")])
def test_a_resumed_run_goes_on_in_its_trackers_run(name, key, known, tmp_path, monkeypatch):
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, name, tracker)
    recipe = tiny_recipe(tmp_path)
    recipe = replace(recipe, run=replace(recipe.run, report_to=name))
    interrupted(recipe)
    first, second = tracker.opened
    assert "resume" not in first and first["name"] == "tiny" and "id" not in first
    assert second["resume"] == "allow" and second[key] == known and second["project"] == first["project"]
    assert [step for step, _ in tracker.logged] == list(range(17)) and tracker.finished == 2
    losses = [(number, record["loss"]) for number, record in enumerate(records(recipe.folder)) if "loss" in record]
    assert [(step, sent[key]) for step, sent in tracker.logged for key in sent if key.endswith("/loss")] == losses
    shutil.rmtree(recipe.folder)  # another run of that name is another run there
    distill(recipe)
    assert "resume" not in tracker.opened[2] and len(tracker.logged) == 34


def test_a_run_that_changes_its_tracker_begins_there(tmp_path, monkeypatch):
    wandb, trackio = Tracker(), Tracker()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    recipe = tiny_recipe(tmp_path)
    die_in_step(replace(recipe, run=replace(recipe.run, report_to="wandb")), 5)
    distill(replace(recipe, run=replace(recipe.run, report_to="trackio")), resume=True)
    assert "resume" not in trackio.opened[0] and [step for step, _ in trackio.logged] == list(range(5, 17))
    assert json.loads((recipe.folder / "tracker.json").read_text()) == {"wandb": "id-1", "trackio": "tiny@1"}


def test_tensorboard_takes_steps_that_are_made_again_in_place_of_the_old_ones(tmp_path, monkeypatch):
    opened, points = [], []

    class Writer:
        def __init__(self, folder, purge_step):
            points[:] = [point for point in points if point[1] < purge_step]
            opened.append((folder, purge_step))

        def add_scalar(self, key, value, step):
            points.append((key, step, value))

        def close(self):
            opened.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    recipe = tiny_recipe(tmp_path)
    interrupted(replace(recipe, run=replace(recipe.run, report_to="tensorboard")))
    folder = str(recipe.folder / "tensorboard")
    assert opened == [(folder, 0), "closed", (folder, 5), "closed"]
    losses = [(step, value) for key, step, value in points if key.endswith("/loss")]
    assert losses == list(enumerate([r["loss"] for r in records(recipe.folder) if "loss" in r], 1))


def test_one_tracker_sees_the_whole_run(tmp_path, monkeypatch):
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    recipe = tiny_recipe(tmp_path)
    distill(replace(recipe, run=replace(recipe.run, report_to="wandb")))
    assert [settings["name"] for settings in tracker.opened] == ["tiny"] and tracker.finished == 1
    logged = tracker.logged
    assert [step for step, _ in logged] == list(range(17))
    assert logged[0][1].keys() == {"converted/tokens", "converted/heldout_kl", "converted/heldout_perplexity"}
    assert "align/loss" in logged[8][1] and "match/lr_other" in logged[9][1]


def test_nothing_is_loaded_for_a_recipe_that_cannot_run(tmp_path, monkeypatch):
    monkeypatch.setattr(DISTILL, "open_teacher", lambda *args: pytest.fail("the teacher was loaded"))
    monkeypatch.setitem(sys.modules, "trackio", None)  # as if it were not installed
    recipe = tiny_recipe(tmp_path)
    for changes, message in (
        (
            {"run": replace(recipe.run, report_to="paper")},
            "run.report_to='paper'; choose trackio, wandb or tensorboard",
        ),
        ({"run": replace(recipe.run, report_to="trackio")}, "run.report_to='trackio' needs.*pip install trackio"),
        ({"run": replace(recipe.run, device="cuda:99")}, "device 'cuda:99' is not there.*choose auto or cpu"),
        ({"student": StudentSpec(init="cold")}, "init='cold'; choose one of calibrated"),
        ({"run": replace(recipe.run, eval_every=0)}, "run.eval_every=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            distill(replace(recipe, **changes))


def test_ngram_baselines_equal_counting_by_hand():
    train = [TokenFile(np.array([1, 2, 1, 2, 3], np.uint16), np.array([0, 5]))]
    heldout = [Batch(torch.tensor([[1, 2, 4]]), torch.tensor([[0, 1, 2]]))]
    unigram, bigram = ngram_baselines(train, heldout, 5)
    p = {2: 3 / 10, 4: 1 / 10}
    assert unigram.perplexity == pytest.approx((p[2] * p[4]) ** -0.5)
    assert bigram.perplexity == pytest.approx(((2 + 5 * p[2]) / (2 + 5) * (5 * p[4]) / (2 + 5)) ** -0.5)


def test_an_existing_run_is_not_overwritten_nor_mixed_with_another_recipe(tmp_path):
    recipe = tiny_recipe(tmp_path, align=Stage(), match=Stage(tokens=64, sequence_length=32, batch_size=2))
    distill(recipe)
    with pytest.raises(FileExistsError, match="--resume"):
        distill(recipe)
    with pytest.raises(ValueError, match=r"match.batch_size: 2 then, 1 now"):
        distill(replace(recipe, match=replace(recipe.match, batch_size=1)), resume=True)


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path, monkeypatch):
    calls = []

    def poisoned(*args):
        calls.append(1)
        losses = align_step(*args)
        return {"loss": losses["loss"] * float("nan")} if len(calls) == 6 else losses

    recipe = tiny_recipe(tmp_path)
    monkeypatch.setattr(DISTILL, "align_step", poisoned)
    with pytest.raises(FloatingPointError, match=r"align, step 5.*align-0000004.*--resume --align.lr_mixers 0\.0005"):
        distill(recipe)
    monkeypatch.undo()
    run = distill(replace(recipe, align=replace(recipe.align, lr_mixers=5e-4)), resume=True)
    assert (run / "match" / "config.json").is_file()


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


def test_each_layer_is_trained_on_the_teachers_own_input():
    teacher = random_teacher("llama")
    from deltify import convert

    student = convert(teacher, init="library")
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

    student = convert(teacher, full_attention_layers="3:1", init="library")
    ids = torch.randint(0, 200, (1, 48))
    packed = Batch(ids, torch.cat([torch.arange(20), torch.arange(28)])[None])
    first = hidden_states(student, Batch(ids[:, :20], torch.arange(20)[None]))
    second = hidden_states(student, Batch(ids[:, 20:], torch.arange(28)[None]))
    assert torch.allclose(hidden_states(student, packed), torch.cat([first, second]), atol=1e-5)
    assert next_tokens(packed)[0, 19] == -100 and next_tokens(packed)[0, 18] == ids[0, 19]
    student.requires_grad_(True)
    assert float(match_step(teacher, student, packed, Stage(ce_weight=0.5), 1.0)["ce"]) > 0


def test_behind_the_teachers_reach_the_text_alone_teaches():
    teacher = random_teacher("llama")
    student = convert(teacher, full_attention_layers="none", init="library").requires_grad_(True)
    ids = torch.randint(0, 250, (2, 12))
    batch, short = (Batch(ids[:, :n], torch.arange(n).expand(2, n)) for n in (12, 8))
    teacher.model.config.max_position_embeddings = 8
    found = match_step(teacher, student, batch, Stage(ce_weight=0.5), 1.0)
    mine = [p.grad.clone() for p in student.parameters()]
    near = match_step(teacher, student, short, Stage(), 1.0)
    student.zero_grad()
    labels = next_tokens(batch).flatten()
    logits = student(ids).logits.flatten(0, 1)
    ce = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / labels.numel()
    torch.testing.assert_close(float(found["ce"]), float(ce.detach()))
    torch.testing.assert_close(float(found["kl"]), float(near["kl"]))
    torch.testing.assert_close(float(found["loss"]), float(0.5 * near["kl"] + 0.5 * ce.detach()))
    (0.5 * ce).backward()
    match_step(teacher, student, short, Stage(), 0.5)
    for gradient, parameter in zip(mine, student.parameters()):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-6, rtol=1e-4)


def test_a_run_starts_from_a_students_folder(tmp_path, whole):
    start = StudentSpec(init=str(whole))
    nothing = Stage()
    run = distill(tiny_recipe(tmp_path, student=start, align=nothing))
    first, last = load_file(run / "converted" / "model.safetensors"), load_file(whole / "match" / "model.safetensors")
    assert all(torch.equal(first[name], last[name]) for name in last)
    kls = {r["stage"]: r["heldout_kl"] for r in records(whole) if "heldout_kl" in r}
    assert records(run)[0]["heldout_kl"] == pytest.approx(kls["match"], rel=1e-5)
    hybrid = replace(start, full_attention_layers=[0])
    with pytest.raises(ValueError, match=r"full_attention_layers=\[0\] are .*let both be the same"):
        distill(tiny_recipe(tmp_path / "other", student=hybrid, align=nothing))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["distill", "absent.yaml"], "there is no recipe absent.yaml"),
        (["distill", "{recipe}", "--match.tokns", "5"], "did you mean match.tokens?"),
        (["distill", "{recipe}", "--match.tokens", "many"], "many"),
        (["distill", "{recipe}", "--teacher.model", "gpt-nowhere"], "'gpt-nowhere' is neither a folder"),
        (["distill", "{recipe}", "--data.train", '{"absent.txt": 1}'], "no text at 'absent.txt'"),
        (["distill", "{recipe}", "--run.report_to", "paper"], "run.report_to='paper'"),
        (["distill", "{recipe}", "--student.init", "cold"], "init='cold'"),
        (["distill", "{recipe}", "--run.device", "cuda:99"], "device 'cuda:99' is not there"),
        (["distill", "{recipe}", "--run.eval_every", "0"], "run.eval_every=0 must be at least 1"),
        (
            ["distill", "{recipe}", "--run.heldout_sequence_length", "1"],
            "run.heldout_sequence_length=1 must be at least 2",
        ),
        (["distill", "{recipe}", "--run.heldout_tokens", "8"], "run.heldout_tokens=8 must be at least run.heldout_seq"),
        (["distill", "{recipe}", "--run.save_every", "-1"], "run.save_every=-1 must be at least 0"),
        (["distill", "{recipe}", "--run.save_every_minutes", "0"], "run.save_every_minutes=0.0 must be above 0"),
        (["distill", "{recipe}", "--align.max_grad_norm", "0"], "align.max_grad_norm=0.0 must be above 0"),
        (["generate", "{folder}", "Hello", "--device", "gpu"], "device 'gpu' is unknown; choose auto, cpu, cuda"),
        (["read", "{folder}", "a.txt", "-o", "b", "--device", "cuda:99"], "choose auto or cpu"),
        (["chat", "{folder}", "--device", "cuda:x"], "device 'cuda:x' is unknown"),
        (["serve", "{folder}", "--device", "gpu"], "device 'gpu' is unknown"),
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


@pytest.mark.parametrize("old, new", RENAMED.items())
def test_old_names_of_fields_are_refused_with_the_new_name(old, new, tmp_path):
    section, field = old.split(".")
    (tmp_path / "old.yaml").write_text(f"name: x\nmatch: {{tokens: 65536}}\n{section}: {{{field}: 1}}\n")
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
        ("name: [x", r"bad\.yaml is not YAML: .*line 1.*recipes/ has examples"),
        ("- name: x", r"bad\.yaml holds a list.*a recipe is fields and their values"),
        ("my recipe", r"bad\.yaml holds a str, 'my recipe'"),
        ("# no more than a remark", r"bad\.yaml holds nothing"),
        ("name: x\nalign: 5", r"align=5 is not a section; give it fields, which are: tokens, sequence_length"),
        ("name: x\nmatch:", r"match=None is not a section"),
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


def test_a_row_longer_than_the_teacher_reads_is_refused(tmp_path):
    teacher = random_teacher("llama", max_position_embeddings=64)
    for part in (teacher.model, teacher.tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    recipe = tiny_recipe(tmp_path, teacher=TeacherSpec(model=str(tmp_path / "teacher")))
    with pytest.raises(ValueError, match=r"match\.sequence_length=128 is longer than the teacher can read"):
        distill(replace(recipe, match=Stage(tokens=512, sequence_length=128, batch_size=2)))


def test_generate_streams_and_counts(tmp_path, capsys):
    run = distill(tiny_recipe(tmp_path, match=Stage()))
    assert main(["generate", str(run), "Hello", "--max-new-tokens", "5", "--device", "cpu"]) == 0
    assert "tokens/s" in capsys.readouterr().out

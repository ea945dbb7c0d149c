"""Runs that are stopped, killed, damaged or changed, and resumed."""

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
from helpers import assert_same_weights, die_in_step, flip, records, tiny_recipe
from soak import soak
from transformers import AutoModelForCausalLM

from deltify import distill, load_recipe
from deltify.cli import main
from deltify.config import Stage, write_recipe
from deltify.training import checkpoint, runner, trainer
from deltify.training.distributed import sole_writer
from deltify.training.run_folder import same
from deltify.training.signals import Stopped
from deltify.training.steps import align_step


def test_a_run_killed_at_random_moments_resumes_to_the_same_bits(tmp_path):
    assert len(list(soak(tmp_path, 3, seed=80))) == 3  # two of them while a folder is written; `make soak` kills 20


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_after_the_step_and_ends_the_run(number, code, tmp_path, monkeypatch, capsys, whole):
    recipe = tiny_recipe(tmp_path)
    write_recipe(recipe, tmp_path / "recipe.yaml")
    monkeypatch.setattr(trainer, "align_step", signalled(2, number))  # in the third step
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    assert main(["distill", str(tmp_path / "recipe.yaml")]) == code
    assert handlers == [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    assert f"stopped by {number.name}: saved {recipe.folder}/checkpoints/align-0000003; --resume continues from it" in (
        capsys.readouterr().err
    )
    assert [record["step"] for record in records(recipe.folder)] == [0, 1, 2, 3]
    monkeypatch.undo()
    assert_same_weights(distill(recipe, resume=True), whole, "align", "match")
    assert [record["step"] for record in records(recipe.folder)] == [0, *range(1, 9), *range(1, 9)]
    assert "resuming from step 3" in capsys.readouterr().out


def signalled(calls: int, *numbers: signal.Signals):
    """Return an `align_step` that sends signals to this process after the given number of calls."""
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
    monkeypatch.setattr(trainer, "align_step", signalled(2, signal.SIGTERM, signal.SIGTERM))
    with pytest.raises(Stopped, match="SIGTERM: saved"):
        distill(recipe)
    monkeypatch.setattr(trainer, "align_step", signalled(1, signal.SIGINT, signal.SIGINT))
    with pytest.raises(Stopped, match="SIGINT: --resume continues from the last checkpoint"):
        distill(recipe, resume=True)
    assert checkpoint.checkpoints(recipe.folder, "align")[-1].name == "align-0000004"


def test_a_signal_during_the_last_validation_of_a_stage_waits_until_its_model_is_saved(tmp_path, monkeypatch):
    recipe, validate = tiny_recipe(tmp_path), trainer.StageTrainer.evaluate
    recipe = replace(recipe, run=replace(recipe.run, save_every=0))

    def signalled_at_the_end(self):
        if self.is_last_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(self)

    monkeypatch.setattr(trainer.StageTrainer, "evaluate", signalled_at_the_end)
    with pytest.raises(Stopped, match="SIGTERM"):
        distill(recipe)
    assert checkpoint.is_finished(recipe.folder / "align")


def test_a_checkpoint_of_the_last_step_is_not_left_beside_the_stages_model(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, match=Stage())
    monkeypatch.setattr(trainer, "align_step", signalled(7, signal.SIGTERM))  # in the last of eight steps
    with pytest.raises(Stopped, match="align-0000008"):
        distill(recipe)
    assert checkpoint.is_finished(distill(recipe, resume=True) / "align")
    assert "align-0000008" not in [path.name for path in checkpoint.checkpoints(recipe.folder, "align")]


def test_a_signal_outside_the_steps_ends_the_run_at_once(tmp_path, monkeypatch):
    def load(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the run continued")

    monkeypatch.setattr(runner, "open_teacher", load)
    with pytest.raises(Stopped, match="stopped by SIGTERM") as stopped:
        distill(tiny_recipe(tmp_path))
    assert stopped.value.exit_code == 143


def test_tokens_that_changed_since_the_start_are_refused(tmp_path, whole):
    recipe, text = tiny_recipe(tmp_path), tmp_path / "text.txt"
    text.write_text("A short text. " * 200)
    recipe = replace(recipe, data=replace(recipe.data, train={str(text): 1.0}, heldout="python-docs"))
    distill(recipe, max_minutes=0)
    text.write_text("Another text. " * 200)
    with pytest.raises(ValueError, match="changed since it was tokenized"):
        distill(recipe, resume=True)
    shutil.rmtree(tmp_path / "data")  # tokenized again, the text has other tokens
    with pytest.raises(ValueError, match=r"the tokens of .*text\.txt are not those that .*tiny began with"):
        distill(recipe, resume=True)
    (tokens,) = (tmp_path / "data").rglob("*-all*/tokens.bin")
    flip(tokens, 100)  # a damaged token file is made again, from the current text
    with pytest.raises(ValueError, match=r"the tokens of .*text\.txt are not those that .*tiny began with"):
        distill(recipe, resume=True)
    shutil.rmtree(tmp_path / "data")
    text.write_text("A short text. " * 200)
    distill(recipe, resume=True)


def test_a_runs_recipe_is_not_resumed_in_another_place(tmp_path, monkeypatch, capsys):
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: mine\noutput: runs\nmatch: {tokens: 65536}\n")
    (run / "metrics.jsonl").touch()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert main(["distill", "../runs/mine/recipe.yaml", "--resume"]) == 1
    assert f"To continue it, give --output {tmp_path / 'runs'}" in capsys.readouterr().err
    assert not (tmp_path / "other" / "runs").exists()


def test_a_run_stopped_by_the_clock_resumes(tmp_path, whole):
    recipe = tiny_recipe(tmp_path)
    run = distill(recipe, max_minutes=0)
    assert (run / "align" / "unfinished.json").is_file() and not (run / "match").exists()
    AutoModelForCausalLM.from_pretrained(run / "align")
    distill(recipe, resume=True)
    assert not (run / "align" / "unfinished.json").exists()
    assert_same_weights(run, whole, "match")


def test_no_validation_of_other_text_is_the_best(tmp_path, capsys):
    recipe = tiny_recipe(tmp_path)
    die_in_step(recipe, 5)
    saved = checkpoint.checkpoints(recipe.folder, "align")[-1] / "progress.json"
    before = json.loads(saved.read_text())
    assert before["judge"] == "128 tokens in sequences of 32" and before["best_step"] == 4
    changed = replace(recipe, run=replace(recipe.run, heldout_tokens=64, eval_every=100))
    distill(changed, resume=True, max_minutes=0)
    assert "validation text changed from 128 tokens" in " ".join(capsys.readouterr().out.split())
    after = json.loads((checkpoint.checkpoints(recipe.folder, "align")[-1] / "progress.json").read_text())
    assert after["judge"] == "64 tokens in sequences of 32" and after["best_step"] == after["step"] > 4


def test_stages_can_be_trained_one_by_one(tmp_path, whole):
    recipe = tiny_recipe(tmp_path)
    with pytest.raises(ValueError, match=r"stages=\('match',\) leaves out align, which comes before"):
        distill(recipe, stages=("match",))
    with pytest.raises(ValueError, match=r"has mtach; the stages are align, match, extend"):
        distill(recipe, stages=("mtach",))
    run = distill(recipe, stages=("align",))
    assert not (run / "match").exists()
    for partial in ("match-0000001.unfinished", "match-0000001.damaged"):  # what a killed run leaves
        (run / "checkpoints" / partial).mkdir(parents=True)
    distill(recipe, stages=("match",), resume=True)
    assert_same_weights(run, whole, "match")
    assert not list((run / "checkpoints").glob("match-*.*"))


def test_a_stage_stopped_by_the_clock_is_never_taken_for_done(tmp_path, monkeypatch, whole):
    recipe, replace_folder = tiny_recipe(tmp_path), checkpoint.replace_folder

    def dies_after(unfinished, folder):
        replace_folder(unfinished, folder)
        if folder.name == "align":
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "replace_folder", dies_after)
    with pytest.raises(KeyboardInterrupt):
        distill(recipe, max_minutes=0)
    monkeypatch.undo()
    assert_same_weights(distill(recipe, resume=True), whole, "match")


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


def test_learning_rates_may_change_when_resuming_and_nothing_else(tmp_path, capsys):
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
    assert "align.lr_mixers: 0.001 before, 0.0002 from now on" in said
    assert "align.max_grad_norm: 1.0 before, 0.7 from now on" in said
    rates = [record["lr_mixers"] for record in records(run) if record["stage"] == "align" and record["step"]]
    assert rates[:2] == [1e-3, 2e-4] and 1e-4 < rates[-1] < rates[-2] < 2e-4
    assert load_recipe(run / "recipe.yaml").align.lr_mixers == 2e-4


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    recipe = tiny_recipe(tmp_path)
    with sole_writer(recipe.folder / ".run.lock", ""), pytest.raises(ValueError, match="Another process trains in"):
        distill(recipe)
    assert not (recipe.folder / "recipe.yaml").exists()


def test_data_weights_may_not_change_when_resuming(tmp_path):
    recipe = tiny_recipe(tmp_path, match=Stage())
    weighted = replace(recipe, align=replace(recipe.align, data_weights=dict(recipe.data.train)))
    distill(weighted, max_minutes=0)
    with pytest.raises(ValueError, match=r"align\.data_weights: \{.*\} then, None now\)"):
        distill(recipe, resume=True)


def test_another_precision_when_resuming_is_logged(tmp_path, capsys):
    recipe = tiny_recipe(tmp_path, match=Stage())
    distill(recipe, max_minutes=0)
    run = replace(recipe.run, precision="bf16")
    distill(replace(recipe, run=run), max_minutes=0, resume=True)
    assert "warning: the run was on cpu in fp32 and continues on cpu in bf16" in capsys.readouterr().out
    distill(replace(recipe, run=run), resume=True)
    assert "warning" not in capsys.readouterr().out


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
        return {name: x * float("nan") for name, x in losses.items()} if len(calls) == 6 else losses

    recipe = tiny_recipe(tmp_path)
    monkeypatch.setattr(trainer, "align_step", poisoned)
    with pytest.raises(FloatingPointError, match=r"align, step 5.*align-0000004.*--resume --align.lr_mixers 0\.0005"):
        distill(recipe)
    monkeypatch.undo()
    run = distill(replace(recipe, align=replace(recipe.align, lr_mixers=5e-4)), resume=True)
    assert (run / "match" / "config.json").is_file()


def test_a_resumed_run_keeps_the_order_of_its_sources():
    assert same({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.0}) and same(None, None)
    assert not same({"a": 1.0, "b": 2.0}, {"b": 2.0, "a": 1.0}) and not same(None, {"a": 1.0})

"""Recipes that are fitted to a time."""

from dataclasses import replace

import pytest
import torch
from helpers import records, tiny_recipe

from deltify.config import Recipe, RunSpec, Stage, StudentSpec, load_recipe
from deltify.training import fit as fitting
from deltify.training.fit import (
    FEWEST_STEPS,
    LEAST_CALIBRATION,
    LEAST_VALIDATION,
    MOST_GROWTH,
    Speed,
    fit,
    fit_to_time,
    measure_speed,
    per_sequence,
    run_seconds,
    take_numbers,
)
from deltify.training.metrics import read_stages
from deltify.training.runner import distill
from deltify.training.teachers import open_teacher

RECIPE = Recipe(
    name="r",
    student=StudentSpec(calibration_tokens=8192),
    align=Stage(tokens=24 * 8 * 256, sequence_length=256, batch_size=8),
    match=Stage(tokens=12 * 8 * 256, sequence_length=256, batch_size=8, micro_batch_size=8),
    run=RunSpec(heldout_tokens=8192, heldout_sequence_length=256, eval_every=24),
)


def machine(tokens_per_second: float) -> Speed:
    """Return the speed of a machine that reads as many validation tokens per second, as teacher and student."""
    second = 1 / tokens_per_second
    return Speed(5.0, second, {"align": second, "match": 2 * second})


@pytest.mark.parametrize("speed", [40, 100, 300, 1_000, 30_000])
def test_a_run_takes_the_time_it_is_fitted_to(speed):
    fitted = fit(RECIPE, machine(speed), 600)
    assert run_seconds(fitted, machine(speed)) == pytest.approx(600, rel=0.15) or speed == 30_000
    for name in ("align", "match"):
        assert fitted.stage(name).steps >= FEWEST_STEPS
        assert fitted.stage(name).steps * 256 * fitted.stage(name).batch_size == fitted.stage(name).tokens
        assert fitted.stage(name).tokens <= MOST_GROWTH * RECIPE.stage(name).tokens
    assert LEAST_CALIBRATION <= fitted.student.calibration_tokens <= 8192
    assert LEAST_VALIDATION <= fitted.run.heldout_tokens <= 8192


def test_a_slow_machine_gets_less_of_everything_and_smaller_batches():
    fitted = fit(RECIPE, machine(20), 600)
    assert fitted.student.calibration_tokens < 8192 and fitted.run.heldout_tokens < 8192
    assert fitted.match.batch_size < 8 and fitted.match.batch_size % fitted.match.micro_batch_size == 0
    assert fitted.run.eval_every == 24
    assert fitted.match.lr_mixers == pytest.approx(RECIPE.match.lr_mixers * (fitted.match.batch_size / 8) ** 0.5)


def test_numbers_that_were_given_stay_and_the_others_fit_the_time(speed=300):
    fitted = fit(RECIPE, machine(20), 600, {"match.batch_size", "match.lr_mixers"})
    assert fitted.match.batch_size == 8 and fitted.match.lr_mixers == RECIPE.match.lr_mixers
    assert fitted.match.tokens == fitted.match.steps * 8 * 256 < RECIPE.match.tokens
    fitted = fit(RECIPE, machine(speed), 600, {"match.tokens", "run.heldout_tokens"})
    assert fitted.match == RECIPE.match and fitted.run.heldout_tokens == RECIPE.run.heldout_tokens
    assert run_seconds(fitted, machine(speed)) == pytest.approx(600, rel=0.15)
    assert fit(RECIPE, machine(20), 600, {"align.tokens", "match.tokens"}).match == RECIPE.match


def test_every_stage_trains_on_a_machine_that_is_too_slow():
    fitted = fit(RECIPE, machine(1), 600)
    assert (fitted.align.steps, fitted.align.batch_size) == (2, 1)
    assert (fitted.match.steps, fitted.match.batch_size) == (2, 1)
    assert (fitted.student.calibration_tokens, fitted.run.heldout_tokens) == (LEAST_CALIBRATION, LEAST_VALIDATION)


def test_a_fast_machine_trains_more_up_to_a_limit():
    fitted = fit(RECIPE, machine(1e6), 600)
    assert fitted.align.steps == MOST_GROWTH * 24 and fitted.match.steps == MOST_GROWTH * 12
    assert fitted.run.eval_every == MOST_GROWTH * 24
    assert fitted.student == RECIPE.student and fitted.run.heldout_tokens == 8192


def test_numbers_that_are_small_already_stay():
    small = replace(RECIPE, student=StudentSpec(calibration_tokens=100, calibration_sequence_length=50))
    small = replace(small, run=replace(small.run, heldout_tokens=300))
    fitted = fit(small, machine(1), 60)
    assert fitted.student.calibration_tokens == 100 and fitted.run.heldout_tokens == 300


def test_a_batch_is_timed_where_that_takes_little_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(fitting.time, "monotonic", lambda: now[0])

    def worker(seconds_per_sequence, first):
        def make(sequences):
            def work(step):
                now[0] += seconds_per_sequence * sequences + (first if step == 0 else 0)

            return work

        return make

    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert per_sequence(worker(2.0, 0.5), 8, cpu) == pytest.approx(2.5)  # a slow CPU measures a single sequence
    assert now[0] == pytest.approx(2.5)
    assert per_sequence(worker(0.1, 0.5), 8, cpu) == pytest.approx(0.1)
    assert per_sequence(worker(0.1, 90), 8, gpu) == pytest.approx(0.1)  # its first call compiles kernels


def test_a_fitted_run_trains_all_stages_and_resumes_with_its_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fitting, "measure_speed", lambda _: Speed(0.1, 1e-3, {"align": 2e-3, "match": 4e-3}))
    recipe = tiny_recipe(tmp_path)
    fitted = fit_to_time(recipe, 0.03)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("This machine trains"))
    steps = fitted.align.steps
    assert f"align 8 steps -> {steps}" in line and ("batches of" in line) == (fitted.align.batch_size != 2)
    assert steps != 8 and replace(take_numbers(fitted, recipe), run=recipe.run) == recipe  # nothing else has changed
    run = distill(fitted, max_minutes=0)
    assert load_recipe(run / "recipe.yaml") == fitted
    changed = fit_to_time(replace(recipe, match=replace(recipe.match, lr_mixers=1e-5)), 5, ["match.lr_mixers"])
    assert changed.match == replace(fitted.match, lr_mixers=1e-5) and changed.align == fitted.align
    again = fit_to_time(recipe, 5)  # on a machine that is as fast, it would be other numbers
    assert again == fitted and "This machine" not in capsys.readouterr().out
    distill(again, resume=True)
    assert [stage for stage, _ in read_stages(run)] == ["converted", "align", "match"]
    assert records(run)[-1]["step"] == fitted.match.steps


def test_the_time_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="--fit-minutes 0 must be above 0"):
        fit_to_time(tiny_recipe(tmp_path), 0)


def test_several_processes_do_not_each_fit_their_own_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="speed of one process, but there are 2"):
        fit_to_time(tiny_recipe(tmp_path), 1.0)


def assert_same_weights_as_new(teacher, recipe):
    """Timing match after align must not train weights that align shared with the teacher."""
    new = open_teacher(recipe, torch.device("cpu"), torch.float32).model.state_dict()
    assert all(torch.equal(value, new[name]) for name, value in teacher.model.state_dict().items())


@pytest.mark.parametrize("layers", ["1:1", "measured:1"])
def test_the_speed_of_any_student_is_measured(tmp_path, layers, monkeypatch):
    teachers = []

    def opened(*arguments):
        teachers.append(open_teacher(*arguments))
        return teachers[0]

    monkeypatch.setattr(fitting, "open_teacher", opened)
    recipe = tiny_recipe(tmp_path, student=StudentSpec(full_attention_layers=layers, calibration_tokens=256))
    speed = measure_speed(recipe)
    assert_same_weights_as_new(teachers[0], recipe)
    assert set(speed.training) == {"align", "match"} and min(speed.validation, *speed.training.values()) > 0
    assert not (tmp_path / "tiny").exists()  # it writes no run

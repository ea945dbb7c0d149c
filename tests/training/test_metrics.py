"""Trackers: what a run and a resumed run send to wandb, trackio and tensorboard."""

import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers import die_in_step, records, tiny_recipe

from deltify import distill
from deltify.config import Recipe
from deltify.training.metrics import Metrics, by_stage, read_stages
from deltify.training.trackers import Table, picture_of_recall


class Tracker:
    """Replaces the modules wandb and trackio, and records what was opened, logged and finished."""

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

    def Table(self, columns, data):
        return columns, data

    def Image(self, picture):
        return picture.shape


def interrupted(recipe: Recipe) -> None:
    """Run a recipe that dies in the sixth step of align, one step after a checkpoint, and resume it."""
    die_in_step(recipe, 5)
    distill(recipe, resume=True)


@pytest.mark.parametrize("name, key, known", [("wandb", "id", "id-1"), ("trackio", "name", "tiny@1")])
def test_a_resumed_run_continues_its_trackers_run(name, key, known, tmp_path, monkeypatch):
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
    shutil.rmtree(recipe.folder)  # a new run of that name is a new run of the tracker
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

        add_text = add_scalar

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
    scores = ("tokens", "heldout_kl", "heldout_perplexity", "validation_seconds")
    assert logged[0][1].keys() == {*(f"converted/{score}" for score in scores), "samples"}
    assert "align/loss" in logged[8][1] and "match/lr_other" in logged[9][1]


def test_validations_send_a_table_of_samples_and_a_picture_of_the_recall_curve(tmp_path, monkeypatch):
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    recipe = tiny_recipe(tmp_path)
    recipe.folder.mkdir(parents=True)
    curve = {"recall": -3.0, "recall_logprob_128": -2.0, "recall_logprob_256": -4.0}
    with Metrics(replace(recipe, run=replace(recipe.run, report_to="trackio"))) as metrics:
        metrics.write("converted", 0, [{"prompt": "a", "continuation": "b"}], tokens=0, **curve)
        metrics.write("align", 1, tokens=64, loss=1.0)
    (_, validated), (_, plain) = tracker.logged
    assert validated["samples"] == (["stage", "prompt", "continuation"], [["converted", "a", "b"]])
    assert validated["recall_curve"] == (480, 720, 3) and plain == {"align/tokens": 64, "align/loss": 1.0}
    assert [sorted(record) for record in records(recipe.folder)][1] == ["loss", "stage", "step", "time", "tokens"]
    pictures = [picture_of_recall([{"stage": "align", "tokens": 9} | curve] * count) for count in (1, 20)]
    assert all(picture.std() > 0 for picture in pictures) and (pictures[0] != pictures[1]).any()


def test_a_table_in_markdown_keeps_its_rows():
    table = Table(("prompt", "continuation"), [["a\nb", "c | d"]])
    assert table.markdown() == "| prompt | continuation |\n| --- | --- |\n| a b | c \\| d |"


def test_tokens_of_stages_count_from_the_start_of_the_run(tmp_path):
    lines = [{"stage": stage, "tokens": tokens} for stage, tokens in (("match", 5), ("align", 10), ("align", 20))]
    assert by_stage(lines) == {"align": lines[1:], "match": [{"stage": "match", "tokens": 25}]}
    with pytest.raises(FileNotFoundError, match=r"has no metrics\.jsonl"):
        read_stages(tmp_path)

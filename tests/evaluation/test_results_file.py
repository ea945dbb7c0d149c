"""results.json: what a second evaluation keeps of the first."""

import json

import pytest
import torch

from deltify.evaluation.comparison import run_again
from deltify.evaluation.report import combine
from deltify.evaluation.results_file import Results

WEIGHTS = {"teacher": "a", "match": "b"}
HAYSTACK = {"source": "books"}


def row(model, task=None, length=None, **more):
    return {"model": model, "task": task, "length": length, **more}


@pytest.fixture
def path(tmp_path, monkeypatch):
    """results.json of an evaluation with two tasks, needles and decoding."""
    path = tmp_path / "results.json"
    first = open_results(path, monkeypatch, "deltify evaluate run --all")
    first.add(scores=[{"name": "match", "kl": 1.0}], samples={"match": ["Once"]})
    models = ("teacher", "match", "teacher, window 64")
    first.add(benchmarks=[row(model, task, items=4) for model in models for task in ("piqa", "arc_easy")])
    first.add(settings={"needles": HAYSTACK})
    first.add(needles=[row(model, "niah_single_1", 1024, score=0.5) for model in models], needle_rows=[])
    first.add(decode=[row("match", context=64)])
    return path


def open_results(path, monkeypatch, command, weights=None):
    monkeypatch.setattr("sys.argv", command.split())
    return Results(path, "T", ["run"], 512, weights or WEIGHTS, torch.device("cpu"), torch.float32)


def test_a_second_evaluation_adds_to_the_first_and_replaces_what_it_repeats(path, monkeypatch):
    second = open_results(path, monkeypatch, "deltify evaluate run --more")
    second.add(scores=[{"name": "match", "kl": 0.9}])
    content = json.loads(path.read_text())
    assert content["scores"] == [{"name": "match", "kl": 0.9}] and content["samples"] == {"match": ["Once"]}
    assert len(content["benchmarks"]) == 6 and content["decode"] == [row("match", context=64)]
    assert content["command"] == "deltify evaluate run --all\ndeltify evaluate run --more"
    assert run_again(content, "match", "--x") == "deltify evaluate run --more --x"

    second.add(benchmarks=[row("teacher", "piqa", items=8)])  # piqa is measured again, on more items
    content = json.loads(path.read_text())
    assert [(r["model"], r["task"], r["items"]) for r in content["benchmarks"]] == [
        ("teacher", "piqa", 8),
        *((model, "arc_easy", 4) for model in ("teacher", "match", "teacher, window 64")),
    ]
    second.content["settings"] = {"needles": HAYSTACK}
    new = [row("teacher", "niah_single_1", length, score=1.0) for length in (4096, 1024)]
    second.add(needles=new, needle_rows=[])  # stopped before the student: its row stays
    kept = json.loads(path.read_text())["needles"]
    assert [(r["model"], r["length"], r["score"]) for r in kept] == [
        ("teacher", 4096, 1.0),
        ("teacher", 1024, 1.0),
        ("match", 1024, 0.5),
        ("teacher, window 64", 1024, 0.5),
    ]
    second.add(decode=[row("match", context=256)])
    assert [r["context"] for r in json.loads(path.read_text())["decode"]] == [256, 64]


def test_measures_of_another_text_are_not_kept_and_a_measure_that_has_just_begun_changes_nothing(path, monkeypatch):
    second = open_results(path, monkeypatch, "deltify evaluate run")
    second.content["settings"] = {"needles": {"source": "code"}}
    second.add(samples={})
    content = json.loads(path.read_text())
    assert content["settings"] == {"needles": HAYSTACK} and len(content["needles"]) == 3
    second.add(needles=[row("match", "niah_single_1", 4096, score=1.0)], needle_rows=[])
    content = json.loads(path.read_text())
    assert [r["length"] for r in content["needles"]] == [4096] and len(content["benchmarks"]) == 6
    assert content["settings"] == {"needles": {"source": "code"}}


@pytest.mark.parametrize(
    "changes, weights, why",
    [
        ({}, {"teacher": "a", "match": "c"}, "was measured with other weights"),
        ({}, {"teacher": "a", "run": "b"}, "has other names of the models (teacher, match; now teacher, run)"),
        ({"versions": {}}, WEIGHTS, "was measured with other versions of python and"),
        ({"dtype": "bfloat16", "device": "H200"}, WEIGHTS, "was measured with another device and dtype"),
        ({"weights": None}, WEIGHTS, "does not say which weights were measured"),
        (None, WEIGHTS, "cannot be read ("),
    ],
)
def test_results_that_do_not_fit_are_renamed_with_the_first_new_measure(
    changes, weights, why, path, monkeypatch, capsys
):
    if changes is None:
        path.write_text("{")
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    before = path.read_text()
    old = path.with_name("results.json.old")
    old.write_text("older")
    second = open_results(path, monkeypatch, "deltify evaluate run", weights)
    assert path.read_text() == before and not capsys.readouterr().out
    second.add(scores=[])
    told = " ".join(capsys.readouterr().out.split())
    assert f"results.json {why}" in told and "It is results.json.old1 now" in told
    assert old.read_text() == "older" and path.with_name("results.json.old1").read_text() == before
    assert not {"benchmarks", "needles", "decode", "samples"} & set(json.loads(path.read_text()))


def test_a_version_of_lm_eval_is_about_benchmarks_alone(path, monkeypatch):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"versions": content["versions"] | {"lm_eval": "0.0"}}))
    second = open_results(path, monkeypatch, "deltify evaluate run")
    second.add(samples={})
    assert len(json.loads(path.read_text())["benchmarks"]) == 6
    second.add(benchmarks=[row("match", "piqa", items=4)])
    content = json.loads(path.read_text())
    assert len(content["benchmarks"]) == 1 and content["decode"]


def test_a_common_report_refuses_a_model_that_was_trained_between_its_evaluations(path, monkeypatch, tmp_path):
    for name, weights in (("first", WEIGHTS), ("second", WEIGHTS | {"match": "c"})):
        (tmp_path / name).mkdir()
        open_results(tmp_path / name / "results.json", monkeypatch, "x", weights).add(scores=[{"name": "match"}])
    folders = [tmp_path / "first", tmp_path / "second"]
    with pytest.raises(ValueError, match="match has other weights in one evaluation than in another"):
        combine(folders, tmp_path / "all")
    for folder, run in zip(folders, ("runs/a", "runs/b")):  # stages of two runs
        content = json.loads((folder / "results.json").read_text())
        (folder / "results.json").write_text(json.dumps(content | {"runs": [run]}))
    with pytest.raises(ValueError, match=r"both have a model called 'match'\. Evaluate each with --no-stages"):
        combine(folders, tmp_path / "all")


def test_evaluations_that_do_not_know_the_hash_of_their_text_are_reported_together(path, monkeypatch, tmp_path):
    for name, settings in (("first", {"source": "books"}), ("second", {"source": "books", "text": "abc"})):
        (tmp_path / name).mkdir()
        content = json.loads(path.read_text()) | {"settings": {"needles": settings}}
        (tmp_path / name / "results.json").write_text(json.dumps(content))
    assert (combine([tmp_path / "first", tmp_path / "second"], tmp_path / "all") / "results.json").is_file()

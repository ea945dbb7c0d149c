"""results.json: what a second evaluation keeps of the first."""

import json

import pytest
import torch

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

    second.add(benchmarks=[row("teacher", "piqa", items=8)])  # piqa is measured again, on more items
    content = json.loads(path.read_text())
    assert [(r["model"], r["task"], r["items"]) for r in content["benchmarks"]] == [
        ("teacher", "piqa", 8),
        *((model, "arc_easy", 4) for model in ("teacher", "match", "teacher, window 64")),
    ]
    second.add(settings={"needles": HAYSTACK})
    second.add(needles=[row("teacher", "niah_single_1", 4096, score=1.0)])
    assert [r["length"] for r in json.loads(path.read_text())["needles"]] == [4096, 1024, 1024, 1024]


def test_measures_of_other_weights_or_of_another_text_are_not_kept(path, monkeypatch, capsys):
    second = open_results(path, monkeypatch, "deltify evaluate run")
    second.add(settings={"needles": {"source": "code"}})
    second.add(needles=[row("match", "niah_single_1", 4096, score=1.0)])
    content = json.loads(path.read_text())
    assert [r["length"] for r in content["needles"]] == [4096] and len(content["benchmarks"]) == 6
    assert content["settings"] == {"needles": {"source": "code"}} and "needle_rows" not in content

    third = open_results(path, monkeypatch, "deltify evaluate run", WEIGHTS | {"match": "c"})
    assert "weights differ" in capsys.readouterr().out
    third.add(scores=[])
    assert not {"benchmarks", "needles", "decode", "samples"} & set(json.loads(path.read_text()))

"""Two processes under torchrun share an evaluation, and its files are those of one process."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
from filelock import FileLock
from helpers import tiny_recipe
from measures import measure
from processes import run_under_torchrun

from deltify import distill, evaluate
from deltify.cli import main
from deltify.config import Stage
from deltify.training import distributed
from deltify.utils.files import read_jsonl

FILES = ("items/teacher/arc_easy.jsonl", "items/match/arc_easy.jsonl", "needles.jsonl", "recall.jsonl", "own.jsonl")
WORDS = "bee cat dog fig hat jam key map net owl pen rat sun tin urn van web yak".split()
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return distill(tiny_recipe(tmp_path_factory.mktemp("runs"), align=Stage()))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eleven questions of different lengths in the format of ARC, and text, as JSON lines."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {
            "id": str(i),
            "question": f"What is {i} and {i}" + " and nothing" * (i % 3) + "?",
            "choices": {"text": [str(2 * i + shift) for shift in range(4)], "label": list("ABCD")},
            "answerKey": "ABCD"[i % 4],
        }
        for i in range(11)
    ]
    for split in ("train", "test"):
        (folder / f"arc_easy_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rng = random.Random(0)
    texts = [" ".join(f"The {rng.choice(WORDS)} has a {rng.choice(WORDS)}." for _ in range(120)) for _ in range(20)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def results(folder: Path) -> dict:
    """Return results.json without what differs from run to run."""
    content = json.loads((folder / "results.json").read_text())
    content["decode"] = [{k: v for k, v in row.items() if k != "ms_per_token"} for row in content["decode"]]
    return {k: v for k, v in content.items() if k not in ("seconds", "command", "date")}


def half(path: Path, field: str, value: object) -> None:
    """Remove the second half of a file's rows, and mark the others, so that answers that are given again show."""
    rows = read_jsonl(path)
    path.write_text("".join(json.dumps(row | {field: value}) + "\n" for row in rows[: len(rows) // 2]))


def halve(whole: Path, folder: Path) -> Path:
    """Return a copy of an evaluation's folder that was stopped half way, with marks on the answers that it has."""
    shutil.copytree(whole, folder)
    (folder / "own.jsonl").unlink()
    half(folder / "items/match/arc_easy.jsonl", "loglikelihoods", [-1.0, -2.0, -3.0, -4.0])
    half(folder / "needles.jsonl", "answer", "kept")
    half(folder / "recall.jsonl", "task", "kept")
    return folder


def is_resumed(whole: Path, folder: Path) -> None:
    """Check that the marked half was kept, and the other half answered."""
    items = read_jsonl(folder / "items/match/arc_easy.jsonl")
    assert [item["doc"] for item in items] == list(range(11))
    assert [item["loglikelihoods"] == [-1, -2, -3, -4] for item in items] == [True] * 5 + [False] * 6
    for item, want in list(zip(items, read_jsonl(whole / "items/match/arc_easy.jsonl")))[5:]:
        assert item["loglikelihoods"] == pytest.approx(want["loglikelihoods"], abs=1e-4)
    for name, field in (("needles", "answer"), ("recall", "task")):
        rows, wanted = (read_jsonl(path / f"{name}.jsonl") for path in (folder, whole))
        half = len(wanted) // 2
        assert [row[field] == "kept" for row in rows] == [True] * half + [False] * (len(wanted) - half), name
        key = "prompt" if name == "needles" else "probe"
        assert [row[key] for row in rows] == [row[key] for row in wanted]
    for part in ("needles", "recall", "benchmarks"):
        assert len(results(folder)[part]) == len(results(whole)[part])


@pytest.mark.slow
def test_files_are_those_of_one_process_and_resume_on_any_number(run, data, tmp_path):
    one, two = tmp_path / "by_one", tmp_path / "by_two"
    tokens = measure(run, data, one)
    of_one = halve(one, tmp_path / "of_one")
    printed = run_under_torchrun("measures.py", run, data, two, of_one)
    for name in FILES:
        assert (two / name).read_bytes() == (one / name).read_bytes(), name
    assert {path.name for path in two.rglob("*")} == {path.name for path in one.rglob("*")}
    assert results(two) == results(one)
    assert len(read_jsonl(two / "own.jsonl")) == 10
    shares = [int(share) for share in re.findall(r"by_two (\d+)", printed)]
    assert len(shares) == 2 and all(0.3 * tokens < share < 0.7 * tokens for share in shares)
    assert printed.count("match: niah_single_1 at 600 tokens") == 2  # the first process prints, in both evaluations

    is_resumed(one, of_one)
    of_two = halve(two, tmp_path / "of_two")
    assert measure(run, data, of_two) < 0.8 * tokens
    is_resumed(two, of_two)


def test_a_folder_has_one_evaluation_at_a_time(run, tmp_path):
    with FileLock(run / ".evaluation.lock"), pytest.raises(ValueError, match=r"Another evaluation writes .* torchrun"):
        evaluate(run)


def test_other_commands_refuse_to_run_several_times(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["report", "runs/kda"]) == 1
    assert "torchrun started 2 processes, but report runs in one" in capsys.readouterr().err


def test_processes_that_read_other_files_are_stopped(monkeypatch):
    distributed.check_same("models", lambda: 1)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather", lambda own: [own, own])
    distributed.check_same("models", lambda: [1, "a"])
    monkeypatch.setattr(distributed, "all_gather", lambda own: [own, "other"])
    with pytest.raises(ValueError, match=r"The 2 processes have different models\. Give all of them the same files"):
        distributed.check_same("models", lambda: [1, "a"])

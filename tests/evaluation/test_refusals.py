"""What evaluations and reports refuse, because a number would be that of another model, text or measure."""

import json
from pathlib import Path

import pytest
from helpers import small_tokenizer

from deltify.config import DataSpec, Recipe
from deltify.evaluation import runner
from deltify.evaluation.card import card_metadata
from deltify.evaluation.heldout import check_unseen
from deltify.evaluation.report import check_current, check_settings, combine, report
from deltify.evaluation.runner import check_tokenizers


def recipe(train: str, heldout: str | None = None) -> Recipe:
    return Recipe("run", data=DataSpec({train: 1.0}, heldout))


def test_text_that_a_run_was_trained_on_is_not_scored(tmp_path):
    a, b = (str(tmp_path / name) for name in ("a.txt", "b.txt"))
    for path in (a, b):
        Path(path).write_text("A text.")
    check_unseen({"one": recipe(a, b)}, None)
    check_unseen({"one": recipe(a), "two": recipe(a)}, None)  # both hold back the same documents
    with pytest.raises(ValueError, match=r"two was trained on text of .*b\.txt, which would be scored as held out"):
        check_unseen({"one": recipe(a, b), "two": recipe(b)}, None)
    with pytest.raises(ValueError, match=r"one was trained on text of .*a\.txt"):
        check_unseen({"one": recipe(f"recall:{a}")}, a)
    with pytest.raises(ValueError, match="two was trained on"):
        check_unseen({"one": recipe(a), "two": recipe(a, b)}, None)


def test_models_with_different_tokenizers_are_not_compared(monkeypatch):
    own, other = small_tokenizer(), small_tokenizer()
    other.add_tokens(["hat and"])
    known = {"a": own, "b": other}
    monkeypatch.setattr(runner, "load_tokenizer", lambda folder: known[folder])
    check_tokenizers(own, "the teacher", {"one": ("a", True)})
    with pytest.raises(ValueError, match=r"two \(b\) has another tokenizer than the teacher"):
        check_tokenizers(own, "the teacher", {"one": ("a", True), "two": ("b", True)})


def test_a_report_of_a_run_that_was_trained_further_is_refused(whole):
    trained = 2 * 8 * 2 * 32
    rows = [{"name": "teacher", "tokens": 0}, {"name": "match", "tokens": trained}]
    check_current(whole, {"scores": rows, "students": [{"name": "match", "tokens": trained}]})
    with pytest.raises(ValueError, match=r"match had been trained on 64 tokens\. Now it has 1,024\. Run: deltify eval"):
        check_current(whole, {"scores": [{"name": "match", "tokens": 64}]})
    with pytest.raises(ValueError, match=f"{whole.name} had been trained on 64 tokens"):
        check_current(whole, {"students": [{"name": whole.name, "tokens": 64}]})


def test_common_reports_have_one_text_and_one_number_of_items_for_a_measure(tmp_path):
    books = {"settings": {"positions": {"source": "a.txt", "tokens": 4096}}}
    check_settings([books, {}, books])
    with pytest.raises(ValueError, match=r"differ in the settings of positions: .*a\.txt.* and .*b\.txt"):
        check_settings([books, {"settings": {"positions": {"source": "b.txt", "tokens": 4096}}}])
    parts = [{"benchmarks": [{"task": "arc_easy", "items": items}]} for items in (100, 2376)]
    with pytest.raises(ValueError, match="arc_easy was measured on 100 and on 2,376 items"):
        check_settings(parts)
    (tmp_path / "results.json").write_text(json.dumps({"teacher": "t"}))
    with pytest.raises(ValueError, match="is one of the evaluations"):
        combine([tmp_path], tmp_path / ".")
    with pytest.raises(FileNotFoundError, match="has no results"):
        report(tmp_path / "absent")


@pytest.mark.parametrize("stage, scores", [("match", ["value: 0.366"]), ("align", [])])
def test_a_card_has_the_benchmarks_of_its_own_stage(stage, scores, whole):
    rows = [
        {"model": name, "task": "hellaswag", "metric": "acc_norm", "value": value}
        for name, value in (("teacher", 0.52), (whole.name, 0.366))
    ]
    card = card_metadata(whole, stage, {"runs": [], "benchmarks": rows}, {})
    assert [line.strip() for line in card.splitlines() if "value:" in line] == scores


def test_a_run_called_teacher_does_not_get_the_teachers_scores():
    row = {"model": "teacher", "task": "hellaswag", "metric": "acc_norm", "value": 0.52}
    assert "0.52" not in card_metadata(Path("runs/teacher"), "match", {"runs": [], "benchmarks": [row]}, {})

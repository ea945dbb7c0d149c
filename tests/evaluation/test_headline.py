"""The three numbers of the first screen, and the verdict that follows from them."""

import re
from pathlib import Path

import pytest

from deltify.evaluation.comparison import CONTEXT, FOUND, Absent, decoding_cost, needles_found, share_kept
from deltify.evaluation.headline import FAR, FAST, HEAVY, KEPT, LEAN, NEAR, SLOW, WIDEST, headline, headlines

COMMAND = "deltify evaluate runs/tiny --contexts 256"


def score(model, task, value, ratio=None, *, chance=0.25, items=1000, main=True):
    """Return a row of benchmarks, as `compare_with_teacher` makes it."""
    row = {"model": model, "task": task, "metric": "acc", "value": value, "chance": chance, "items": items}
    return row | {"main": main, **({} if model == "teacher" else {"ratio_above_chance": ratio})}


def needle(model, length, found, *, task="niah_single_1", items=16):
    return {"model": model, "task": task, "length": length, "score": found, "stderr": 0.1, "items": items}


def decoded(model, context, mib, ms, device="cpu"):
    row = {"model": model, "context": context, "cache_bytes": int(mib * 2**20), "ms_per_token": ms}
    return row | {"device": device, "dtype": "float32"}


def results(**measured) -> dict:
    """Return the contents of results.json with one student."""
    students = [{"name": "tiny", "layers": "2 layers of KDA", "parameters": 1000, "tokens": 64}]
    return {"students": students, "runs": ["runs/tiny"], "command": COMMAND} | measured


GOOD = {
    "benchmarks": [score("teacher", "arc_easy", 0.65), score("tiny", "arc_easy", 0.63, [0.95, 0.9, 1.0])],
    "needles": [needle(model, length, 1.0) for model in ("teacher", "tiny") for length in (1024, 4096)],
    "decode": [decoded("teacher", CONTEXT, 100, 10), decoded("tiny", CONTEXT, 1, 5)],
}


# ---- the share of the teacher that is kept ---------------------------------------------------------------------------


def test_the_share_kept_is_that_of_all_points_above_chance():
    rows = [score("teacher", "easy", 0.65), score("tiny", "easy", 0.45, [0.5, 0.4, 0.6])]
    rows += [score("teacher", "pairs", 0.6, chance=0.5), score("tiny", "pairs", 0.6, [1.0, 0.8, 1.2], chance=0.5)]
    kept = share_kept(results(benchmarks=rows), "tiny")
    assert kept.share == pytest.approx((0.2 + 0.1) / (0.4 + 0.1))
    assert {task: pytest.approx(points) for task, points in kept.points.items()} == {
        "easy": (0.2, 0.4),
        "pairs": (0.1, 0.1),
    }
    half = ((0.8 * 0.1) ** 2 + (0.2 * 0.2) ** 2) ** 0.5  # weights of the tasks times half of their intervals
    assert kept.interval == pytest.approx((0.6 - half, 0.6 + half))
    assert kept.left_out == {}


def test_a_student_at_chance_keeps_nothing_whatever_its_score():
    rows = [score("teacher", "pairs", 0.6, chance=0.5), score("tiny", "pairs", 0.5, [0.0, -0.1, 0.1], chance=0.5)]
    shown = headline(results(benchmarks=rows), "tiny").cards[0]
    assert (shown.value, shown.grade) == ("0 %", "poor") and "little or nothing" in shown.sentence


def test_tasks_with_the_teacher_at_chance_do_not_count_and_are_named():
    rows = [score("teacher", "easy", 0.65), score("tiny", "easy", 0.61, [0.9, 0.85, 0.95])]
    rows += [score("teacher", "hard", 0.251), score("tiny", "hard", 0.9, None)]
    rows += [score("teacher", "other", 0.65, items=500), score("tiny", "other", 0.65, [1.0, 0.9, 1.1])]
    rows += [score("tiny", "easy", 0.3, None, main=False)]
    kept = share_kept(results(benchmarks=rows), "tiny")
    assert kept.share == pytest.approx(0.9) and list(kept.points) == ["easy"]
    note = headline(results(benchmarks=rows), "tiny").cards[0].note
    assert "in easy. 95 % interval: 85 to 95 %" in note
    assert "Not counted: the teacher is not clearly above chance in hard; the teacher was measured with other" in note

    absent = share_kept(results(benchmarks=rows[2:4]), "tiny")
    assert absent.why.startswith("No task counts: the teacher is not clearly above chance in hard.")


def test_free_answers_have_a_chance_of_zero():
    rows = [score("teacher", "gsm8k", 0.5, chance=None), score("tiny", "gsm8k", 0.4, [0.8, 0.7, 0.9], chance=None)]
    assert share_kept(results(benchmarks=rows), "tiny").share == pytest.approx(0.8)


def test_a_share_from_few_items_has_no_grade():
    rows = [score("teacher", "easy", 0.75, items=8), score("tiny", "easy", 0.75, [1.0, 0.5, 1.8], items=8)]
    card = headline(results(benchmarks=rows), "tiny").cards[0]
    assert (card.value, card.grade, card.sentence) == ("100 %", "", "Measured with too few items to be sure.")


def test_benchmarks_that_stopped_early_or_had_no_teacher_give_no_share():
    early = [{k: v for k, v in row.items() if "ratio" not in k and k != "main"} for row in GOOD["benchmarks"]]
    assert share_kept(results(benchmarks=early), "tiny") == Absent(
        "The benchmarks did not run to their end. Run:", COMMAND
    )
    alone = share_kept(results(benchmarks=early[1:]), "tiny")
    assert alone.why.startswith("The teacher was not measured") and alone.command == f"{COMMAND} --teacher TEACHER"
    assert share_kept(results(benchmarks=early[1:], teacher="a"), "tiny").command == ""  # it has one


# ---- memory and speed ------------------------------------------------------------------------------------------------


def test_memory_and_speed_are_those_at_32k_or_at_the_longest_common_context():
    rows = [decoded("teacher", c, c / 1024, 20) for c in (1024, CONTEXT, 2 * CONTEXT)]
    rows += [decoded("tiny", c, 4, 10) for c in (1024, CONTEXT, 2 * CONTEXT)]
    cost = decoding_cost(results(decode=rows), "tiny")
    assert (cost.context, cost.memory, cost.speed) == (CONTEXT, 4 / 32, 2)
    kept = [row for row in rows if row["model"] == "tiny" or row["context"] == 1024]  # the teacher ran out of memory
    card = headline(results(decode=kept), "tiny").cards[1]
    assert card.label == "Memory and speed at 1k tokens of context" and card.grade == "poor"
    assert card.value == "400 % of the memory, 2.0 times the speed"
    assert card.sentence == "Context: 4.0 MiB, the teacher's 1.0 MiB. Time per token: 10.0 ms, the teacher's 20.0 ms."
    small = results(decode=[decoded("teacher", 64, 0.5, 10), decoded("tiny", 64, 0.0625, 0.25)])
    assert "0.062 MiB, the teacher's 0.5 MiB. Time per token: 0.25 ms" in headline(small, "tiny").cards[1].sentence
    assert "no context in common" in decoding_cost(results(decode=[rows[0], rows[4]]), "tiny").why
    assert decoding_cost(results(decode=rows[3:]), "tiny").why.startswith("The teacher was not measured")


@pytest.mark.parametrize(
    "mib, ms, grade",
    [(25, 11, "good"), (26, 10, "fair"), (25, 12, "fair"), (10, 21, "poor"), (100, 1, "poor")],
)
def test_grades_of_memory_and_speed(mib, ms, grade):
    rows = [decoded("teacher", CONTEXT, 100, 10), decoded("tiny", CONTEXT, mib, ms)]
    assert headline(results(decode=rows), "tiny").cards[1].grade == grade


@pytest.mark.parametrize(
    "layers, device, named",
    [("2 layers of KDA", "NVIDIA H200", True), ("2 layers of KDA", "cpu", False)]
    + [("1 layers of KDA, 1 layers of full attention", "NVIDIA H200", False)],
)
def test_a_cuda_graph_is_named_where_it_is_a_part_of_the_speed(layers, device, named):
    rows = [decoded("teacher", CONTEXT, 100, 10, device), decoded("tiny", CONTEXT, 20, 1, device)]
    found = results(decode=rows) | {"students": [{"name": "tiny", "layers": layers}]}
    assert ("CUDA graph" in headline(found, "tiny").cards[1].note) == named


# ---- needles ---------------------------------------------------------------------------------------------------------


def test_the_longest_context_is_that_of_all_needles_in_tasks_that_the_teacher_can_do():
    rows = [needle("teacher", length, found) for length, found in ((1024, 1.0), (4096, 1.0), (16384, 0.0))]
    rows += [needle("tiny", length, found) for length, found in ((1024, 0.75), (4096, 0.95), (16384, 0.5))]
    rows += [needle("tiny", length, 1.0, task="pairs") for length in (1024, 4096, 16384)]
    rows += [needle("teacher", length, 0.8, task="pairs") for length in (1024, 4096, 16384)]
    recall = needles_found(results(needles=rows), "tiny")
    assert (recall.length, recall.teacher_length) == (4096, 4096)
    assert recall.curve == {1024: 0.75, 4096: 0.95, 16384: 0.5}
    assert (recall.tasks, recall.left_out) == (["niah_single_1"], ["pairs"])
    card = headline(results(needles=rows), "tiny").cards[2]
    assert (card.value, card.grade) == ("4k tokens", "good")
    assert card.sentence == "Only 75 % at 1k. The teacher: 4k tokens."  # what the number hides
    assert "Not counted, as the teacher finds too few needles: pairs." in card.note


def test_tasks_count_by_their_samples_and_only_at_lengths_that_all_have():
    rows = [needle("teacher", 1024, 1.0, task=task) for task in ("one", "two")]
    rows += [needle("tiny", 1024, 1.0, task="one", items=30), needle("tiny", 1024, 0.6, task="two", items=10)]
    rows += [needle("tiny", 4096, 1.0, task="one")]
    recall = needles_found(results(needles=rows), "tiny")
    assert recall.curve == {1024: pytest.approx(0.9)} and recall.length == 1024
    assert "No longer texts were measured." in headline(results(needles=rows), "tiny").cards[2].sentence


def test_a_teacher_that_finds_too_few_at_every_length_was_measured():
    scores = {"one": (1.0, 0.7), "two": (0.7, 0.95)}  # each task counts at one length
    rows = [needle("teacher", n, s, task=t) for t, found in scores.items() for n, s in zip((1024, 4096), found)]
    rows += [needle("tiny", length, 0.95, task=task) for length in (1024, 4096) for task in scores]
    recall = needles_found(results(needles=rows), "tiny")
    assert recall.length == 4096 and recall.teacher_length is None and recall.teacher_curve
    shown = headline(results(**GOOD | {"needles": rows}), "tiny")
    assert "the teacher finds less than 90 % of the needles at every length" in shown.cards[2].weakness


def test_a_student_that_finds_no_needle_is_called_so():
    rows = [needle("teacher", length, 1.0) for length in (1024, 4096)]
    rows += [needle("tiny", length, 0.0) for length in (1024, 4096)]
    shown = headline(results(**GOOD | {"needles": rows}), "tiny")
    assert shown.verdict == "This student does not replace its teacher: it finds no needles."
    card = shown.cards[2]
    assert (card.value, card.grade) == ("none", "poor")
    assert card.sentence == "It finds no needles: none of 32. The teacher: 4k tokens."

    alone = headline(results(needles=rows[2:]), "tiny").cards[2]  # without a teacher, too
    assert alone.grade == "poor" and alone.sentence == "It finds no needles: none of 32."
    unable = [row | {"score": 0.0} for row in rows]
    card = headline(results(**GOOD | {"needles": unable}), "tiny").cards[2]
    assert (card.value, card.grade) == ("", "")
    assert headline(results(**GOOD | {"needles": unable}), "tiny").verdict == (
        "No verdict yet: it finds no needles, and the teacher too few."
    )
    assert card.sentence == "It finds no needles: none of 32. No task counts: the teacher finds too few needles."


def test_just_below_the_threshold_is_not_shown_as_the_threshold():
    rows = [needle("teacher", 1024, 1.0), needle("tiny", 1024, 0.899)]
    card = headline(results(needles=rows), "tiny").cards[2]
    assert card.value == "none" and card.sentence.startswith("At most 89 %, at 1k tokens.") and card.grade == "poor"


@pytest.mark.parametrize("reached, grade", [(16384, "good"), (8192, "fair"), (4096, "fair"), (2048, "poor")])
def test_grades_of_needles(reached, grade):
    lengths = (2048, 4096, 8192, 16384)
    rows = [needle("teacher", length, 1.0) for length in lengths]
    rows += [needle("tiny", length, float(length <= reached)) for length in lengths]
    assert headline(results(needles=rows), "tiny").cards[2].grade == grade


# ---- the verdict -----------------------------------------------------------------------------------------------------


def test_the_verdict_follows_from_the_worst_grade():
    assert headline(results(**GOOD), "tiny").verdict == "This student can replace its teacher, as far as was measured."
    slower = GOOD | {"decode": [decoded("teacher", CONTEXT, 100, 10), decoded("tiny", CONTEXT, 40, 12)]}
    assert headline(results(**slower), "tiny").verdict == (
        "This student can replace its teacher, with limits: it needs 40 % of the memory and has 0.83 times the speed."
    )
    missing = {key: value for key, value in slower.items() if key != "benchmarks"}
    assert headline(results(**missing), "tiny").verdict == "No verdict yet: benchmark scores are missing."
    rows = [score("teacher", "easy", 0.65), score("tiny", "easy", 0.45, [0.5, 0.4, 0.6])]
    assert headline(results(benchmarks=rows), "tiny").verdict == (  # a poor grade is enough
        "This student does not replace its teacher: it keeps 50 % of the benchmark scores above chance."
    )


def test_numbers_that_were_not_measured_are_absent_with_the_command_that_adds_them():
    (shown,) = headlines(results())
    assert shown.verdict == (
        "No verdict yet: benchmark scores are missing; memory and speed are missing; needles are missing."
    )
    assert [(card.value, card.grade, card.sentence) for card in shown.cards] == 3 * [("", "", "Not measured. Run:")]
    commands = [card.command for card in shown.cards]
    assert commands[0] == f"{COMMAND} --tasks hellaswag,arc_easy,piqa"  # a new evaluation replaces results.json
    assert "--contexts 1024,8192,32768" in commands[1] and "--needles niah_single_1" in commands[2]
    common = results(command="deltify evaluate a\ndeltify evaluate runs/tiny")
    assert headline(common, "tiny").cards[0].command.startswith("deltify evaluate runs/tiny ... --tasks")


def test_commands_that_add_a_number_are_commands():
    from deltify.cli import make_parser

    parser = make_parser()
    for card in headlines(results())[0].cards:
        options = parser.parse_args(card.command.split()[1:])
        assert options.command == "evaluate" and options.contexts


def test_held_out_text_is_told_but_does_not_decide():
    scores = [{"name": "teacher", "perplexity": 20.0, "top1": 1.0, "kl": 0.0}]
    scores += [{"name": "tiny", "perplexity": 2000.0, "top1": 0.125, "kl": 5.0}]
    shown = headline(results(**GOOD, scores=scores), "tiny")
    assert shown.grade == "good" and "perplexity is 2,000.0 (teacher: 20.0)" in shown.heldout
    assert "the teacher's for 12 % of the tokens. This does not enter the verdict." in shown.heldout


def test_thresholds_are_written_down():
    page = (Path(__file__).parents[2] / "docs/guides/evaluate.md").read_text()
    rows = {cells[0].strip(): cells[1:] for line in page.splitlines() if len(cells := line.strip("|").split("|")) > 3}
    (good, _, _), (fair, _, _), *_ = KEPT
    expected = {
        "share of the scores kept": ([good], [fair]),
        "memory": ([LEAN], [HEAVY]),
        "speed": ([FAST], [SLOW]),
        "longest context with 90 % of the needles, in percent of the teacher's": ([FAR], [NEAR]),
    }
    for name, thresholds in expected.items():
        for cell, values in zip(rows[name], thresholds):
            assert [float(x) for x in re.findall(r"(\d+) %", cell)] == [100 * value for value in values], name
    for value in (FOUND, WIDEST, *(least for least, _, _ in KEPT if least > 0)):
        assert f"{100 * value:.0f} " in page, value
    assert all(words in page for _, words, _ in KEPT)

"""Evaluation of models side by side, and the pages of its report."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
from figures import drawn_by, lines_of
from helpers import tiny_recipe

from deltify import distill, evaluate, report
from deltify.cli import main
from deltify.config import Stage, load_recipe, write_recipe
from deltify.conversion.teacher import random_teacher
from deltify.evaluation.benchmarks import main_metric, run_benchmarks
from deltify.evaluation.plots import draw_training
from deltify.evaluation.settings import BenchmarkSpec, DecodeSpec, EvaluationSpec, NeedleSpec, PositionSpec, RecallSpec
from deltify.evaluation.tables import heldout_note
from deltify.training.checkpoint import save_model
from deltify.training.history import Trained, trained_model, trained_stages
from deltify.training.metrics import read_stages
from deltify.utils.files import atomic_write, read_jsonl, write_text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return distill(tiny_recipe(folder, match=Stage(tokens=256, sequence_length=32, batch_size=2)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six questions in the format of ARC, as JSON lines."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {
            "id": str(i),
            "question": f"What is {i} and {i}?",
            "choices": {"text": [str(2 * i + shift) for shift in range(4)], "label": list("ABCD")},
            "answerKey": "ABCD"[i % 4],
        }
        for i in range(6)
    ]
    for split in ("train", "test"):
        (folder / f"arc_easy_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_run_is_measured_by_everything_and_reported(run, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["deltify.evaluation.recall_curve"], "SHORTEST", 1024)  # a byte is a token
    spec = EvaluationSpec(
        benchmarks=BenchmarkSpec(("arc_easy",), limit=4, data=data),
        needles=NeedleSpec(("niah_single_1",), lengths=(512,), samples=1),
        recall=RecallSpec(max_tokens=1024, samples=1),
        positions=PositionSpec("python-docs", max_tokens=150, documents=1),
        decode=DecodeSpec((64,)),
    )
    results = json.loads(evaluate(run, spec).read_text())
    stages = [score["name"] for score in results["scores"]]
    assert stages == ["teacher", "unigram model", "bigram model", "converted", "align", "match"]
    assert results["scores"][0]["kl"] == 0 and results["scores"][-1]["tokens"] == 512 + 256
    controls = ["teacher, window 64", "teacher, window 38 (the states' bytes)", "match, state zeroed every 64"]
    models = ["teacher", "match", *controls]  # in the order in which they are measured
    for part in ("benchmarks", "needles", "recall", "positions"):
        assert list(dict.fromkeys(row["model"] for row in results[part])) == models, part
    accuracy = {row["model"]: row for row in results["benchmarks"] if row["metric"] == "acc"}
    assert accuracy["match"]["main"] and accuracy["match"]["items"] == 4 and accuracy["match"]["chance"] == 0.25
    assert [row["model"] for row in results["decode"]] == ["teacher", "match"]
    assert set(results["samples"]) == {"teacher", "match"}

    pages = report(run)
    html, text, card = (path.read_text() for path in pages)
    assert [path.name for path in pages] == ["report.html", "report.md", "README.md"]
    assert "http" not in html.split("</style>")[1].split("How to reproduce")[0]  # nothing to fetch
    assert html.count('role="img" aria-label=') >= 8 and "<img" not in html and "arc_easy, acc (4)" in html
    assert "No verdict yet" in html or "This student does not replace its teacher" in html
    assert "| random chance | 25.0 |" in text and "(needles.png)" in text
    assert "model-index" in card and "linear_attention" not in card and (run / "match" / "README.md").is_file()
    printed = " ".join(capsys.readouterr().out.split())
    assert "No model finds a needle in niah_single_1" in printed and "It finds no needles: none of 1." in printed


def test_every_source_can_be_a_path(run, tmp_path):
    teacher = random_teacher("llama")
    save_model(tmp_path / "teacher", teacher.model, teacher.tokenizer)
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on a mat. " * 1000)
    spec = EvaluationSpec(
        teacher=tmp_path / "teacher",
        heldout=text,
        needles=NeedleSpec(("niah_single_1",), lengths=(512,), samples=1, haystack=text),
        positions=PositionSpec(text, max_tokens=100, documents=1),
        controls=False,
        stages=False,
        samples=False,
    )
    results = json.loads(evaluate(run, spec, output=tmp_path / "results").read_text())
    assert {row["model"] for row in results["positions"]} == {"teacher", run.name}
    assert len(results["scores"]) == 4 and len(results["needles"]) == 2


def test_several_models_need_a_place_and_one_teacher(run, tmp_path):
    with pytest.raises(ValueError, match="--output"):
        evaluate([str(run), str(run / "match")])
    with pytest.raises(ValueError, match=r"gone has no recipe\.yaml, so it is no run\. Check the path"):
        evaluate(tmp_path / "gone")
    other = distill(tiny_recipe(tmp_path, name="other", align=Stage()))
    path = evaluate([run, other], EvaluationSpec(controls=False), output=tmp_path / "both")
    both = json.loads(path.read_text())
    assert [score["name"] for score in both["scores"]][-2:] == ["tiny", "other"] and set(both["samples"]) >= {"tiny"}
    assert report(tmp_path / "both")[0].is_file()
    alone = evaluate(str(run / "match"), EvaluationSpec(decode=DecodeSpec((64,))), output=str(tmp_path / "alone"))
    assert [row["model"] for row in json.loads(alone.read_text())["decode"]] == ["match"]
    recipe = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(recipe.replace("random:llama", "random:arcee"))
    with pytest.raises(ValueError, match=r"different teachers, random:arcee, random:llama"):
        evaluate([str(run), str(other)], output=tmp_path / "both")


def test_scores_on_a_text_that_was_named_stay_until_another_is_named(run, tmp_path, capsys):
    text = tmp_path / "final.txt"
    text.write_text("A final text, which no model was trained on. " * 40)
    options = {"controls": False, "stages": False, "samples": False}
    path = evaluate(run, EvaluationSpec(heldout=text, **options), output=tmp_path / "of")
    first = json.loads(path.read_text())
    evaluate(run, EvaluationSpec(decode=DecodeSpec((64,)), **options), output=tmp_path / "of")
    second = json.loads(path.read_text())
    assert second["scores"] == first["scores"] and second["heldout_digest"] == first["heldout_digest"]
    assert second["decode"] and second["heldout_source"] == str(text)
    assert "are kept. To replace them, give --heldout" in " ".join(capsys.readouterr().out.split())


def test_students_are_compared_with_the_teacher_before_controls_are_measured(run, data, tmp_path, monkeypatch):
    runner, measured = sys.modules["deltify.evaluation.runner"], []

    def stops_at_the_first_control(*arguments, **options):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(1)
        return run_benchmarks(*arguments, **options)

    run_benchmarks = runner.run_benchmarks
    monkeypatch.setattr(runner, "run_benchmarks", stops_at_the_first_control)
    spec = EvaluationSpec(benchmarks=BenchmarkSpec(("arc_easy",), limit=4, data=str(data)), stages=False, samples=False)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, spec, output=tmp_path / "of")
    rows = json.loads((tmp_path / "of" / "results.json").read_text())["benchmarks"]
    assert [(row["model"], "ratio" in row) for row in rows if row["main"]] == [("teacher", False), ("tiny", True)]


def test_evaluations_made_one_by_one_are_reported_together(run, data, tmp_path, capsys):
    again = tiny_recipe(tmp_path, name="again", align=Stage(), match=Stage(tokens=64, sequence_length=32, batch_size=2))
    again = distill(replace(again, student=replace(again.student, init=str(run))))
    benchmarks = BenchmarkSpec(("arc_easy",), limit=4, data=str(data))
    options = {"controls": False, "stages": False, "samples": False}
    spec = EvaluationSpec(benchmarks=benchmarks, decode=DecodeSpec((64,)), **options)
    for source in (run, again):
        evaluate(source, spec, output=tmp_path / f"of-{source.name}")
    folders = [str(tmp_path / f"of-{source.name}") for source in (run, again)]
    assert main(["report", *folders]) == 1 and "folders need --output" in capsys.readouterr().err
    assert main(["report", *folders, "-o", str(tmp_path / "all")]) == 0
    results = json.loads((tmp_path / "all" / "results.json").read_text())
    names = ["teacher", "unigram model", "bigram model", "tiny", "again"]
    assert [(s["name"], s["tokens"]) for s in results["scores"]] == list(zip(names, (0, 0, 0, 768, 832)))
    for part in ("benchmarks", "decode"):
        assert list(dict.fromkeys(row["model"] for row in results[part])) == ["teacher", "tiny", "again"], part
    assert set(results["weights"]) == {"teacher", "tiny", "again"}
    assert results["runs"] == [str(run), str(again)] and results["command"].count("\n") == 1
    text = (tmp_path / "all" / "report.md").read_text()
    assert "| again |" in text and "| tiny |" in text
    assert main(["report", folders[1]]) == 0  # with the recipe of the run that it goes on from, first
    text = (tmp_path / "of-again" / "report.md").read_text()
    assert text.count("name: tiny") == text.count("name: again") == 1
    assert text.index("name: tiny") < text.index("name: again")
    other = json.loads((tmp_path / "of-again" / "results.json").read_text()) | {"device": "abacus"}
    (tmp_path / "of-again" / "results.json").write_text(json.dumps(other))
    assert main(["report", *folders, "-o", str(tmp_path / "all")]) == 1
    assert "The evaluations differ in device: abacus, cpu" in capsys.readouterr().err


def test_models_of_one_name_and_different_texts_are_not_reported_together(run, tmp_path, capsys):
    again = shutil.copytree(run, tmp_path / "again")
    spec = EvaluationSpec(controls=False, samples=False)
    folders = [str(evaluate(source, spec, output=tmp_path / str(n)).parent) for n, source in enumerate((run, again))]
    assert main(["report", *folders, "-o", str(tmp_path / "all")]) == 1  # both have a model called match
    assert "both have a model called" in (said := capsys.readouterr().err) and "--no-stages" in said
    spec = replace(spec, stages=False)
    (tmp_path / "other.txt").write_text("Quite another text. " * 2000)
    other = replace(spec, heldout=tmp_path / "other.txt")
    folders = [str(evaluate(again, s, output=tmp_path / f"h{n}").parent) for n, s in enumerate((spec, other))]
    assert main(["report", *folders, "-o", str(tmp_path / "all")]) == 1
    assert "2 different held-out texts" in capsys.readouterr().err


def test_held_out_text_that_changed_since_the_run_began_is_refused(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    facts = json.loads((folder / "run.json").read_text())
    facts["data"]["held-out text 1"] = "another"
    (folder / "run.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"held-out text 1 of .* changed since the run began.*--heldout"):
        evaluate(folder, EvaluationSpec(controls=False))


def test_a_measure_that_cannot_run_is_refused_first(run, tmp_path):
    model, out = run / "match", tmp_path / "out"
    with pytest.raises(ValueError, match="--heldout needs a run"):
        evaluate(model, EvaluationSpec(heldout="no-such-file"), output=out)
    for needles, message in (
        (NeedleSpec(("niah_singel_1",)), "no needle task 'niah_singel_1'"),
        (NeedleSpec(("niah_single_1",), lengths=(0,)), "--lengths 0"),
        (NeedleSpec(("niah_single_1",), samples=-1), "--needle-samples -1"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(run, EvaluationSpec(needles=needles), output=out)
    for spec, message in (
        (EvaluationSpec(decode=DecodeSpec((1024, 1030))), "too close"),
        (EvaluationSpec(benchmarks=BenchmarkSpec(("hellaswagg",))), "no task 'hellaswagg' .*hellaswag"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(run, spec, output=out)
    assert not (out / "results.json").exists()
    with pytest.raises(ValueError, match="--books needs a teacher"):
        evaluate(model, EvaluationSpec(positions=PositionSpec("no-such-file")), output=out)


def test_answers_to_more_items_are_kept_when_fewer_are_asked(run, data, tmp_path):
    spec = EvaluationSpec(controls=False, samples=False, stages=False)
    asked = {None: [], 2: []}
    for limit in (None, 2, None):
        benchmarks = BenchmarkSpec(("arc_easy",), limit=limit, data=str(data))
        evaluate(run, replace(spec, benchmarks=benchmarks), output=tmp_path / "out")
        lines = read_jsonl(tmp_path / "out" / "items" / run.name / "arc_easy.jsonl")
        items = [line for line in lines if "scores" in line]
        asked[limit].append((len(items), sum(len(line.get("requests", "1")) for line in lines)))
    assert asked[2][0][0] == 2 and asked[None][0] == asked[None][1]
    assert asked[2][0][1] == asked[None][0][1]  # every answer is still there


def test_tokens_of_the_model_that_a_run_starts_from_are_counted(run, tmp_path):
    of_stage = trained_stages(run)
    assert 0 == of_stage["converted"].tokens < of_stage["align"].tokens < of_stage["extend"].tokens
    short = {"align": Stage(), "match": Stage(tokens=64, sequence_length=16, batch_size=2)}
    recipe = replace(tiny_recipe(tmp_path, name="first", **short), output=str(tmp_path))
    parent = shutil.copytree(run, tmp_path / "parent")
    for number, start in enumerate((parent, parent / "align", parent / "converted")):
        child = replace(recipe, name=f"child{number}", student=replace(recipe.student, init=str(start)))
        folder, before = distill(child), trained_model(start)
        assert trained_stages(folder)["converted"] == before
        assert trained_model(folder) == Trained(before.tokens + 64, max(before.length, 16)), start
    grandchild = replace(recipe, name="grandchild", student=replace(recipe.student, init=str(folder / "converted")))
    shutil.rmtree(parent)  # what it was trained on is written down
    assert trained_model(distill(grandchild)).tokens == 64 and trained_model(tmp_path / "child0").tokens > 64
    moved = (tmp_path / "child0").rename(tmp_path / "moved")
    results = json.loads(evaluate(moved, EvaluationSpec(controls=False)).read_text())
    of_stage = trained_stages(moved)
    scores = {score["name"]: score["tokens"] for score in results["scores"]}
    assert scores["converted"] == of_stage["converted"].tokens > 0 and scores["match"] == of_stage["match"].tokens


def test_a_stage_that_has_saved_no_model_does_not_count(run, tmp_path):
    folder = tmp_path / "begun"
    shutil.copytree(run, folder)
    extend = Stage(tokens=512, sequence_length=64, batch_size=2)
    begun = replace(load_recipe(run / "recipe.yaml"), name="begun", output=str(tmp_path), extend=extend)
    write_recipe(begun, folder / "recipe.yaml")
    with (folder / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps({"stage": "extend", "step": 1, "tokens": 128, "loss": 1.0}) + "\n")
    results = json.loads(evaluate(folder, EvaluationSpec(stages=False, controls=False)).read_text())
    assert results["trained_length"] == 32
    whole = trained_stages(run)
    assert results["students"][0]["tokens"] == whole["match"].tokens
    (folder / "match" / "unfinished.json").write_text(json.dumps({"step": 3}))  # it stopped there, and went on since
    assert trained_stages(folder)["match"].tokens == whole["align"].tokens + 3 * 2 * 32


def test_a_model_that_fails_half_way_keeps_what_was_measured(run, data, monkeypatch):
    calls = []

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the power went out")
        return run_benchmarks(*args, **options)

    monkeypatch.setattr(sys.modules["deltify.evaluation.runner"], "run_benchmarks", failing)
    (run / "results.json").unlink(missing_ok=True)
    with pytest.raises(RuntimeError):
        evaluate(run, EvaluationSpec(benchmarks=BenchmarkSpec(("arc_easy",), limit=3, data=data), samples=False))
    kept = json.loads((run / "results.json").read_text())
    assert kept["scores"] and {row["model"] for row in kept["benchmarks"]} == {"teacher"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{run}", "--tasks", "arc_eezy"], "arc_easy"),
        (["{run}", "--tasks", "arc_easy", "--data", "nowhere"], "nowhere"),
        (["{run}", "--needles", "niah_singel_1"], "niah_single_1"),
        (["{run}", "--books", "absent.txt"], "no text at 'absent.txt'"),
        (["{run}", "--dtype", "int3"], "--dtype"),
        (["{run}", "--recall", "--recall-tokens", "100"], "choose 512 to 65,536"),
    ],
)
def test_bad_measures_are_named(run, arguments, message, capsys):
    filled = [str(run) if argument == "{run}" else argument for argument in arguments]
    assert main(["evaluate", *filled, "--no-controls", "--no-samples"]) == 1
    assert message in capsys.readouterr().err


def test_files_appear_whole_and_a_cut_line_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_jsonl(path) == []
    write_text(path, '{"a": 1}\n{"a": "ü\u2028"}\n')
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write("lost")
        raise RuntimeError
    rows = read_jsonl(path)
    assert rows == [{"a": 1}, {"a": "ü\u2028"}]
    with path.open("a") as file:
        file.write('{"a": 3')
    whole = path.read_text()[: -len('{"a": 3')]
    assert read_jsonl(path) == rows and path.read_text() != whole
    assert read_jsonl(path, repair=True) == rows and path.read_text() == whole


def test_each_task_has_one_main_metric():
    rows = [{"task": task, "metric": m} for task in ("arc_easy", "hellaswag") for m in ("acc", "acc_norm")]
    assert main_metric(rows, "arc_easy") == "acc" and main_metric(rows, "hellaswag") == "acc_norm"
    assert main_metric([{"task": "x", "metric": "f1"}], "x") == "f1"


def test_curves_are_drawn_without_an_evaluation(run):
    paths, figure = drawn_by(draw_training, run, {"teacher": "random:llama"})
    assert [path.name for path in paths] == ["curves.png", "curves.svg"] and all(path.is_file() for path in paths)
    divergence, loss = figure.axes
    validated = {name: [r for r in records if "heldout_kl" in r] for name, records in read_stages(run)}
    labels = [f"{stage}: {records[-1]['heldout_kl']:.2f}" for stage, records in validated.items()]
    lines = lines_of(divergence)
    assert list(lines) == labels and [label.split(":")[0] for label in labels] == ["converted", "align", "match"]
    for label, records in zip(labels, validated.values()):
        assert lines[label][1][-len(records) :] == [r["heldout_kl"] for r in records]
    assert list(lines_of(loss)) == ["align: relative error of mixers", "match: KL to teacher"]


def test_the_note_on_heldout_text_is_that_of_the_figures():
    scores = [{"name": "unigram model", "perplexity": 90.0, "kl": None}]
    scores += [{"name": n, "perplexity": p, "kl": kl} for n, p, kl in (("converted", 99.0, 2.0), ("align", 80.0, 1.0))]
    assert heldout_note(scores) == (
        "KL falls at every stage. The student's perplexity is below that of a unigram model."
    )
    scores[-1] |= {"kl": 2.5, "perplexity": 95.0}
    assert heldout_note(scores) == (
        "KL does NOT fall at every stage. The student's perplexity is NOT below that of a unigram model."
    )

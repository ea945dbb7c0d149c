"""experiments/qwen_coder.py: its questions, recipes and table, and a small run without `measure`."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import zstandard

from deltify.cli import main
from deltify.config import STAGES
from deltify.conversion.teacher import random_teacher
from deltify.data.sources import python_docs

FOLDER = Path(__file__).parent.parent / "experiments"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def qwen_coder():
    sys.path.insert(0, str(FOLDER))  # it imports other experiments
    try:
        spec = importlib.util.spec_from_file_location("qwen_coder", FOLDER / "qwen_coder.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Return a folder as the script wants it, with documentation of Python in place of textbooks and books."""
    folder = tmp_path_factory.mktemp("text")
    texts = [text for text in python_docs() if 2000 < len(text) < 5000][:20]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    for part in ("train", "eval"):
        (folder / part).mkdir()
    for name in ("openstax", "changelog", "gutenberg-0"):
        (folder / "train" / f"{name}.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    (folder / "eval" / "heldout_dev.jsonl").write_bytes(lines)
    questions = [{"question": f"What is {n} times 2?", "answer": f"#### {2 * n}"} for n in range(20)]
    (folder / "eval" / "gsm8k_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    return folder


def options(qwen_coder, text, out, *more):
    return qwen_coder.parse([*more, "--teacher", "T", "--text", str(text), "--out", str(out)])


def test_all_models_train_on_equally_many_tokens_of_the_same_text(qwen_coder, text, tmp_path):
    chosen = options(qwen_coder, text, tmp_path, "train")
    recipes = {model: qwen_coder.make_recipe(model, chosen) for model in qwen_coder.MODELS}
    for model, recipe in recipes.items():
        aligned = [qwen_coder.make_recipe(model, chosen, only_align=True)] if model != "arcee" else []
        tokens = [one.stage(name).tokens for one in (*aligned, recipe) for name in STAGES]
        assert sum(tokens) == pytest.approx(75e6, abs=3)
        assert all(not any("chat:" in source for source in one.data.train) for one in aligned)
        assert recipe.data.train == recipes["hybrid"].data.train and recipe.teacher.model == "T"
        assert recipe.run.eval_every > 900
    assert f"chat:{tmp_path}/answers/gsm8k" in recipes["arcee"].data.train
    assert recipes["kda-only"].extend.data_weights.keys() == recipes["kda-only"].data.train.keys()
    layers = {model: recipe.student.full_attention_layers for model, recipe in recipes.items()}
    assert layers == {"kda-only": "none", "hybrid": "measured:7", "hybrid-rope": "measured:7", "arcee": "none"}
    assert [model for model, recipe in recipes.items() if recipe.student.keep_rope] == ["hybrid-rope"]
    assert recipes["hybrid"].student.init == str(tmp_path / "hybrid-align" / "align")
    one_kind = qwen_coder.make_recipe("hybrid", options(qwen_coder, text, tmp_path, "train", "--answers", "gsm8k"))
    assert recipes["hybrid"].data.train.keys() - one_kind.data.train.keys() == {f"chat:{tmp_path}/answers/textbooks"}
    assert one_kind.extend.data_weights.keys() == one_kind.data.train.keys()


@pytest.mark.parametrize("gpus", [1, 2, 4])
@pytest.mark.parametrize("tokens", [None, 4096, 12_288, 65_536])
def test_gpus_share_steps_of_any_size(qwen_coder, text, tmp_path, gpus, tokens):
    more = [] if tokens is None else ["--batch-tokens", str(tokens)]
    chosen = options(qwen_coder, text, tmp_path, "train", "--gpus", str(gpus), *more)
    for model in qwen_coder.MODELS:
        recipe = qwen_coder.make_recipe(model, chosen)
        for stage in (stage for stage in map(recipe.stage, STAGES) if stage.tokens):
            assert stage.batch_size % (gpus * stage.micro_batch_size) == 0
            assert stage.micro_batch_size * stage.sequence_length <= 8192
            whole = gpus * stage.sequence_length
            if tokens is not None:  # the largest step that all GPUs share, or one sequence of each
                assert stage.batch_size * stage.sequence_length == max(1, tokens // whole) * whole


def test_a_part_that_fails_does_not_stop_the_others_and_is_repeated(qwen_coder, text, tmp_path, monkeypatch):
    ran, failing = [], {"kda-only-mmlu"}

    def run(arguments, gpus, log):
        output = arguments[arguments.index("--output") + 1]
        ran.append(output.name)
        output.mkdir(parents=True, exist_ok=True)
        (output / "results.json").write_text("{}")  # written after each measure
        if output.name in failing:
            raise RuntimeError(f"{output.name} failed")

    monkeypatch.setattr(qwen_coder, "run_deltify", run)
    parts = ("choices", "mmlu", "gsm8k")
    chosen = options(qwen_coder, text, tmp_path, "measure", "kda-only", "--unfinished", "--parts", *parts)
    with pytest.raises(RuntimeError, match="kda-only-mmlu failed"):
        qwen_coder.measure("kda-only", [], chosen)
    assert ran == [f"kda-only-{part}" for part in parts]
    failing.clear()
    qwen_coder.measure("kda-only", [], chosen)
    assert ran[3:] == ["kda-only-mmlu"]


def test_questions_are_about_passages_of_the_textbooks(qwen_coder, text, tmp_path):
    chosen = options(qwen_coder, text, tmp_path, "answers")
    rows = list(qwen_coder.textbook_questions(chosen))
    assert len(rows) > 30 and rows == list(qwen_coder.textbook_questions(chosen))
    assert all(row.keys() == {"question"} and 80 < len(row["question"].split()) < 280 for row in rows)


def test_a_small_run_answers_and_trains_and_goes_on(qwen_coder, text, tmp_path, monkeypatch, capsys):
    teacher = random_teacher("qwen2")
    teacher.tokenizer.chat_template = TEMPLATE
    for part in (teacher.model, teacher.tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    ran = []

    def run(arguments, gpus, log):
        ran.append(log.stem)
        (tmp_path / "out" / "unfinished").mkdir(exist_ok=True)
        assert not gpus and main([str(argument) for argument in arguments]) == 0

    monkeypatch.setattr(qwen_coder, "run_deltify", run)
    for name, length in {"gsm8k": 256, "textbooks": 1100}.items():  # enough for some answers to end
        monkeypatch.setitem(qwen_coder.ANSWERS[name], "length", length)
    common = ["--teacher", str(tmp_path / "teacher"), "--text", str(text), "--out", str(tmp_path / "out")]
    common += ["--data", str(tmp_path / "data"), "--smoke", "--questions", "2"]
    for command in (["answers"], ["answers"], ["train", "kda-only"]):
        qwen_coder.main([*command, *common])
    # answers are not repeated
    assert ran == ["answers-gsm8k-00", "answers-textbooks-00", "train-kda-only-align", "train-kda-only"]
    chats = [json.loads(line) for line in (tmp_path / "out/answers/gsm8k/gsm8k-00.jsonl").read_text().splitlines()]
    assert chats and {chat["messages"][0]["content"] for chat in chats} <= {f"What is {n} times 2?" for n in range(2)}
    assert (tmp_path / "out" / "kda-only" / "extend" / "config.json").is_file()
    assert len(list((tmp_path / "data").rglob("loss_mask.bin"))) == 2
    monkeypatch.setattr(qwen_coder, "RATES", ((2e-4, 2e-5),))
    qwen_coder.main(["rates", "kda-only", "--rate-tokens", "0.0025", *common])
    assert ran[4:] == ["train-kda-only-rates-0.0002-2e-05"]  # align is not repeated
    assert "kda-only-rates-0.0002-2e-05: 2,048 tokens, KL" in capsys.readouterr().out
    qwen_coder.main(["train", "kda-only", *common])
    with pytest.raises(
        RuntimeError, match=r"hybrid is not trained to its end\. Run: train hybrid\. Or give --unfinished"
    ):
        qwen_coder.main(["measure", "hybrid", *common])
    with pytest.raises(SystemExit, match=r"nothing is measured in .*Run: measure kda-only hybrid hybrid-rope arcee"):
        qwen_coder.main(["report", *common])


def test_the_table_has_shares_of_the_teachers_score(qwen_coder, tmp_path):
    row = {"task": "mmlu@5", "metric": "acc", "chance": 0.25, "items": 500, "main": True}
    strict = {"task": "gsm8k@5", "metric": "exact_match,strict-match", "chance": None, "items": 500, "main": False}
    results = {"benchmarks": [
        row | {"model": "teacher", "value": 0.65}, row | {"model": "kda-only", "value": 0.55},
        strict | {"model": "teacher", "value": 0.5}, strict | {"model": "kda-only", "value": 0.2},
    ]}  # fmt: skip
    for name, right in {"teacher-8": 4, "kda-only-8": 3, "teacher-50": 5, "kda-only-50": 0}.items():
        (tmp_path / f"{name}.jsonl").write_text("{}\n" * right)
    table = qwen_coder.card_table(results, tmp_path)
    assert "| mmlu@5 | 500 | 65.0 | 55.0 (84.6, 75.0) | 88.4, 80.8 |" in table
    assert "| gsm8k@5, strict | 500 | 50.0 | 20.0 (40.0, 40.0) | 51.4 |" in table
    assert "| gsm8k, chat | 8 | 50.0 | 37.5 (75.0, 75.0) |  |" in table
    assert "| gsm8k, chat | 50 | 10.0 | 0.0 (0.0, 0.0) |  |" in table


def test_answers_that_are_measured_name_the_number_of_questions(qwen_coder, text, tmp_path, monkeypatch):
    def run(arguments, gpus, log):
        counts.append(arguments[arguments.index("--count") + 1])
        arguments[arguments.index("-o") + 1].parent.mkdir(parents=True, exist_ok=True)
        arguments[arguments.index("-o") + 1].write_text("{}\n")

    counts = []
    monkeypatch.setattr(qwen_coder, "run_deltify", run)
    (text / "eval" / "gsm8k_test.jsonl").write_text('{"question": "1", "answer": "1"}\n' * 30)
    for more in ([], [], ["--limit", "8"]):  # the second is there already
        qwen_coder.chat_answers("teacher", [], options(qwen_coder, text, tmp_path, "measure", *more))
    assert counts == ["30", "8"]  # the file has fewer than 500
    names = sorted(path.name for path in (tmp_path / "parts" / "gsm8k-chat").iterdir())
    assert names == ["teacher-30.jsonl", "teacher-8.jsonl"]


def test_a_file_of_answers_is_made_anew_for_more_questions_only(qwen_coder, text, tmp_path, monkeypatch):
    def run(arguments, gpus, log):
        ran.append(log.stem)
        arguments[arguments.index("-o") + 1].parent.mkdir(parents=True, exist_ok=True)
        arguments[arguments.index("-o") + 1].write_text(arguments[2].read_text())

    ran = []
    monkeypatch.setattr(qwen_coder, "run_deltify", run)
    monkeypatch.setattr(qwen_coder, "SHARD", 10)
    for number, answered in ((14, 14), (18, 18), (18, 18), (12, 18)):
        qwen_coder.answers(options(qwen_coder, text, tmp_path, "answers", "--questions", str(number)))
        lines = [path.read_text().splitlines() for path in sorted((tmp_path / "answers" / "gsm8k").iterdir())]
        assert list(map(len, lines)) == [10, answered - 10]
    assert [name for name in ran if "gsm8k" in name] == ["answers-gsm8k-00", "answers-gsm8k-01", "answers-gsm8k-01"]


def test_models_have_gpus_of_their_own(qwen_coder, text, tmp_path, monkeypatch):
    chosen = options(qwen_coder, text, tmp_path, "train", "--gpus", "2")
    monkeypatch.setattr(qwen_coder, "visible_gpus", lambda _: list("01234"))
    seen = {}
    qwen_coder.on_gpus_of_their_own(lambda model, gpus, _: seen.update({model: gpus}), chosen)
    assert set(seen) == set(qwen_coder.MODELS) and all("".join(gpus) in ("01", "23") for gpus in seen.values())
    monkeypatch.setattr(qwen_coder, "visible_gpus", lambda _: ["0"])
    with pytest.raises(SystemExit, match=r"--gpus 2, but there are 1"):
        qwen_coder.on_gpus_of_their_own(None, chosen)
    for command in (["train", "kda"], ["align", "arcee"]):
        with pytest.raises(SystemExit):
            options(qwen_coder, text, tmp_path, *command)


def test_models_run_on_the_gpus_that_are_visible(qwen_coder, text, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    assert qwen_coder.visible_gpus(options(qwen_coder, text, tmp_path, "train")) == ["1", "3"]

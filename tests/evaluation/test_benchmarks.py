"""Benchmarks: lm-eval's tasks from local files, cached answers, and HFLM's scores from fewer tokens."""

import contextlib
import json
import random
import sys
from pathlib import Path

import datasets
import lm_eval
import numpy as np
import pytest
import torch
from conftest import with_special_tokens
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.hellaswag.utils import process_docs
from tokenizers.processors import TemplateProcessing

from deltify import convert
from deltify.conversion.teacher import byte_tokenizer, random_teacher
from deltify.evaluation import lm_eval_model
from deltify.evaluation.benchmarks import (
    TASKS,
    compare_with_teacher,
    items_of,
    letter_bias,
    paired,
    read_items,
    run_benchmark,
    run_benchmarks,
    score_rows,
)
from deltify.evaluation.controls import zero_state_every
from deltify.evaluation.lm_eval_cache import CachedLM, answer_key
from deltify.evaluation.lm_eval_model import ConstantStateLM, WholeLM, lm_for
from deltify.evaluation.lm_eval_tasks import Benchmark, load_benchmark, parse_letter, spread, task_manager
from deltify.evaluation.prefix_tree import prefix_tree, walk
from deltify.evaluation.tables import score_text
from deltify.model.capture import has_known_mixers

SUBJECTS = [
    path.stem.removeprefix("mmlu_")
    for path in (Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default").glob("mmlu_*.yaml")
]
WORDS = "a bee can die each fine game hits into jam keeps life more now on".split()


def words(rng: random.Random, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def hub_rows() -> dict[tuple[str, str | None], dict[str, list[dict]]]:
    """Rows in the columns that the datasets on the hub have."""
    rng = random.Random(0)
    rows = {}

    def question(options: int, labels: str) -> dict:
        choices = {"text": [f"{words(rng, 4)} {i}" for i in range(options)], "label": list(labels[:options])}
        return {
            "id": words(rng, 1),
            "question": words(rng, 9) + "?",
            "choices": choices,
            "answerKey": rng.choice(labels[:options]),
        }

    for name, labels in (("ARC-Challenge", "ABCDE"), ("ARC-Easy", "12345")):
        splits = {split: [question(n, labels) for n in (4, 3, 5, 4, 4, 4)] for split in ("train", "validation", "test")}
        rows["allenai/ai2_arc", name] = splits
    rows["Rowan/hellaswag", None] = {
        split: [
            {
                "activity_label": words(rng, 2).title(),
                "ctx_a": words(rng, 8) + ". [step]  Then",
                "ctx_b": words(rng, 2),
                "endings": [words(rng, 6) + " [title] end" for _ in range(4)],
                "label": str(rng.randrange(4)),
            }
            for _ in range(6)
        ]
        for split in ("train", "validation")
    }
    rows["baber/piqa", None] = {
        split: [
            {"goal": words(rng, 6), "sol1": words(rng, 5), "sol2": words(rng, 5), "label": rng.randrange(2)}
            for _ in range(5)
        ]
        for split in ("train", "validation")
    }
    rows["openai/gsm8k", "main"] = {
        split: [
            {"question": words(rng, 6) + "?", "answer": f"{words(rng, 4)}\n#### {rng.randrange(9)}"} for _ in range(n)
        ]
        for split, n in (("train", 8), ("test", 2))
    }
    for subject in SUBJECTS:
        rows["cais/mmlu", subject] = {
            split: [
                {
                    "subject": subject,
                    "question": words(rng, 9),
                    "choices": [f"{words(rng, 3)} {i}" for i in range(4)],
                    "answer": rng.randrange(4),
                }
                for _ in range(n)
            ]
            for split, n in (("dev", 5), ("validation", 1), ("test", 2))
        }
    return rows


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def hub():
    rows = hub_rows()
    return {key: {s: datasets.Dataset.from_list(x) for s, x in splits.items()} for key, splits in rows.items()}


@pytest.fixture(scope="module")
def data(hub, tmp_path_factory):
    """The same rows in a folder, named and prepared as ../shared/data/eval is."""
    folder = tmp_path_factory.mktemp("data")
    prefixes = {"ARC-Challenge": "arc_challenge", "ARC-Easy": "arc_easy", "main": "gsm8k"}
    for (source, name), splits in hub.items():
        for split, rows in splits.items():
            if source == "Rowan/hellaswag":
                columns = ["query", "choices", "label"]
                rows = process_docs(rows).map(lambda row: {"label": row["gold"]}).select_columns(columns)
            prefix = "mmlu" if source == "cais/mmlu" else prefixes.get(name, source.split("/")[1])
            split = "val" if (prefix, split) == ("mmlu", "validation") else split
            with (folder / f"{prefix}_{split}.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


@pytest.fixture
def from_hub(hub, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name=None, **_: dict(hub[path, name]))


@pytest.fixture(scope="module")
def teacher():
    return random_teacher("llama")


@pytest.fixture(scope="module")
def student(teacher):
    return convert(teacher, init="library").eval()


def whole(model, tokenizer, batch_size: int = 8, **options) -> HFLM:
    return HFLM(model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, **options)


# ---- tasks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TASKS, "mmlu@3", "arc_easy@2", "hellaswag@2", "gsm8k@0", "mmlu_generative"])
def test_tasks_from_files_equal_lm_evals_own(name, data, from_hub):
    base, _, shots = name.partition("@")
    stock = task_manager().load([base])["tasks"]
    for task in stock.values():
        if shots:
            task.set_config("num_fewshot", int(shots))
        if task.config.num_fewshot is None:
            task.set_config("num_fewshot", 0)
    ours = load_benchmark(name, data=data).tasks
    assert list(ours) == list(stock)
    rng = random.Random(0)
    for leaf, task in ours.items():
        own = stock[leaf]
        for each in (task, own):
            each.set_fewshot_seed(1234)
            each.build_all_requests()
        assert [x.args for x in task.instances] == [x.args for x in own.instances]
        assert len(task.eval_docs) == len(own.eval_docs) > 0
        for doc, own_doc in zip(task.eval_docs, own.eval_docs):
            assert task.doc_to_target(doc) == own.doc_to_target(own_doc)
            if task.OUTPUT_TYPE == "multiple_choice":
                assert task.doc_to_choice(doc) == own.doc_to_choice(own_doc)
                answers = [(-9 * rng.random(), False) for _ in task.doc_to_choice(doc)]
            else:
                answers = [str(task.doc_to_target(doc))]
            scores = task.process_results(doc, answers)
            assert scores == own.process_results(own_doc, answers)
            assert scores
        assert task.aggregation() == own.aggregation()
        assert task.config.filter_list == own.config.filter_list


def test_names_and_data_that_are_not_there(data, tmp_path, teacher):
    with pytest.raises(ValueError, match=r"no task 'helaswag'.*hellaswag"):
        load_benchmark("helaswag", data=data)
    with pytest.raises(ValueError, match=r"no task 'mmlu_rotate'.*mmlu_rotated"):
        load_benchmark("mmlu_rotate", data=data)
    with pytest.raises(ValueError, match="mmlu@five"):
        load_benchmark("mmlu@five", data=data)
    with pytest.raises(FileNotFoundError, match=f"no folder {tmp_path}/none"):
        load_benchmark("piqa", data=tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}: there is no piqa_validation\.jsonl"):
        load_benchmark("piqa", data=tmp_path)
    (tmp_path / "gsm8k_test.jsonl").write_bytes((data / "gsm8k_test.jsonl").read_bytes())
    with pytest.raises(FileNotFoundError, match=rf"examples in {tmp_path}: there is no gsm8k_train\.jsonl"):
        load_benchmark("gsm8k", data=tmp_path)
    assert load_benchmark("gsm8k@0", data=tmp_path).tasks["gsm8k"].config.num_fewshot == 0
    (tmp_path / "piqa_validation.jsonl").write_text('{"goal": "x"}\n{"goal": \n')
    with pytest.raises(ValueError, match=r"piqa_validation\.jsonl, line 2, is not JSON"):
        load_benchmark("piqa", data=tmp_path)
    with pytest.raises(OSError, match=r"piqa: no data .*give a folder"):
        load_benchmark("piqa")
    options = {"items_folder": tmp_path / "items", "data": data}
    with pytest.raises(ValueError, match=r"limit names \['mmlu'\]"):
        run_benchmarks(teacher.model, teacher.tokenizer, ["piqa"], limit={"mmlu": 3}, **options)
    with pytest.raises(ValueError, match="limit=0 for piqa"):
        run_benchmarks(teacher.model, teacher.tokenizer, ["piqa"], limit=0, **options)
    assert not (tmp_path / "items").exists()


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch, teacher, tmp_path):
    for name in [
        name for name in sys.modules if name.startswith("lm_eval.") or name == "deltify.evaluation.lm_eval_model"
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ModuleNotFoundError, match=r"lm_eval.* is not installed\. Run: pip install 'lm_eval"):
        run_benchmarks(teacher.model, teacher.tokenizer, ["piqa"], items_folder=tmp_path)


def test_a_limit_is_spread_over_a_groups_tasks(data):
    assert spread(7, {"a": 1, "b": 9, "c": 9}) == {"a": 1, "b": 3, "c": 3}
    assert spread(99, {"a": 1, "b": 9}) == {"a": 1, "b": 9}
    benchmark = load_benchmark("mmlu", data=data, limit=70)
    assert sum(len(documents) for documents in benchmark.samples.values()) == 70
    rotated = load_benchmark("arc_challenge_rotated", data=data, limit=3)
    assert rotated.samples == {"arc_challenge": range(4 + 3 + 5)}


# ---- the fast path ---------------------------------------------------------------------------------------------------


def token_requests(model) -> list[tuple[None, list[int], list[int]]]:
    """Contexts that share beginnings, extend each other, or are one token; several, equal and greedy continuations."""
    rng = random.Random(1)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(250) for _ in range(n)]

    shots, other = tokens(90), tokens(70)
    contexts = [shots + tokens(n) for n in (5, 40, 41, 3)] + [other + tokens(9), other + tokens(9)]
    contexts += [shots, other[:-1], tokens(1), tokens(200), shots[:50] + tokens(30)]
    requests = []
    for context in contexts:
        greedy = model.generate(torch.tensor([context]), max_new_tokens=4, do_sample=False, pad_token_id=256)
        greedy = greedy[0, len(context) :].tolist()
        endings = [tokens(7), tokens(1), greedy[:1], greedy, greedy[:3] + tokens(1), tokens(19)]
        requests += [(None, context, ending) for ending in endings]
    requests += [requests[3], (None, tokens(60), tokens(12))]  # one asked again, one alone
    rng.shuffle(requests)
    return requests


@pytest.mark.parametrize("limits", [{}, {"batch_size": 3, "batch_tokens": 64}, {"max_length": 40}], ids=str)
def test_log_likelihoods_equal_those_of_hflm(limits, teacher, student):
    """With large batches; with small ones, where long rows are read in pieces; and with contexts that are cut."""
    limits = dict(limits)
    batch_tokens = limits.pop("batch_tokens", None)
    requests = token_requests(student)
    fast = lm_for(student, teacher.tokenizer, **limits)
    assert isinstance(fast, ConstantStateLM)
    fast.batch_tokens = batch_tokens or fast.batch_tokens
    slow = whole(student, teacher.tokenizer, batch_size=1, max_length=limits.get("max_length"))
    seen = {"fast": 0, "slow": 0}

    def count(kind):
        def hook(_, args, options):
            mask = options.get("attention_mask")
            seen[kind] += options["input_ids"].numel() if mask is None else int(mask.sum())

        return student.model.register_forward_pre_hook(hook, with_kwargs=True)

    answers = {}
    cut = pytest.warns(UserWarning, match="longer than 40") if "max_length" in limits else contextlib.nullcontext()
    for kind, model in (("fast", fast), ("slow", slow)):
        handle = count(kind)
        with cut if kind == "fast" else contextlib.nullcontext():
            answers[kind] = model._loglikelihood_tokens(requests, disable_tqdm=True)
        handle.remove()
    got, want = answers["fast"], answers["slow"]
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
    assert sum(greedy for _, greedy in got) >= 5
    assert np.allclose([ll for ll, _ in got], [ll for ll, _ in want], atol=1e-4, rtol=0)
    assert (fast.tokens_read, fast.tokens_whole) == (seen["fast"], seen["slow"])
    assert seen["fast"] < (1 if "max_length" in limits else 0.5) * seen["slow"]


@pytest.mark.parametrize("begin", [False, True], ids=["plain", "bos"])
def test_strings_are_split_into_tokens_as_hflm_does(begin, student):
    tokenizer = byte_tokenizer()
    if begin:  # a tokenizer that puts a token before every text
        tokenizer.bos_token = tokenizer.eos_token
        template = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", tokenizer.eos_token_id)])
        tokenizer.backend_tokenizer.post_processor = template
        assert tokenizer.encode("a")[0] == tokenizer.bos_token_id
    pairs = [
        ("", " no context"),
        ("", "<|end|> is the prefix token"),
        ("<|end|>said already", " and"),
        ("spaces  ", "after the context"),
        ("Question: ünï 漢?\nAnswer:", " 漢字"),
        ("Question: ünï 漢?\nAnswer:", " no"),
        ("a", "b"),
    ]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    got, want = (
        model.loglikelihood(requests, disable_tqdm=True)
        for model in (lm_for(student, tokenizer), whole(student, tokenizer))
    )
    assert np.allclose([x[0] for x in got], [x[0] for x in want], atol=1e-4, rtol=0)
    assert [x[1] for x in got] == [x[1] for x in want]
    for asked, lacks in ((([1], []), "continuation"), (([], [1]), "context")):
        with pytest.raises(ValueError, match=f"A {lacks} has (0|no) tokens"):
            lm_for(student, tokenizer)._loglikelihood_tokens([(None, *asked)])


def test_whole_texts_equal_those_of_hflm(teacher, student):
    rng = random.Random(0)
    requests = [Instance("loglikelihood_rolling", {}, (words(rng, 60),), 0) for _ in range(5)]
    got, want = (
        model.loglikelihood_rolling(requests, disable_tqdm=True)
        for model in (
            lm_for(student, teacher.tokenizer, max_length=50),
            whole(student, teacher.tokenizer, max_length=50),
        )
    )
    assert np.allclose(got, want, atol=1e-3, rtol=0)


def test_generated_texts_equal_those_of_hflm(teacher, student):
    rng = random.Random(0)
    shots = words(rng, 40) + words(rng, 40) + "\n"
    prompts = [shots + words(rng, 9) for _ in range(5)] + ["x", shots, words(rng, 5)]
    prompts.append(prompts[0])
    options = [
        {"until": ["\n"], "do_sample": False, "max_gen_toks": 12},
        {"until": ["e", "zz"], "max_gen_toks": 30, "temperature": 0.0},
        {"until": [], "max_gen_toks": 8, "repetition_penalty": 1.3},  # looks at the prompt: left to HFLM
    ]
    requests = [Instance("generate_until", {}, (p, o), 0) for o in options for p in prompts]
    fast = lm_for(student, teacher.tokenizer, max_length=500)
    got = fast.generate_until(requests, disable_tqdm=True)
    want = whole(student, teacher.tokenizer, batch_size=1, max_length=500).generate_until(requests, disable_tqdm=True)
    assert got == want
    assert len(set(got)) > 8
    assert 0 < fast.tokens_read < 0.6 * fast.tokens_whole


@pytest.mark.parametrize("kind", ["plain", "begin", "begin and end"])
def test_what_has_no_token_follows_the_prefix_token(kind, teacher, student):
    """HFLM does so with empty contexts, but fails at empty prompts and blank contexts where nothing begins a text."""
    tokenizer = byte_tokenizer()
    if kind != "plain":
        tokenizer = with_special_tokens(tokenizer, end=kind == "begin and end")
    begun = byte_tokenizer() if kind == "plain" else with_special_tokens(byte_tokenizer(), end=False)
    prefix = begun.eos_token if kind == "plain" else ""
    options = {"until": ["\n"], "do_sample": False, "max_gen_toks": 6}
    pairs = [("", " no context"), ("  ", "blank context"), ("a", "b"), ("a\nb", " c")]
    for model in (student, teacher.model):
        truth = whole(model, begun, batch_size=1)
        wanted = [truth.generate_until([Instance("generate_until", {}, (p, options), 0)]) for p in (prefix, "x", "yz")]
        scores = truth.loglikelihood(
            [Instance("loglikelihood", {}, (c if c.strip() else prefix + c, t), 0) for c, t in pairs if c]
        )
        scores[:0] = truth.loglikelihood([Instance("loglikelihood", {}, pairs[0], 0)])
        rolled = truth.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (t,), 0) for t in ("", "abc")])
        for fast in (True, False):
            for batch_size in (1, 8):
                lm = lm_for(model, tokenizer, fast=fast, batch_size=batch_size)
                asked = [Instance("generate_until", {}, (p, options), 0) for p in ("", "x", "yz")]
                assert [[text] for text in lm.generate_until(asked, disable_tqdm=True)] == wanted
                assert lm.generate_until(asked[:1], disable_tqdm=True) == wanted[0]
                got = lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)
                assert np.allclose([x[0] for x in got], [x[0] for x in scores], atol=1e-4, rtol=0)
                texts = [Instance("loglikelihood_rolling", {}, (t,), 0) for t in ("", "abc")]
                assert np.allclose(lm.loglikelihood_rolling(texts, disable_tqdm=True), rolled, atol=1e-4, rtol=0)


def test_a_tree_holds_every_context_once():
    rng = random.Random(2)
    contexts = [[rng.randrange(2) for _ in range(rng.randint(1, 9))] + [7] * rng.choice((0, 80)) for _ in range(300)]
    contexts += [[1] * 100 + context for context in contexts[:50]]
    contexts = [np.array(c, dtype=np.int64) for c in dict.fromkeys(map(tuple, contexts))]
    roots = prefix_tree(contexts)
    found, todo = {}, [(node, ()) for node in roots]
    while todo:
        node, above = todo.pop()
        path = (*above, *node.tokens.tolist())
        if node.context is not None:
            assert node.context not in found
            found[node.context] = path
        todo += [(child, path) for child in node.children]
    assert found == {i: tuple(context.tolist()) for i, context in enumerate(contexts)}
    assert all(len(node.tokens) for node in walk(roots))
    assert sum(len(node.tokens) for node in walk(roots)) < sum(map(len, contexts)) - 50 * 64


def test_only_models_of_constant_state_take_the_fast_path(teacher, student):
    hybrid = convert(teacher, full_attention_layers=[2], init="library")
    for model, fast in ((student, True), (hybrid, False), (teacher.model, False)):
        assert isinstance(lm_for(model, teacher.tokenizer), ConstantStateLM) == fast
    assert type(lm_for(student, teacher.tokenizer, fast=False)) is WholeLM


def test_batches_have_logits_that_fit_into_memory(teacher, monkeypatch):
    asked = [Instance("loglikelihood", {}, ("word " * n, "end"), 0) for n in (40, 3, 4, 5)]
    lm, rows = lm_for(teacher.model, teacher.tokenizer), []
    want = lm.loglikelihood(asked, disable_tqdm=True)
    monkeypatch.setitem(lm_eval_model.LOGIT_BYTES, "cpu", 2 * 3 * 203 * teacher.config.vocab_size * 4)  # two of them
    hook = teacher.model.register_forward_pre_hook(lambda model, args: rows.append(len(args[0])))
    answers = lm.loglikelihood(asked, disable_tqdm=True)
    hook.remove()
    assert rows == [2, 2] and lm.batch_size == 8
    assert np.allclose([p for p, _ in answers], [p for p, _ in want], atol=1e-4)


# ---- running ---------------------------------------------------------------------------------------------------------


def test_rows_are_lm_evals_figures(data, from_hub, teacher, student, tmp_path):
    names = ["arc_easy", "mmlu", "gsm8k@0"]
    limit = {"gsm8k@0": 1}
    rows = run_benchmarks(student, teacher.tokenizer, names, items_folder=tmp_path, data=data, limit=limit)
    stock = {}
    for name in ("arc_easy", "mmlu"):
        loaded = task_manager().load([name])
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(1234)
        stock |= evaluate(whole(student, teacher.tokenizer), loaded, log_samples=False)["results"]
    by_name = {(row["task"], row["metric"]): row for row in rows}
    assert list(by_name) == [
        ("arc_easy", "acc"),
        ("arc_easy", "acc_norm"),
        ("mmlu", "acc"),
        ("gsm8k@0", "exact_match,strict-match"),
        ("gsm8k@0", "exact_match,flexible-extract"),
    ]
    for metric in ("acc", "acc_norm"):
        row = by_name["arc_easy", metric]
        assert row["value"] == stock["arc_easy"][f"{metric},none"]
        assert row["stderr"] == stock["arc_easy"][f"{metric}_stderr,none"]
    assert by_name["arc_easy", "acc"]["chance"] == pytest.approx(np.mean([1 / n for n in (4, 3, 5, 4, 4, 4)]))
    mmlu = by_name["mmlu", "acc"]
    assert mmlu["value"] == pytest.approx(stock["mmlu"]["acc,none"])
    assert (mmlu["items"], mmlu["chance"]) == (2 * 57, 0.25)
    assert mmlu["stderr"] == pytest.approx((mmlu["value"] * (1 - mmlu["value"]) / 113) ** 0.5)
    assert by_name["gsm8k@0", "exact_match,strict-match"]["chance"] is None
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    items = read_items(tmp_path / "arc_easy.jsonl")
    assert [item["doc"] for item in items] == list(range(6))
    assert np.mean([item["scores"]["acc"] for item in items]) == by_name["arc_easy", "acc"]["value"]
    for item in items:
        assert item["predicted"] == int(np.argmax(item["loglikelihoods"]))
        assert (item["predicted"] == item["gold"]) == bool(item["scores"]["acc"])
        assert len(item["loglikelihoods"]) == len(item["greedy"]) == len(item["lengths"]) == len(item["requests"])
    assert len(read_items(tmp_path / "mmlu.jsonl")) == 2 * 57
    (text,) = read_items(tmp_path / "gsm8k@0.jsonl")
    assert text["texts"] and "####" in text["gold"]


def test_a_row_is_compared_by_the_items_of_its_own_benchmark(data, teacher, student, tmp_path):
    options = {"data": data, "limit": 2, "log": lambda line: None}
    for name, model in (("teacher", teacher.model), ("student", student)):
        folder = tmp_path / name
        run_benchmarks(model, teacher.tokenizer, ["arc_easy"], items_folder=folder, **options | {"limit": 5})
        rows = run_benchmarks(model, teacher.tokenizer, ["ai2_arc"], items_folder=folder, **options)
        assert {(row["task"], row["file"]) for row in rows} == {(t, "ai2_arc") for t in ("arc_easy", "arc_challenge")}
        for row in rows:  # those of arc_easy.jsonl, which is there, too, are others
            items = items_of(folder, row)
            assert len(items) == row["items"] < 5
            assert np.mean([item["scores"][row["metric"]] for item in items]) == row["value"]


class Asked:
    """Counts what a model is asked, and fails after so many answers."""

    def __init__(self, monkeypatch, fail_after: int | None = None):
        self.requests: list[tuple] = []
        self.left = fail_after
        keep = CachedLM.keep
        ask = HFLM._loglikelihood_tokens

        def failing(recorder, key, answer):
            if self.left == 0 and key in recorder.waiting:
                raise RuntimeError("the GPU is gone")
            if self.left is not None and key in recorder.waiting:
                self.left -= 1
            keep(recorder, key, answer)

        def counting(model, requests, **options):
            self.requests += [request[0] for request in requests]
            return ask(model, requests, **options)

        monkeypatch.setattr(CachedLM, "keep", failing)
        monkeypatch.setattr(HFLM, "_loglikelihood_tokens", counting)


def test_an_interrupted_run_goes_on_where_it_stopped(data, teacher, tmp_path, monkeypatch):
    names, options = ["arc_easy", "piqa"], {"data": data, "batch_size": 2}
    want = run_benchmarks(teacher.model, teacher.tokenizer, names, items_folder=tmp_path / "whole", **options)
    arc, piqa = 4 + 3 + 5 + 4 + 4 + 4, 2 * 5
    with monkeypatch.context() as patch:
        first = Asked(patch, fail_after=arc + 7)
        with pytest.raises(RuntimeError, match="GPU is gone"):
            run_benchmarks(teacher.model, teacher.tokenizer, names, items_folder=tmp_path / "cut", **options)
    # the first task's results are there, and of the second all items that were complete
    assert json.loads((tmp_path / "cut" / "rows.json").read_text()) == want[:2]
    complete = {item["doc"]: item for item in read_items(tmp_path / "cut" / "piqa.jsonl")}
    assert 2 <= len(complete) < 5
    assert all(
        complete[item["doc"]] == item
        for item in read_items(tmp_path / "whole" / "piqa.jsonl")
        if item["doc"] in complete
    )
    with (tmp_path / "cut" / "piqa.jsonl").open("a") as file:
        file.write('{"request": "a line that was cut sho')
    with monkeypatch.context() as patch:
        second = Asked(patch)
        rows = run_benchmarks(teacher.model, teacher.tokenizer, names, items_folder=tmp_path / "cut", **options)
    assert rows == want
    assert len(first.requests) == arc + 8  # two pieces of piqa, of two documents each
    assert len(second.requests) == piqa - 7  # neither a finished task nor an answered request is asked again
    for name in names:
        assert (tmp_path / "cut" / f"{name}.jsonl").read_bytes() == (tmp_path / "whole" / f"{name}.jsonl").read_bytes()
    with monkeypatch.context() as patch:  # more items ask for those that are new, and nothing of another model is used
        third = Asked(patch)
        run_benchmarks(teacher.model, teacher.tokenizer, ["piqa"], items_folder=tmp_path / "cut", limit=2, **options)
        assert not third.requests
        other = random_teacher("llama", seed=1)
        run_benchmarks(other.model, other.tokenizer, ["piqa"], items_folder=tmp_path / "cut", limit=2, **options)
        assert len(third.requests) == 4


def test_the_fingerprint_changes_with_weights_dtype_and_length(teacher, student):
    tokenizer = teacher.tokenizer
    prints = [answer_key(lm_for(student, tokenizer)), answer_key(lm_for(student, tokenizer, max_length=99))]
    prints.append(answer_key(lm_for(convert(teacher, init="library", seed=1), tokenizer)))
    prints.append(answer_key(lm_for(convert(teacher, init="library").bfloat16(), tokenizer)))
    assert len(set(prints)) == 4
    assert answer_key(lm_for(student, tokenizer, fast=False)) == prints[0]


# ---- letters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, letter", [
    (" B", "B"), ("(C)", "C"), ("**D**", "D"), ("A.\n", "A"), ("A. Paris", "A"), (" A cat", None), ("The", None),
    ("", None), ("E", None), ("b", None), ("Answer", None), (" B Paris", "B"),
    ("\nA. the shop", "A"), (" C\n\nwhich of", "C"), ("\nThe answer is: D. Dun", "D"), ("The answer is a B", None),
])  # fmt: skip
def test_letters_are_read_from_answers(text, letter):
    assert parse_letter(text, 4) == letter


class Scripted(HFLM):
    """Answers prompts by a function."""

    def generate_until(self, requests, disable_tqdm=False):
        return [self.reply(request.args[0]) for request in requests]


@pytest.mark.parametrize("name", ["arc_challenge_rotated", "mmlu_rotated@2"])
def test_a_model_that_always_says_a_is_seen(name, data, teacher, tmp_path):
    model = Scripted(teacher.model, tokenizer=teacher.tokenizer)
    benchmark = load_benchmark(name, data=data, limit=6)
    prompts = []

    def shortest(prompt: str) -> str:  # a model that goes by content
        prompts.append(prompt)
        options = prompt.split("\n\n")[-1].split("\n")[-6:-1]
        options = [line for line in options if line[1:3] == ". "]
        return " " + min(options, key=lambda line: (len(line), line[2:]))[0]

    sizes = [4, 3, 5, 4, 4, 4] if name.startswith("arc") else [4] * 6
    guessing = np.mean([1 / n for n in sizes])
    replies = {"letter": lambda _: " A", "content": shortest, "silent": lambda _: " The"}
    scores = {}
    for kind, reply in replies.items():
        model.reply = reply
        (tmp_path / kind).mkdir()
        rows = run_benchmark(model, benchmark, tmp_path / kind)
        assert {row["task"] for row in rows} == {name} and {row["items"] for row in rows} == {6}
        scores[kind] = {row["metric"]: row["value"] for row in rows}
        chance = {row["metric"]: row["chance"] for row in rows}
        assert chance["acc_rotated"] == pytest.approx(guessing)
    assert scores["letter"]["acc_rotated"] == pytest.approx(guessing)
    assert (scores["letter"]["share_A"], scores["letter"]["share_B"], scores["letter"]["same_content"]) == (1, 0, 0)
    assert scores["content"]["same_content"] == 1
    assert scores["content"]["acc_generated"] == pytest.approx(scores["content"]["acc_rotated"])
    assert scores["content"]["share_A"] == pytest.approx(guessing)
    assert (scores["silent"]["share_none"], scores["silent"]["acc_rotated"]) == (1, 0)
    assert len(prompts) == sum(sizes)
    if name == "mmlu_rotated@2":
        first, second = (prompt.split("\n\n") for prompt in prompts[:2])
        assert first[:3] == second[:3] and len(first) == 4  # description, two examples in their own order, question
        assert sorted(line[3:] for line in first[3].split("\n")[1:5]) == sorted(
            line[3:] for line in second[3].split("\n")[1:5]
        )


# ---- two models ------------------------------------------------------------------------------------------------------


def made_items(scores: list[float], choices: int = 4) -> list[dict]:
    return [
        {"task": "t", "doc": i, "hash": str(i), "lengths": [1] * choices, "scores": {"acc": score}}
        for i, score in enumerate(scores)
    ]


def test_ratios_have_paired_intervals():
    rng = np.random.default_rng(0)
    teacher = (rng.random(1000) < 0.6).astype(float)
    worse = np.where(rng.random(1000) < 0.9, teacher, rng.random(1000) < 0.25)
    ratio, low, high = paired(made_items(worse), made_items(teacher))
    assert ratio == pytest.approx(worse.mean() / teacher.mean())
    assert low < ratio < high < low + 0.08
    # the pairing matters: the same scores on shuffled items have a wider interval
    _, apart_low, apart_high = paired(made_items(rng.permutation(worse)), made_items(teacher))
    assert apart_high - apart_low > 1.8 * (high - low)
    above, above_low, above_high = paired(made_items(worse), made_items(teacher), above_chance=True)
    assert above == pytest.approx((worse.mean() - 0.25) / (teacher.mean() - 0.25))
    assert above_low < above < above_high and above_high - above_low > high - low
    assert paired(made_items(teacher), made_items(teacher)) == (1, 1, 1)
    assert paired(made_items(worse), made_items(teacher)) == (ratio, low, high)


def test_ratios_of_rotated_tasks_are_over_questions():
    def asked(first: float, second: float) -> list[dict]:
        return [
            {
                "task": "t",
                "doc": 2 * i + r,
                "hash": "",
                "item": i,
                "rotation": r,
                "choices": 2,
                "scores": {"acc_rotated": x},
            }
            for i in range(100)
            for r, x in enumerate((first, second if i % 2 else 0.0))
        ]

    mine, theirs = asked(1.0, 0.0), asked(1.0, 1.0)
    assert paired(mine, theirs, "acc_generated") == (1, 1, 1)
    ratio, low, high = paired(mine, theirs, "acc_rotated")
    assert ratio == pytest.approx(0.5 / 0.75)
    assert low < ratio < high < low + 0.1
    assert paired(mine, theirs, "acc_rotated", above_chance=True)[0] == pytest.approx(0, abs=1e-9)


def test_a_student_with_zeroed_states_is_read_as_a_whole(student, teacher):
    control, tokenizer = zero_state_every(student, 64), teacher.tokenizer
    assert type(lm_for(student, tokenizer)) is ConstantStateLM and type(lm_for(control, tokenizer)) is WholeLM
    assert not has_known_mixers(control) and has_known_mixers(student)  # so no graph captures its steps


def test_ratios_of_groups_that_average_tasks_do_the_same():
    def of(a: float, b: float) -> list[dict]:
        tasks = [("large", a)] * 90 + [("small", b)] * 10
        return [{"task": t, "doc": i, "hash": "", "scores": {"acc": x}} for i, (t, x) in enumerate(tasks)]

    mine, theirs = of(1.0, 0.5), of(1.0, 1.0)
    assert paired(mine, theirs)[0] == pytest.approx(0.95)
    assert paired(mine, theirs, by_task=True)[0] == pytest.approx(0.75)


def test_scores_that_are_no_fractions_have_no_ratio(tmp_path):
    results = {
        "results": {
            "ai2_arc": {}, "a": {"acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 2},
            "b": {"perplexity,none": 9.0, "perplexity_stderr,none": "N/A", "sample_len": 2},
        },
        "higher_is_better": {"a": {"acc": True}, "b": {"perplexity": False}},
    }  # fmt: skip
    items = [{"task": "a", "doc": i, "hash": "", "scores": {"acc": float(i)}, "lengths": [1, 1]} for i in range(2)]
    items += [{"task": "b", "doc": i, "hash": "", "scores": {"perplexity": [3.0, 1]}} for i in range(2)]
    rows = score_rows(Benchmark("ai2_arc@3", {"a": None, "b": None}, {}, None), results, items)
    assert [(row["task"], row["fraction"], row["by_task"]) for row in rows] == [
        ("a@3", True, False),
        ("b@3", False, False),
    ]
    rows = [{"model": model, **row, "file": "ai2_arc@3"} for model in ("teacher", "kda") for row in rows]
    for model in ("teacher", "kda"):
        (tmp_path / model).mkdir()
        (tmp_path / model / "ai2_arc@3.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    compared = {row["task"]: row for row in compare_with_teacher(rows, tmp_path) if row["model"] == "kda"}
    assert compared["a@3"]["ratio"] is None or compared["a@3"]["ratio"][0] == 1
    assert "ratio" in compared["a@3"] and "ratio" not in compared["b@3"]
    assert score_text(compared["b@3"]) == "9" and score_text(compared["a@3"]) == "50.0 ± 10.0"


def test_no_ratio_where_the_teacher_is_at_chance_and_none_across_items():
    at_chance = [1.0, 0.0, 0.0, 0.0] * 50
    assert paired(made_items(at_chance), made_items(at_chance), above_chance=True) is None
    assert paired(made_items(at_chance), made_items([0.0] * 200)) is None
    assert paired(made_items(at_chance), made_items(at_chance))[0] == 1
    with pytest.raises(ValueError, match=r"no score 'acc_norm'\. They have \['acc'\]"):
        paired(made_items(at_chance), made_items(at_chance), "acc_norm")
    with pytest.raises(ValueError, match="199 documents are the same, of 199 and 200"):
        paired(made_items(at_chance[:199]), made_items(at_chance))


def test_questions_that_miss_an_order_do_not_count():
    item = {"task": "t", "choices": 2, "gold": "A", "texts": ["A"]}
    items = [item | {"item": 0, "rotation": r} for r in (0, 1)] + [item | {"item": 1, "rotation": 0}]
    assert {row["items"] for row in letter_bias(items)} == {1}
    with pytest.raises(ValueError, match="None of 1 questions has answers in all orders"):
        letter_bias(items[2:])

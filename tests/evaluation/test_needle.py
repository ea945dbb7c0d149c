"""Needles: prompts of an exact length in any tokenizer, lm-eval's templates, answers and scores, and resuming."""

import json
import random
import re
import sys
import types
from dataclasses import replace

import pytest
import torch
from figures import drawn_by, lines_of
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from deltify import convert
from deltify.conversion.teacher import byte_tokenizer, random_teacher
from deltify.evaluation import needles
from deltify.evaluation.haystack import ADJECTIVES, NOUNS
from deltify.evaluation.lm_eval_model import lm_for
from deltify.evaluation.needles import DEPTHS, TASKS, NeedleMaker, ask, ask_needles, hits, summarise
from deltify.evaluation.plots import draw_by_length, draw_heat_map
from deltify.evaluation.tables import needle_table
from deltify.inference import prefill
from deltify.model.cache import new_cache

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ANSWER_TOKENS = 16


pytestmark = pytest.mark.usefixtures("one_thread")


def made_text(sentences: int = 4000) -> str:
    """Sentences with what tokenizers trip over: digits, quotes, dashes, accents, blanks and line ends."""
    rng = random.Random(0)
    words = [
        "the",
        "a",
        "river",
        "It's",
        "naïve",
        "3",
        "1984",
        "café",
        "(see",
        "page)",
        '"so',
        'said"',
        "x_1",
        "--",
        "of",
    ]
    words += [*NOUNS[:80], "don't", "e.g.", "\u201cyes\u201d", "日本", "==="]
    lines = []
    for _ in range(sentences):
        lines.append(
            " ".join(rng.choices(words, k=rng.randint(3, 20))).capitalize() + rng.choice([".", "!", '?"', ".\n\n"])
        )
    return " ".join(lines)


TEXT = made_text()


def trained(pre_tokenizer, decoder, *, bos: bool = False, end: bool = False, **options) -> PreTrainedTokenizerFast:
    """A small BPE tokenizer trained on the text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", **options))
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoder
    alphabet = pre_tokenizers.ByteLevel.alphabet() if isinstance(decoder, decoders.ByteLevel) else []
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256) if options.get("byte_fallback"))]
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=special, initial_alphabet=alphabet, show_progress=False, max_token_length=16
    )
    tokenizer.train_from_iterator([TEXT[:40_000], "0123456789"], trainer)
    if bos:
        ids = [("<s>", 1), ("</s>", 2)]
        template = "<s> $A </s>" if end else "<s> $A"
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def gpt2_like() -> PreTrainedTokenizerFast:
    digits = pre_tokenizers.Digits(individual_digits=True)
    split = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return trained(split, decoders.ByteLevel())


def llama3_like(end: bool = False) -> PreTrainedTokenizerFast:
    """Joins line ends to the punctuation before them; begins every text with a token."""
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    no_regex = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return trained(pre_tokenizers.Sequence([split, no_regex]), decoders.ByteLevel(), bos=True, end=end)


def ending() -> PreTrainedTokenizerFast:
    """Ends every text with a token, too, which is no part of a prompt."""
    return llama3_like(end=True)


def llama2_like() -> PreTrainedTokenizerFast:
    """Marks the space before a word, at a text's beginning, too."""
    return trained(pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace(), bos=True, byte_fallback=True)


def across_words(**options) -> PreTrainedTokenizerFast:
    """Tokens reach across spaces, so that words do not have tokens of their own."""
    return trained(None, decoders.Replace("▁", " "), byte_fallback=True, **options)


def across_words_ending() -> PreTrainedTokenizerFast:
    return across_words(bos=True, end=True)


INEXACT = (across_words, across_words_ending)
TOKENIZERS = {f.__name__: f for f in (byte_tokenizer, gpt2_like, llama3_like, ending, llama2_like, *INEXACT)}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("texts")
    half = len(TEXT) // 2
    (folder / "a.jsonl").write_text(json.dumps({"text": TEXT[:half]}) + "\n", encoding="utf-8")
    (folder / "b.txt").write_text(TEXT[half:], encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def make(source) -> NeedleMaker:
    return NeedleMaker(byte_tokenizer(), source, answer_tokens=ANSWER_TOKENS)


# ---- make ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompt_and_room_take_exactly_the_length(name, source):
    tokenizer = TOKENIZERS[name]()
    make, exact = NeedleMaker(tokenizer, source, answer_tokens=ANSWER_TOKENS), TOKENIZERS[name] not in INEXACT
    prompts = lm_for(random_teacher("llama").model, tokenizer)  # which tokens HFLM gives a prompt, save an end
    for task in TASKS if exact else ("niah_single_1", "niah_single_2", "niah_multikey_2"):
        for length, index in ((1200, 0), (1777, 1), (3001, 2)):
            sample = make(task, length, index)
            assert sample.ids.tolist() == prompts.tok_encode(sample.prompt), (task, length, index)
            assert sample.ids.tolist() == tokenizer(sample.prompt)["input_ids"][: len(sample.ids)]
            assert 2 not in sample.ids or name == "byte_tokenizer"
            short = length - ANSWER_TOKENS - len(sample.ids)
            assert short == 0 if exact else 0 <= short < 25, (task, length, index)
            assert all(sample.prompt.count(value) == 1 for value in sample.expected)
    assert make.text.exact == exact
    if exact:
        length = 3 * len(make.text.ids)  # more than the text has
        assert len(make("niah_single_2", length, 0).ids) == length - ANSWER_TOKENS


def test_a_needle_lies_at_its_depth(make):
    for task in TASKS:
        for index in range(len(DEPTHS)):
            sample = make(task, 12_000, index)
            head, text = sample.question.split("\n", 1)
            assert head.endswith("afterwards.")
            text = text.rpartition("\n")[0]
            places = [100 * text.index(value) / len(text) for value in sample.expected]
            assert places == pytest.approx(sample.depths, abs=2.5), (task, index)
            assert sample.depth == sample.depths[0]
    assert sorted(make("niah_single_1", 2000, index).depth for index in range(8)) == list(DEPTHS)
    assert len({make("niah_single_1", 2000, index).depth // 50 for index in range(2)}) == 2  # two are apart already
    ends = NeedleMaker(make.tokenizer, make.source, answer_tokens=ANSWER_TOKENS, depths=(0, 100))
    first, last = (ends("niah_single_2", 3000, index).question.split("\n")[1] for index in range(2))
    assert first.startswith("One of the special magic numbers")
    assert re.search(r"One of the special magic numbers for \S+ is: \d{7}\.$", last)


def test_samples_depend_on_their_arguments_alone(make, source):
    again, other = (NeedleMaker(make.tokenizer, source, answer_tokens=ANSWER_TOKENS, seed=seed) for seed in (0, 1))
    for task in reversed(TASKS):
        for index in (1, 0):
            assert again(task, 1500, index).prompt == make(task, 1500, index).prompt
            assert other(task, 1500, index).prompt != make(task, 1500, index).prompt
    texts = {make("niah_single_2", 1500, index).question.split("\n")[1] for index in range(6)}
    assert len(texts) == 6


def test_what_cannot_be_made_is_said(make, tmp_path):
    with pytest.raises(ValueError, match="Did you mean niah_multikey_"):
        make("niah_multikey", 1000, 0)
    with pytest.raises(ValueError, match=r"300 tokens are too few: the answer needs 16, question and needles \d+"):
        make("niah_single_1", 300, 0)
    with pytest.raises(ValueError, match="0 to 100"):
        NeedleMaker(make.tokenizer, depths=[50, 101])
    with pytest.raises(FileNotFoundError, match="there is no text at"):
        NeedleMaker(make.tokenizer, str(tmp_path / "absent"))("niah_single_2", 1000, 0)
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(ValueError, match="has 2 words"):
        NeedleMaker(make.tokenizer, str(tmp_path / "short.txt"))("niah_single_2", 1000, 0)


# ---- against lm-eval -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ruler():
    """lm-eval's own task functions, which need two packages and their data for word lists and sentences."""
    pytest.importorskip("lm_eval")
    words = types.SimpleNamespace(_categories={"nouns": NOUNS, "adjectives": ADJECTIVES, "verbs": []})
    wonderwords, nltk = types.ModuleType("wonderwords"), types.ModuleType("nltk")
    wonderwords.RandomWord = lambda: words
    nltk.data = types.SimpleNamespace(find=lambda name: name)
    nltk.sent_tokenize = lambda text: re.split(r"(?<=[.!?]) ", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wonderwords", wonderwords)
        patch.setitem(sys.modules, "nltk", nltk)
        from lm_eval.tasks.ruler import niah_utils
    return niah_utils


def form(text: str) -> str:
    """A text without what is drawn at random."""
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID", text)
    return re.sub(r"\b[1-9]\d{6}\b", "NUMBER", re.sub(r"\b[a-z]+-[a-z]+\b", "WORD", text))


@pytest.mark.parametrize("task", TASKS)
def test_prompts_have_the_form_of_lm_evals(task, make, ruler, monkeypatch):
    theirs_of, haystack = ruler.generate_samples, TEXT.split()
    monkeypatch.setattr(ruler, "generate_samples", lambda *args, **kw: theirs_of(*args, **kw | {"num_samples": 3}))
    get = ruler.get_haystack
    monkeypatch.setattr(
        ruler, "get_haystack", lambda type_haystack: haystack if type_haystack == "essay" else get(type_haystack)
    )
    monkeypatch.setattr(ruler, "get_tokenizer", lambda name: make.tokenizer)
    documents = getattr(ruler, task)(max_seq_lengths=[6000], tokenizer="bytes")["test"]
    for index, theirs in enumerate(documents):
        ours = make(task, 6000, index).document()
        assert ours.keys() == theirs.keys()
        assert len(ours["outputs"]) == len(theirs["outputs"])
        assert [form(x) for x in ours["outputs"]] == [form(x) for x in theirs["outputs"]]
        assert form(ours["gen_prefix"]) == form(theirs["gen_prefix"])
        head, *context, question = form(ours["input"]).split("\n")
        their_head, *their_context, their_question = form(theirs["input"]).split("\n")
        assert (head, question) == (their_head, their_question)
        needle = r"One of the special magic \w+ for \w+ is: \w+\."
        count, their_count = (len(re.findall(needle, "\n".join(lines))) for lines in (context, their_context))
        if TASKS[task].haystack != "needles":
            assert count == their_count
        if TASKS[task].haystack != "text":
            cut = [line for line in context if line not in their_context]
            assert len(cut) <= 1  # the line that fills the gap


def test_scores_are_lm_evals(make, ruler):
    from lm_eval.tasks.ruler.common_utils import process_results

    seen = set()
    for task in TASKS:
        sample = make(task, 2000, 1)
        first, *rest = sample.expected
        answers = [
            "",
            first,
            first[:-1],
            f"\x01\n {first.upper()}\t",
            f" it is {first[:3]} {first[3:]}",
            f"{first}{first}",
        ]
        answers += [", ".join(sample.expected), " ".join(rest), f"{sample.expected[-1]}\x00{first}9"]
        for answer in answers:
            found = hits(answer, sample.expected)
            theirs = process_results(sample.document(), [answer])["2000"]
            assert sum(found) / len(found) == theirs, (task, answer)
            seen.add(theirs)
    assert seen == {0.0, 0.25, 0.5, 0.75, 1.0}


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_answers_are_lm_evals(kind, make):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = speaker(kind)
    samples = [make(task, 800, 0) for task in ("niah_single_1", "niah_single_2")]
    plain = ask(model, make.tokenizer, samples, ANSWER_TOKENS)
    # a letter that the model says in the midst of its first answer becomes an end of sequence
    end = plain[0][next(i for i in range(2, ANSWER_TOKENS) if plain[0][i] not in plain[0][:i])]
    model.generation_config.eos_token_id = [make.tokenizer.eos_token_id, *make.tokenizer(end)["input_ids"]]
    lm = HFLM(model, tokenizer=make.tokenizer, batch_size=1, max_length=4096)
    options = {"do_sample": False, "temperature": 0.0, "max_gen_toks": ANSWER_TOKENS, "until": []}
    requests = [Instance("generate_until", s.document(), (s.prompt, options), 0) for s in samples]
    theirs = lm.generate_until(requests, disable_tqdm=True)
    ours = ask(model, make.tokenizer, samples, ANSWER_TOKENS)
    assert ours == [answer.removesuffix(end) for answer in theirs]
    assert ours[0] == plain[0].split(end)[0] and len(plain[0]) == ANSWER_TOKENS


def speaker(kind: str):
    """A tiny random model that says printable letters only, each one token."""
    teacher = random_teacher("llama", initializer_range=0.3)
    model = teacher.model if kind == "teacher" else convert(teacher, init="library").eval()
    letters = [ids[0] for ids in byte_tokenizer()([chr(code) for code in range(33, 127)])["input_ids"]]
    with torch.no_grad():
        keep = torch.zeros(len(model.lm_head.weight), 1).index_fill(0, torch.tensor(letters), 1.0)
        model.lm_head.weight.mul_(keep)
    return model


# ---- ask -------------------------------------------------------------------------------------------------------------


def test_an_answer_ends_when_it_holds_what_was_asked(make):
    model = speaker("teacher")
    samples = [make("niah_single_2", 900, index) for index in range(3)]
    whole = ask(model, make.tokenizer, samples, ANSWER_TOKENS)
    wanted = [replace(sample, expected=[answer[4:8]]) for sample, answer in zip(samples, whole)]
    wanted[2] = samples[2]
    cut = ask(model, make.tokenizer, wanted, ANSWER_TOKENS)
    assert [len(answer) for answer in cut[:2]] == [answer.index(answer[4:8]) + 4 for answer in whole[:2]]
    assert cut[2] == whole[2]
    assert all(hits(answer, sample.expected) == [True] for answer, sample in zip(cut[:2], wanted))


@pytest.mark.parametrize("layers", ["none", "3:1", "all"])
def test_reading_in_pieces_changes_nothing(layers, make, monkeypatch):
    model = convert(random_teacher("llama"), init="library", full_attention_layers=layers).eval()
    samples = [make("niah_single_2", 900, index) for index in range(3)]
    ids = torch.from_numpy(samples[0].ids).long()[None]
    whole = ask(model, make.tokenizer, samples, ANSWER_TOKENS)
    logits = prefill.prefill(model, ids, new_cache(model))
    sizes = []
    forward = model.model.forward
    monkeypatch.setattr(prefill, "FORWARD_TOKENS", 200)
    monkeypatch.setattr(
        model.model, "forward", lambda *a, **kw: sizes.append(kw["input_ids"].shape) or forward(*a, **kw)
    )
    torch.testing.assert_close(prefill.prefill(model, ids, new_cache(model)), logits, atol=1e-4, rtol=1e-4)
    assert ask(model, make.tokenizer, samples, ANSWER_TOKENS) == whole
    assert (1, 192) in sizes and (3, 64) in sizes and max(rows * tokens for rows, tokens in sizes) <= 200


def test_attention_bounds_rows_and_pieces(monkeypatch):
    teacher = random_teacher("llama")
    student = convert(teacher, init="library").eval()
    per_token = 2 * 2 * 16 * 4 * 4  # keys and values, heads, width, layers, float32
    monkeypatch.setattr(prefill, "CACHE_BYTES", per_token * 5000)
    assert [prefill.max_batch_size(teacher.model, context) for context in (10, 1000, 9000)] == [128, 5, 1]
    assert [prefill.max_batch_size(student, context) for context in (10, 9000)] == [128, 128]
    assert prefill.piece_length(student, 1, 2**22) == 4096
    assert prefill.piece_length(teacher.model, 1, 2**20) == 256


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_other_weights_or_another_dtype_are_asked_anew_under_the_same_name(make, tmp_path, monkeypatch):
    model, path = random_teacher("llama").model, tmp_path / "needles.jsonl"
    plan = {"name": "tiny", "tasks": ["niah_single_1"], "lengths": [1000], "samples": 2}
    asked = []
    monkeypatch.setattr(needles, "ask", lambda model, tokenizer, group, room: asked.append(len(group)) or ["?"] * 2)
    first = ask_needles(model, make, path, **plan)
    model.model.layers[2].mlp.up_proj.weight.data[5, 7] += 0.1
    second = ask_needles(model, make, path, **plan)
    model.bfloat16()
    ask_needles(model, make, path, **plan)
    model.float()
    model.model.layers[2].mlp.up_proj.weight.data[5, 7] += 1
    ask_needles(model, make, path, **plan)
    assert asked == [2, 2, 2, 2] and len(path.read_text().splitlines()) == 8
    assert {row["weights"] for row in first}.isdisjoint({row["weights"] for row in second})
    ask_needles(random_teacher("llama").model, make, path, **plan)  # the first again
    assert asked == [2, 2, 2, 2]


def test_a_broken_run_goes_on_where_it_stopped(make, tmp_path, monkeypatch):
    model, path, lines = random_teacher("llama").model, tmp_path / "needles.jsonl", []
    plan = {"name": "tiny", "tasks": ["niah_single_1", "niah_multivalue"], "lengths": [1000, 1100], "samples": 3}
    rows = ask_needles(model, make, path, **plan, log=lines.append)
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    assert len(rows) == 12 and len(lines) == 4 and "niah_multivalue at 1,100 tokens" in lines[-1]
    assert all(row["tokens"] == row["length"] for row in rows)

    text = path.read_text()
    path.write_text(text[: text.index("\n", len(text) // 2) + 60])  # killed while it wrote a line
    left = path.read_text().count("\n")
    asked = []
    monkeypatch.setattr("deltify.evaluation.needles.ask", lambda *args: asked.extend(args[2]) or ask(*args))
    assert ask_needles(model, make, path, **plan) == rows
    assert len(asked) == 12 - left
    assert sorted(map(json.dumps, map(json.loads, path.read_text().splitlines()))) == sorted(map(json.dumps, rows))

    asked.clear()
    assert ask_needles(model, make, path, **plan) == rows and not asked
    ask_needles(model, make, path, **plan | {"name": "other"})
    assert len(asked) == 12
    asked.clear()
    new = ask_needles(
        model, NeedleMaker(make.tokenizer, make.source, answer_tokens=ANSWER_TOKENS, seed=1), path, **plan
    )
    assert len(asked) == 12 and [row["prompt"] for row in new] != [row["prompt"] for row in rows]


def made_rows() -> list[dict]:
    rows = []
    for model, limit in (("teacher", 4096), ("student", 1500), ("teacher, window 64", 100)):
        for task in ("niah_single_1", "niah_multivalue"):
            for length in (512, 1024, 2048, 4096):
                for sample, depth in enumerate(DEPTHS):
                    depths = [depth] if "single" in task else [depth, *DEPTHS[:3]]
                    found = [int(length * (100 - d) / 100 < limit) for d in depths]
                    rows.append(
                        {
                            "model": model,
                            "task": task,
                            "length": length,
                            "sample": sample,
                            "depth": depth,
                            "depths": depths,
                        }
                        | {"hits": found, "correct": sum(found) / len(found), "prompt": "0"}
                    )
    return rows


def test_summary_and_table():
    rows = made_rows()
    summary = {(row["model"], row["task"], row["length"]): row for row in summarise(rows)}
    row = summary["student", "niah_single_1", 2048]
    right = [r["correct"] for r in rows if (r["model"], r["task"], r["length"]) == ("student", "niah_single_1", 2048)]
    assert row["score"] == sum(right) / 8 == 6 / 8 and row["items"] == 8
    assert row["stderr"] == pytest.approx(torch.tensor(right).std().item() / 8**0.5)
    assert summarise(rows[:1])[0]["stderr"] is None
    table = needle_table(summarise(rows))
    assert table.columns == ("task: model", "512", "1k", "2k", "4k")
    assert len(table.rows) == 6 and "8 samples" in table.title
    (line,) = [line for line in table.rows if line[0] == "niah_single_1: student"]
    assert line[3] == "75 ± 16"


def test_pictures(tmp_path):
    rows = made_rows()
    for tasks, counts in ((None, "2 to 10"), (["niah_single_1"], "1")):
        paths, figure = drawn_by(draw_heat_map, rows, tmp_path / "map", tasks=tasks, trained=1024)
        assert [path.name for path in paths] == ["map.png", "map.svg"] and all(path.is_file() for path in paths)
        teacher, student, window = [axis for axis in figure.axes if axis.get_title()]
        assert student.get_title() == "student"
        assert [label.get_text() for label in student.get_xticklabels()] == ["512", "1k", "2k", "4k"]
        assert [label.get_text() for label in student.get_yticklabels()] == [str(depth) for depth in DEPTHS]
        shown = {axis: axis.images[0].get_array() for axis in (teacher, student, window)}
        assert (shown[teacher] == 1).all() and (shown[window][:6] == 0).all()
        # at 2k tokens, the student finds what is among the last 1,500
        assert shown[student][:, 2].tolist() == [int(2048 * (100 - depth) / 100 < 1500) for depth in DEPTHS]
        title = figure.get_suptitle()
        assert f"\n{counts} value" in title and "Red line: training length, 1k" in title
    summary = summarise(rows)
    paths, figure = drawn_by(draw_by_length, summary, tmp_path / "lengths", trained=1024)
    assert [path.name for path in paths] == ["lengths.png", "lengths.svg"] and all(path.is_file() for path in paths)
    assert [axis.get_title() for axis in figure.axes if axis.get_title()] == ["niah_single_1", "niah_multivalue"]
    for axis in figure.axes[:2]:
        lines = lines_of(axis)
        assert list(lines) == ["teacher", "student", "teacher, window 64"]
        for model, (x, y) in lines.items():
            scores = {r["length"]: r["score"] for r in summary if (r["model"], r["task"]) == (model, axis.get_title())}
            assert dict(zip(x, y)) == pytest.approx({length: 100 * score for length, score in scores.items()})
    with pytest.raises(ValueError, match="no rows of niah_single_3"):
        draw_heat_map(rows, tmp_path / "map", tasks=["niah_single_3"])

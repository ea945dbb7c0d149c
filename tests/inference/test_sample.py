"""Documents that a model writes itself."""

import json

import numpy as np
import pytest
import torch
from conftest import with_special_tokens

from deltify import convert
from deltify.cli import main
from deltify.conversion.teacher import byte_tokenizer, random_teacher
from deltify.data.chats import Chats
from deltify.data.sources import documents, held_out
from deltify.data.token_files import tokenize
from deltify.inference.generate import generate
from deltify.inference.sample import (
    Question,
    beginnings,
    continuations,
    last_number,
    read_questions,
    sample,
    sample_answers,
)
from deltify.training.checkpoint import save_model

TEXTS = [f"Document {number} tells of its number {number}, and goes on for a while." for number in range(60)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    teacher = random_teacher("llama")
    save_model(folder / "model", convert(teacher, init="library"), teacher.tokenizer)
    lines = [json.dumps({"text": text}) + "\n" for text in ["short", *TEXTS]]
    (folder / "text.jsonl").write_text("".join(lines))
    return folder


def test_documents_begin_as_those_of_the_source_and_the_seed_decides_the_rest(model, tmp_path):
    fit = [text for text in TEXTS if not held_out(text)]
    assert len(fit) < len(TEXTS)
    settings = {"prompt_tokens": 16, "length": 40, "batch": 7, "device": "cpu"}
    one, same, other = (tmp_path / f"{name}.jsonl" for name in ("one", "same", "other"))
    for path, seed in ((one, 0), (same, 0), (other, 1)):
        assert sample(str(model / "model"), str(model / "text.jsonl"), path, seed=seed, count=20, **settings) == path
    found = list(documents(str(one)))
    assert [text[:16] for text in found] == [text[:16] for text in fit[:20]]
    assert all(text[16:] != whole[16:40] for text, whole in zip(found, fit))
    assert one.read_text() == same.read_text() != other.read_text()


@pytest.mark.parametrize("end", [False, True])
def test_a_beginning_begins_with_a_special_token_and_has_no_end(end, model, tmp_path):
    plain, tokenizer = byte_tokenizer(), with_special_tokens(byte_tokenizer(), end=end)
    texts = [text for text in ("", "ab", "abc", "abcd", "abcdef", "abcdefgh") if not held_out(text)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = list(beginnings(str(tmp_path / "text.jsonl"), tokenizer, 4))
    assert found == [[tokenizer.bos_token_id, *plain(text[:3])["input_ids"]] for text in texts if len(text) > 2] != []


def test_a_document_ends_with_the_end_of_sequence_token():
    teacher = random_teacher("llama")
    end = teacher.tokenizer.eos_token_id
    prompts = torch.tensor([[72, 105, 33], [66, 121, 101]])

    class Speaker:
        device = torch.device("cpu")

        def generate(self, ids, **options):
            assert options["max_new_tokens"] == 7 and options["eos_token_id"] == [end]
            return torch.cat([ids, torch.tensor([[1, 2, end, end, end, end, end], [1, 2, 3, 4, 5, 6, 7]])], 1)

    rows = list(continuations(Speaker(), prompts, 10, 1.0, {end}))
    assert rows == [([1, 2], True), ([1, 2, 3, 4, 5, 6, 7], False)]


def test_a_long_message_takes_no_tokens_from_the_answers_of_its_batch():
    class Speaker:
        device = torch.device("cpu")

        def generate(self, ids, **options):
            assert options["max_new_tokens"] == 8  # the first message may get a chat of 10 tokens
            return torch.cat([ids, torch.tensor([[1, 2, 3, 4, 5, 6, 9, 9], [1, 2, 3, 4, 5, 6, 7, 8]])], 1)

    prompts, mask = torch.arange(12).view(2, 6), torch.tensor([[0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1]])
    rows = list(continuations(Speaker(), prompts, 10, 1.0, {9}, mask))
    assert rows == [([1, 2, 3, 4, 5, 6], True), ([1, 2, 3, 4], False)]


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Parrot:
    """A model whose answer is the message, and after it a number that grows with each answer; the last has no end."""

    device = torch.device("cpu")

    def __init__(self, tokenizer):
        self.tokenizer, self.answers = tokenizer, 0

    def generate(self, ids, attention_mask, **options):
        rows = []
        for row, mask in zip(ids.tolist(), attention_mask.tolist()):
            assert sorted(mask) == mask  # padding is on the left
            text = self.tokenizer.decode([token for token, real in zip(row, mask) if real])
            said = text.removeprefix("<user>").removesuffix("</s><assistant>")
            self.answers += 1
            new = self.tokenizer(f"{said} {self.answers}", add_special_tokens=False)["input_ids"][:60]
            end = [self.tokenizer.eos_token_id] * (60 - len(new)) if self.answers < 6 else [1] * (60 - len(new))
            rows.append(row + new + end)
        return torch.tensor(rows)


def test_chats_hold_message_and_answer_and_keep_right_numbers(model, tmp_path, monkeypatch, capsys):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr("deltify.inference.sample.load_tokenizer", lambda _: tokenizer)
    parrot = Parrot(tokenizer)
    monkeypatch.setattr("deltify.inference.sample.open_writer", lambda *_: (parrot, {tokenizer.eos_token_id}))
    questions = [("How many?", "It is 1,000.\n#### 2"), ("And a longer one?", "3"), ("x" * 500, "4")]
    source = tmp_path / "questions.jsonl"
    source.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in questions))

    def chats(name: str, **options) -> list[list[dict]]:
        parrot.answers = 0
        path = sample_answers(str(model / "model"), source, tmp_path / name, field="question", length=128, **options)
        return [json.loads(line)["messages"] for line in path.read_text().splitlines()]

    def chat(number: int, count: int) -> list[dict]:
        said = {"user": (message := questions[number][0]), "assistant": f"{message} {count}"}
        return [{"role": role, "content": text} for role, text in said.items()]

    every = [chat(0, 1), chat(0, 2), chat(0, 3), chat(1, 4), chat(1, 5)]  # the sixth answer does not end
    assert chats("all.jsonl", samples=3, batch=4) == every
    assert chats("right.jsonl", samples=3, batch=4, keep_number="answer") == [chat(0, 2)]
    file = tokenize(Chats(str(tmp_path / "all.jsonl")), tokenizer, tmp_path / "tokens")  # text to train on
    counted = np.asarray(file.tokens)[1:][file.loss_mask[:-1].astype(bool)]
    assert tokenizer.decode(counted) == "".join(f"{answer['content']}</s>" for _, answer in every)
    assert "5 kept; " in capsys.readouterr().out
    assert last_number("1,234.5 or -7,000 m") == "-7000" and last_number("none") is None
    assert last_number("3-5") == "5" and last_number("-5") == "-5"
    assert Question("m", "18").accepts("It costs $18.00") and not Question("m", "18").accepts("18.5")
    assert not Question("m", "18").accepts("none") and Question("m").accepts("none")
    with pytest.raises(ValueError, match=r"questions\.jsonl, line 1: .* with question and right\. Name other fields"):
        chats("wrong.jsonl", keep_number="right")
    with pytest.raises(ValueError, match=r"questions\.jsonl, line 1: question has no number.*'How many\?'"):
        chats("wrong.jsonl", keep_number="question")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template\. Leave --chat out"):
        chats("none.jsonl")


def test_temperature_0_takes_the_likeliest_tokens(model, tmp_path, capsys):
    here, text = str(model / "model"), str(model / "text.jsonl")
    written = []
    for seed in (0, 1):
        sample(here, text, tmp_path / f"{seed}.jsonl", count=2, length=48, temperature=0, seed=seed, device="cpu")
        written.append((tmp_path / f"{seed}.jsonl").read_text())
    assert written[0] == written[1]
    options = {"max_new_tokens": 8, "device": "cpu"}
    assert generate(here, "To open", temperature=0, **options) == generate(here, "To open", greedy=True, **options)


def test_what_does_not_fit_is_named(model, tmp_path, capsys):
    here, text = str(model / "model"), str(model / "text.jsonl")
    out = tmp_path / "own.jsonl"
    for options, message in (
        ({"prompt_tokens": 9, "length": 9}, "prompt_tokens=9 must be at least 1 and below length=9"),
        ({"temperature": float("nan")}, "temperature=nan must be a number of at least 0"),
        ({"temperature": -1}, "temperature=-1 must be a number of at least 0"),
        ({"count": 0}, "count=0 must be a number above 0"),
        ({"prompt_tokens": 500}, "has prompt_tokens=500 tokens\. Give fewer"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(here, text, out, device="cpu", **{"length": 512, **options})
    assert not out.exists()
    teacher = random_teacher("llama")
    teacher.model.save_pretrained(tmp_path / "teacher")
    teacher.tokenizer.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="length=5000 is more than the 4096 tokens"):
        sample(str(tmp_path / "teacher"), text, out, length=5000, device="cpu")
    with pytest.raises(ValueError, match=r"must end in \.jsonl"):
        sample(here, text, tmp_path / "own.txt")
    command = ["sample", here, text, "-o", str(out), "--count", "200", "--length", "20", "--prompt-tokens", "12"]
    assert main([*command, "--device", "cpu"]) == 0
    assert "has no more documents of 12 tokens" in capsys.readouterr().out
    assert main(command) == 1
    assert f"{out} exists. Delete it, or name another file" in capsys.readouterr().err


def test_a_message_that_is_no_text_is_refused(tmp_path):
    source = tmp_path / "chats.jsonl"
    source.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    with pytest.raises(ValueError, match=r"messages is not a text, but .*Name another --field"):
        list(read_questions(source, "messages", None))

"""Documents that a model writes itself."""

import json

import pytest
import torch
from conftest import with_special_tokens

from deltify import convert
from deltify.cli import main
from deltify.conversion.teacher import byte_tokenizer, random_teacher
from deltify.data.sources import documents, held_out
from deltify.inference.sample import beginnings, continuations, sample
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
    assert rows == [[72, 105, 33, 1, 2], [66, 121, 101, 1, 2, 3, 4, 5, 6, 7]]


def test_what_does_not_fit_is_named(model, tmp_path, capsys):
    here, text = str(model / "model"), str(model / "text.jsonl")
    out = tmp_path / "own.jsonl"
    for options, message in (
        ({"prompt_tokens": 9, "length": 9}, "prompt_tokens=9 must be at least 1 and below length=9"),
        ({"temperature": float("nan")}, "temperature=nan must be a number above 0"),
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

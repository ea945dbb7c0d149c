"""Saved states: one size, no tokens, refused by any other model."""

import pytest
import torch

from deltify import convert
from deltify.checkpoint import save_model
from deltify.cli import main
from deltify.states import load_state, read
from deltify.teacher import random_teacher


@pytest.fixture(scope="module")
def pair():
    teacher = random_teacher("llama")
    return convert(teacher, start="library").eval(), teacher.tokenizer


def test_going_on_from_a_state_equals_reading_everything(pair, tmp_path):
    model, _ = pair
    book, question = torch.randint(0, 250, (700,)), torch.randint(0, 250, (1, 9))
    read(model, book, piece=128).save(tmp_path / "book.state")
    state = load_state(tmp_path / "book.state", model)
    whole = torch.cat([book[None], question], 1)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 256}
    want = model.generate(whole, attention_mask=torch.ones_like(whole), **options)[0, 709:]
    for _ in range(2):  # the state is not used up
        mask = torch.ones_like(question)
        got = model.generate(question, attention_mask=mask, past_key_values=state.cache(model), **options)
        assert torch.equal(got[0, 9:], want)
    both = read(model, book[300:], state=read(model, book[:300]))
    assert both.tokens == 700
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(both.recurrent, state.recurrent))


def test_the_file_has_one_size_and_does_not_hold_the_text(pair, tmp_path):
    model, _ = pair
    for name, tokens in (("short", 1000), ("long", 100_000)):
        read(model, torch.randint(0, 250, (tokens,))).save(tmp_path / name)
    assert (tmp_path / "short").stat().st_size == (tmp_path / "long").stat().st_size
    assert load_state(tmp_path / "long", model).tokens == 100_000


def test_wrong_states_are_refused(pair, tmp_path):
    model, _ = pair
    read(model, [1, 2, 3]).save(tmp_path / "state")
    other = convert(random_teacher("llama"), start="library", seed=1)
    with pytest.raises(ValueError, match="read by another model"):
        load_state(tmp_path / "state", other)
    (tmp_path / "cut").write_bytes((tmp_path / "state").read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged"):
        load_state(tmp_path / "cut", model)
    with pytest.raises(FileNotFoundError, match="deltify read MODEL TEXT"):
        load_state(tmp_path / "absent", model)
    with pytest.raises(ValueError, match="nothing to read"):
        read(model, [])
    hybrid = convert(random_teacher("llama"), full_attention_layers=[2], start="library")
    with pytest.raises(ValueError, match=r"layers \[2\] are attention"):
        read(hybrid, [1, 2])


def test_on_the_command_line(pair, tmp_path, capsys):
    save_model(tmp_path / "model", *pair)
    (tmp_path / "book.txt").write_text("It was a dark and stormy night. " * 20)
    model, state = str(tmp_path / "model"), str(tmp_path / "book.state")
    assert main(["read", model, str(tmp_path / "book.txt"), "-o", state, "--device", "cpu"]) == 0
    assert "read 640 tokens" in capsys.readouterr().out
    assert main(["generate", model, "Why", "--state", state, "--max-new-tokens", "4", "--device", "cpu"]) == 0
    assert "tokens/s" in capsys.readouterr().out

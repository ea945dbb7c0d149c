"""Chats as training text: which tokens count, in token files, batches and losses."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import with_special_tokens
from helpers import records as metrics_of
from helpers import tiny_recipe
from transformers import ByT5Tokenizer

from deltify import distill
from deltify.config import DataSpec, Stage, StudentSpec
from deltify.conversion.teacher import byte_tokenizer, random_teacher
from deltify.data import sources
from deltify.data.batches import MixedBatches, heldout_batches
from deltify.data.chats import Chats, encode_chat
from deltify.data.sources import documents, held_out
from deltify.data.token_files import open_data, open_tokens, origin_of, tokenize, tokenize_split
from deltify.training import runner

PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# renders an answer that is not the last one otherwise, as templates of reasoning models do
THINKING = (
    "{% for m in messages %}<{{ m['role'] }}>{{ '<think>' if loop.last and m['role'] == 'assistant' }}"
    "{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
REFUSING = "{{ raise_exception('roles must alternate') }}"


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


HELLO = [says("system", "Be kind."), says("user", "Hi!"), says("assistant", "Hello, grüß dich."), says("user", "Bye.")]
HELLO.append(says("assistant", "See you."))


def chat_tokenizer(template: str | None = PLAIN, **special):
    tokenizer = with_special_tokens(byte_tokenizer(), **special) if special else byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def counted(tokenizer, record: dict) -> tuple[str, str]:
    """Return a chat as text, and the text of its tokens that count."""
    chat = encode_chat(record, tokenizer, "here")
    assert len(chat.ids) == len(chat.answer) == len(chat.loss_mask)
    ids = np.array(chat.ids)
    assert ids[1:][chat.loss_mask[:-1]].tolist() == ids[chat.answer].tolist()  # what is predicted is what was written
    assert not chat.loss_mask[-1]
    return tokenizer.decode(ids), tokenizer.decode(ids[chat.answer])


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_all_answers_count_with_their_ends_and_nothing_else(template):
    tokenizer = chat_tokenizer(template)
    text, answers = counted(tokenizer, {"messages": HELLO})
    assert text == tokenizer.apply_chat_template(HELLO, tokenize=False) + "<|end|>"
    assert answers == "Hello, grüß dich.</s>See you.</s>"  # the end of sequence that follows does not count


@pytest.mark.parametrize("template", [PLAIN, MARKED, THINKING])
def test_of_prompt_and_completion_the_completion_counts(template):
    tokenizer = chat_tokenizer(template)
    text, answers = counted(tokenizer, {"prompt": HELLO[:4], "completion": HELLO[4:]})
    assert text == tokenizer.apply_chat_template(HELLO, tokenize=False) + "<|end|>"
    assert answers == ("<think>" if template == THINKING else "") + "See you.</s>"


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_of_a_completion_of_several_messages_only_assistants_count(template):
    more = [says("user", "Wait."), says("assistant", "I do."), says("user", "Go.")]
    text, answers = counted(chat_tokenizer(template), {"prompt": HELLO[:4], "completion": [HELLO[4], *more]})
    assert "Hello, grüß dich." in text and answers == "See you.</s>I do.</s>"
    with pytest.raises(ValueError, match=r"here: no message of the completion has the role 'assistant'"):
        counted(chat_tokenizer(template), {"prompt": HELLO, "completion": more[:1]})


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_an_answer_and_a_chat_end_with_one_end_of_sequence(template):
    tokenizer = chat_tokenizer(template.replace("</s>", "<|end|>\n"))  # as SmolLM2's and Qwen's
    text, answers = counted(tokenizer, {"messages": HELLO})
    assert text + "\n" == tokenizer.apply_chat_template(HELLO, tokenize=False)
    assert answers == "Hello, grüß dich.<|end|>See you.<|end|>"
    assert counted(tokenizer, {"prompt": HELLO[:4], "completion": HELLO[4:]}) == (text, "See you.<|end|>")
    tokenizer.chat_template += "{% if messages | length == 5 %}Bye.{% endif %}"  # text after the last end
    assert counted(tokenizer, {"messages": HELLO}) == (text + "\nBye.<|end|>", answers)


@pytest.mark.parametrize("end", [False, True])
def test_strings_are_framed_as_texts_are_and_their_end_counts(end):
    tokenizer = chat_tokenizer(None, end=end)
    text, answers = counted(tokenizer, {"prompt": "Once upon", "completion": " a time"})
    assert text == tokenizer.decode([tokenizer.bos_token_id]) + "Once upon a time" + tokenizer.eos_token
    assert answers == " a time" + tokenizer.eos_token


@pytest.mark.parametrize(
    "record, template, message",
    [
        ({"text": "no chat"}, PLAIN, r"its fields are text; a chat has messages, or prompt and completion"),
        ({"messages": HELLO[:2]}, PLAIN, r"no message has the role 'assistant'.* Remove the line"),
        ({"messages": HELLO[2:]}, PLAIN, r"begins with an answer\. Give a message before it"),
        ({"messages": "Hi!"}, PLAIN, r"'messages' is Hi!, not a list of messages whose role and content are strings"),
        ({"messages": [{"role": "user"}]}, PLAIN, r"not a list of messages whose role and content"),
        ({"messages": []}, PLAIN, r"'messages' is \[\], not a list"),
        ({"prompt": HELLO[:2], "completion": "Hello"}, PLAIN, r"'completion' is Hello, not a list"),
        ({"prompt": "Once", "completion": ""}, MARKED, r"no token of it counts: it has no answer"),
        ({"messages": HELLO, "tools": [{"name": "clock"}]}, PLAIN, r"chats with tools are not supported"),
        ({"messages": HELLO}, THINKING, r"Give each answer a line of its own, or mark answers .* \{% generation %\}"),
        ({"messages": HELLO}, PLAIN.replace("<assistant>", "<bot>"), r"begins an answer with .*<bot>', but .*strings"),
        ({"messages": HELLO}, None, r"has no chat template\. Give prompt and completion as strings"),
        ({"messages": HELLO}, REFUSING, r"the chat template refuses it: roles must alternate"),
    ],
)
def test_a_line_that_is_no_chat_is_named(record, template, message, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"prompt": "fine", "completion": " indeed"}) + "\n\n" + json.dumps(record))
    with pytest.raises(ValueError, match=rf"chats\.jsonl, line 3: .*{message}"):
        tokenize(Chats(str(path)), chat_tokenizer(template), tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_a_source_of_chats_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": HELLO}))
    with pytest.raises(ValueError, match=r"line 1: .* field 'text'\. Name the source chat:FILE, to train on the ans"):
        list(documents(str(path)))
    with pytest.raises(ValueError, match=r"can be read only with a teacher's chat template: in data\.train or"):
        list(documents(f"recall:chat:{path}"))
    with pytest.raises(ValueError, match=r"ByT5Tokenizer does not tell which characters.*library tokenizers"):
        tokenize(Chats(str(path)), ByT5Tokenizer(), tmp_path / "tokens")
    monkeypatch.chdir(tmp_path)  # whose JSON lines are not the source without a name
    with pytest.raises(FileNotFoundError, match=r"there is no text at 'chat:'\. Give .*chat:SOURCE"):
        open_data(DataSpec({"chat:": 1.0}, folder=str(tmp_path / "data")), "teacher", chat_tokenizer(), 64)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a\.txt has no JSON lines\. Give a file that ends in \.jsonl"):
        tokenize(Chats(str(tmp_path)), chat_tokenizer(), tmp_path / "tokens")
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"chats\.jsonl, line 1: '\[1\]' is not a JSON object, but a list"):
        tokenize(Chats(str(path)), chat_tokenizer(), tmp_path / "tokens")


def test_a_bad_line_after_the_last_one_needed_does_no_harm(tmp_path):
    path = tmp_path / "chats.jsonl"
    source = write_chats(path, 20, 1).removeprefix("chat:")
    for bad in ('{"text": "no chat"}', "{", "[1]"):
        write_chats(path, 20, 1)
        path.write_text(path.read_text() + bad)
        file = tokenize(Chats(source), chat_tokenizer(), tmp_path / f"some-{len(bad)}", max_tokens=300)
        assert 300 <= len(file) < 400
        with pytest.raises(ValueError, match=r"chats\.jsonl, line 21: "):
            tokenize(Chats(source), chat_tokenizer(), tmp_path / "all")


def test_unfit_rows_of_a_dataset_are_left_out_and_counted(tmp_path, monkeypatch, capsys):
    unfit = [
        {"messages": HELLO[:2]},
        {"messages": HELLO, "tools": [{"name": "clock"}]},
        {"messages": [says("user", "Hi!"), {"role": "assistant", "content": None}]},
        {"messages": [says("user", "Hi!"), says("robot", "Beep.")]},
    ]
    fit = {"messages": [says("user", "Hi!"), says("assistant", "Hello.")], "tools": None}
    rows = [unfit[0], fit, *unfit[1:], fit, *unfit * 80, fit]  # more than are encoded at a time
    monkeypatch.setattr(sources, "hub_rows", lambda source: iter(rows))
    refusing = "{% if messages[-1]['role'] == 'robot' %}{{ raise_exception('no robots') }}{% endif %}" + PLAIN
    tokenizer = chat_tokenizer(refusing)
    file = tokenize(Chats("hf:me/chats"), tokenizer, tmp_path / "chats")
    assert tokenizer.decode(file.tokens) == "<user>Hi!</s><assistant>Hello.</s><|end|>" * 3
    assert json.loads((tmp_path / "chats" / "meta.json").read_text())["rows_left_out"] == 4 * 81
    said = " ".join(capsys.readouterr().out.split())
    assert "324 rows were left out, the first because of this: hf:me/chats, row 1: no message has the role" in said
    rows.remove(fit), rows.remove(fit)  # no row is fit among the first ones
    with pytest.raises(ValueError, match=r"hf:me/chats, row 1: no message has the role 'assistant'"):
        tokenize(Chats("hf:me/chats"), tokenizer, tmp_path / "none")


def write_chats(path, count: int, answers: int = 2) -> str:
    """Write chats of which two answer the same question, and return their source."""
    lines = [
        {"messages": [says("user", f"What is {n} squared?"), says("assistant", f"Answer {a}: it is {n * n}.")]}
        for n in range(count)
        for a in range(answers)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"chat:{path}"


def answers_in(file, tokenizer) -> str:
    """Return what predictions that count predict in a token file."""
    return tokenizer.decode(np.asarray(file.tokens)[1:][np.asarray(file.loss_mask)[:-1].astype(bool)])


def test_token_files_of_chats_have_a_mask_and_keep_answers_to_a_question_together(tmp_path):
    tokenizer, source = chat_tokenizer(), write_chats(tmp_path / "chats.jsonl", 300)
    spec = DataSpec({source: 1.0}, folder=str(tmp_path / "data"))
    (train,), (held,) = open_data(spec, "teacher", tokenizer, 64)
    questions = [f"user: What is {n} squared?\n" for n in range(300)]
    assert 3 < sum(held_out(question) for question in questions) < 40
    for file, part in ((train, False), (held, True)):
        numbers = [n for n, question in enumerate(questions) if held_out(question) == part]
        assert answers_in(file, tokenizer) == "".join(
            f"Answer {a}: it is {n * n}.</s>" for n in numbers for a in (0, 1)
        )
        assert len(file.loss_mask) == len(file.tokens)
    meta = json.loads(next((tmp_path / "data").rglob("train/meta.json")).read_text())
    assert meta["documents"] + 2 * sum(map(held_out, questions)) == 600 and meta["source"] == source
    again = open_data(spec, "teacher", tokenizer, 64)[0][0]  # from disk
    assert again.digest == train.digest and len(train.digest) == 96
    with pytest.raises(ValueError, match=r"was made with another chat template\. Delete it"):
        open_data(spec, "teacher", chat_tokenizer(MARKED), 64)
    mask = next((tmp_path / "data").rglob("train/loss_mask.bin"))
    mask.write_bytes(bytes([1]) + mask.read_bytes()[1:])
    with pytest.raises(ValueError, match="is damaged: its checksum differs"):
        open_tokens(mask.parent)


def test_a_cut_between_training_and_held_out_text_cuts_the_mask_there(tmp_path):
    tokenizer = chat_tokenizer()
    (tmp_path / "few.jsonl").write_text(json.dumps({"messages": HELLO * 10}))
    whole = tokenize(Chats(str(tmp_path / "few.jsonl")), tokenizer, tmp_path / "whole")
    train, held = tokenize_split(Chats(str(tmp_path / "few.jsonl")), tokenizer, tmp_path / "split")
    parts = (held, train) if held_out("system: Be kind.\nuser: Hi!\n") else (train, held)
    assert all(len(part) for part in parts)
    for name in ("tokens", "loss_mask"):
        assert np.concatenate([getattr(part, name) for part in parts]).tolist() == getattr(whole, name).tolist()


def test_one_side_goes_on_when_the_other_is_full(tmp_path):
    tokenizer, source = chat_tokenizer(), write_chats(tmp_path / "chats.jsonl", 1000, 1)
    options = {"max_tokens": 500, "heldout_tokens": 1500}  # training is full after the first ten chats
    train, held = tokenize_split(Chats(source.removeprefix("chat:")), tokenizer, tmp_path / "split", **options)
    questions = [f"user: What is {n} squared?\n" for n in range(1000)]
    for file, part, limit in ((train, False, 500), (held, True, 1500)):
        assert limit <= len(file) < limit + 100
        numbers = [n for n, question in enumerate(questions) if held_out(question) == part][: len(file.bounds) - 1]
        assert answers_in(file, tokenizer) == "".join(f"Answer 0: it is {n * n}.</s>" for n in numbers)


def test_replaced_characters_and_limits_are_those_of_texts(tmp_path, capsys):
    tokenizer, path = chat_tokenizer(), tmp_path / "chats.jsonl"
    path.write_text(r'{"messages": [{"role": "user", "content": "a\ud83d"}, {"role": "assistant", "content": "b"}]}')
    file = tokenize(Chats(str(path)), tokenizer, tmp_path / "a")
    assert tokenizer.decode(file.tokens) == "<user>a\ufffd</s><assistant>b</s><|end|>"
    assert f"1 were, the first in {path}, line 1" in capsys.readouterr().out
    source = write_chats(tmp_path / "many.jsonl", 600, 1)
    some = tokenize(Chats(source.removeprefix("chat:")), tokenizer, tmp_path / "b", max_tokens=1000)
    assert 1000 <= len(some) < 1100 and some.loss_mask.sum() > 300
    assert origin_of(source)["files"] and origin_of(source)["source"] == source


def test_files_of_texts_are_as_before(tmp_path):
    tokenizer = chat_tokenizer()
    file = tokenize(["one text"], tokenizer, tmp_path / "text")
    assert file.loss_mask is None and len(file.digest) == 64
    assert sorted(path.name for path in (tmp_path / "text").iterdir()) == ["bounds.npy", "meta.json", "tokens.bin"]
    assert "chat_template" not in json.loads((tmp_path / "text" / "meta.json").read_text())
    batch = MixedBatches([file], [1.0], 4, 2, 0).batch(0)
    assert batch.loss_mask is None and batch.counted is None


def test_the_fraction_that_counts_is_that_of_the_whole_step_on_every_rank(tmp_path):
    tokenizer, source = chat_tokenizer(), write_chats(tmp_path / "chats.jsonl", 100)
    chats = tokenize(Chats(source.removeprefix("chat:")), tokenizer, tmp_path / "chats")
    texts = tokenize(["some text " * 500], tokenizer, tmp_path / "texts")
    mix = MixedBatches([chats, texts], [0.5, 0.5], 32, 8, 0)
    for step in range(3):
        whole = mix.batch(step)
        parts = [mix.batch(step, rank, 4) for rank in range(4)]
        assert torch.equal(torch.cat([part.loss_mask for part in parts]), whole.loss_mask)
        for part in (*parts, *whole.split(2), whole.to("cpu")):
            assert part.counted == pytest.approx(float(whole.loss_mask.float().mean()))
        for index, mask in enumerate(whole.loss_mask):  # the row of a text counts whole, that of a chat in part
            assert bool(mask.all()) == (mix.source_of(8 * step + index)[0] == 1)
    assert heldout_batches([chats], 32, 4, 256)[0].loss_mask is None


@pytest.mark.parametrize("with_chats", [False, True])
def test_sequences_beyond_the_teachers_window_say_what_is_within_it(tmp_path, with_chats):
    tokenizer = chat_tokenizer()
    files = [tokenize(["some text " * 500, "more"] * 5, tokenizer, tmp_path / "texts")]
    files.append(tokenize(["a text, " * 4] * 200, tokenizer, tmp_path / "short"))
    if with_chats:
        source = write_chats(tmp_path / "chats.jsonl", 100)
        files.append(tokenize(Chats(source.removeprefix("chat:")), tokenizer, tmp_path / "chats"))
    mix = MixedBatches(files, [1.0] * len(files), 64, 8, 0, context_window=24)
    whole = mix.batch(1)
    inside = whole.loss_mask & (whole.position_ids < 24)
    assert 0.2 < float(inside.float().mean()) < 0.95 * float(whole.counted)
    for part in (mix.batch(1, 1, 4), *whole.split(2), whole.to("cpu")):
        assert float(part.within) == pytest.approx(float(inside.float().mean()))
        assert float(part.counted) == pytest.approx(float(whole.loss_mask.float().mean()))
    assert MixedBatches(files[:2], [0.5, 0.5], 24, 8, 0, context_window=24).batch(0).within is None


@pytest.mark.parametrize("micro", [0, 2])
def test_training_on_chats_logs_the_mean_over_the_tokens_that_count(micro, tmp_path, monkeypatch):
    teacher = random_teacher("llama")
    teacher.tokenizer.chat_template = PLAIN
    monkeypatch.setattr(runner, "open_teacher", lambda *args: teacher)
    source, text = write_chats(tmp_path / "chats.jsonl", 60), tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n} is a number. " * 8}) + "\n" for n in range(60)))
    recipe = tiny_recipe(tmp_path, student=StudentSpec(init="library"), align=Stage())
    data = replace(recipe.data, train={source: 0.8, str(text): 0.2})
    stage = Stage(8 * 32, 32, 8, micro_batch_size=micro, lr_mixers=0.0, lr_other=1e-9, ce_weight=0.3)
    recipe = replace(recipe, data=data, match=stage)
    run = distill(recipe)
    row = next(row for row in metrics_of(run) if row["stage"] == "match")
    student = runner.load_student(run / "converted", torch.device("cpu")).eval()
    train, _, _ = runner.open_text(recipe, teacher)
    batch = runner.stage_mix(recipe, "match", train, 2048).batch(0)
    assert 0 < int(batch.loss_mask.sum()) < batch.loss_mask.numel()
    options = {"position_ids": batch.position_ids, "use_cache": False}  # with a cache, Llama reads over documents
    with torch.no_grad():
        log_p, log_q = (m(batch.input_ids, **options).logits.log_softmax(-1) for m in (teacher.model, student))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[batch.loss_mask].mean()
    inside = batch.loss_mask[:, :-1] & batch.same_document
    ce = -log_q[:, :-1].gather(-1, batch.input_ids[:, 1:, None])[..., 0][inside].sum() / batch.loss_mask.sum()
    assert row["kl"] == pytest.approx(float(kl), rel=1e-4) and row["ce"] == pytest.approx(float(ce), rel=1e-4)
    assert row["loss"] == pytest.approx(float(0.7 * kl + 0.3 * ce), rel=1e-4)

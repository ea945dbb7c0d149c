"""Conversations: a cache that is kept between turns does not change answers."""

import pytest
import torch
from conftest import with_special_tokens
from jinja2.exceptions import TemplateError

from deltify import convert
from deltify.conversion.teacher import random_teacher
from deltify.inference.chat import Conversation, chat
from deltify.inference.generate import sampling_options
from deltify.training.checkpoint import save_model

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("kept", ["none", "3:1", "KS"])
def test_each_turn_reads_only_what_is_new(kept):
    teacher = random_teacher("llama")
    model, tokenizer = convert(teacher, full_attention_layers=kept, init="library").eval(), teacher.tokenizer
    with pytest.raises(ValueError, match="no chat template"):
        Conversation(model, tokenizer)
    tokenizer.chat_template = TEMPLATE
    conversation, read = Conversation(model, tokenizer), []
    model.model.register_forward_pre_hook(lambda m, a, k: read.append(k["input_ids"].shape[1]), with_kwargs=True)
    greedy = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 256}
    for turn, message in enumerate(("Hello", "And then?", "Why")):
        before, read[:] = conversation.ids.shape[1], []
        conversation.say(message, **greedy)
        ids = conversation.ids
        if turn:  # the new turn, and the last token of the answer before, which was written but not yet read
            assert read[0] < 50 and read[0] + before - 1 + 5 == ids.shape[1]
        new = ids[:, -5:]
        fresh = model.generate(ids[:, :-5], attention_mask=torch.ones_like(ids[:, :-5]), **greedy)[:, -5:]
        assert torch.equal(new, fresh)
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * 3


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("template_begins", [False, True])
def test_the_template_alone_writes_special_tokens(template_begins, end):
    teacher = random_teacher("llama")
    model, tokenizer = convert(teacher, init="library").eval(), with_special_tokens(teacher.tokenizer, end=end)
    tokenizer.chat_template = ("{{ bos_token }}" if template_begins else "") + TEMPLATE
    conversation = Conversation(model, tokenizer)
    start, stop = tokenizer.bos_token_id, tokenizer.eos_token_id
    options = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": stop, "suppress_tokens": [start, stop]}
    for message, messages in (("Hello", 1), ("And then?", 3)):
        conversation.say(message, **options)
        ids = conversation.ids[0].tolist()
        assert ids.count(start) == template_begins == (ids[0] == start) and ids.count(stop) == messages


def test_a_failed_answer_leaves_the_conversation_as_it_was():
    class Broken:
        def put(self, tokens):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1

        def end(self):
            pass

    teacher = random_teacher("llama")
    teacher.tokenizer.chat_template = TEMPLATE
    model, greedy = convert(teacher, init="library").eval(), {"do_sample": False, "max_new_tokens": 5}
    clean, broken, streamer = Conversation(model, teacher.tokenizer), Conversation(model, teacher.tokenizer), Broken()
    assert clean.say("Hello", **greedy) == broken.say("Hello", **greedy)
    streamer.left = 2
    with pytest.raises(KeyboardInterrupt):
        broken.say("A message", streamer=streamer, **greedy)
    assert broken.messages == clean.messages
    teacher.tokenizer.chat_template = "{{ raise_exception('no') if messages[-1]['content'] == 'bad' }}" + TEMPLATE
    with pytest.raises(TemplateError, match="no"):
        broken.say("bad", **greedy)
    assert broken.messages == clean.messages
    assert clean.say("And then?", **greedy) == broken.say("And then?", **greedy)


def test_settings_of_a_teacher_that_no_streamer_allows_do_not_matter():
    answers = []
    for settings in (
        {},
        {"num_beams": 2, "return_dict_in_generate": True, "use_cache": False, "repetition_penalty": 9.0},
    ):
        teacher = random_teacher("llama")
        teacher.tokenizer.chat_template = TEMPLATE
        model = convert(teacher, init="library").eval()
        model.generation_config.update(**settings)
        greedy = sampling_options(0.0) | {"max_new_tokens": 6}
        conversation = Conversation(model, teacher.tokenizer)
        answers.append([conversation.say(message, **greedy) for message in ("Hello", "And then?")])
    assert answers[0] == answers[1]


def test_a_teacher_can_be_talked_to_as_well():
    teacher = random_teacher("llama")
    teacher.tokenizer.chat_template = TEMPLATE
    conversation, greedy = Conversation(teacher.model, teacher.tokenizer), {"do_sample": False, "max_new_tokens": 5}
    for message in ("Hello", "And then?"):
        conversation.say(message, **greedy)
    prompt = conversation.ids[:, :-5]
    whole = teacher.model.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy)
    assert torch.equal(conversation.ids, whole)


def test_in_the_terminal(tmp_path, monkeypatch, capsys):
    teacher = random_teacher("llama")
    teacher.tokenizer.chat_template = TEMPLATE
    student = convert(teacher, init="library")
    student.generation_config.max_length = 30
    save_model(tmp_path / "model", student, teacher.tokenizer)
    lines = iter(["Hi", "/new", "Again", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    say, turns = Conversation.say, []

    def greedy(conversation, message, *, streamer, **sampling):
        assert sampling == {"do_sample": True, "temperature": 0.7, "top_p": 0.95}
        answer = say(conversation, message, streamer=streamer, max_new_tokens=4, do_sample=False)
        turns.append((message, len(conversation.messages), answer))
        return answer

    monkeypatch.setattr(Conversation, "say", greedy)
    chat(str(tmp_path / "model"))
    out = capsys.readouterr().out
    assert "/new starts a new one" in out and next(lines, "used up") == "used up"
    # /new forgets the first message
    assert [(message, messages) for message, messages, _ in turns] == [
        ("Hi", 2),
        ("Again", 2),
    ]
    assert all(answer and answer.strip() in out for *_, answer in turns)
    fresh = Conversation(student.eval(), teacher.tokenizer)
    assert say(fresh, "Again", max_new_tokens=4, do_sample=False) == turns[1][2]

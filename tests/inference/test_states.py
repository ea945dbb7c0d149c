"""Saved states: files of one size, generation from them, and refusal by other models."""

import pytest
import torch
from conftest import with_special_tokens
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import deltify
from deltify import convert
from deltify.cli import main
from deltify.conversion.gguf_files import mark_spaces
from deltify.conversion.student import sliding_control
from deltify.conversion.teacher import random_teacher
from deltify.inference.generate import generate, read_file
from deltify.inference.states import State, tensors_of
from deltify.training.checkpoint import save_model
from deltify.utils.tokens import beginning, open_ended, token_ids


@pytest.fixture(scope="module", params=["K", "KS"])
def pair(request):
    teacher = random_teacher("llama", num_hidden_layers=2)
    student = convert(teacher, full_attention_layers=request.param, sliding_window=16, init="library")
    return student.eval(), teacher.tokenizer


def test_going_on_from_a_state_equals_reading_everything(pair, tmp_path):
    model, _ = pair
    book, question = torch.randint(0, 250, (700,)), torch.randint(0, 250, (1, 9))
    State.from_text(model, book, piece=128).save(tmp_path / "book.state")
    state = State.load(tmp_path / "book.state", model)
    whole = torch.cat([book[None], question], 1)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 256}
    want = model.generate(whole, attention_mask=torch.ones_like(whole), **options)[0, 709:]
    for _ in range(2):  # the state is not used up
        mask = torch.ones_like(question)
        got = model.generate(question, attention_mask=mask, past_key_values=state.cache(model), **options)
        assert torch.equal(got[0, 9:], want)
    both = State.from_text(model, book[300:], state=State.from_text(model, book[:300]))
    assert both.tokens == 700
    for mine, theirs in zip(both.layers, state.layers):
        assert mine.keys() == theirs.keys() and all(torch.allclose(mine[n], theirs[n], atol=1e-5) for n in mine)


def test_a_string_is_read_with_its_tokenizer(pair):
    model, tokenizer = pair
    text = "It was a dark night"
    state, ids = deltify.State.from_text(model, text, tokenizer), tokenizer(text)["input_ids"]
    assert state.tokens == len(ids) == 19
    for mine, theirs in zip(state.layers, deltify.State.from_text(model, ids).layers):
        assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    with pytest.raises(ValueError, match="Give the model's tokenizer too"):
        deltify.State.from_text(model, text)


@pytest.fixture(params=["begin", "begin and end"])
def special(pair, request):
    tokenizer = with_special_tokens(random_teacher("llama").tokenizer, end=request.param == "begin and end")
    return pair[0], tokenizer, tokenizer.bos_token_id


def test_special_tokens_begin_a_document_and_stand_nowhere_else(special):
    _, tokenizer, start = special
    plain, written = random_teacher("llama").tokenizer("Hi")["input_ids"], f"{tokenizer.bos_token}Hi"
    assert beginning(tokenizer) == [start] and beginning(random_teacher("llama").tokenizer) == []
    for text in ("Hi", written):
        assert token_ids(tokenizer, text) == [start, *plain]
        assert token_ids(tokenizer, text, begins=False) == plain
    assert token_ids(tokenizer, "") == token_ids(tokenizer, "", begins=False) == []
    assert token_ids(tokenizer, tokenizer.bos_token) == [start]  # a text of its own
    end = tokenizer("Hi")["input_ids"][-1] == tokenizer.eos_token_id
    whole = open_ended(tokenizer)
    assert (whole is tokenizer) == (not end) and whole(["Hi", ""])["input_ids"] == [[start, *plain], [start]]


def test_a_text_that_goes_on_gets_no_space_before_it():
    vocabulary = {token: i for i, token in enumerate(["<unk>", "\u2581", "\n", *"going"[:4], "\u2581g"])}
    backend = Tokenizer(models.BPE(vocabulary, [("\u2581", "g")], unk_token="<unk>"))
    mark_spaces(backend, prefix=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)

    def tokens(text, **options):
        return tokenizer.convert_ids_to_tokens(token_ids(tokenizer, text, **options))

    assert tokens("going") == ["\u2581g", "o", "i", "n", "g"] and tokens("go", begins=False) == ["g", "o"]
    assert tokens(" go", begins=False) == ["\u2581g", "o"] and tokens("\n\ngo", begins=False) == ["\n", "\n", "g", "o"]


def test_a_text_read_in_parts_equals_the_whole(special):
    model, tokenizer, _ = special
    first, second, third = "The quick brown fox ", "jumps over", " the dog"
    state = None
    for part in (first, second, third):
        state = State.from_text(model, part, tokenizer, state=state)
    whole = State.from_text(model, first + second + third, tokenizer)
    assert state.tokens == whole.tokens == 1 + len(first + second + third)
    for mine, theirs in zip(state.layers, whole.layers):
        assert all(torch.allclose(mine[n].float(), theirs[n].float(), atol=1e-6) for n in mine)
    for before in (None, state):
        with pytest.raises(ValueError, match="nothing to read"):
            State.from_text(model, "", tokenizer, state=before)


def test_a_prompt_after_a_state_goes_on_as_after_the_whole_text(special, tmp_path):
    model, tokenizer, start = special
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    save_model(tmp_path / "model", model, tokenizer)
    (tmp_path / "first.txt").write_text("It was a dark night. ")
    folder, state = str(tmp_path / "model"), str(tmp_path / "state")
    read_file(folder, str(tmp_path / "first.txt"), state)
    read_before, steps = State.load(state, model), {"greedy": True, "max_new_tokens": 8}
    for prompt, chat in (("Why", False), (f"{tokenizer.bos_token}Why", False), ("Why", True)):
        text = "<user>Why" if chat else "Why"
        whole = [start, *token_ids(tokenizer, "It was a dark night. " + text, begins=False)]
        assert read_before.tokens + len(text) == len(whole)
        ids = torch.tensor([whole])
        want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        want = tokenizer.decode(want[0, len(whole) - len(text) :], skip_special_tokens=True)
        assert generate(folder, prompt, state=state, chat=chat, **steps) == want
        ids = torch.tensor([[start, *token_ids(tokenizer, text, begins=False)]])
        want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert generate(folder, prompt, chat=chat, **steps) == tokenizer.decode(want[0], skip_special_tokens=True)
    for before in (None, state):
        with pytest.raises(ValueError, match="The prompt is empty"):
            generate(folder, "", state=before)


def test_from_any_length_one_size_and_one_effort_to_the_first_token(pair, tmp_path):
    model, _ = pair
    question, effort = torch.randint(0, 250, (1, 9)), []

    def count(module, args, options):
        held = [x for layer in options["past_key_values"].layers for x in tensors_of(layer).values()]
        effort.append((options["input_ids"].shape[1], sum(x.numel() for x in held)))

    for name, tokens in (("short", 1000), ("long", 100_000)):
        State.from_text(model, torch.randint(0, 250, (tokens,))).save(tmp_path / name)
        state = State.load(tmp_path / name, model)
        assert state.tokens == tokens
        hook = model.model.register_forward_pre_hook(count, with_kwargs=True)
        options = {"max_new_tokens": 1, "attention_mask": torch.ones_like(question), "pad_token_id": 256}
        model.generate(question, past_key_values=state.cache(model), **options)
        hook.remove()
    assert (tmp_path / "short").stat().st_size == (tmp_path / "long").stat().st_size
    assert len(effort) == 2 and effort[0] == effort[1] and effort[0][0] == 9  # tokens read, numbers held


def test_wrong_states_are_refused(pair, tmp_path):
    model, _ = pair
    State.from_text(model, [1, 2, 3]).save(tmp_path / "state")
    options = {"full_attention_layers": ["K", "KS"]["sliding_attention" in model.config.layer_types]}
    other = convert(random_teacher("llama", num_hidden_layers=2), init="library", sliding_window=16, seed=1, **options)
    with pytest.raises(ValueError, match="read by another model"):
        State.load(tmp_path / "state", other)
    for go_on in (State.cache, lambda state, model: State.from_text(model, [1, 2], state=state)):
        with pytest.raises(ValueError, match="read by another model"):
            go_on(State.from_text(model, [1, 2, 3]), other)
    (tmp_path / "cut").write_bytes((tmp_path / "state").read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged"):
        State.load(tmp_path / "cut", model)
    with pytest.raises(FileNotFoundError, match="deltify read MODEL TEXT"):
        State.load(tmp_path / "absent", model)
    with pytest.raises(ValueError, match="nothing to read"):
        State.from_text(model, [])
    hybrid = convert(random_teacher("llama"), full_attention_layers=[2], init="library")
    with pytest.raises(ValueError, match=r"Layers \[2\] are attention"):
        State.from_text(hybrid, [1, 2])


def test_a_model_of_sliding_layers_alone_has_states(tmp_path):
    teacher = random_teacher("llama", num_hidden_layers=2)
    model = sliding_control(teacher, window=16, sinks=2)
    book, question = torch.randint(0, 250, (100,)), torch.randint(0, 250, (1, 9))
    State.from_text(model, book).save(tmp_path / "book.state")
    state = State.load(tmp_path / "book.state", model)
    assert state.tokens == 100 and [set(layer) for layer in state.layers] == [{"keys", "values", "seen"}] * 2
    whole = torch.cat([book[None], question], 1)
    with torch.no_grad():
        want = model(whole).logits[:, 100:]
        got = model(question, past_key_values=state.cache(model), use_cache=True).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 256}
    generated = model.generate(
        question, attention_mask=torch.ones_like(question), past_key_values=state.cache(model), **options
    )
    wanted = model.generate(whole, attention_mask=torch.ones_like(whole), **options)
    assert torch.equal(generated[0, 9:], wanted[0, 109:])
    for other in (sliding_control(teacher, window=17, sinks=2), sliding_control(random_teacher("llama", seed=1))):
        with pytest.raises(ValueError, match="read by another model"):
            State.load(tmp_path / "book.state", other)


def test_on_the_command_line(pair, tmp_path, capsys):
    save_model(tmp_path / "model", *pair)
    (tmp_path / "book.txt").write_text("It was a dark and stormy night. " * 20)
    model, state = str(tmp_path / "model"), str(tmp_path / "book.state")
    assert main(["read", model, str(tmp_path / "book.txt"), "-o", state, "--device", "cpu"]) == 0
    assert "read 640 tokens" in capsys.readouterr().out
    assert main(["generate", model, "Why", "--state", state, "--max-new-tokens", "4", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    text = generate(model, "Why", state=state, max_new_tokens=4)
    assert text.startswith("Why") and len(text) > 3 and text in out and "[4 tokens in" in out


def test_a_model_with_other_weights_but_the_same_gates_is_refused(pair, tmp_path):
    import copy

    model, _ = pair
    State.from_text(model, [1, 2, 3]).save(tmp_path / "state")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].self_attn.v_proj.weight.normal_()
    with pytest.raises(ValueError, match="read by another model"):
        State.load(tmp_path / "state", other)
    model.save_pretrained(tmp_path / "model")
    half = type(model).from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert State.load(tmp_path / "state", half).tokens == 3
    with pytest.raises(ValueError, match="LlamaForCausalLM is no deltify model"):
        State.from_text(random_teacher("llama").model, [1])

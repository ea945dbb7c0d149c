"""Features of transformers that any causal language model has, on tiny models."""

import threading

import pytest
import torch
from helpers import random_student
from transformers import CompileConfig, GenerationConfig, GenerationMixin, TextIteratorStreamer, pipeline

from deltify import convert
from deltify.conversion.student import sliding_control
from deltify.conversion.teacher import random_teacher
from deltify.inference.states import State

KINDS = {"pure": ("none", False), "hybrid": ("3:1", False), "rope": ("3:1", True), "sliding": ("KSFS", False)}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def pair(request):
    layers, rope = request.param
    teacher = random_teacher("llama")
    student = convert(teacher, full_attention_layers=layers, keep_rope=rope, init="library").eval()
    return student, teacher.tokenizer


@pytest.fixture
def ids():
    return torch.randint(1, 200, (2, 17))


def alone(model, prompt, **options):
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=256, **options)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_gives_the_same_continuation(pair, ids, side):
    model, _ = pair
    padded, mask = torch.full((2, 17), 256), torch.zeros(2, 17, dtype=torch.long)
    place = slice(8, 17) if side == "left" else slice(0, 9)
    padded[0, place], mask[0, place] = ids[0, :9], 1
    padded[1], mask[1] = ids[1], 1
    for beams, cached in ((1, True), (2, True), (1, False)):
        options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "use_cache": cached}
        out = model.generate(padded, attention_mask=mask, pad_token_id=256, **options)
        for row, single in enumerate((ids[:1, :9], ids[1:])):
            assert torch.equal(out[row, 17:], alone(model, single, **options)[0, -6:])


def test_beam_search_equals_beam_search_without_a_cache(pair, ids):
    model, _ = pair
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "do_sample": False}
    cached = alone(model, ids, **options, use_cache=True)
    assert cached.shape == (4, 23)
    assert torch.equal(cached, alone(model, ids, **options, use_cache=False))


def test_sampling_is_seeded_and_returns_as_many_as_asked(pair, ids):
    model, _ = pair
    options = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "num_return_sequences": 3, "max_new_tokens": 5}
    torch.manual_seed(1)
    first = alone(model, ids, **options)
    torch.manual_seed(1)
    assert first.shape[0] == 6 and torch.equal(first, alone(model, ids, **options))


@torch.no_grad()
def test_a_cache_is_not_read_into_twice(pair, ids):
    model = pair[0]
    want = alone(model, ids, max_new_tokens=4, do_sample=False)

    def after(tokens):
        return {"past_key_values": model(input_ids=ids[:, :tokens], use_cache=True).past_key_values}

    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(alone(model, ids, **options | after(12)), want)
    mask = torch.ones_like(ids)  # over the cache's tokens, too
    got = model.generate(ids[:, 12:], attention_mask=mask, pad_token_id=256, **options | after(12))
    assert torch.equal(got[:, 5:], want[:, 17:])
    for given in (ids, ids[:, 12:]):
        with pytest.raises(ValueError, match=r"the cache holds 17 tokens, and the input has (17|5)\. Give"):
            alone(model, given, **options | after(17))
    with pytest.raises(ValueError, match="use_cache=False beside a cache"):
        alone(model, ids, **options | after(12), use_cache=False)


@pytest.mark.parametrize("kinds", ["SKA", "SSKA", "SKSA", "AKS", "SAK"])
def test_layers_of_any_order_decode_with_a_cache(kinds, ids):
    model = random_student(kinds, sliding_window=4, sink_tokens=1, vocab_size=257).eval()
    whole = alone(model, ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(alone(model, ids, max_new_tokens=4, do_sample=False), whole)


def test_settings_that_a_student_cannot_follow_stay_with_the_teacher(ids):
    teacher, lines = random_teacher("llama"), []
    unfit = {"cache_implementation": "static", "prompt_lookup_num_tokens": 3, "num_assistant_tokens": 4}
    unfit |= {"max_cache_len": 90, "compile_config": CompileConfig(), "penalty_alpha": 0.6, "dola_layers": "high"}
    teacher.model.generation_config = GenerationConfig(**unfit, temperature=0.7, top_k=4, use_cache=False)
    student = convert(teacher, full_attention_layers="KSF", init="library", log=lines.append).eval()
    (line,) = [line for line in lines if "generation settings" in line]
    assert all(name in line for name in unfit) and "temperature" not in line and "use_cache" not in line
    for model in (student, sliding_control(teacher)):
        kept = model.generation_config
        assert kept.cache_implementation is None and kept.temperature == 0.7 and kept.use_cache is False
        options = {"max_new_tokens": 5, "do_sample": False}
        want = alone(model, ids, **options, generation_config=GenerationConfig())
        assert torch.equal(alone(model, ids, **options), want)
    assert teacher.model.generation_config.cache_implementation == "static"
    lines.clear()
    convert(random_teacher("llama"), init="library", log=lines.append)
    assert not [line for line in lines if "generation settings" in line]


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_several_answers_go_on_from_one_state(beams):
    model = convert(random_teacher("llama"), full_attention_layers="SK", sliding_window=6, init="library").eval()
    text, question = torch.randint(1, 200, (1, 30)), torch.randint(1, 200, (1, 5))
    options = {"max_new_tokens": 6, "num_beams": beams, "num_return_sequences": 3, "do_sample": beams == 1}
    torch.manual_seed(1)
    want = alone(model, torch.cat([text, question], 1), **options, use_cache=False)[:, 35:]
    state = State.from_text(model, text[0])
    with pytest.raises(ValueError, match=r"past_key_values has 1 sequences, the input 3\. Repeat sequences"):
        alone(model, question, **options, past_key_values=state.cache(model))
    cache = state.cache(model)
    cache.batch_repeat_interleave(3)
    torch.manual_seed(1)
    assert torch.equal(alone(model, question, **options, past_key_values=cache)[:, 5:], want)


@torch.no_grad()
def test_generation_stops_at_a_string(pair, ids):
    model, tokenizer = pair
    words = [tokenizer.decode([i]) for i in range(len(tokenizer))]  # random bytes are parts of characters
    options = {"max_new_tokens": 6, "do_sample": False}
    options["suppress_tokens"] = [i for i, word in enumerate(words) if not word.isalnum()]
    out = alone(model, ids[:1], **options)
    text = tokenizer.decode(out[0, 17:20])
    stopped = alone(model, ids[:1], stop_strings=[text], tokenizer=tokenizer, **options)
    assert out.shape[1] == 23 and torch.equal(stopped, out[:, :20])


@torch.no_grad()
def test_guidance_by_a_negative_prompt_equals_guidance_without_a_cache(pair, ids):
    model, _ = pair
    options = {"max_new_tokens": 5, "do_sample": False, "guidance_scale": 1.7}
    assert torch.equal(*(alone(model, ids, use_cache=use, **options) for use in (True, False)))


def test_pipeline_and_chat_template(pair):
    model, tokenizer = pair
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert generate("Hello", max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith("Hello")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    answer = generate([{"role": "user", "content": "Hi"}], max_new_tokens=4, do_sample=False)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"


def test_streaming_gives_the_same_text(pair, ids):
    model, tokenizer = pair
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    options = {"max_new_tokens": 6, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=alone, args=(model, ids[:1]), kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(alone(model, ids[:1], max_new_tokens=6, do_sample=False)[0, 17:])


@torch.no_grad()
def test_embeddings_in_hidden_states_out_and_last_logits_only(pair, ids):
    model, _ = pair
    full = model(ids, output_hidden_states=True)
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(embedded.logits, full.logits)
    assert len(full.hidden_states) == 5 and full.hidden_states[0].shape == (2, 17, 64)
    assert torch.allclose(model(ids, logits_to_keep=3).logits, full.logits[:, -3:], atol=1e-6)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))
    assert isinstance(model(ids, return_dict=False), tuple)


def test_labels_give_the_shifted_cross_entropy(pair, ids):
    model, _ = pair
    out = model(ids, labels=ids)
    want = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert torch.allclose(out.loss, want, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_close(pair, ids, dtype, tmp_path):
    model, _ = pair
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=dtype).eval()
    want, got = model(ids).logits, half(ids).logits.float()
    assert (want - got).abs().max() < 0.05 * want.abs().max()
    out = alone(half, ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(out[:, 17], half(ids).logits[:, -1].argmax(-1))


def test_device_map_places_the_model(pair, ids, tmp_path):
    model, _ = pair
    model.save_pretrained(tmp_path)
    placed = type(model).from_pretrained(tmp_path, device_map={"": "cpu"})
    with torch.no_grad():
        assert torch.equal(placed(ids).logits, model(ids).logits)


def test_embeddings_can_be_resized(pair, ids, tmp_path):
    import copy

    model = copy.deepcopy(pair[0])
    before = model(ids).logits
    model.resize_token_embeddings(300)
    assert model.config.vocab_size == 300 and torch.allclose(model(ids).logits[..., :257], before, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_preparing_a_cache_returns_what_transformers_returns(pair, monkeypatch):
    model, _ = pair
    monkeypatch.setattr(GenerationMixin, "_prepare_cache_for_generation", lambda *args: "what transformers returns")
    assert model._prepare_cache_for_generation(GenerationConfig(), {}) == "what transformers returns"

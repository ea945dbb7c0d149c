"""Sliding windows with sinks: equal to StreamingLLM's definition, for any division of a text."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from deltify.conversion.student import convert, origins, sliding_control
from deltify.conversion.teacher import random_teacher
from deltify.model import DeltifyConfig, DeltifyForCausalLM
from deltify.model.modeling import DeltifyCache

TINY = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
TINY |= {"attention_bias": True, "qk_norm": True, "sliding_window": 7, "sink_tokens": 3, "use_rope": [True] * 3}
KINDS = {"S": "sliding_attention", "K": "linear_attention", "F": "full_attention"}


def tiny(pattern: str, **changes) -> DeltifyForCausalLM:
    options = TINY | {"layer_types": [KINDS[letter] for letter in pattern]} | changes
    return DeltifyForCausalLM(DeltifyConfig(**options)).eval()


@pytest.fixture(params=["SSS", "KSS", "SFK"])
def model(request):
    return tiny(request.param)


@pytest.fixture
def ids():
    return torch.randint(1, 97, (2, 90))  # without 0, the padding token


def reindexed(layer, x_TD, window: int, sinks: int):
    """Compute StreamingLLM's definition, a query at a time: the tokens in its cache have positions 0, 1, 2, ..."""

    def rotated(x_HK, positions):
        angles = positions[:, None] * 1e4 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
        turn = torch.polar(torch.ones_like(angles), angles)
        pairs = torch.complex(*x_HK.double().chunk(2, -1)) * turn
        return torch.cat([pairs.real, pairs.imag], -1)

    q, k, v = (part[0] for part in layer.project(x_TD[None]))
    rows = []
    for t in range(len(x_TD)):
        kept = sorted(set(range(min(sinks, t + 1))) | set(range(max(0, t - window + 1), t + 1)))
        places = torch.arange(len(kept), dtype=torch.float64) if layer.use_rope else torch.zeros(len(kept)).double()
        heads = []
        for head in range(4):
            keys, query = rotated(k[kept, head // 2], places), rotated(q[t, head][None], places[-1:])
            heads.append((query @ keys.T / 16**0.5).softmax(-1) @ v[kept, head // 2])
        rows.append(torch.cat(heads, -1))
    return layer.o_proj(torch.cat(rows))


@torch.no_grad()
@pytest.mark.parametrize("window, sinks", [(7, 3), (1, 2), (7, 0), (2, 1), (100, 4), (64, 90)])
@pytest.mark.parametrize("rope", [True, False])
def test_a_layer_equals_the_definition(window, sinks, rope):
    model = tiny("SSS", sliding_window=window, sink_tokens=sinks, use_rope=[rope] * 3).double()
    layer, x = model.model.layers[0].self_attn, torch.randn(1, 150, 64, dtype=torch.float64)
    got, _ = layer(x, model.model.rotary_tables(x), model.model.slots(x, None, None))
    assert torch.allclose(got[0], reindexed(layer, x[0], window, sinks), atol=1e-6)


@torch.no_grad()
def test_short_texts_get_full_attention(ids):
    sliding = tiny("SSS", sliding_window=60, sink_tokens=30)
    full = tiny("FFF")
    full.load_state_dict(sliding.state_dict())
    assert torch.allclose(sliding(ids).logits, full(ids).logits, atol=1e-5)
    longer = ids.repeat(1, 2)
    assert (sliding(longer).logits - full(longer).logits)[:, 90:].abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(50, 60), (2, 3), (1, 80), (64, 65, 89)])
def test_whole_equals_pieces_equals_decode(model, ids, cuts):
    whole, cache = model(ids).logits, DeltifyCache(config=model.config)
    pieces = [model(part, past_key_values=cache).logits for part in ids.tensor_split(cuts, 1)]
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-5)
    assert cache.get_seq_length() == 90
    cache.reset()
    assert cache.get_seq_length() == 0
    steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(20)]
    assert torch.allclose(torch.cat(steps, 1), whole[:, :20], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_sequences_equal_single_ones_also_in_pieces(model, ids, side):
    lengths, width = (90, 61, 2), 100
    ids = torch.cat([ids, ids[:1].flip(1)])
    padded, mask, places = torch.full((3, width), 5), torch.zeros(3, width, dtype=torch.long), []
    for row, length in enumerate(lengths):
        places.append(slice(width - length, width) if side == "left" else slice(0, length))
        padded[row, places[-1]], mask[row, places[-1]] = ids[row, :length], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = model(padded, attention_mask=mask, position_ids=positions).logits
    cache, pieces = DeltifyCache(config=model.config), []
    for start, end in ((0, 40), (40, 99), (99, 100)):  # some pieces are padding only, for one sequence or several
        options = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
        pieces.append(model(padded[:, start:end], past_key_values=cache, **options).logits)
    for row, length in enumerate(lengths):
        want = model(ids[row : row + 1, :length]).logits[0]
        assert torch.allclose(whole[row, places[row]], want, atol=1e-5)
        assert torch.allclose(torch.cat(pieces, 1)[row, places[row]], want, atol=1e-5)


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(model, ids):
    lengths = (30, 2, 58)
    packed = torch.cat([ids[0, :30], ids[1, :2], ids[1, 2:60]])[None].repeat(2, 1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].repeat(2, 1)
    out = model(packed, position_ids=positions).logits
    for part in torch.arange(90).split(lengths):
        assert torch.allclose(out[1, part], model(packed[:1, part]).logits[0], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("window, sinks", [(1, 2), (7, 0), (7, 3), (2, 1)])
def test_windows_and_sinks_skip_padding(window, sinks):
    model, ids = tiny("SSS", sliding_window=window, sink_tokens=sinks), torch.randint(1, 97, (3, 30))
    mask = (torch.rand(3, 30) < 0.5).long()
    mask[:, :4] = mask[:, 12:21] = 0  # longer than the window
    cache, whole = DeltifyCache(config=model.config), model(ids, attention_mask=mask).logits
    options = [{"attention_mask": mask[:, : t + 3], "past_key_values": cache} for t in range(0, 30, 3)]
    pieces = [model(part, **now).logits for part, now in zip(ids.split(3, 1), options)]
    for row in range(3):
        tokens = mask[row].bool()
        want = model(ids[row : row + 1, tokens]).logits[0]
        assert torch.allclose(whole[row, tokens], want, atol=1e-5)
        assert torch.allclose(torch.cat(pieces, 1)[row, tokens], want, atol=1e-5)
    assert all(torch.equal(layer.seen, mask.sum(1)) for layer in cache.layers)


@torch.no_grad()
def test_generation_with_padding_and_beams_equals_recomputing(model, ids):
    mask = torch.ones_like(ids)
    mask[1, :70] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=mask, **options)
    alone = model.generate(ids[1:, 70:], attention_mask=mask[1:, 70:], use_cache=False, **options)
    assert torch.equal(out[1, 90:], alone[0, 20:])
    options |= {"num_beams": 3, "num_return_sequences": 2}
    beams = [model.generate(ids, attention_mask=mask, use_cache=use, **options) for use in (True, False)]
    assert torch.equal(*beams)


@torch.no_grad()
def test_the_cache_never_grows():
    model, cache = tiny("SSK"), None

    def size():
        tensors = [x for layer in cache.layers[:2] for x in (layer.keys, layer.values)]
        return sum(x.numel() for x in tensors), [x.data_ptr() for x in tensors]

    cache = model(torch.randint(0, 97, (1, 3)), use_cache=True).past_key_values
    before = size()
    assert before[0] == 2 * 2 * (3 + 7 - 1) * 2 * 16  # layers, keys and values, places, heads, width
    for tokens in (1, 200, 1):
        model(torch.randint(0, 97, (1, tokens)), past_key_values=cache)
    assert size() == before and cache.get_seq_length() == 205
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache, which keeps no sinks"):
        model(torch.randint(0, 97, (1, 3)), past_key_values=DynamicCache(config=model.config))


@torch.no_grad()
def test_scores_of_a_long_text_never_exist_at_once(monkeypatch):
    from deltify.model import sliding

    layer = tiny("SSS", sliding_window=64, sink_tokens=4).model
    sizes, attend = [], sliding.attend
    monkeypatch.setattr(sliding, "attend", lambda q, k, *rest: sizes.append(k.numel()) or attend(q, k, *rest))
    x = torch.randn(1, 65536, 64)
    layer.layers[0].self_attn(x, layer.rotary_tables(x), layer.slots(x, None, None))
    assert len(sizes) == 32 and max(sizes) == 32 * (64 + 63) * 2 * 16


def test_gradients_are_those_of_the_definition_and_reach_every_weight(ids):
    model = tiny("SKS")
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    layer = tiny("SSS").double().model.layers[0].self_attn
    other = copy.deepcopy(layer)
    x = torch.randn(1, 80, 64, dtype=torch.float64)
    outer = tiny("SSS").double().model
    layer(x, outer.rotary_tables(x), outer.slots(x, None, None))[0].square().sum().backward()
    reindexed(other, x[0], 7, 3).square().sum().backward()
    for (name, got), want in zip(layer.named_parameters(), other.parameters()):
        assert torch.allclose(got.grad, want.grad, atol=1e-4, rtol=1e-5), name


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "smollm3", "arcee"])
def test_the_control_is_the_teacher_with_a_window_and_sinks(architecture):
    teacher = random_teacher(architecture)
    control = sliding_control(teacher, window=16, sinks=4)
    ids = torch.randint(0, 200, (1, 60))
    with torch.no_grad():
        got, want = control(ids).logits, teacher.model(ids).logits
    assert torch.allclose(got[:, :20], want[:, :20], atol=1e-5)
    assert (got - want)[:, 20:].abs().max() > 1e-3
    weight = control.model.layers[1].self_attn.q_proj.weight
    assert weight.data_ptr() == teacher.model.model.layers[1].self_attn.q_proj.weight.data_ptr()
    assert not any(p.requires_grad for p in control.parameters())
    trained = convert(teacher, full_attention_layers="S", sliding_window=16, init="library").eval()
    with torch.no_grad():
        assert torch.equal(trained(ids).logits, got)


def test_a_pattern_of_three_kinds_is_converted_explained_and_saved(tmp_path):
    teacher = random_teacher("llama")
    student = convert(teacher, full_attention_layers="KSF", sliding_window=16, init="library").eval()
    kinds = ["linear_attention", "sliding_attention", "full_attention", "linear_attention"]
    assert student.config.layer_types == kinds and student.config.use_rope == [False, True, False, False]
    lines = [line for line in origins(student, "library") if "a window of 16 tokens and 4 sinks" in line]
    assert len(lines) == 4 and "self_attn.q_proj" in lines[0]
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 200, (1, 60))
    with torch.no_grad():
        assert again.config.layer_types == kinds and torch.equal(again(ids).logits, student(ids).logits)


def test_wrong_windows_and_masks_are_named(ids):
    with pytest.raises(ValueError, match="sliding_window=0 must be at least 1"):
        tiny("SSS", sliding_window=0)
    with pytest.raises(ValueError, match="sink_tokens=-1 must be at least 0"):
        tiny("SSS", sink_tokens=-1)
    with pytest.raises(ValueError, match=r"attention_mask has shape \[1, 1, 90, 90\]; KDA and sliding layers need"):
        tiny("SSF")(ids, attention_mask=torch.ones(1, 1, 90, 90))

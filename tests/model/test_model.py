"""The model: equal to its teacher without converted layers, and to itself for any division of a sequence."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DynamicCache

from deltify.conversion.student import convert
from deltify.conversion.teacher import FAMILIES, random_teacher
from deltify.inference.states import State
from deltify.model import DeltifyConfig, DeltifyForCausalLM, capture, mixers, modeling
from deltify.model.mixers import fuse_weights_, fused_weight, is_observed
from deltify.model.modeling import DeltifyCache

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
PURE = ["linear_attention"] * 4
HYBRID = ["linear_attention"] * 3 + ["full_attention"]


@pytest.fixture(params=[PURE, HYBRID], ids=["pure", "hybrid"])
def model(request):
    config = DeltifyConfig(**TINY, layer_types=request.param, use_rope=[True] * 4)
    return DeltifyForCausalLM(config).eval()


@pytest.fixture
def ids():
    return torch.randint(1, 97, (2, 70))  # without 0, the padding token


# what makes a tiny teacher of each family show what is special about it
FAMILY_OPTIONS = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "arcee": {"attention_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"attention_bias": True},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
}


def test_every_family_is_tested():
    assert FAMILY_OPTIONS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("architecture", FAMILY_OPTIONS)
def test_with_all_layers_converted_a_student_trains(architecture):
    teacher = random_teacher(architecture, **FAMILY_OPTIONS[architecture])
    student = convert(teacher, init="library")
    ids = torch.randint(0, 200, (2, 24))
    student(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in student.parameters())
    assert not [name for name in student.state_dict() if name.endswith("q_norm.weight")]
    with pytest.raises(ValueError, match="attend to a window of 16 tokens"):
        convert(random_teacher("mistral", sliding_window=16), full_attention_layers="3:1", init="library")


@pytest.mark.parametrize("architecture", FAMILY_OPTIONS)
def test_with_no_layer_converted_the_teacher_comes_back_bit_for_bit(architecture):
    teacher = random_teacher(architecture, **FAMILY_OPTIONS[architecture])
    student = convert(teacher, full_attention_layers="all", keep_rope=True, init="library")
    ids = torch.randint(0, 200, (2, 50))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with torch.no_grad():
        assert torch.equal(student(ids).logits, teacher.model(ids).logits)
        assert torch.equal(student(ids, attention_mask=mask).logits, teacher.model(ids, attention_mask=mask).logits)


@torch.no_grad()
def test_whole_equals_prefill_and_decode_equals_pieces(model, ids):
    whole = model(ids).logits
    out = model(ids[:, :50], use_cache=True)
    logits, cache = [out.logits], out.past_key_values
    logits.append(model(ids[:, 50:60], past_key_values=cache).logits)
    logits += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(60, 70)]
    assert torch.allclose(torch.cat(logits, 1), whole, atol=1e-5)
    assert cache.get_seq_length() == 70


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_sequences_equal_single_ones(model, ids, side):
    lengths = (70, 40)
    padded, mask = torch.full((2, 80), 5), torch.zeros(2, 80, dtype=torch.long)
    places = []
    for row, length in enumerate(lengths):
        place = slice(80 - length, 80) if side == "left" else slice(0, length)
        padded[row, place], mask[row, place] = ids[row, :length], 1
        places.append(place)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(padded, attention_mask=mask, position_ids=positions).logits
    for row, length in enumerate(lengths):
        assert torch.allclose(out[row, places[row]], model(ids[row : row + 1, :length]).logits[0], atol=1e-5)


@torch.no_grad()
def test_a_fixed_number_of_documents_changes_nothing(model, ids):
    positions = torch.cat([torch.arange(30), torch.arange(10)])[None].repeat(2, 1)
    for places in (positions, torch.arange(40)[None].repeat(2, 1)):
        want = model(ids[:, :40], position_ids=places).logits
        got = model(ids[:, :40], position_ids=places, max_documents=16).logits
        torch.testing.assert_close(got, want)


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(model, ids):
    packed = torch.cat([ids[0, :30], ids[1, :40]])[None].repeat(2, 1)
    positions = torch.cat([torch.arange(30), torch.arange(40)])[None].repeat(2, 1)
    out = model(packed, position_ids=positions).logits
    for row in range(2):
        assert torch.allclose(out[row, :30], model(ids[:1, :30]).logits[0], atol=1e-5)
        assert torch.allclose(out[row, 30:], model(ids[1:, :40]).logits[0], atol=1e-5)


@torch.no_grad()
def test_generate_equals_recomputing_the_whole_sequence(model, ids):
    prompt = ids[:, :20]
    out = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    want = prompt
    for _ in range(8):
        want = torch.cat([want, model(want).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, want)
    mask = torch.ones_like(prompt)
    mask[1, :7] = 0
    out = model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    alone = model.generate(prompt[1:, 7:], max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(out[1, 20:], alone[0, 13:])


@torch.no_grad()
def test_the_cache_of_a_pure_model_does_not_grow():
    model = DeltifyForCausalLM(DeltifyConfig(**TINY)).eval()
    cache = model(torch.randint(0, 97, (1, 10)), use_cache=True).past_key_values

    def numbers():
        layers = [(layer.conv_states[0], layer.recurrent_states[0]) for layer in cache.layers]
        return [(x.data_ptr(), x.shape) for pair in layers for x in pair]

    before = numbers()
    for _ in range(3):
        model(torch.randint(0, 97, (1, 33)), past_key_values=cache)
    assert numbers() == before and cache.get_seq_length() == 109


def test_saved_folder_loads_with_the_auto_class_and_keeps_gates_in_float32(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model(ids).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    mixer = half.model.layers[0].self_attn
    assert mixer.A_log.dtype == mixer.dt_bias.dtype == torch.float32 and mixer.q_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("biases", [{}, {"gate_bias": True}, {"kda_bias": True}, {"gate_bias": True, "kda_bias": True}])
def test_tensors_decide_whether_kda_layers_have_biases(biases, ids, tmp_path):
    model = DeltifyForCausalLM(DeltifyConfig(**TINY, layer_types=HYBRID, **biases)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["gate_bias"], config["kda_bias"]  # as in folders of deltify before 0.1
    path.write_text(json.dumps(config))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (again.config.gate_bias, again.config.kda_bias) == (model.config.gate_bias, model.config.kda_bias)
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model(ids).logits)


def test_the_norm_of_heads_has_an_epsilon_of_its_own():
    assert DeltifyConfig(**TINY, rms_norm_eps=1e-6).o_norm_eps == 1e-6
    student = convert(random_teacher("qwen3", rms_norm_eps=1e-6), init="library")
    layer = student.model.layers[0]
    assert layer.input_layernorm.eps == 1e-6 and layer.self_attn.o_norm.eps == 1e-5


def test_activation_checkpointing_gives_equal_gradients(model, ids):
    model.train()

    def gradients():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    want = gradients()
    model.gradient_checkpointing_enable()
    for name, gradient in gradients().items():
        assert torch.allclose(gradient, want[name], atol=1e-6), name


def test_wrong_configurations_are_named():
    with pytest.raises(ValueError, match="layer_types contains"):
        DeltifyConfig(**TINY, layer_types=["mamba"] * 4)
    with pytest.raises(ValueError, match="use_rope has 3 entries"):
        DeltifyConfig(**TINY, use_rope=[True] * 3)


@torch.no_grad()
def test_documents_stay_apart_with_padding_and_with_a_mask_of_ones():
    torch.manual_seed(0)
    packed = torch.cat([torch.arange(5), torch.arange(7)])[None]
    ids = torch.randint(0, 90, (1, 12))
    for kinds in (["linear_attention"] * 2, ["linear_attention", "full_attention"]):
        facts = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 90}
        model = DeltifyForCausalLM(DeltifyConfig(**facts, num_hidden_layers=2, layer_types=kinds)).eval()
        alone = model(ids[:, 5:]).logits
        ones = model(ids, attention_mask=torch.ones_like(ids), position_ids=packed).logits[:, 5:]
        assert torch.allclose(ones, alone, atol=1e-5)
        padded, mask = torch.nn.functional.pad(ids, (3, 0)), torch.tensor([[0] * 3 + [1] * 12])
        places = torch.nn.functional.pad(packed, (3, 0), value=1)
        if "full_attention" in kinds:
            with pytest.raises(ValueError, match="padding and several documents"):
                model(padded, attention_mask=mask, position_ids=places)
        else:
            beside = model(padded, attention_mask=mask, position_ids=places).logits[:, 8:]
            assert torch.allclose(beside, alone, atol=1e-5)
        with pytest.raises(ValueError, match="cannot go on from a cache"):
            model(ids, position_ids=packed, past_key_values=DeltifyCache(config=model.config))
        with pytest.raises(ValueError, match="past_key_values has 0 layers, the model 2"):
            model(ids, past_key_values=DynamicCache())


LENGTHS = (9, 1, 14)
OFFSETS = torch.tensor([0, 9, 10, 24], dtype=torch.int32)
PLACES = torch.cat([torch.arange(n) for n in LENGTHS])[None]
NUMBERS = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None].int()
FORMS = {
    "transformers' collator": {"cu_seq_lens_q": OFFSETS, "cu_seq_lens_k": OFFSETS, "max_length_q": 14},
    "without keys": {"cu_seq_lens_q": OFFSETS},
    "flash-linear-attention": {"cu_seqlens": OFFSETS.long()},
    "with an empty document": {"cu_seqlens": torch.tensor([0, 9, 9, 10, 24, 24])},
    "a list": {"cu_seqlens": OFFSETS.tolist()},
    "numbers": {"seq_idx": NUMBERS},
    "other numbers": {"seq_idx": torch.tensor([5, -1, 5])[NUMBERS.long()]},
    "trl": {"position_ids": PLACES, "cu_seq_lens_q": OFFSETS, "cu_seq_lens_k": OFFSETS, "seq_idx": NUMBERS},
    "positions from 2": {"position_ids": PLACES + 2, "seq_idx": NUMBERS},
    "under a mask of ones": {"cu_seqlens": OFFSETS, "attention_mask": torch.ones(1, 24, dtype=torch.long)},
}


def tiny(*kinds: str, **more) -> DeltifyForCausalLM:
    facts = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 90}
    facts |= {"sliding_window": 6, "sink_tokens": 2, "use_rope": [True] * len(kinds)} | more
    return DeltifyForCausalLM(DeltifyConfig(**facts, num_hidden_layers=len(kinds), layer_types=list(kinds))).eval()


@pytest.fixture(params=["KK", "KF", "FK", "SK"])
def small(request):
    letters = {"K": "linear_attention", "F": "full_attention", "S": "sliding_attention"}
    return tiny(*(letters[letter] for letter in request.param))


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_bounds_of_documents_count_in_every_form(small, form):
    ids = torch.randint(0, 90, (1, 24))
    want = torch.cat([small(part).logits for part in ids.split(LENGTHS, 1)], 1)
    for options in ({}, {"use_cache": False}, {"labels": ids}):
        out = small(ids, **FORMS[form], **options)
        assert torch.allclose(out.logits, want, atol=1e-5) and out.past_key_values is None


@torch.no_grad()
def test_bounds_of_several_sequences_cover_all_of_them(small):
    ids = torch.randint(0, 90, (2, 12))
    want = torch.cat([small(part).logits[0] for row in ids.split(1) for part in row.split(6, 1)]).view(2, 12, -1)
    numbers = torch.tensor([[0] * 6 + [1] * 6] * 2)
    for given in ({"cu_seqlens": torch.tensor([0, 6, 12, 18, 24])}, {"seq_idx": numbers}):
        assert torch.allclose(small(ids, **given).logits, want, atol=1e-5)
    places = torch.arange(6).repeat(2)[None]  # one sequence's positions, for all
    assert torch.allclose(small(ids, position_ids=places).logits, want, atol=1e-5)
    with pytest.raises(ValueError, match="lets a document reach into the next sequence of 12 tokens"):
        small(ids, cu_seqlens=torch.tensor([0, 6, 18, 24]))


def test_bounds_that_contradict_or_do_not_fit_are_refused(small):
    ids, other = torch.randint(0, 90, (1, 24)), torch.tensor([0, 10, 24])
    pairs = [{"cu_seq_lens_q": OFFSETS, "cu_seq_lens_k": other}, {"cu_seqlens": other, "seq_idx": NUMBERS}]
    pairs += [{"cu_seqlens": OFFSETS, "position_ids": torch.arange(24)[None]}]
    pairs += [{"seq_idx": NUMBERS, "position_ids": PLACES.roll(1, 1)}]
    for given in pairs:
        with pytest.raises(ValueError, match=f"{next(iter(sorted(given)))}.*contradict each other"):
            small(ids, **given)
    for bounds in ([0, 9], [1, 24], [0, 12, 9, 24], []):
        with pytest.raises(ValueError, match="must rise from 0 to the number of tokens, 24"):
            small(ids, cu_seqlens=torch.tensor(bounds))
    with pytest.raises(ValueError, match=r"seq_idx has shape \[24\]; it must be the document of each token, \[1, 24\]"):
        small(ids, seq_idx=NUMBERS[0])
    mask = torch.tensor([[0] * 3 + [1] * 21])
    with pytest.raises(ValueError, match="with an attention_mask with padding"):
        small(ids, cu_seqlens=OFFSETS, attention_mask=mask)
    for given in ({"cu_seqlens": OFFSETS}, {"seq_idx": NUMBERS}):
        with pytest.raises(ValueError, match="packed documents cannot continue from a cache"):
            small(ids, past_key_values=DeltifyCache(config=small.config), **given)
    with pytest.raises(ValueError, match="packed documents cannot continue from a cache"):
        small.generate(ids, cu_seq_lens_q=OFFSETS, max_new_tokens=2, pad_token_id=0)


def test_gradients_of_packed_documents_are_those_of_each_alone(small):
    ids = torch.randint(0, 90, (1, 24))

    def gradients(*logits):
        small.zero_grad()
        torch.cat(logits, 1).square().sum().backward()
        return [p.grad for p in small.parameters()]

    want = gradients(*(small(part).logits for part in ids.split(LENGTHS, 1)))
    for got, alone in zip(gradients(small(ids, cu_seqlens=OFFSETS).logits), want):
        assert torch.allclose(got, alone, atol=1e-5)


@torch.no_grad()
def test_flash_attention_is_told_where_documents_are(monkeypatch):
    """Attend within `cu_seq_lens_q` of all sequences one after the other, as FlashAttention does."""
    model, ids = tiny("full_attention", "linear_attention"), torch.randint(0, 90, (2, 12))
    cuts = (5, 7, 3, 9)
    places = torch.cat([torch.arange(n) for n in cuts]).view(2, 12)
    want = model(ids, position_ids=places).logits

    def attend(module, q, k, v, mask, scaling, cu_seq_lens_q, cu_seq_lens_k, max_length_q, **kwargs):
        assert mask is None and torch.equal(cu_seq_lens_q, cu_seq_lens_k) and max_length_q >= max(cuts)
        q, k, v = (x.transpose(1, 2).flatten(0, 1).transpose(0, 1) for x in (q, k, v))  # [heads, tokens, K]
        parts = [x.split(cu_seq_lens_q.diff().tolist(), 1) for x in (q, k, v)]
        causal = torch.nn.functional.scaled_dot_product_attention
        y = torch.cat([causal(*part, is_causal=True, scale=scaling) for part in zip(*parts)], 1)
        return y.transpose(0, 1).unflatten(0, (2, 12)), None

    monkeypatch.setattr(mixers.ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *_: attend)
    model.config._attn_implementation = "flash_attention_2"
    assert torch.allclose(model(ids, position_ids=places).logits, want, atol=1e-5)


@torch.no_grad()
def test_documents_stay_apart_beside_a_sequence_of_padding():
    ids, mask = torch.randint(0, 90, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[0], mask[2, :4] = 0, 0
    places = torch.cat([torch.arange(5), torch.arange(7)]).repeat(3, 1)
    places[2] = torch.arange(12)
    model = tiny("linear_attention", "sliding_attention")
    out = model(ids, attention_mask=mask, position_ids=places)
    assert torch.allclose(out.logits[1, 5:], model(ids[1:2, 5:]).logits[0], atol=1e-5)
    assert torch.allclose(out.logits[2, 4:], model(ids[2:, 4:]).logits[0], atol=1e-5)
    assert out.past_key_values is None
    with pytest.raises(ValueError, match="packed documents cannot go on from a cache"):
        model(ids, attention_mask=mask, position_ids=places, past_key_values=DeltifyCache(config=model.config))


def test_options_reach_the_configuration(model, tmp_path):
    model.save_pretrained(tmp_path / "sub")
    again = DeltifyForCausalLM.from_pretrained(tmp_path, subfolder="sub", use_cache=False, dtype="auto")
    assert again.config.use_cache is False and again.dtype == torch.float32


@torch.no_grad()
def test_fused_projections_change_no_result_and_no_file(tmp_path):
    model = DeltifyForCausalLM(DeltifyConfig(**TINY, layer_types=PURE)).eval()
    layer, ids = model.model.layers[0].self_attn, torch.randint(0, 97, (2, 20))

    def logits():
        cache = DeltifyCache(config=model.config)
        return torch.cat([model(part, past_key_values=cache).logits for part in ids.split([18, 1, 1], dim=1)], 1)

    want, before = logits(), {name: x.clone() for name, x in model.state_dict().items()}
    assert fused_weight(layer.projections) is None
    fuse_weights_(layer)
    assert fused_weight(layer.projections).shape == (3 * 64 + 2 * 16 + 4 + 4, 64)  # a multiple of 8 rows
    assert torch.allclose(logits(), want, atol=1e-6)
    with torch.enable_grad():
        assert fused_weight(layer.projections) is None
        model(ids).logits.sum().backward()
    assert all(x.grad is not None for x in layer.parameters())
    model.save_pretrained(tmp_path)
    again = DeltifyForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(x, again[name]) for name, x in before.items())


@torch.no_grad()
def test_modules_with_a_hook_or_another_forward_are_called():
    model, ids = DeltifyForCausalLM(DeltifyConfig(**TINY, layer_types=PURE)).eval(), torch.randint(0, 97, (2, 20))
    projection = model.model.layers[0].self_attn.v_proj
    plain = projection.forward
    projection.forward = lambda x: 0 * plain(x)
    got = model(ids).logits
    del projection.forward
    projection.weight.zero_()
    torch.testing.assert_close(got, model(ids).logits)
    assert not any(map(is_observed, model.modules()))
    model(ids, output_hidden_states=True)  # leaves hooks that do nothing
    assert not any(map(is_observed, model.modules()))
    model.model.layers[1].register_forward_hook(lambda *_: None)
    assert any(map(is_observed, model.modules()))


@torch.no_grad()
def test_a_mask_of_a_whole_text_serves_its_pieces(small):
    ids, mask = torch.randint(0, 90, (2, 16)), torch.ones(2, 16, dtype=torch.long)
    mask[1, :5] = 0
    want, cache = small(ids, attention_mask=mask).logits, DeltifyCache(config=small.config)
    pieces = [small(part, attention_mask=mask, past_key_values=cache).logits for part in ids.split(8, 1)]
    longer = F.pad(mask, (0, 4))
    last = small(ids, attention_mask=longer, logits_to_keep=1).logits
    whole = small(ids, attention_mask=longer).logits
    for got, wanted in ((torch.cat(pieces, 1), want), (whole, want), (last, want[:, -1:])):
        for row in range(2):
            kept = mask[row].bool()[-got.shape[1] :]
            torch.testing.assert_close(got[row, kept], wanted[row, kept], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_mask_longer_than_a_state_that_counts_no_tokens_is_refused():
    model = tiny("linear_attention", "linear_attention")
    state = State.from_text(model, [1, 2, 3, 4])
    with pytest.raises(ValueError, match="Give the mask of the 2 new tokens"):
        model(torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 6), past_key_values=state.cache(model))


class OnGpu(torch.Tensor):
    """A tensor that claims to be on a GPU, so that a CPU runs the code for GPUs."""

    is_cuda = True


@torch.no_grad()
def test_a_cache_that_does_not_count_tokens_is_never_captured():
    model = tiny("linear_attention", "linear_attention")
    ids, cache = torch.randint(0, 90, (2, 4)), DynamicCache(config=model.config)
    steps = [model(ids[:, t : t + 1].as_subclass(OnGpu), past_key_values=cache).logits for t in range(4)]
    assert torch.allclose(torch.cat(steps, 1).as_subclass(torch.Tensor), model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("keys, pieces", [(1, 1), (31, 1), (64, 4)])
def test_attention_of_one_token(keys, pieces, monkeypatch):
    monkeypatch.setattr(mixers, "LONG", 40)
    monkeypatch.setattr(mixers, "PIECES", pieces)
    q, (k, v) = torch.randn(2, 6, 1, 16), torch.randn(2, 2, 3, keys, 16)
    mask = torch.rand(2, 1, 1, keys) < 0.6
    mask[..., -1] = True
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
    assert torch.allclose(mixers.attend_once(q, k, v, mask, 0.3), want.transpose(1, 2), atol=1e-5)


@torch.no_grad()
def test_another_norm_in_a_layer_is_called():
    model, ids = tiny("linear_attention", "linear_attention"), torch.randint(0, 90, (2, 9))
    norm = model.model.layers[0].post_attention_layernorm = torch.nn.LayerNorm(model.config.hidden_size)
    torch.nn.init.normal_(norm.bias)
    got, seen = model(ids).logits, []
    norm.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(got, model(ids).logits) and seen


@torch.no_grad()
def test_linear_layers_of_adapters_run_in_a_captured_step():
    x, weight = torch.randn(1, 8), torch.randn(5, 8)
    with capture.FastProducts():
        assert torch.equal(F.linear(input=x, weight=weight), x @ weight.t())
        assert torch.equal(F.linear(x, weight, bias=x[0, :5]), torch.addmm(x[0, :5], x, weight.t()))


@torch.no_grad()
def test_a_step_without_memory_for_a_trial_runs_eagerly(eager_steps, monkeypatch):
    model = tiny("linear_attention", "linear_attention")
    ids, cache = torch.randint(0, 90, (2, 4)).as_subclass(OnGpu), DeltifyCache(config=model.config)

    def no_memory(cache):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(capture, "copy_states", no_memory)
    with pytest.warns(UserWarning, match="does not hold the states twice") as said:
        found = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(4)]
    assert len(said) == 1 and not eager_steps
    want = model(ids.as_subclass(torch.Tensor)).logits
    assert torch.allclose(torch.cat(found, 1).as_subclass(torch.Tensor), want, atol=1e-5)


class EagerStep(capture.DecodeStep):
    """A captured step without a graph, which counts its uses."""

    used: list[int] = []

    def capture(self):
        pass

    def __call__(self, ids, cache, *arguments):
        assert self.addresses == capture.addresses(cache)
        self.used.append(cache.get_seq_length())
        return super().__call__(ids.as_subclass(torch.Tensor), cache, *arguments)


@pytest.fixture
def eager_steps(monkeypatch):
    """Replace CUDA graphs by eager steps on the same buffers, which have room for few tokens."""
    monkeypatch.setattr(capture, "CapturedStep", EagerStep)
    monkeypatch.setattr(capture, "LEAST_ROOM", 1)
    monkeypatch.setattr(EagerStep, "used", [])
    return EagerStep.used


@torch.no_grad()
def test_a_captured_step_needs_tokens_without_padding_and_writable_buffers(eager_steps):
    model, replayed = tiny("linear_attention", "linear_attention"), eager_steps
    ids, mask = torch.randint(0, 90, (2, 30)), torch.ones(2, 30, dtype=torch.long)
    mask[0, :12], mask[1, 17], mask[:, 20] = 0, 0, 0
    cache, found = DeltifyCache(config=model.config), []
    for t in range(30):
        token = ids[:, t : t + 1].as_subclass(OnGpu)
        with torch.inference_mode() if t < 14 or 24 <= t < 27 else torch.no_grad():
            out = model(token, attention_mask=mask[:, : t + 1], past_key_values=cache)
        found.append(out.logits.as_subclass(torch.Tensor))
        if t == 22:
            cache.reorder_cache(torch.tensor([0, 1]))  # equal sizes, so in place
    # a new step runs twice: once as a trial
    assert replayed == [13, 13, 15, 15, 16, 18, 19, 21, 22, 23, 24, 25, 26, 27, 28, 29]
    for row in range(2):
        tokens = mask[row].bool()
        want = model(ids[row : row + 1, tokens]).logits[0]
        assert torch.allclose(torch.cat(found, 1)[row, tokens], want, atol=1e-5)
    replayed.clear()
    for options in ({"output_hidden_states": True}, {"labels": ids[:, :1]}):
        model(ids[:, :1].as_subclass(OnGpu), past_key_values=cache, **options)
    with pytest.raises(ValueError, match="forward does not know windows"):
        model(ids[:, :1].as_subclass(OnGpu), past_key_values=cache, windows=3)
    assert not replayed
    model(ids[:, :1].as_subclass(OnGpu), past_key_values=cache, tokenizer=object(), output_hidden_states=False)
    assert len(replayed) == 1


def decoded(model, ids, mask, prompt, as_gpu, change=lambda at, cache: None, **options):
    """Return the logits of tokens decoded one by one after a prompt."""
    cache, found = DeltifyCache(config=model.config), []
    model(ids[:, :prompt], attention_mask=None if mask is None else mask[:, :prompt], past_key_values=cache)
    for at in range(prompt, ids.shape[1]):
        token = ids[:, at : at + 1]
        seen = None if mask is None else mask[:, : at + 1]
        given = {name: x[:, at : at + 1] for name, x in options.items()}
        out = model(token.as_subclass(OnGpu) if as_gpu else token, attention_mask=seen, past_key_values=cache, **given)
        found.append(out.logits.as_subclass(torch.Tensor))
        change(at, cache)
    return torch.cat(found, 1)


@torch.no_grad()
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_hybrids_captured_step_gives_the_eager_logits(rope, padded, eager_steps):
    kinds = ("linear_attention", "full_attention", "linear_attention", "full_attention")
    model = tiny(*kinds, use_rope=[rope] * 4, num_key_value_heads=1)
    ids, mask = torch.randint(0, 90, (2, 600)), None
    options = {}
    if padded:
        mask = torch.ones(2, 600, dtype=torch.long)
        mask[0, :7] = 0
        options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)

    def reorder(at, cache):
        if at in (40, 300):
            cache.reorder_cache(torch.tensor([1, 0]))
            cache.reorder_cache(torch.tensor([1, 0]))

    want = decoded(model, ids, mask, 20, False, **options)
    got = decoded(model, ids, mask, 20, True, reorder, **options)
    assert torch.allclose(got, want, atol=1e-4)
    # two tokens run eagerly at first; each full buffer and each new address of a state costs a comparison
    assert len(eager_steps) >= 579 and eager_steps[0] == 21 and {256, 512} <= set(eager_steps)


@torch.no_grad()
def test_a_hybrids_step_that_differs_from_the_eager_one_is_not_used(eager_steps, monkeypatch):
    model, ids = tiny("linear_attention", "full_attention"), torch.randint(0, 90, (2, 40))
    want = decoded(model, ids, None, 10, False)
    monkeypatch.setattr(capture.RoomyCache, "take", lambda self, used: self.place.fill_(used))  # forgets the prompt
    with pytest.warns(UserWarning, match="without a CUDA graph: its logits differ by"):
        got = decoded(model, ids, None, 10, True)
    assert torch.allclose(got, want, atol=1e-4) and eager_steps == [11, 11]


def as_on_gpu(model, ids, *more):
    return capture.captured_logits(model, ids.as_subclass(OnGpu), *more)


@torch.no_grad()
def test_generation_of_a_hybrid_is_the_same_with_captured_steps(eager_steps, monkeypatch):
    model = tiny("linear_attention", "full_attention")
    ids, mask = torch.randint(1, 90, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[0, :5], mask[1, :1] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 30, "min_new_tokens": 30, "pad_token_id": 0}
    for beams in (1, 2):
        want = model.generate(ids, do_sample=False, num_beams=beams, **options)
        with monkeypatch.context() as patch:
            patch.setattr(modeling, "captured_logits", as_on_gpu)
            assert torch.equal(model.generate(ids, do_sample=False, num_beams=beams, **options), want)
    assert len(eager_steps) > 25

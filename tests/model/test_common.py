"""The checks of transformers' common model and generation tests, which its wheel does not contain."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    Trainer,
    TrainingArguments,
)
from transformers.cache_utils import DynamicLayer

from deltify.model import ArceeKDAConfig, DeltifyConfig, DeltifyForCausalLM, DeltifyModel
from deltify.model.cache import DeltifyCache, held
from deltify.model.modeling import ArceeKDAForCausalLM

TINY = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8, "sink_tokens": 2, "use_rope": [True] * 3}
TINY |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "bos_token_id": 1, "eos_token_id": None}
TINY |= {"pad_token_id": 0}
LLAMA = {name: TINY[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
LLAMA |= {"num_hidden_layers": 1, "num_key_value_heads": 2, "eos_token_id": None, "pad_token_id": 0}
KINDS = {"S": "sliding_attention", "K": "linear_attention", "F": "full_attention"}
GREEDY = {"do_sample": False, "pad_token_id": 0}


def config_of(pattern: str, cls=DeltifyConfig, **changes) -> DeltifyConfig:
    return cls(**(TINY | {"layer_types": [KINDS[letter] for letter in pattern]} | changes))


@pytest.fixture(params=["KKK", "KFK", "SSS", "KSF"])
def config(request):
    return config_of(request.param)


@pytest.fixture
def model(config):
    return DeltifyForCausalLM(config).eval()


@pytest.fixture
def ids():
    return torch.randint(2, 97, (2, 21))


# ---- configuration, weights, saving ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [DeltifyConfig, ArceeKDAConfig])
def test_a_configuration_survives_json_and_copies(cls, tmp_path):
    config = config_of("KSF", cls)
    config.save_pretrained(tmp_path)
    for again in (cls.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path), copy.deepcopy(config)):
        assert type(again) is cls
        assert again.to_json_string() == config.to_json_string()
    assert cls().model_type == cls.model_type  # without arguments, too


@pytest.mark.parametrize("absent", ["null", "missing"])
def test_fields_that_follow_from_others_may_be_null_or_missing_in_a_file(absent, tmp_path):
    defaults = {
        "head_dim": 16,
        "num_key_value_heads": 4,
        "layer_types": ["linear_attention"] * 3,
        "use_rope": [False] * 3,
        "o_norm_eps": 0.25,
    }
    facts = {name: value for name, value in TINY.items() if name not in defaults}
    facts |= {"model_type": "deltify", "rms_norm_eps": 0.25}
    facts |= dict.fromkeys(defaults) if absent == "null" else {}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    for config in (DeltifyConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert {name: getattr(config, name) for name in defaults} == defaults
        assert DeltifyForCausalLM(config).model.layers[0].self_attn.o_norm.eps == 0.25


def test_a_new_model_is_initialised_within_its_range(config):
    config.initializer_range = 1e-10
    for name, p in DeltifyForCausalLM(config).named_parameters():
        if not name.endswith(("A_log", "dt_bias")):  # the gates are initialised differently
            assert round(float(p.detach().mean()), 6) in (0.0, 1.0), name
    config.initializer_range = 0.02
    again = DeltifyForCausalLM(config)
    gates = [p for name, p in again.named_parameters() if name.endswith(("A_log", "dt_bias"))]
    assert all(torch.isfinite(p).all() for p in gates)
    width = again.model.layers[0].mlp.up_proj.weight.detach().std()
    assert 0.015 < float(width) < 0.025


def test_meta_device_and_absent_weights_are_filled(config):
    with torch.device("meta"):
        empty = DeltifyForCausalLM(config)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    filled = DeltifyForCausalLM.from_pretrained(None, config=config, state_dict={})
    for (name, p), q in zip(filled.named_parameters(), DeltifyForCausalLM(config).parameters()):
        p, q = p.detach(), q.detach()
        assert p.device.type == "cpu" and torch.isfinite(p).all(), name
        if name.endswith("A_log"):
            assert float(p.min()) >= 0 and float(p.max()) <= 2.78  # log 16
        elif name.endswith("dt_bias"):
            assert float(F.softplus(p).min()) >= 0.99e-3 and float(F.softplus(p).max()) <= 0.101
        else:
            assert abs(float(p.std() - q.std())) < 0.01 and abs(float(p.mean() - q.mean())) < 0.01, name
    named = set(dict(filled.named_parameters())) | set(dict(filled.named_buffers()))
    assert set(filled.state_dict()) <= named


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cls", [DeltifyForCausalLM, ArceeKDAForCausalLM])
def test_saving_and_loading_with_and_without_the_head(cls, tied, tmp_path, ids):
    model = cls(config_of("KSF", cls.config_class, tie_word_embeddings=tied)).eval()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path / "whole", max_shard_size="50KB")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 1
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and type(again) is cls
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)
    base = AutoModel.from_pretrained(tmp_path / "whole").eval()
    want = model.model(ids).last_hidden_state
    assert isinstance(base, DeltifyModel) and torch.equal(base(ids).last_hidden_state, want)
    base.save_pretrained(tmp_path / "base")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "base").eval()(ids).last_hidden_state, want)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = cls(model.config).eval()
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(other(ids).logits, model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_replaced_and_resized_both_ways(tied, ids):
    model = DeltifyForCausalLM(config_of("KSF", tie_word_embeddings=tied)).eval()
    before = model(ids).logits
    for size in (120, 97):
        model.resize_token_embeddings(size)
        assert model.get_input_embeddings().weight.shape[0] == model.lm_head.out_features == model.config.vocab_size
        assert torch.allclose(model(ids).logits[..., :97], before, atol=1e-5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    fresh = torch.nn.Embedding(97, 64)
    model.set_input_embeddings(fresh)
    assert model.get_input_embeddings() is model.model.embed_tokens is fresh
    assert model.get_output_embeddings() is model.lm_head


# ---- forward and backward --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_outputs_do_not_depend_on_form_or_company(model, ids):
    options = {"output_hidden_states": True, "labels": ids}
    out, again = model(ids, **options), model(ids, return_dict=False, **options)
    assert torch.equal(out.loss, again[0]) and torch.equal(out.logits, again[1])
    hidden = next(part for part in again[2:] if isinstance(part, tuple))
    assert all(torch.equal(a, b) for a, b in zip(out.hidden_states, hidden))
    assert [h.shape for h in out.hidden_states] == [(2, 21, 64)] * 4
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    for row in range(2):
        assert torch.allclose(model(ids[row : row + 1]).logits, out.logits[row : row + 1], atol=1e-5)
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(embedded.logits, out.logits)


@torch.no_grad()
def test_attentions_are_those_of_full_layers(config, ids):
    config._attn_implementation = "eager"
    model = DeltifyForCausalLM(config).eval()
    attentions = model(ids, output_attentions=True).attentions or ()
    assert len(attentions) == config.layer_types.count("full_attention")
    for weights in attentions:
        assert weights.shape == (2, 4, 21, 21) and torch.allclose(weights.sum(-1), torch.ones(2, 4, 21), atol=1e-5)
        assert float(weights.triu(1).abs().max()) == 0


@torch.no_grad()
def test_attention_implementations_agree(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    want = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("eager")
    got = model(ids, attention_mask=mask).logits
    assert torch.allclose(got[0, 6:], want[0, 6:], atol=1e-5) and torch.allclose(got[1], want[1], atol=1e-5)


def test_gradients_reach_every_weight_and_every_hidden_state(model, ids):
    model.train()
    out = model(ids, labels=ids, output_hidden_states=True)
    for hidden in out.hidden_states:
        hidden.retain_grad()
    out.loss.backward()
    assert all(h.grad is not None and bool(h.grad.abs().sum() > 0) for h in out.hidden_states[:-1])
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_equal_with_checkpointing_of_either_kind(model, ids, reentrant):
    model.train()

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()  # use_cache is the configuration's, and checkpointing turns it off
        return [p.grad.clone() for p in model.parameters()]

    want = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients(), want))
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


# ---- generation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_generation_from_ids_embeddings_pieces_and_without_a_cache_is_the_same(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    want = model.generate(ids, attention_mask=mask, max_new_tokens=8, **GREEDY)
    options = {"attention_mask": mask, "max_new_tokens": 8} | GREEDY
    assert torch.equal(model.generate(ids, use_cache=False, **options), want)
    assert torch.equal(model.generate(ids, prefill_chunk_size=5, **options), want)
    assert torch.equal(model.generate(inputs_embeds=model.get_input_embeddings()(ids), **options), want[:, 21:])


@torch.no_grad()
def test_generation_continues_from_its_cache(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    want = model.generate(ids, attention_mask=mask, max_new_tokens=8, **GREEDY)
    first = model.generate(ids, attention_mask=mask, max_new_tokens=5, return_dict_in_generate=True, **GREEDY)
    assert isinstance(first.past_key_values, DeltifyCache) and first.past_key_values.get_seq_length() == 25
    longer = torch.cat([mask, torch.ones(2, 5, dtype=mask.dtype)], 1)
    options = {"attention_mask": longer, "past_key_values": first.past_key_values, "max_new_tokens": 3}
    assert torch.equal(model.generate(first.sequences, **options, **GREEDY), want)
    assert model.generate(max_new_tokens=3, **GREEDY).shape == (1, 4)  # from bos_token_id only


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_reports_scores_logits_and_hidden_states(model, ids, beams):
    wanted = {f"output_{name}": True for name in ("scores", "logits", "hidden_states", "attentions")}
    model.set_attn_implementation("eager")
    options = {"max_new_tokens": 3, "num_beams": beams, "return_dict_in_generate": True} | wanted | GREEDY
    out = model.generate(ids, **options)
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == 3
    assert out.logits[0].shape == (2 * beams, 97) and [len(step) for step in out.hidden_states] == [4] * 3
    assert out.hidden_states[0][0].shape == (2 * beams, 21, 64) and out.hidden_states[1][0].shape == (2 * beams, 1, 64)
    assert [len(step) for step in out.attentions] == [model.config.layer_types.count("full_attention")] * 3


def test_caches_that_cannot_hold_the_layers_are_refused(model, ids):
    for kind in ("static", "offloaded", "quantized"):
        with pytest.raises(ValueError, match=f"cache_implementation='{kind}' cannot hold KDA and sliding layers"):
            model.generate(ids, max_new_tokens=2, cache_implementation=kind, **GREEDY)
    with pytest.raises(ValueError, match="continuous batching pages keys and values"):
        model.generate(ids, max_new_tokens=2, cache_implementation="paged", **GREEDY)
    with pytest.raises(ValueError, match="continuous batching pages keys and values"):
        model.generate_batch(ids.tolist(), max_new_tokens=2)


@torch.no_grad()
def test_a_cache_with_layers_of_another_kind_is_refused_by_name(ids):
    for pattern, other, match in (
        ("KKK", "FKK", "layer 0 of past_key_values is a DynamicLayer, not a LinearAttentionLayer"),
        ("SSS", "SSK", "layer 2 of past_key_values is a LinearAttentionLayer, not a SinkLayer"),
    ):
        with pytest.raises(ValueError, match=match):
            DeltifyForCausalLM(config_of(pattern))(ids, past_key_values=DeltifyCache(config_of(other)))


@torch.no_grad()
def test_a_cache_of_another_kind_is_refused_unless_it_is_empty(ids):
    model = DeltifyForCausalLM(config_of("KFK")).eval()
    want = model.generate(ids, max_new_tokens=4, **GREEDY)
    assert torch.equal(model.generate(ids, max_new_tokens=4, past_key_values=DynamicCache(), **GREEDY), want)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    longer = torch.cat([ids, ids[:, :3]], 1)
    for given in (cache, StaticCache(config=config_of("FFF"), max_cache_len=40)):
        with pytest.raises(ValueError, match="which this model cannot continue from"):
            model.generate(longer, max_new_tokens=2, past_key_values=given, **GREEDY)


def test_modes_that_discard_tokens_are_refused_by_name(model, ids):
    row, options = ids[:1], {"max_new_tokens": 2} | GREEDY
    for name, value in (("prompt_lookup_num_tokens", 2), ("assistant_model", model), ("assistant_early_exit", 1)):
        with pytest.raises(ValueError, match=r"assisted_generation discards tokens.*cannot be rolled back"):
            model.generate(row, **{name: value}, **options)
    with pytest.raises(ValueError, match=r"contrastive_search discards tokens.*cannot be rolled back"):
        model.generate(row, penalty_alpha=0.6, top_k=4, trust_remote_code=True, **options)
    cache = model(row, use_cache=True).past_key_values
    for call in (cache.activate_past_recording, lambda: cache.crop(-1), lambda: cache.crop(0)):
        with pytest.raises(ValueError, match="cannot be rolled back"):
            call()


def test_a_student_does_not_draft_and_nothing_is_generated(model, ids):
    main, written = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval(), []
    main.register_forward_hook(lambda *_: written.append(1))
    other = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    options = {"max_new_tokens": 4} | GREEDY
    assert torch.equal(main.generate(ids[:1], assistant_model=other, **options), main.generate(ids[:1], **options))
    written.clear()
    for more in ({}, {"do_sample": True}, {"past_key_values": DynamicCache()}):
        with pytest.raises(ValueError, match=r"cannot draft: it is stateful.*cannot be rolled back"):
            main.generate(ids[:1], assistant_model=model, **(options | more))
    assert not written


@torch.no_grad()
def test_a_cache_of_full_attention_only_can_be_cropped(ids):
    model = DeltifyForCausalLM(config_of("FFF")).eval()
    cache = model(ids, use_cache=True).past_key_values
    cache.crop(-4)
    again = model(ids[:, -4:], past_key_values=cache).logits
    assert torch.allclose(again, model(ids).logits[:, -4:], atol=1e-5)


# ---- padding, rows and modes of a cache ------------------------------------------------------------------------------


def holes(rows: int, tokens: int) -> torch.Tensor:
    """Return a mask with padding on the left, on the right, in between, and twice in all sequences."""
    mask = (torch.rand(rows, tokens) < 0.6).long()
    mask[0], mask[1, :15], mask[1, 15:], mask[2, :9], mask[2, 9:] = 1, 0, 1, 1, 0
    mask[:, :5] = mask[:, 11:15] = 0
    return mask


@torch.no_grad()
@pytest.mark.parametrize("step", [1, 2, 4, 21])
@pytest.mark.parametrize("read_before", [False, True])
def test_padding_is_skipped_in_pieces_of_any_size(model, step, read_before):
    ids, mask = torch.randint(2, 97, (4, 21)), holes(4, 21)
    if read_before:
        mask[:, :2] = 1
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cache, pieces = DeltifyCache(config=model.config), []
    for t in range(0, 21, step):
        now = {"attention_mask": mask[:, : t + step], "position_ids": places[:, t : t + step]}
        pieces.append(model(ids[:, t : t + step], past_key_values=cache, **now).logits)
    got = torch.cat(pieces, 1)
    for row in range(4):
        tokens = mask[row].bool()
        assert torch.allclose(got[row, tokens], model(ids[row : row + 1, tokens]).logits[0], atol=1e-5)
    assert cache.get_seq_length() == 21


@torch.no_grad()
def test_a_pass_of_padding_changes_no_state(model, ids):
    cache = model(ids, use_cache=True).past_key_values
    before = copy.deepcopy(cache)
    for tokens in (1, 5):
        mask = torch.cat([torch.ones(2, cache.get_seq_length()), torch.zeros(2, tokens)], 1).long()
        model(ids[:, :tokens], attention_mask=mask, past_key_values=cache)
    for old, new in zip(before.layers, cache.layers):
        if not isinstance(old, DynamicLayer):  # it keeps the keys of padding, which the mask hides
            assert all(torch.equal(a, b) for a, b in zip(held(old), held(new), strict=True))


@torch.no_grad()
def test_generation_over_pieces_that_are_padding_for_some_sequences(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :13], mask[1, :4] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 8} | GREEDY
    want = model.generate(ids, **options)
    alone = model.generate(ids[:1, 13:], attention_mask=mask[:1, 13:], max_new_tokens=8, **GREEDY)
    assert torch.equal(want[0, 21:], alone[0, 8:])
    for size in (1, 2, 3, 6):
        assert torch.equal(model.generate(ids, prefill_chunk_size=size, **options), want)
    right = options | {"attention_mask": mask.flip(1)}
    with pytest.raises(ValueError, match="prefill_chunk_size with padding on the right"):
        model.generate(ids, prefill_chunk_size=6, **right)
    with pytest.raises(ValueError, match="guidance_scale with padding on the right"):
        model.generate(ids, guidance_scale=1.5, **right)


def test_masks_positions_and_caches_of_another_batch_size_are_named(model, ids):
    with pytest.raises(ValueError, match=r"attention_mask has shape \[1, 21\]; it must be \[2, 21\]"):
        model(ids, attention_mask=torch.ones(1, 21))
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 20\]; it must be \[2, 21\]"):
        model(ids, attention_mask=torch.ones(2, 20))
    for shape in ([21], [2, 20], [3, 21], [3, 2, 21]):
        with pytest.raises(ValueError, match="position_ids has shape"):
            model(ids, position_ids=torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ValueError, match=r"the input has shape \[2, 0, 64\], without a token"):
        model(ids[:, :0])
    cache = model(ids[:1], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"past_key_values has 1 sequences, the input 2\. Repeat sequences"):
        model(ids, past_key_values=cache)
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="would write the cache twice"):
        model(ids, past_key_values=DeltifyCache(config=model.config))


CHOICES = {
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "select by a mask": (lambda cache: cache.batch_select_indices(torch.tensor([False, True, True])), [1, 2]),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("step", [1, 3])
def test_sequences_of_a_cache_continue_as_each_alone(model, name, step):
    ids, more = torch.randint(2, 97, (3, 17)), torch.randint(2, 97, (6, 6))
    lengths = [17, 1, 12]  # in a window, and beyond
    mask = torch.tensor([[0] * (17 - n) + [1] * n for n in lengths])
    cache = DeltifyCache(config=model.config)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    model(ids, attention_mask=mask, position_ids=places, past_key_values=cache)
    spare = copy.deepcopy(cache)
    change, rows = CHOICES[name]
    for fresh in (cache, spare):  # the copy is independent
        change(fresh)
        longer, got = torch.cat([mask[rows], torch.ones(len(rows), 6, dtype=torch.long)], 1), []
        for t in range(17, 23, step):
            now = {"attention_mask": longer[:, : t + step], "past_key_values": fresh}
            positions = (longer.cumsum(1) - 1)[:, t : t + step]
            got.append(model(more[: len(rows), t - 17 : t - 17 + step], position_ids=positions, **now).logits)
        for place, row in enumerate(rows):
            alone = torch.cat([ids[row, 17 - lengths[row] :], more[place]])[None]
            assert torch.allclose(torch.cat(got, 1)[place], model(alone).logits[0, -6:], atol=1e-5)


@torch.no_grad()
def test_an_emptied_cache_reads_another_batch_size_as_a_new_one_does(model, ids):
    cache = model(ids, use_cache=True).past_key_values
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.rows() is None
    row = torch.randint(2, 97, (1, 11))
    got = torch.cat([model(part, past_key_values=cache).logits for part in row.split([7, 1, 1, 2], 1)], 1)
    assert torch.allclose(got, model(row).logits, atol=1e-5) and cache.get_seq_length() == 11


@torch.no_grad()
def test_several_answers_are_those_of_each_sequence_alone(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6} | GREEDY
    got = model.generate(ids, attention_mask=mask, **options)
    for row, start in ((0, 9), (1, 0)):
        alone = ids[row : row + 1, start:]
        want = model.generate(alone, attention_mask=torch.ones_like(alone), use_cache=False, **options)
        assert torch.equal(got[2 * row : 2 * row + 2, 21:], want[:, -6:])


@pytest.mark.parametrize("step", [1, 4, 9])
def test_gradients_through_a_cache_equal_those_of_the_whole_text(model, ids, step):
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)

    def gradients(step: int) -> list[torch.Tensor]:
        model.zero_grad()
        cache, logits = DeltifyCache(config=model.config), []
        for t in range(0, 21, step):
            now = {"attention_mask": mask[:, : t + step], "position_ids": places[:, t : t + step]}
            logits.append(model(ids[:, t : t + step], past_key_values=cache, **now).logits)
        (torch.cat(logits, 1) * mask[..., None]).square().sum().backward()
        return [p.grad for p in model.parameters()]

    for got, want in zip(gradients(step), gradients(21)):
        assert torch.allclose(got, want, atol=1e-5 * max(1, float(want.abs().max())))


def test_a_cache_with_gradients_continues_without_them_and_its_backward_is_complete(model, ids):
    def gradients(go_on: bool) -> list[torch.Tensor]:
        model.zero_grad()
        cache = DeltifyCache(config=model.config)
        loss = model(ids[:, :9], past_key_values=cache).logits.square().sum()
        loss = loss + model(ids[:, 9:12], past_key_values=cache).logits.square().sum()
        if go_on:
            with torch.no_grad():
                parts = ids[:, 12:].split([1, 1, 7], 1)
                got = torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)
                assert torch.allclose(got, model(ids).logits[:, 12:], atol=1e-5)
                cache.reset()
        loss.backward()
        return [p.grad for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False)))


@pytest.mark.parametrize("grad", [False, True])
def test_a_cache_filled_in_inference_mode_continues_outside(model, ids, grad):
    want = model(ids).logits.detach()
    for sizes in ([1, 1, 10], [4, 1, 7]):
        with torch.inference_mode():
            cache = model(ids[:, :9], use_cache=True).past_key_values
            kept = copy.deepcopy(cache)
        with torch.set_grad_enabled(grad):
            kept.batch_repeat_interleave(1)
            for fresh in (cache, kept):
                parts = ids[:, 9:].split(sizes, 1)
                got = torch.cat([model(part, past_key_values=fresh).logits for part in parts], 1)
                assert torch.allclose(got, want[:, 9:], atol=1e-5)
        if grad:
            got.square().sum().backward()
            assert all(p.grad is not None for p in model.parameters())
    with torch.inference_mode():
        kept.reset()
    kept.reset()
    assert torch.allclose(model(ids, past_key_values=kept).logits, want, atol=1e-5)


# ---- what callers may give -------------------------------------------------------------------------------------------


def test_arguments_that_would_change_nothing_are_refused_by_name(model, ids):
    out = model(ids, labels=ids, num_items_in_batch=None, token_type_ids=torch.zeros_like(ids), is_causal=True)
    assert torch.equal(out.logits, model(ids, pixel_values=None).logits)
    for unknown in ({"pixel_values": ids}, {"is_causal": False}, {"windows": 3}):
        with pytest.raises(ValueError, match=f"forward does not know {next(iter(unknown))}, and would ignore it"):
            model(ids, **unknown)


def test_the_number_of_items_scales_the_loss(model, ids):
    whole = model(ids, labels=ids).loss
    assert torch.allclose(model(ids, labels=ids, num_items_in_batch=torch.tensor(80)).loss, whole * 40 / 80)


def test_a_trainer_predicts_logits_only(model, ids, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    trainer = Trainer(model, TrainingArguments(tmp_path, per_device_eval_batch_size=2, **quiet))
    with torch.no_grad():
        assert torch.allclose(torch.tensor(trainer.predict(rows).predictions), model(ids).logits, atol=1e-6)

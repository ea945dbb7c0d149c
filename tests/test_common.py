"""What transformers' own common model and generation tests check (its wheel does not carry them), for our class."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from deltify.model import ArceeKDAConfig, DeltifyConfig, DeltifyForCausalLM, DeltifyModel
from deltify.model.modeling import ArceeKDAForCausalLM, DeltifyCache

TINY = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8, "sink_tokens": 2, "use_rope": [True] * 3}
TINY |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "bos_token_id": 1, "eos_token_id": None}
TINY |= {"pad_token_id": 0}
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


def test_a_fresh_model_lies_within_its_range(config):
    config.initializer_range = 1e-10
    for name, p in DeltifyForCausalLM(config).named_parameters():
        if not name.endswith(("A_log", "dt_bias")):  # the gates have a start of their own
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
        model(ids, labels=ids).loss.backward()  # use_cache is config's: checkpointing turns it off
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
def test_generation_goes_on_from_its_cache(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    want = model.generate(ids, attention_mask=mask, max_new_tokens=8, **GREEDY)
    first = model.generate(ids, attention_mask=mask, max_new_tokens=5, return_dict_in_generate=True, **GREEDY)
    assert isinstance(first.past_key_values, DeltifyCache) and first.past_key_values.get_seq_length() == 25
    longer = torch.cat([mask, torch.ones(2, 5, dtype=mask.dtype)], 1)
    options = {"attention_mask": longer, "past_key_values": first.past_key_values, "max_new_tokens": 3}
    assert torch.equal(model.generate(first.sequences, **options, **GREEDY), want)
    assert model.generate(max_new_tokens=3, **GREEDY).shape == (1, 4)  # from bos_token_id alone


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
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids[:1], max_new_tokens=2, prompt_lookup_num_tokens=2, **GREEDY)

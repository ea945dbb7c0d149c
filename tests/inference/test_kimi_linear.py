"""Moonshot's kimi_linear layout: transformers and MLX-LM run it with their own code, and deltify reads it back."""

import json
from functools import partial

import helpers
import pytest
import torch
from helpers import EXPORT_SHAPES
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from deltify.cli import main
from deltify.conversion.teacher import byte_tokenizer
from deltify.inference.export import read_layout
from deltify.inference.kimi_linear import read_kimi_linear, write_kimi_linear
from deltify.training.checkpoint import save_model

SHAPES = EXPORT_SHAPES | {
    "hybrid, wider than the latent": {"kinds": "KA", "hidden_size": 576},
    "hybrid, heads of 256": {"kinds": "KA", "head_dim": 256},
}
random_student = partial(helpers.random_student, vocab_size=len(byte_tokenizer()), eos_token_id=256)


def log_probabilities(model, ids):
    with torch.no_grad():
        return model(ids).logits.log_softmax(-1)


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_own_model_gives_our_log_probabilities_and_tokens(tmp_path, shape):
    pytest.importorskip("transformers.models.kimi_linear", reason="transformers before 5.23 has no kimi_linear")
    ours = random_student(**SHAPES[shape])
    write_kimi_linear(ours, byte_tokenizer(), tmp_path / "kimi")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "kimi", output_loading_info=True)
    assert type(theirs).__module__.startswith("transformers.") and not any(info.values())
    ids = torch.randint(0, 256, (2, 70))
    assert torch.allclose(log_probabilities(theirs, ids), log_probabilities(ours, ids), atol=1e-3)
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    assert torch.equal(theirs.generate(ids[:, :20], **options), ours.generate(ids[:, :20], **options))


def test_o_norm_keeps_its_eps(tmp_path):
    """Short convolutions as small as calibrated ones give outputs whose mean square is far below eps."""
    pytest.importorskip("transformers.models.kimi_linear", reason="transformers before 5.23 has no kimi_linear")
    ours = random_student("KK", rms_norm_eps=1e-6, o_norm_eps=1e-5, initializer_range=0.3)
    with torch.no_grad():
        for layer in ours.model.layers:
            for conv in "qkv":
                getattr(layer.self_attn, f"{conv}_conv1d").weight.mul_(1e-3)
    assert "rms_norm_eps 1e-05 instead of 1e-06" in write_kimi_linear(ours, byte_tokenizer(), tmp_path)
    ids, theirs = torch.randint(0, 256, (1, 70)), AutoModelForCausalLM.from_pretrained(tmp_path)
    want = log_probabilities(ours, ids)
    assert torch.allclose(log_probabilities(theirs, ids), want, atol=1e-3)
    assert torch.allclose(log_probabilities(read_kimi_linear(tmp_path), ids), want, atol=1e-3)
    for layer in ours.model.layers:
        layer.self_attn.o_norm.eps = 1e-6
    assert (log_probabilities(ours, ids) - want).abs().max() > 0.1
    assert "not for vLLM" in write_kimi_linear(ours, byte_tokenizer(), tmp_path / "old")


def cached_mlx_log_probabilities(folder, ids):
    """Return log-probabilities of MLX-LM for one sequence: a prefill and single steps with its cache."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    kimi_linear = pytest.importorskip("mlx_lm.models.kimi_linear", reason="mlx-lm is not installed")
    model = kimi_linear.Model(kimi_linear.ModelArgs.from_dict(json.loads((folder / "config.json").read_text())))
    weights = model.sanitize(mx.load(str(folder / "model.safetensors")))
    model.load_weights(list(weights.items()), strict=True)
    model.eval()
    cache, ids = model.make_cache(), mx.array(ids.tolist())
    steps = [model(ids[:, :40], cache), *(model(ids[:, i : i + 1], cache) for i in range(40, ids.shape[1]))]
    return torch.tensor(mx.concatenate(steps, axis=1).tolist()).log_softmax(-1)


@pytest.mark.parametrize("shape", ["pure", "pure, tied, 128", "hybrid, GQA, tied", "hybrid, wider than the latent"])
def test_mlx_lm_gives_our_log_probabilities(tmp_path, shape):
    ours = random_student(**SHAPES[shape])
    write_kimi_linear(ours, byte_tokenizer(), tmp_path)
    ids = torch.randint(0, 256, (1, 70))
    assert torch.allclose(cached_mlx_log_probabilities(tmp_path, ids), log_probabilities(ours, ids), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_is_read_back(tmp_path, shape, dtype):
    ours = random_student(**SHAPES[shape]).to(dtype)
    write_kimi_linear(ours, byte_tokenizer(), tmp_path)
    again = read_kimi_linear(tmp_path)
    same = "layer_types head_dim num_attention_heads tie_word_embeddings max_position_embeddings eos_token_id"
    for name in same.split() + (["num_key_value_heads"] if "A" in SHAPES[shape]["kinds"] else []):
        assert getattr(again.config, name) == getattr(ours.config, name)
    assert again.dtype == dtype
    changed = ("input_layernorm.weight", "q_proj.weight")  # of attention layers: multiplied, divided and rounded
    for name, x in ours.state_dict().items():
        kind = ours.config.layer_types[int(name.split(".")[2])] if ".layers." in name else "outside"
        if kind == "full_attention" and name.endswith(changed):
            assert torch.allclose(again.state_dict()[name], x, rtol=4 * torch.finfo(dtype).eps)
        else:
            assert torch.equal(again.state_dict()[name], x.to(again.state_dict()[name].dtype)), name


def test_what_transformers_saves_is_read_too(tmp_path):
    """Its own config has no linear_attn_config, and its names of dense MLPs differ from Moonshot's."""
    pytest.importorskip("transformers.models.kimi_linear", reason="transformers before 5.23 has no kimi_linear")
    ours = random_student("KAK")
    write_kimi_linear(ours, byte_tokenizer(), tmp_path / "kimi")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "kimi")
    facts = loaded.config.to_dict()
    del facts["linear_attn_config"]
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**facts))
    made.load_state_dict(loaded.state_dict())
    made.save_pretrained(tmp_path / "saved")
    assert any("block_sparse_moe" in name for name in load_file(tmp_path / "saved" / "model.safetensors"))
    ids = torch.randint(0, 256, (1, 30))
    again = read_kimi_linear(tmp_path / "saved")
    assert again.config.layer_types == ours.config.layer_types
    assert torch.allclose(log_probabilities(again, ids), log_probabilities(ours, ids), atol=1e-5)


def set_bias(name):
    def change(model):
        for key, module in model.named_modules():
            if key.endswith(name):
                module.bias = torch.nn.Parameter(torch.ones(module.out_features))

    return change


@pytest.mark.parametrize(
    "facts, change, message",
    [
        (
            {"use_rope": [False, False, True], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            None,
            "RoPE",
        ),
        ({"qk_norm": True}, None, "qk-norm in attention layers"),
        ({"kinds": "AA"}, None, "a model without KDA layers"),
        ({"kinds": "KSA"}, None, "sliding attention layers"),
        ({"mlp_gated": False, "hidden_act": "relu2"}, None, "an MLP without a gate, the activation relu2"),
        ({"gate_lower_bound": -5.0}, None, "a bounded gate .*only vLLM"),
        ({}, set_bias("layers.0.self_attn.g_proj.1"), r"a bias of the output gate \(see --fold-gate-bias\)"),
        ({}, set_bias("layers.0.self_attn.k_proj"), r"biases of q, k or v in KDA layers \(see --fold-gate-bias\)"),
        ({}, set_bias("layers.2.self_attn.o_proj"), "biases of q, k, v or o"),
        ({}, set_bias("layers.1.mlp.up_proj"), "biases of the MLP"),
    ],
)
def test_what_the_layout_cannot_express_is_refused_by_name(tmp_path, facts, change, message):
    model = random_student(**facts)
    if change is not None:
        change(model)
    with pytest.raises(ValueError, match=f"does not support {message}"):
        write_kimi_linear(model, byte_tokenizer(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_why_it_adds_a_layer(tmp_path, capsys):
    ours, tokenizer = random_student("KK", max_position_embeddings=512), byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    ours.generation_config.eos_token_id = [256, 10]
    save_model(tmp_path / "ours", ours, tokenizer)
    export = ["export", str(tmp_path / "ours"), "--layout", "kimi_linear", "-o"]
    assert main([*export, str(tmp_path / "auto")]) == 0
    assert "2 KDA layers, an identity layer, since transformers" in capsys.readouterr().out
    assert main([*export, str(tmp_path / "never"), "--identity-layer", "never"]) == 0
    assert "identity" not in capsys.readouterr().out
    assert main([*export, str(tmp_path / "no"), "--identity-layer", "always"]) == 1
    assert "'auto', 'never'" in capsys.readouterr().err
    for folder, layers in (("auto", 3), ("never", 2)):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["num_hidden_layers"] == config["first_k_dense_replace"] == layers
        assert config["model_max_length"] == config["max_position_embeddings"] == 512
        assert config["linear_attn_config"]["kda_layers"] == [1, 2]
        assert config["linear_attn_config"]["full_attn_layers"] == [3][: layers - 2]
        again = read_layout(tmp_path / folder)
        assert len(again.model.layers) == 2 and again.generation_config.eos_token_id == [256, 10]
        assert AutoTokenizer.from_pretrained(tmp_path / folder).chat_template == tokenizer.chat_template
    assert main(["export", str(tmp_path / "ours"), "--layout", "kda", "--identity-layer", "never", "-o", "x"]) == 1
    assert "no identity layer" in capsys.readouterr().err


def test_a_large_model_is_written_and_read_in_shards(tmp_path, monkeypatch):
    from deltify.inference import kimi_linear

    monkeypatch.setattr(kimi_linear, "SHARD_BYTES", 100_000)
    ours = random_student("KA")
    write_kimi_linear(ours, byte_tokenizer(), tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and (tmp_path / "model.safetensors.index.json").is_file()
    ids = torch.randint(0, 256, (1, 30))
    again = log_probabilities(read_kimi_linear(tmp_path), ids)
    assert torch.allclose(again, log_probabilities(ours, ids), atol=1e-5)


def test_the_effect_of_eps_on_a_kept_first_layer_is_named(tmp_path):
    """MLA's second norm removes the eps of the first one, and embeddings are small."""
    ours = random_student("AK", initializer_range=0.01)
    line = write_kimi_linear(ours, byte_tokenizer(), tmp_path)
    assert "1 KDA layers, 1 attention layers as MLA, keys and values of layer 0 scaled by 1.0" in line


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
            r"latent attention of model\.layers\.1 is not",
        ),
        ("model.layers.0.block_sparse_moe.experts.0.w1.weight", "experts or biases"),
        ("model.layers.0.self_attn.g_b_proj.bias", "experts or biases"),
        ("model.layers.0.self_attn.q_norm.weight", r"q_norm\.weight is not expected"),
    ],
)
def test_what_deltify_cannot_express_is_refused_by_name(tmp_path, name, message):
    write_kimi_linear(random_student("KA"), byte_tokenizer(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name] = torch.randn(tensors[name].shape if name in tensors else (4,))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        read_kimi_linear(tmp_path)

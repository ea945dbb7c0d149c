"""The checkpoint layout of AFM-4.5B-Base-KDA-Only: names, shapes and config, and files that deviate from it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import deltify
from deltify.model import ArceeKDAConfig, ArceeKDAForCausalLM
from deltify.model.loading import layer_types_of


def contract(
    layers: int, full: tuple[int, ...], width: int, heads: int, kv_heads: int, head: int, mlp: int, words: int
):
    """Return the names and shapes of the published checkpoint, independently of the model's code."""
    inner = heads * head
    shapes = {
        "model.embed_tokens.weight": (words, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (words, width),
    }
    for i in range(layers):
        layer, mixer = f"model.layers.{i}.", f"model.layers.{i}.self_attn."
        shapes |= {f"{layer}input_layernorm.weight": (width,), f"{layer}post_attention_layernorm.weight": (width,)}
        shapes |= {f"{layer}mlp.up_proj.weight": (mlp, width), f"{layer}mlp.down_proj.weight": (width, mlp)}
        shapes |= {f"{mixer}q_proj.weight": (inner, width), f"{mixer}o_proj.weight": (width, inner)}
        kv = kv_heads * head if i in full else inner
        shapes |= {f"{mixer}k_proj.weight": (kv, width), f"{mixer}v_proj.weight": (kv, width)}
        if i in full:
            continue
        shapes |= {f"{mixer}{name}_conv1d.weight": (inner, 1, 4) for name in "qkv"}
        shapes |= {f"{mixer}f_proj.0.weight": (head, width), f"{mixer}f_proj.1.weight": (inner, head)}
        shapes |= {f"{mixer}g_proj.0.weight": (head, width), f"{mixer}g_proj.1.weight": (inner, head)}
        shapes |= {f"{mixer}g_proj.1.bias": (inner,), f"{mixer}b_proj.weight": (heads, width)}
        shapes |= {f"{mixer}A_log": (heads,), f"{mixer}dt_bias": (inner,), f"{mixer}o_norm.weight": (head,)}
    return shapes


SMALL = {"layers": 4, "width": 32, "heads": 4, "kv_heads": 2, "head": 8, "mlp": 48, "words": 60}
HYBRID = tuple(range(3, 36, 4))


@pytest.mark.parametrize("full, total", [((), 5_046_996_688), (HYBRID, 4_940_043_676)])
def test_full_size_has_the_published_names_shapes_and_count(full, total):
    want = contract(36, full, 2560, 20, 4, 128, 18432, 128004)
    config = ArceeKDAConfig(layer_types=layer_types_of(want, 36))
    with torch.device("meta"):
        model = ArceeKDAForCausalLM(config)
    assert {name: tuple(x.shape) for name, x in model.state_dict().items()} == want
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.model.layers[0].self_attn.parameters()) == 27_612_308


def write_folder(folder, full=(), changes=None):
    """Write a folder in the published layout. Its config does not say which layers are KDA."""
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) * 0.1 for name, shape in contract(full=full, **SMALL).items()}
    tensors |= changes or {}
    folder.mkdir(exist_ok=True)
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "arcee_kda", "architectures": ["ArceeKDAForCausalLM"], "vocab_size": 60, "hidden_size": 32}
    config |= {"intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"head_dim": 8, "hidden_act": "relu2", "eos_token_id": 1, "bos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("full", [(), (3,)])
def test_a_folder_in_the_published_layout_loads_generates_and_saves_again(tmp_path, full):
    folder = write_folder(tmp_path / "published", full)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model) is ArceeKDAForCausalLM
    assert [i for i, kind in enumerate(model.config.layer_types) if kind == "full_attention"] == list(full)
    ids = torch.randint(2, 60, (1, 12))
    with torch.no_grad():
        logits = model(ids).logits
        sampled = model.generate(ids, max_new_tokens=5, do_sample=True, temperature=0.7, top_p=0.95)
    assert sampled.shape[1] > 12
    model.save_pretrained(tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").model_type == "arcee_kda"
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == contract(full=full, **SMALL).keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, logits)


def test_the_published_snippet_runs_deltifys_class_whatever_code_the_folder_names(tmp_path):
    folder = write_folder(tmp_path / "published", (3,))
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling_arcee_kda.ArceeKDAForCausalLM"}, "kda_mode": "chunk"}
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16, device_map="auto")
    assert type(model) is ArceeKDAForCausalLM and model.dtype == torch.bfloat16
    ids = torch.randint(2, 60, (1, 12), device=model.device)
    outputs = model.generate(ids, max_new_tokens=5, do_sample=True, temperature=0.7, top_p=0.95)
    assert 12 < outputs.shape[1] <= 17


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.norm.weight": None}, r"model\.norm\.weight is missing"),
        ({"model.extra": torch.zeros(1)}, r"model\.extra is not expected"),
        ({"lm_head.weight": torch.zeros(60, 31)}, r"lm_head\.weight has shape \[60, 31\], expected \[60, 32\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(write_folder(tmp_path / "bad", changes=changes))


def test_damaged_missing_and_pickled_files_are_refused(tmp_path):
    folder = write_folder(tmp_path / "cut")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        AutoModelForCausalLM.from_pretrained(folder)

    model = AutoModelForCausalLM.from_pretrained(write_folder(tmp_path / "good"))
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shard = sorted((tmp_path / "shards").glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"lacks {shard.name}"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "shards")

    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_importing_deltify_is_all_that_the_auto_classes_need():
    assert AutoModelForCausalLM._model_mapping[deltify.ArceeKDAConfig] is ArceeKDAForCausalLM
    assert AutoConfig.for_model("deltify").model_type == "deltify"

"""Teachers in folders, whose tensors count more than their configuration; and the fingerprint of weights."""

import json
import shutil

import pytest
import torch
from helpers import small_model, small_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltify import convert
from deltify.conversion.student import sliding_control
from deltify.conversion.teacher import load_teacher, random_teacher
from deltify.model import DeltifyForCausalLM
from deltify.utils.fingerprint import fingerprint

IDS = torch.arange(1, 31).view(1, 30)


def save(teacher, folder, **said):
    """Save a teacher with a changed configuration, and return the folder's name."""
    teacher.model.save_pretrained(folder)
    teacher.tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | said))
    return str(folder)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


# ---- tensors ---------------------------------------------------------------------------------------------------------


HOW = pytest.mark.parametrize("shard", [None, lambda model: None], ids=["transformers", "rows"])


@HOW
@pytest.mark.parametrize("tied", [True, False])
def test_an_untied_head_is_kept_though_the_config_has_it_tied(tied, shard, tmp_path):
    saved = random_teacher("llama", num_hidden_layers=2, tie_word_embeddings=False)
    if tied:  # two equal matrices are tied
        saved.model.lm_head.weight.data.copy_(saved.model.model.embed_tokens.weight)
    teacher = load_teacher(save(saved, tmp_path, tie_word_embeddings=not tied), shard=shard)
    assert teacher.config.tie_word_embeddings == tied
    head, embeddings = teacher.model.lm_head.weight, teacher.model.model.embed_tokens.weight
    assert (head.data_ptr() == embeddings.data_ptr()) == tied
    want = logits(saved.model)
    student = convert(teacher, full_attention_layers="all", keep_rope=True, init="library").eval()
    for model in (teacher.model, student, sliding_control(teacher, window=64, sinks=4)):
        torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-6)


def test_a_students_untied_head_is_kept_too(tmp_path):
    student = convert(random_teacher("llama", num_hidden_layers=2), init="library").eval()
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert torch.equal(logits(DeltifyForCausalLM.from_pretrained(tmp_path)), logits(student))


@HOW
@pytest.mark.parametrize(
    "family, facts, said, message",
    [
        ("llama", {"attention_bias": True}, {"attention_bias": False}, r"k_proj\.bias is not expected"),
        ("llama", {"mlp_bias": True}, {"mlp_bias": False}, r"down_proj\.bias is not expected"),
        ("llama", {}, {"num_hidden_layers": 2}, r"layers\.2\.input_layernorm\.weight is not expected"),
        ("llama", {}, {"num_hidden_layers": 4}, r"layers\.3\.input_layernorm\.weight is missing"),
        (
            "qwen3",
            {},
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            r"k_norm\.weight is not expected",
        ),
        ("llama", {"tie_word_embeddings": True}, {"tie_word_embeddings": False}, r"lm_head\.weight is missing"),
        ("llama", {}, {"num_key_value_heads": 4}, r"k_proj\.weight has shape \[32, 64\], expected \[64, 64\]"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused(family, facts, said, message, shard, tmp_path):
    folder = save(random_teacher(family, num_hidden_layers=3, **facts), tmp_path, **said)
    with pytest.raises(ValueError, match=message):
        load_teacher(folder, shard=shard)


@HOW
@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod."])
def test_the_prefixes_of_wrappers_are_removed(wrapper, shard, tmp_path):
    saved = random_teacher("llama", num_hidden_layers=2)
    student = convert(saved, init="library").eval()
    save(saved, tmp_path / "teacher")
    student.save_pretrained(tmp_path / "student")
    for name in ("teacher", "student"):
        file = tmp_path / name / "model.safetensors"
        # around the model, and around one layer inside it
        renamed = {wrapper + k.replace("layers.1.", f"layers.1.{wrapper}"): x for k, x in load_file(file).items()}
        save_file(renamed, file, {"format": "pt"})
    assert torch.equal(logits(load_teacher(str(tmp_path / "teacher"), shard=shard).model), logits(saved.model))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "student")), logits(student))


# ---- quantized weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_weights_are_dequantized(bits, tmp_path):
    from transformers import BitsAndBytesConfig

    plain = random_teacher("llama", num_hidden_layers=2, hidden_size=128, intermediate_size=128, head_dim=32)
    save(plain, tmp_path / "plain")
    how = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=how, device_map="cpu")
    small.save_pretrained(tmp_path / "small")
    plain.tokenizer.save_pretrained(tmp_path / "small")
    teacher = load_teacher(tmp_path / "small")
    far = {8: 0.02, 4: 0.2}[bits]
    for name, want in plain.model.state_dict().items():
        got = teacher.model.state_dict()[name]
        assert got.dtype == torch.float32 and float((got - want).norm() / want.norm()) < far, name
    student = convert(teacher, full_attention_layers="all", keep_rope=True, init="library").eval()
    torch.testing.assert_close(logits(student), logits(teacher.model), rtol=0, atol=1e-6)
    student.save_pretrained(tmp_path / "student")
    assert "quantization_config" not in json.loads((tmp_path / "student" / "config.json").read_text())


def quantize_to_fp8(folder, scales: bool = True):
    """Return what `FineGrainedFP8` saves: blocks of 128 x 128 in 8 bits, and their scales."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj." in name]:
        x = tensors[name]
        blocks = x.view(x.shape[0] // 128, 128, x.shape[1] // 128, 128)
        scale = blocks.abs().amax((1, 3)) / 448
        tensors[name] = (blocks / scale[:, None, :, None]).view_as(x).to(torch.float8_e4m3fn)
        if scales:
            tensors[name + "_scale_inv"] = scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_attention_heads": 4, "num_hidden_layers": 2}


def load_fp8(folder):
    try:
        return load_teacher(folder)
    except ValueError as error:  # transformers 5.16 cannot
        assert "is quantized by 'fp8', which cannot be dequantized here" in str(error)
        pytest.skip(str(error))


def test_fp8_weights_are_dequantized(tmp_path):
    plain = random_teacher("llama", **WIDE)
    folder = save(plain, tmp_path, quantization_config=FP8)
    quantize_to_fp8(tmp_path)
    teacher = load_fp8(folder)
    for name, want in plain.model.state_dict().items():
        got = teacher.model.state_dict()[name]
        assert got.dtype == torch.float32 and float((got - want).norm() / want.norm()) < 0.05, name
    rotary = load_teacher(folder, dtype=torch.bfloat16).model.model.rotary_emb
    assert torch.equal(rotary.inv_freq, plain.model.model.rotary_emb.inv_freq)  # float32


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight_scale_inv"])
def test_a_quantized_model_with_a_missing_tensor_is_refused(name, tmp_path):
    folder = save(random_teacher("llama", **WIDE, tie_word_embeddings=False), tmp_path, quantization_config=FP8)
    quantize_to_fp8(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"has no scales of|cannot be dequantized here"):
        load_teacher(folder)


def test_an_untied_head_of_a_quantized_model_is_kept_though_the_config_has_it_tied(tmp_path):
    plain = random_teacher("llama", **WIDE, tie_word_embeddings=False)
    folder = save(plain, tmp_path, quantization_config=FP8, tie_word_embeddings=True)
    quantize_to_fp8(tmp_path)
    teacher = load_fp8(folder)
    assert torch.equal(teacher.model.lm_head.weight, plain.model.lm_head.weight)
    student = convert(teacher, full_attention_layers="all", keep_rope=True, init="library").eval()
    torch.testing.assert_close(logits(student), logits(teacher.model), rtol=0, atol=1e-6)


def test_codes_without_their_scales_are_refused(tmp_path):
    folder = save(random_teacher("llama", **WIDE), tmp_path)
    quantize_to_fp8(tmp_path, scales=False)
    with pytest.raises(ValueError, match=r"has quantized weights: model\.layers\.0\.mlp\.down_proj\.weight"):
        load_teacher(folder)


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "quanto", "a-new-one"])
def test_methods_that_cannot_be_dequantized_are_refused_by_name(method, tmp_path):
    folder = save(random_teacher("llama"), tmp_path, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ValueError, match=f"is quantized by '{method}', which cannot be dequantized here"):
        load_teacher(folder)


# ---- configurations that change what a model computes ----------------------------------------------------------------


def test_a_teacher_that_sees_later_tokens_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is_causal is false"):
        load_teacher(save(random_teacher("llama"), tmp_path, is_causal=False))


def test_a_model_with_code_of_its_own_is_refused(tmp_path):
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    folder = save(random_teacher("llama"), tmp_path, auto_map=own)
    (tmp_path / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'llama'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(ValueError, match="its own class OwnForCausalLM"):
        load_teacher(folder, trust_remote_code=True)
    assert type(load_teacher(folder).model).__name__ == "LlamaForCausalLM"


def test_llama_ignores_the_fields_of_sliding_windows(tmp_path):
    teacher = load_teacher(save(random_teacher("llama", num_hidden_layers=2), tmp_path, sliding_window=4))
    student = convert(teacher, full_attention_layers="all", keep_rope=True, init="library").eval()
    torch.testing.assert_close(logits(student), logits(teacher.model), rtol=0, atol=1e-6)


def test_longrope_is_kept_in_full_attention_and_refused_in_windows():
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 16}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, **factors}
    teacher = random_teacher("llama", num_hidden_layers=2, head_dim=16, rope_parameters=rope)
    student = convert(teacher, full_attention_layers="all", keep_rope=True, init="library").eval()
    torch.testing.assert_close(logits(student), logits(teacher.model), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"longrope.*--no-controls"):
        sliding_control(teacher)


@pytest.mark.parametrize(
    "settings", [{"penalty_alpha": 0.6, "top_k": 4}, {"top_p": 0.9, "cache_implementation": "static"}]
)
def test_a_student_is_saved_without_settings_of_generation_that_it_drops(settings, tmp_path):
    folder = save(random_teacher("llama", num_hidden_layers=2), tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    convert(load_teacher(folder), init="library").save_pretrained(tmp_path / "student")


# ---- the vocabulary --------------------------------------------------------------------------------------------------


def test_a_special_token_without_an_embedding_does_not_make_a_teacher_unusable(tmp_path):
    tokenizer = small_tokenizer()
    model = small_model(tokenizer)
    rows = len(tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path)
    read = load_teacher(str(tmp_path)).tokenizer
    assert len(read) == rows and read.pad_token is None and read.chat_template == tokenizer.chat_template
    text = "the <pad> cat"
    assert max(read(text)["input_ids"]) < rows and read.decode(read(text)["input_ids"]) == text
    assert read("the cat")["input_ids"] == tokenizer("the cat")["input_ids"]
    read.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again")(text)["input_ids"] == read(text)["input_ids"]


def test_the_models_end_token_replaces_one_without_an_embedding(tmp_path):
    tokenizer = small_tokenizer()
    model = small_model(tokenizer, eos_token_id=1)
    model.save_pretrained(tmp_path)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.save_pretrained(tmp_path)
    assert load_teacher(str(tmp_path)).tokenizer.eos_token == "</s>"
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    with pytest.raises(ValueError, match=r"end-of-sequence token of .*'<\|im_end\|>', has no embedding"):
        load_teacher(str(tmp_path))


def test_an_ordinary_token_without_an_embedding_is_refused_however_few_tokens_there_are(tmp_path):
    tokenizer = small_tokenizer()
    small_model(tokenizer).save_pretrained(tmp_path)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    word = max(state["model"]["vocab"], key=state["model"]["vocab"].get)
    state["model"]["vocab"][word] += 1  # this id is not used: there are as many tokens as embeddings
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(tokenizer)
    with pytest.raises(ValueError, match="they do not belong together"):
        load_teacher(str(tmp_path))


# ---- the fingerprint -------------------------------------------------------------------------------------------------


def test_a_fingerprint_differs_when_a_weight_or_its_use_does_and_not_with_the_dtype(tmp_path):
    student = convert(random_teacher("llama", num_hidden_layers=2), full_attention_layers="KS", init="library")
    student.bfloat16().float()
    mine = fingerprint(student)
    assert fingerprint(convert(random_teacher("llama", num_hidden_layers=2, seed=1), init="library")) != mine
    student.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        assert fingerprint(DeltifyForCausalLM.from_pretrained(tmp_path, dtype=dtype)) == mine
    for name, p in student.named_parameters():  # any one weight
        index = torch.randint(p.numel(), ()).item()
        before = p.data.flatten()[index].clone()
        p.data.view(-1)[index] = before * 1.02 + 1e-3
        assert fingerprint(student) != mine, name
        p.data.view(-1)[index] = before
    assert fingerprint(student) == mine
    student.config.sliding_window += 1
    assert fingerprint(student) != mine


def test_the_sign_of_any_weight_changes_the_fingerprint():
    model = random_teacher("llama", num_hidden_layers=2).model
    mine = fingerprint(model)
    model.model.layers[0].self_attn.q_proj.weight.data[:2] *= -1
    assert fingerprint(model) != mine


def test_a_folder_whose_teacher_was_replaced_is_another_teacher(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        save(random_teacher("llama", seed=seed, num_hidden_layers=2), tmp_path / name)
    mine = fingerprint(load_teacher(str(tmp_path / "a")).model)
    shutil.rmtree(tmp_path / "a")
    shutil.copytree(tmp_path / "b", tmp_path / "a")
    assert fingerprint(load_teacher(str(tmp_path / "a")).model) != mine

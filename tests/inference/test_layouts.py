"""Layouts of other libraries: written, read back, and refused where they cannot express a model."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from deltify import convert
from deltify.cli import main
from deltify.conversion.teacher import random_teacher
from deltify.inference.export import export, read_layout, write_kda
from deltify.training.checkpoint import save_model


def saved(folder, architecture="llama", gate_bias=False, bounded=False, **options):
    teacher = random_teacher(architecture, tie_word_embeddings=options.pop("tied", False), rms_norm_eps=1e-5)
    student = convert(teacher, init="library", gate_bias=gate_bias, **options).eval()
    if bounded:
        student.config.gate_lower_bound = -5.0
    if gate_bias:
        torch.nn.init.ones_(student.model.layers[0].self_attn.g_proj[1].bias)
    save_model(folder, student, teacher.tokenizer)
    return student


@pytest.mark.parametrize("tied", [False, True])
def test_flash_linear_attentions_names_and_back(tmp_path, tied):
    ours = saved(tmp_path / "ours", tied=tied, gate_bias=True)
    settings = GenerationConfig(eos_token_id=[256, 10], do_sample=True, top_p=0.8)
    settings.save_pretrained(tmp_path / "ours")
    export(str(tmp_path / "ours"), "kda", tmp_path / "kda")
    names = load_file(tmp_path / "kda" / "model.safetensors").keys()
    mixer = "q_proj.weight k_proj.weight v_proj.weight o_proj.weight q_conv1d.weight k_conv1d.weight v_conv1d.weight "
    mixer += (
        "f_proj.0.weight f_proj.1.weight b_proj.weight A_log dt_bias g_proj.0.weight g_proj.1.weight g_proj.1.bias "
    )
    mixer += "o_norm.weight"
    want = {f"model.layers.{i}.attn.{name}" for i in range(4) for name in mixer.split()}
    want |= {f"model.layers.{i}.{kind}_norm.weight" for i in range(4) for kind in ("attn", "mlp")}
    want |= {f"model.layers.{i}.mlp.{kind}_proj.weight" for i in range(4) for kind in ("gate", "up", "down")}
    want |= {"model.embeddings.weight", "model.norm.weight"} | (set() if tied else {"lm_head.weight"})
    assert names == want
    export(str(tmp_path / "kda"), "deltify", tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    kept = again.generation_config
    assert (kept.eos_token_id, kept.do_sample, kept.top_p) == ([256, 10], True, 0.8)
    ids = torch.randint(0, 250, (2, 30))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, ours(ids).logits)


def test_flash_linear_attention_gets_a_bias_of_zeros_if_there_is_none(tmp_path):
    teacher = random_teacher("llama", rms_norm_eps=1e-5)
    student = convert(teacher, init="library").eval()
    write_kda(student, teacher.tokenizer, tmp_path)
    ids = torch.randint(0, 250, (2, 30))
    with torch.no_grad():
        assert torch.equal(read_layout(tmp_path)(ids).logits, student(ids).logits)


@pytest.mark.parametrize(
    "options, layout, message",
    [
        ({"gate_bias": True}, "kimi_linear", r"bias of the output gate \(see --fold-gate-bias\)"),
        ({"architecture": "arcee"}, "kda", "an MLP without a gate, the activation relu2"),
        ({"architecture": "qwen2"}, "kda", "biases of q, k, v"),
        ({"full_attention_layers": "3:1"}, "kda", "attention layers"),
        ({"full_attention_layers": "KS"}, "kimi_linear", "sliding attention layers"),
        ({"bounded": True}, "kimi_linear", "a bounded gate"),
        ({}, "onnx", "Layout 'onnx' is unknown"),
    ],
)
def test_what_a_layout_cannot_say_is_refused_by_name(tmp_path, options, layout, message):
    saved(tmp_path / "ours", **options)
    with pytest.raises(ValueError, match=message):
        export(str(tmp_path / "ours"), layout, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "field, value", [("attn", {"layers": [1]}), ("allow_neg_eigval", True), ("expand_v", 2), ("num_v_heads", 8)]
)
def test_what_a_deltify_model_cannot_be_is_refused_by_name(tmp_path, field, value):
    saved(tmp_path / "ours")
    export(str(tmp_path / "ours"), "kda", tmp_path / "kda")
    config = json.loads((tmp_path / "kda" / "config.json").read_text()) | {field: value}
    (tmp_path / "kda" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{field}=.* is not supported"):
        read_layout(str(tmp_path / "kda"))


@pytest.mark.parametrize("layout", ["kda", "kimi_linear"])
def test_wrong_files_of_other_layouts_are_named(tmp_path, layout):
    saved(tmp_path / "ours")
    export(str(tmp_path / "ours"), layout, tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    name = next(name for name in tensors if name.endswith("b_proj.weight") and "layers.2" in name)
    lacking = {other: x for other, x in tensors.items() if other != name}
    save_file(lacking, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn\..*b_proj\.weight is missing|lacks .*b_proj\.weight"):
        read_layout(str(tmp_path / "theirs"))
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        read_layout(str(tmp_path / "theirs"))
    file.unlink()
    torch.save(tensors, tmp_path / "theirs" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights"):
        read_layout(str(tmp_path / "theirs"))


@pytest.mark.parametrize("layout", ["deltify", "kda", "kimi_linear"])
def test_a_folder_with_something_in_it_is_left_alone(tmp_path, layout):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        export("anything", layout, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_flas_usual_config_is_read_and_what_has_no_place_is_refused(tmp_path):
    teacher = random_teacher("llama")
    student = convert(teacher, init="library").eval()
    save_model(tmp_path / "ours", student, teacher.tokenizer)
    export(str(tmp_path / "ours"), "kda", tmp_path / "fla")
    config = json.loads((tmp_path / "fla" / "config.json").read_text())
    config |= {"intermediate_size": None, "hidden_ratio": 4}
    (tmp_path / "fla" / "config.json").write_text(json.dumps(config))
    assert read_layout(str(tmp_path / "fla")).config.intermediate_size == student.config.intermediate_size
    (tmp_path / "fla" / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    with pytest.raises(ValueError, match="hidden_act='gelu'"):
        read_layout(str(tmp_path / "fla"))


def test_biases_of_an_earlier_student_are_folded_only_if_told(tmp_path, capsys):
    saved(tmp_path / "ours", gate_bias=True)
    command = ["export", str(tmp_path / "ours"), "--layout", "kimi_linear", "-o", str(tmp_path / "kimi")]
    assert main([*command, "--fold-gate-bias"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    cost = float(re.search(r"folded: KL ([-0-9.e]+) nats", line)[1])
    model = read_layout(tmp_path / "kimi")
    assert not model.config.gate_bias and 0 < cost < 0.1
    with pytest.raises(ValueError, match="has no biases in KDA layers"):
        export(tmp_path / "kimi", "deltify", tmp_path / "again", fold_gate_bias="python-docs")
    short = tmp_path / "short.txt"
    short.write_text("a short text")
    with pytest.raises(ValueError, match="needs 12,288"):
        export(tmp_path / "ours", "deltify", tmp_path / "again", fold_gate_bias=str(short))

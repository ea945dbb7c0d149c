"""Saved folders without deltify installed, and the layer against transformers' implementation."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deltify import convert
from deltify.conversion.teacher import random_teacher
from deltify.model import DeltifyConfig, DeltifyKDA
from deltify.training.checkpoint import save_model

SCRIPT = """
import sys
{block}
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in {folders!r}:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer("Hello there", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        generated = model.generate(ids, max_new_tokens=4, do_sample=False)
        logits = model(ids).logits
    operator = sys.modules[type(model.model.layers[0].self_attn).__module__].kda.__module__
    torch.save((type(model).__module__, operator, logits, generated), folder + "/out.pt")
"""


# with deltify installed, its operator is preferred, and its classes once it is imported: so one folder only
@pytest.mark.parametrize(
    "block, origin, kinds",
    [
        ("sys.modules['deltify'] = None", "transformers_modules.", {"llama": "KKSF", "arcee": "none"}),
        ("", "deltify.ops.dispatch", {"llama": "KKSF"}),
        ("", "deltify.ops.dispatch", {"arcee": "none"}),
    ],
    ids=["without", "with-llama", "with-arcee"],
)
def test_saved_folders_load_with_their_own_code(tmp_path, block, origin, kinds):
    students, folders = [], [str(tmp_path / architecture) for architecture in kinds]
    for folder, (architecture, kept) in zip(folders, kinds.items()):
        teacher = random_teacher(architecture)
        students.append(convert(teacher, full_attention_layers=kept, init="library").eval())
        save_model(Path(folder), students[-1], teacher.tokenizer)
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": "", "HOME": str(tmp_path)}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # the last bits of a product depend on it
    script = SCRIPT.format(folders=folders, block=block)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    ids = teacher.tokenizer("Hello there", return_tensors="pt")["input_ids"]
    for folder, student in zip(folders, students):
        module, operator, logits, text = torch.load(f"{folder}/out.pt")
        assert module.startswith("transformers_modules.") and operator.startswith(origin)
        with torch.no_grad():
            assert torch.equal(logits, student(ids).logits) and text.shape[1] == ids.shape[1] + 4


def test_the_layer_equals_transformers_own(monkeypatch):
    kimi = pytest.importorskip("transformers.models.kimi_linear", reason="transformers before 5.23 has no kimi_linear")
    from transformers import DynamicCache

    monkeypatch.setitem(sys.modules, "fla", None)  # it would prefer fla's kernels, which need a GPU
    shared = {"hidden_size": 48, "num_hidden_layers": 2, "rms_norm_eps": 1e-5}
    config = kimi.KimiLinearConfig(
        **shared, linear_head_dim=16, linear_num_heads=3, layer_types=["linear_attention"] * 2, hidden_act="silu"
    )
    peer = kimi.modeling_kimi_linear.KimiLinearDeltaAttention(config, 0).eval()
    ours = DeltifyKDA(DeltifyConfig(**shared, num_attention_heads=3, head_dim=16), 0).eval()
    with torch.no_grad():
        for p in peer.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
        copy = {f"{n}_proj.weight": f"{n}_proj.weight" for n in "qkvob"} | {"o_norm.weight": "o_norm.weight"}
        copy |= {"f_proj.0.weight": "forget_gate.f_a_proj.weight", "f_proj.1.weight": "forget_gate.f_b_proj.weight"}
        copy |= {"g_proj.0.weight": "g_a_proj.weight", "g_proj.1.weight": "g_b_proj.weight"}
        copy |= {"dt_bias": "forget_gate.dt_bias", "A_log": "forget_gate.A_log"}
        source, target = peer.state_dict(), ours.state_dict()
        for mine, theirs in copy.items():
            target[mine].copy_(source[theirs].flatten() if mine == "A_log" else source[theirs])
        for name, part in zip("qkv", source["conv1d.weight"].chunk(3)):
            target[f"{name}_conv1d.weight"].copy_(part)
        x = torch.randn(2, 150, 48)
        caches = [DynamicCache(config=config) for _ in range(2)]
        for start, end in ((0, 140), (140, 149), (149, 150)):
            want = peer(x[:, start:end], cache_params=caches[0])
            got = ours(x[:, start:end], caches[1])
            assert torch.allclose(got, want, atol=1e-5)
        states = [cache.get_recurrent_state(0) for cache in caches]
        assert torch.allclose(*states, atol=1e-5)

"""The model in other libraries, which compile, adapt, fine-tune, upload, quantize, place and score it."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import send_to_device
from huggingface_hub import HfApi
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltify import convert
from deltify.conversion.teacher import random_teacher
from deltify.model.mixers import find_packing
from deltify.model.sliding import find_slots
from deltify.ops import CutRows
from deltify.training.checkpoint import save_model

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def tiny(pattern: str, **teacher):
    """A student with layers of the kinds in `pattern`, and its tokenizer."""
    teacher = random_teacher("llama", num_hidden_layers=len(pattern), **teacher)
    student = convert(teacher, full_attention_layers=pattern, sliding_window=16, init="library")
    return student.eval(), teacher.tokenizer


@pytest.fixture
def ids():
    return torch.randint(1, 200, (2, 40))


def gradients(model, forward, ids):
    model.zero_grad()
    forward(ids, labels=ids, use_cache=False).loss.backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.slow
def test_compiled_gradients_equal_eager(ids):
    model, _ = tiny("KS")
    torch.compiler.reset()
    pairs = zip(gradients(model, torch.compile(model, backend="aot_eager"), ids), gradients(model, model, ids))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)
    torch.compiler.reset()


@pytest.mark.slow
@torch.no_grad()
def test_compiled_and_exported_forward_equal_eager(ids):
    model, _ = tiny("KF")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="inductor")
    assert torch.allclose(compiled(ids, use_cache=False).logits, model(ids).logits, atol=1e-5)
    torch.compiler.reset()
    model, _ = tiny("KSF")
    exported = torch.export.export(model, (ids,), {"use_cache": False}, strict=False).module()
    assert torch.allclose(exported(ids, use_cache=False).logits, model(ids).logits, atol=1e-5)


def test_lora_on_the_projections_trains_merges_and_loads(tmp_path, ids):
    peft = pytest.importorskip("peft")
    model, _ = tiny("KSF")
    plain = copy.deepcopy(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=PROJECTIONS, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapters = {name: p.clone() for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(adapters) == 3 * 4 * 2  # layers, projections, the two halves
    adapted(ids, labels=ids).loss.backward()
    optimizer.step()
    assert all(not torch.equal(p, adapters[n]) for n, p in adapted.named_parameters() if p.requires_grad)
    for name, p in adapted.base_model.model.named_parameters():
        name = name.replace(".base_layer", "")
        assert name not in before or torch.equal(p, before[name])
    adapted.eval()
    with torch.no_grad():
        want = adapted(ids).logits
        adapted.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
        assert torch.equal(again(ids).logits, want)
        merged = adapted.merge_and_unload()
        assert torch.allclose(merged(ids).logits, want, atol=1e-5)
    assert merged.state_dict().keys() == before.keys()


@pytest.mark.parametrize("packing", [False, True])
def test_trl_fine_tunes_a_step_and_saves(tmp_path, packing):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model, tokenizer = tiny("KF")
    before = {name: p.clone() for name, p in model.named_parameters()}
    texts = datasets.Dataset.from_list([{"text": word * 9} for word in ("Hello ", "there ", "how ", "are you ")])
    quiet = {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}
    options = {"max_steps": 1, "per_device_train_batch_size": 2, "max_length": 48, "packing": packing}
    settings = trl.SFTConfig(output_dir=tmp_path / "run", learning_rate=1e-3, **options, **quiet)
    trainer = trl.SFTTrainer(model, args=settings, train_dataset=texts, processing_class=tokenizer)
    assert trainer.train().training_loss > 0
    unchanged = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not unchanged and all(torch.isfinite(p).all() for p in model.parameters())
    trainer.save_model(tmp_path / "tuned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    ids = torch.randint(1, 200, (1, 20))
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)


@pytest.mark.slow
def test_a_push_to_the_hub_uploads_code_and_safetensors_and_no_pickle(monkeypatch):
    uploaded = []

    def take(self, repo_id, operations, **options):
        uploaded.extend(operation.path_in_repo for operation in operations)

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **options: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "create_commit", take)
    model, tokenizer = tiny("KF")
    model.push_to_hub("someone/something")
    code = "configuration loading modeling mixers sliding remote".split()
    want = {f"{name}_deltify.py" for name in code} | {f"kda_{n}.py" for n in ("ops", "reference", "chunked", "conv")}
    want |= {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert want <= set(uploaded) and not [name for name in uploaded if name.endswith((".bin", ".pt", ".pkl"))]
    uploaded.clear()
    tokenizer.push_to_hub("someone/something")
    assert "tokenizer.json" in uploaded


SCORE = """
import json, sys
sys.modules["deltify"] = None
import lm_eval
from lm_eval.tasks import TaskManager
manager = TaskManager(include_path={folder!r}, include_defaults=False)
model = "pretrained={folder}/model,trust_remote_code=True,dtype=float32"
where = {{"task_manager": manager, "device": "cpu", "batch_size": 2}}
results = lm_eval.simple_evaluate("hf", model_args=model, tasks=["tiny"], **where)
print(json.dumps([[r[0] for r in s["filtered_resps"]] for s in results["samples"]["tiny"]]))
"""


def test_lm_eval_scores_a_saved_folder_where_deltify_is_not_installed(tmp_path):
    pytest.importorskip("lm_eval")
    model, tokenizer = tiny("KSF")
    save_model(tmp_path / "model", model, tokenizer)
    rows = [{"text": f"Question {i}:", "options": [" yes", " perhaps not"], "gold": i % 2} for i in range(3)]
    (tmp_path / "tiny.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    task = {"task": "tiny", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test"}
    task |= {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "tiny.jsonl")}}, "doc_to_text": "text"}
    task |= {"doc_to_choice": "options", "doc_to_target": "gold", "target_delimiter": ""}
    task |= {"metric_list": [{"metric": "acc"}]}
    (tmp_path / "tiny.yaml").write_text(json.dumps(task))
    environment = os.environ | {name: str(tmp_path / name) for name in ("HF_MODULES_CACHE", "HF_HOME")}
    command = [sys.executable, "-c", SCORE.format(folder=str(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    got = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    want = torch.empty(3, 2)
    for i, row in enumerate(rows):
        for j, option in enumerate(row["options"]):
            both = torch.tensor([tokenizer(row["text"] + option)["input_ids"]])
            start = len(tokenizer(row["text"])["input_ids"])
            with torch.no_grad():
                logs = model(both).logits.log_softmax(-1)[0, start - 1 : -1]
            want[i, j] = logs.gather(1, both[0, start:, None]).sum()
    assert torch.allclose(got, want, atol=1e-3)


def test_only_projections_are_linear_modules_and_so_open_to_quantization():
    model, _ = tiny("KSF")
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name.split(".")[-1] for name in linear if not name.split(".")[-1].isdigit()} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "b_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
    }
    assert {name.split(".")[-2] for name in linear if name.split(".")[-1].isdigit()} == {"f_proj", "g_proj"}
    others = {name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in linear}
    kept = ("A_log", "dt_bias", "conv1d.weight", "norm.weight", "layernorm.weight", "embed_tokens.weight")
    assert all(name.endswith(kept) for name in others)


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_quantizes_the_projections_only(tmp_path, bits, ids):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install bitsandbytes)")
    from transformers import BitsAndBytesConfig

    # its 4-bit CPU kernel needs widths in multiples of 64, and b_proj has the width of the number of heads
    model, _ = tiny("KF", hidden_size=128, intermediate_size=128, head_dim=64)
    model.save_pretrained(tmp_path)
    options = {"llm_int8_skip_modules": ["b_proj", "lm_head"]} | {f"load_in_{bits}bit": True}
    settings = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **options)
    small = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, device_map="cpu").eval()
    mixer = small.model.layers[0].self_attn
    assert type(mixer.q_proj).__name__ == type(mixer.f_proj[0]).__name__ == {8: "Linear8bitLt", 4: "Linear4bit"}[bits]
    assert mixer.A_log.dtype == mixer.dt_bias.dtype == torch.float32 and mixer.q_conv1d.weight.is_floating_point()
    with torch.no_grad():
        want, got = model(ids).logits, small(ids).logits.float()
    assert 0 < (want - got).norm() / want.norm() < {8: 0.05, 4: 0.5}[bits]


@pytest.mark.parametrize("spread", [False, True])
def test_device_map_places_the_model(tmp_path, ids, spread):
    model, tokenizer = tiny("KSF")
    save_model(tmp_path / "model", model, tokenizer)
    parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    parts |= {f"model.layers.{i}": "disk" if i < 2 else "cpu" for i in range(3)}
    places = {"device_map": parts, "offload_folder": tmp_path / "disk"} if spread else {"device_map": "auto"}
    placed = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, **places)
    assert any(p.device.type == "meta" for p in placed.parameters()) == spread
    ids, mask = ids.to(placed.device), torch.ones_like(ids, device=placed.device)
    mask[0, :9] = 0
    with torch.no_grad():
        got, want = placed(ids, attention_mask=mask).logits, model.to(placed.device)(ids, attention_mask=mask).logits
    assert torch.allclose(got[0, 9:], want[0, 9:], atol=1e-4) and torch.allclose(got[1], want[1], atol=1e-4)
    prompt = AutoTokenizer.from_pretrained(tmp_path / "model")("Hello", return_tensors="pt").to(placed.device)
    out = placed.generate(**prompt, max_new_tokens=4, do_sample=True, temperature=0.7, top_p=0.95)
    assert prompt["input_ids"].shape[1] < out.shape[1] <= prompt["input_ids"].shape[1] + 4


def test_packing_and_slots_move_between_devices():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    packing = replace(find_packing(mask, None, 3, cached=False), cut=CutRows(None, torch.tensor([0, 2])))
    slots = find_slots(packing.cu_seqlens.long(), 5, 4, 2, torch.tensor([2, 3]))
    moved = (send_to_device(packing, "meta"), send_to_device(slots, "meta"))
    tensors = [x for part in (*moved, moved[0].cut) for x in vars(part).values() if isinstance(x, torch.Tensor)]
    assert len(tensors) == 11 and all(x.device.type == "meta" for x in tensors)

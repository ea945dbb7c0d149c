"""Optimizers: 8-bit Adam and Muon."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import assert_same_weights, die_in_step, records, tiny_recipe
from transformers import AutoModelForCausalLM

from deltify import distill
from deltify.config import Stage
from deltify.model import DeltifyForCausalLM
from deltify.training.optimizers import make_optimizers, trained


def trains_and_resumes_to_the_same_bits(tmp_path: Path, stage: Stage) -> DeltifyForCausalLM:
    """Assert that an unbroken and a resumed run of align and match agree, and return the model, ready to train."""
    runs = [tiny_recipe(tmp_path / name, align=stage, match=stage) for name in ("whole", "broken")]
    distill(runs[0])
    die_in_step(runs[1], 5)
    distill(runs[1], resume=True)
    assert_same_weights(runs[1].folder, runs[0].folder, "align", "match")
    losses = [r["loss"] for r in records(runs[0].folder) if r["stage"] == "match" and r["step"]]
    assert losses[-1] < losses[0]
    return AutoModelForCausalLM.from_pretrained(runs[0].folder / "match").requires_grad_(True)


def test_eight_bit_moments_train_and_resume_to_the_same_bits(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    stage = replace(tiny_recipe(tmp_path).align, optimizer="adamw8bit")
    model = trains_and_resumes_to_the_same_bits(tmp_path, stage)
    (optimizer,) = make_optimizers(model, stage, "match")
    model(torch.arange(8)[None]).logits.sum().backward()
    optimizer.step()
    wide = model.model.layers[0].mlp.up_proj.weight
    assert optimizer.state[wide]["state1"].dtype == torch.uint8
    with pytest.raises(ValueError, match=r"match.optimizer='adamw8bit': .* no trained matrix has such rows"):
        make_optimizers(model, stage, "match", sharded=True)
    with pytest.raises(ValueError, match=r"match.optimizer='muon' cannot be sharded over processes"):
        make_optimizers(model, replace(stage, optimizer="muon"), "match", sharded=True)


def test_an_optimizer_that_is_not_installed_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    recipe = tiny_recipe(tmp_path)
    recipe = replace(recipe, match=replace(recipe.match, optimizer="adamw8bit"))
    with pytest.raises(ValueError, match=r"match.optimizer='adamw8bit' needs bitsandbytes"):
        distill(recipe)
    assert not (recipe.folder / "converted").exists()


def test_muon_trains_and_resumes_to_the_same_bits_and_equals_torchs(tmp_path):
    stage = replace(tiny_recipe(tmp_path).align, optimizer="muon")
    model = trains_and_resumes_to_the_same_bits(tmp_path, stage)
    adamw, muon = make_optimizers(model, replace(stage, weight_decay=0.1), "match")
    muon_matrices = {id(p) for p in trained([muon])}
    embedding_ids = {id(model.model.embed_tokens.weight), id(model.lm_head.weight)}
    assert {id(p) for p in model.parameters() if p.dim() == 2} - muon_matrices == embedding_ids
    assert {id(p) for p in trained([adamw, muon])} == {id(p) for p in model.parameters()}
    copies = [p.detach().clone() for p in trained([muon])]
    reference = torch.optim.Muon(copies, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for group in muon.param_groups:
        group["lr"] = 0.01
    for seed in range(3):
        torch.manual_seed(seed)
        for parameter, copy in zip(trained([muon]), copies):
            parameter.grad = torch.randn_like(parameter)
            copy.grad = parameter.grad.clone()
        muon.step()
        reference.step()
    for parameter, copy in zip(trained([muon]), copies):
        torch.testing.assert_close(
            parameter.detach(), copy, rtol=0, atol=2e-4
        )  # bfloat16 products are summed in another order

"""Steps of align and match: losses, gradients, CUDA graphs, and memory."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_recipe
from safetensors.torch import load_file

from deltify import distill
from deltify.cli import main
from deltify.config import Stage, write_recipe
from deltify.conversion.student import convert
from deltify.conversion.teacher import random_teacher
from deltify.data.batches import Batch
from deltify.training import steps, trainer
from deltify.training.cuda_graphs import GraphedStep
from deltify.training.optimizers import choose_trained
from deltify.training.steps import align_step, hidden_states, match_step, next_tokens
from deltify.training.teachers import LiveTeacher
from deltify.training.trainer import explain_out_of_memory, share_frozen_weights, unshare_weights


def test_align_keeps_one_copy_of_what_is_frozen(tmp_path):
    teacher, rounded = random_teacher("llama"), random_teacher("llama").model.bfloat16()
    student = convert(teacher, full_attention_layers="none", init="library")
    choose_trained(student, Stage(), "align")
    share_frozen_weights(student, dict(rounded.named_parameters()))
    assert student.model.layers[0].mlp.up_proj.weight.dtype == torch.float32  # the teacher's rounded weight differs
    unshare_weights(student, dict(rounded.named_parameters()))
    share_frozen_weights(student, dict(teacher.model.named_parameters()))
    teacher_data = {p.data_ptr() for p in teacher.model.parameters()}
    shared = [name for name, p in student.named_parameters() if p.data_ptr() in teacher_data]
    assert len(shared) == sum(not p.requires_grad for p in student.parameters()) > 8
    unshare_weights(student, dict(teacher.model.named_parameters()))
    assert not any(p.data_ptr() in teacher_data for p in student.parameters())
    recipe = tiny_recipe(tmp_path, run=replace(tiny_recipe(tmp_path).run, precision="bf16"))
    distill(recipe)
    weights = load_file(recipe.folder / "align" / "model.safetensors")
    assert all(x.dtype == torch.float32 for x in weights.values())


def test_a_gpu_out_of_memory_names_the_settings_to_change(tmp_path, monkeypatch, capsys, whole):
    recipe = tiny_recipe(tmp_path)
    write_recipe(recipe, tmp_path / "recipe.yaml")

    def too_large(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(trainer, "match_step", too_large)
    assert main(["distill", str(tmp_path / "recipe.yaml")]) == 1
    said = capsys.readouterr().err
    assert "match does not fit in the GPU's memory: micro_batch_size=0 (2 at a time), sequence_length=32, act" in said
    advice = [
        "--resume --match.micro_batch_size 1",
        "--resume --match.activation_checkpointing true",
        "--match.sequence_length 16",
    ]
    assert all(way in said for way in advice) and "(CUDA out of memory. Tried to allocate 2.00 GiB.)" in said
    monkeypatch.undo()
    # the advice works and changes only the memory
    options = ["--resume", "--match.micro_batch_size", "1", "--match.activation_checkpointing", "true"]
    assert main(["distill", str(tmp_path / "recipe.yaml"), *options]) == 0
    got, want = (load_file(run / "match" / "model.safetensors") for run in (recipe.folder, whole))
    # norms, not elements: Adam turns rounding errors of a gradient near 0 into steps of any size
    for name in want:
        assert (got[name] - want[name]).norm() <= 1e-3 * want[name].norm(), name


def test_out_of_memory_when_only_the_sequence_length_is_left_to_lower():
    stage = Stage(sequence_length=4096, batch_size=8, micro_batch_size=1, activation_checkpointing=True)
    with pytest.raises(MemoryError) as error, explain_out_of_memory("extend", stage):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert "Continue with --extend.sequence_length 2048 and another --name" in str(error.value)
    fewer = pytest.raises(MemoryError, match=r"--align.micro_batch_size 2, or with --align\.sequence_length")
    with fewer, explain_out_of_memory("align", replace(stage, micro_batch_size=4)):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_each_layer_is_trained_on_the_teachers_own_input():
    teacher = random_teacher("llama")
    student = convert(teacher, init="library")
    batch = Batch(torch.randint(0, 200, (2, 32)), torch.arange(32).expand(2, 32))
    student.requires_grad_(True)
    align_step(LiveTeacher(teacher), student, batch, Stage(), 1.0)
    want = student.model.layers[2].self_attn.q_proj.weight.grad.clone()
    student.zero_grad()
    with torch.no_grad():  # a ruined layer below must not matter
        student.model.layers[0].self_attn.o_proj.weight.fill_(9.0)
    align_step(LiveTeacher(teacher), student, batch, Stage(), 1.0)
    assert torch.equal(student.model.layers[2].self_attn.q_proj.weight.grad, want)
    assert student.model.layers[2].mlp.up_proj.weight.grad is None


def test_match_keeps_packed_documents_apart():
    teacher = random_teacher("llama")
    student = convert(teacher, full_attention_layers="3:1", init="library")
    ids = torch.randint(0, 200, (1, 48))
    packed = Batch(ids, torch.cat([torch.arange(20), torch.arange(28)])[None])
    first = hidden_states(student, Batch(ids[:, :20], torch.arange(20)[None]))
    second = hidden_states(student, Batch(ids[:, 20:], torch.arange(28)[None]))
    assert torch.allclose(hidden_states(student, packed), torch.cat([first, second]), atol=1e-5)
    assert next_tokens(packed)[0, 19] == -100 and next_tokens(packed)[0, 18] == ids[0, 19]
    student.requires_grad_(True)
    assert float(match_step(LiveTeacher(teacher), student, packed, Stage(ce_weight=0.5), 1.0)["ce"]) > 0


def test_beyond_the_context_window_only_cross_entropy_trains():
    teacher = random_teacher("llama")
    student = convert(teacher, full_attention_layers="none", init="library").requires_grad_(True)
    ids = torch.randint(0, 250, (2, 12))
    batch, short = (Batch(ids[:, :n], torch.arange(n).expand(2, n)) for n in (12, 8))
    teacher.model.config.max_position_embeddings = 8
    losses = match_step(LiveTeacher(teacher), student, batch, Stage(ce_weight=0.5), 1.0)
    gradients = [p.grad.clone() for p in student.parameters()]
    near = match_step(LiveTeacher(teacher), student, short, Stage(), 1.0)
    student.zero_grad()
    labels = next_tokens(batch).flatten()
    logits = student(ids).logits.flatten(0, 1)
    ce = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / labels.numel()
    torch.testing.assert_close(float(losses["ce"]), float(ce.detach()))
    torch.testing.assert_close(float(losses["kl"]), float(near["kl"]))
    torch.testing.assert_close(float(losses["loss"]), float(0.5 * near["kl"] + 0.5 * ce.detach()))
    (0.5 * ce).backward()
    match_step(LiveTeacher(teacher), student, short, Stage(), 0.5)
    for gradient, parameter in zip(gradients, student.parameters()):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("compute", [align_step, match_step])
def test_a_fixed_number_of_documents_changes_no_gradient(compute):
    teacher = random_teacher("llama")
    positions = torch.cat([torch.arange(20), torch.arange(28)]).expand(2, 48)
    batch = Batch(torch.randint(0, 200, (2, 48)), positions)
    gradients = []
    for max_documents in (None, 16):
        student = convert(teacher, full_attention_layers="3:1", init="library").requires_grad_(True)
        compute(LiveTeacher(teacher), student, batch, Stage(), 1.0, max_documents)
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], want, atol=1e-6, rtol=1e-4, msg=name)


class FakeGraph:
    def replay(self):
        pass


@pytest.fixture
def fake_graphs(monkeypatch):
    """Graphs that do nothing, on a GPU whose first graph takes 100 bytes. The list has the free bytes."""
    reserved, free = iter((0, 100, *[100] * 20)), [1000]
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: nullcontext())
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: next(reserved))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 1000))
    return free


def test_graphs_are_released_if_a_batch_of_another_shape_would_not_fit_beside_them(fake_graphs):
    calls, complaints = [], []

    def compute(batch, max_documents):
        calls.append(max_documents)
        return {"loss": batch.input_ids.sum()}

    step = GraphedStep(compute, [], complaints.append)

    def run(*cuts):
        for cut in cuts:
            step(Batch(torch.ones(1, 64, dtype=torch.long), torch.arange(64)[None] % cut), torch.device("cpu"))

    run(64, 64, 64)
    fake_graphs[0] = 111
    run(2)  # fits
    assert len(calls) == 3 and step.works and not complaints
    fake_graphs[0] = 109
    run(1)
    assert not step.works and "another number of documents" in complaints[0]
    run(64, 64)
    assert calls == [16, 16, 32, 64, 16, 16] and len(complaints) == 1


def test_a_graphed_step_packs_like_batches_alike_and_captures_the_second(fake_graphs, monkeypatch):
    calls, complaints, seen = [], [], []
    monkeypatch.setattr(FakeGraph, "replay", lambda graph: calls.append("replay"))

    def compute(batch, max_documents):
        calls.append(max_documents)
        seen.append(batch)
        return {"loss": batch.input_ids.sum()}

    step = GraphedStep(compute, [], complaints.append)
    for cut in (64, 8, 40, 2, 3):  # 1, 8, 2, 32 and 22 documents
        step(Batch(torch.ones(1, 64, dtype=torch.long), torch.arange(64)[None] % cut), torch.device("cpu"))
    assert calls == [16, 16, "replay", "replay", 32, 32, "replay"] and not complaints
    other = replace(masked_batch(), loss_mask=~masked_batch().loss_mask, counted=torch.tensor(0.25))
    batches = [masked_batch(), masked_batch(), other]
    for batch in batches:  # a mask needs a graph of its own, whose replay reads the last batch's
        step(batch, torch.device("cpu"))
    assert calls[-4:] == [16, 16, "replay", "replay"]
    assert torch.equal(seen[-1].loss_mask, other.loss_mask) and seen[-1].counted == 0.25


def masked_batch(rows: int = 4) -> Batch:
    """Return a batch of which two thirds count, unequally many in each row."""
    mask = torch.rand(rows, 24, generator=torch.Generator().manual_seed(0)) < torch.linspace(0.4, 0.95, rows)[:, None]
    ids = torch.randint(0, 250, (rows, 24), generator=torch.Generator().manual_seed(1))
    return Batch(ids, torch.arange(24).repeat(rows, 1), mask, mask.float().mean())


STAGES_WITH_A_MASK = {
    "kl": Stage(),
    "ce": Stage(ce_weight=0.4),
    "hidden states": Stage(hidden_state_weight=0.5, ce_weight=0.2),
    "reverse": Stage(divergence="reverse", temperature=2.0),
}


@pytest.mark.parametrize("stage", STAGES_WITH_A_MASK.values(), ids=STAGES_WITH_A_MASK)
def test_tokens_that_do_not_count_bring_no_gradient(stage, monkeypatch):
    teacher, batch = LiveTeacher(random_teacher("llama")), masked_batch()
    student = convert(teacher.pretrained, init="library").requires_grad_(True)
    gradients, real = [], steps.layer_states

    def with_gradient(*args, **options):
        states = real(*args, **options)
        for state in states:
            if state.requires_grad:
                state.retain_grad()
                gradients.append(state)
        return states

    monkeypatch.setattr(steps, "layer_states", with_gradient)
    match_step(teacher, student, batch, stage, 1.0)
    counts = batch.loss_mask.flatten()
    last = gradients[0].grad
    assert not last[~counts].any() and last[counts].any(-1).all()


@pytest.mark.parametrize("window", [2048, 10])
@pytest.mark.parametrize("stage", STAGES_WITH_A_MASK.values(), ids=STAGES_WITH_A_MASK)
def test_every_token_that_counts_has_the_same_weight_in_any_micro_batches(stage, window):
    teacher, batch = LiveTeacher(random_teacher("llama")), masked_batch()
    teacher.pretrained.model.config.max_position_embeddings = window
    if window < batch.input_ids.shape[1]:
        batch.position_ids[1:3, 7:] -= 7  # two documents, so that rows differ in what is within the window
        batch = replace(batch, within=(batch.loss_mask & (batch.position_ids < window)).float().mean())
    student = convert(teacher.pretrained, init="library").requires_grad_(True)
    results = []
    for rows in (4, 2, 1):
        student.zero_grad()
        parts = batch.split(rows)
        losses = [match_step(teacher, student, part, stage, 1 / len(parts)) for part in parts]
        means = {name: float(torch.stack([loss[name] for loss in losses]).mean()) for name in losses[0]}
        results.append((means, [p.grad.clone() for p in student.parameters()]))
    (want, want_gradients), *others = results
    for got, gradients in others:
        assert got == pytest.approx(want, rel=1e-5)
        for gradient, other in zip(gradients, want_gradients):
            torch.testing.assert_close(gradient, other, atol=1e-6, rtol=1e-4)
    # weights that are all 1 are those of a batch without a mask
    ones = Batch(batch.input_ids, batch.position_ids, torch.ones_like(batch.loss_mask), torch.tensor(1.0))
    with_ones, without = (match_step(teacher, student, b, stage, 1.0) for b in (ones, Batch(*batch.tensors[:2])))
    assert {k: float(v) for k, v in with_ones.items()} == pytest.approx({k: float(v) for k, v in without.items()})


def test_a_step_in_which_nothing_counts_changes_nothing():
    teacher, batch = LiveTeacher(random_teacher("llama")), masked_batch()
    nothing = Batch(*batch.tensors[:2], torch.zeros_like(batch.loss_mask), torch.tensor(0.0))
    student = convert(teacher.pretrained, init="library").requires_grad_(True)
    losses = match_step(teacher, student, nothing, STAGES_WITH_A_MASK["hidden states"], 1.0)
    assert not any(losses.values()) and not any(p.grad.any() for p in student.parameters())
    with pytest.raises(ValueError, match="has loss_mask and counted, or neither"):
        Batch(*batch.tensors[:3])


def test_beyond_the_context_window_the_mask_counts_and_every_token_inside_has_the_same_weight():
    teacher, batch = random_teacher("llama"), masked_batch()
    teacher.model.config.max_position_embeddings = 10
    student = convert(teacher, init="library").requires_grad_(True)
    kl = float(match_step(LiveTeacher(teacher), student, batch, Stage(ce_weight=0.5), 1.0)["kl"])
    with torch.no_grad():
        log_p, log_q = (m(batch.input_ids).logits.log_softmax(-1) for m in (teacher.model, student))
    rows = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert kl == pytest.approx(float(rows[:, :10][batch.loss_mask[:, :10]].mean()), rel=1e-4)

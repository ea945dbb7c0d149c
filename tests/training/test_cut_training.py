"""Training on rows that are cut over processes gives the losses, gradients and weights of one process."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import records, tiny_recipe
from processes import run_in_processes
from safetensors.torch import load_file
from torch import Tensor

from deltify import distill
from deltify.config import Recipe, Stage, StudentSpec, check
from deltify.conversion.student import convert
from deltify.conversion.teacher import random_teacher
from deltify.data.batches import Batch
from deltify.training import distributed, samples
from deltify.training.estimate import plan
from deltify.training.fit import fit_to_time
from deltify.training.steps import match_step
from deltify.training.teachers import LiveTeacher

pytestmark = pytest.mark.slow
STAGE = Stage(ce_weight=0.3, hidden_state_weight=0.2)


def two_rows() -> Batch:
    """Return a row of one document and a row of two."""
    positions = torch.stack([torch.arange(16), torch.arange(16) - torch.tensor([0] * 7 + [7] * 9)])
    return Batch(torch.randint(0, 250, (2, 16)), positions)


def losses_and_gradients(
    row_group: dist.ProcessGroup | None, masked: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the losses and gradients of a match step, beyond the teacher's context window, as means over ranks."""
    torch.manual_seed(0)
    teacher = random_teacher("llama")
    student = convert(teacher, full_attention_layers="3:1", init="library").double().requires_grad_(True)
    teacher.model.double().config.max_position_embeddings = 10
    batch = two_rows()
    if masked:
        mask = torch.arange(32).view(2, 16) % 5 > 1
        batch = replace(batch, loss_mask=mask, counted=mask.float().mean())
    losses = match_step(LiveTeacher(teacher), student, batch, STAGE, 1.0, row_group=row_group)
    gradients = {name: distributed.all_reduce_mean(p.grad) for name, p in student.named_parameters()}
    return {name: distributed.all_reduce_mean(loss) for name, loss in losses.items()}, gradients


def cut_losses_and_gradients() -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    return [losses_and_gradients(dist.group.WORLD, masked) for masked in (False, True)]


def test_losses_of_a_cut_row_are_those_of_the_row(tmp_path):
    for got, masked in zip(run_in_processes(cut_losses_and_gradients, 2, tmp_path)[1], (False, True)):
        want = losses_and_gradients(None, masked)
        assert want[0].keys() == got[0].keys() == {"loss", "kl", "ce", "hidden"}
        for which in (0, 1):
            for name, x in want[which].items():
                assert (got[which][name] - x).norm() <= 1e-6 * x.norm(), name


TEACHERS = {  # architecture and fields of the configuration, and whether each rank computes its segment only
    "llama": ("llama", {}, True),
    "smollm3, some layers without RoPE": ("smollm3", {}, True),
    "qwen3, with norms of queries and keys": ("qwen3", {}, True),
    "mistral, with windows": ("mistral", {"sliding_window": 5}, False),
    "llama, with RoPE that depends on the length": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        False,
    ),
}


def teacher_states(case: str, row_group: dist.ProcessGroup | None) -> tuple[bool, list[Tensor]]:
    """Return whether a teacher is cut, and its states [B, T, D] of whole rows or of this rank's segments."""
    architecture, facts, _ = TEACHERS[case]
    torch.manual_seed(0)
    live = LiveTeacher(random_teacher(architecture, **facts))
    live.model.double()
    batch = two_rows()
    with torch.no_grad():
        states = [*live.layer_states(batch, row_group), live.hidden_states(batch, row_group)]
    return live.can_be_cut, [x.unflatten(0, (2, -1)) for x in states]


def cut_teacher_states() -> dict[str, tuple[bool, list[Tensor]]]:
    return {case: teacher_states(case, dist.group.WORLD) for case in TEACHERS}


def test_states_of_a_teachers_segments_are_those_of_its_rows(tmp_path):
    first, second = run_in_processes(cut_teacher_states, 2, tmp_path)
    for case, (_, _, can_be_cut) in TEACHERS.items():
        _, want = teacher_states(case, None)
        assert first[case][0] == second[case][0] == can_be_cut, case
        assert len(want) > 3
        for *parts, x in zip(first[case][1], second[case][1], want):
            assert (torch.cat(parts, 1) - x).abs().max() <= 1e-10 * x.abs().max(), case


def distill_quickly(recipe: Recipe) -> Path:
    samples.NEW_TOKENS = 4
    return distill(recipe)


def cut(recipe: Recipe, processes: int) -> Recipe:
    return replace(recipe, run=replace(recipe.run, context_parallel=processes))


def test_a_run_on_cut_rows_ends_with_the_weights_of_one_process(tmp_path):
    one, two = tiny_recipe(tmp_path / "one"), cut(tiny_recipe(tmp_path / "two"), 2)
    run_in_processes(distill_quickly, 2, tmp_path, two)
    distill(one)
    for stage in ("align", "match"):
        got, want = (load_file(recipe.folder / stage / "model.safetensors") for recipe in (two, one))
        assert got.keys() == want.keys()
        for name in want:
            # Adam turns rounding errors of a gradient near 0 into steps of any size, and A_log begins at 0
            assert (got[name] - want[name]).norm() <= 1e-3 * want[name].norm().clamp(min=0.1), (stage, name)
    assert len(records(two.folder)) == len(records(one.folder))


def test_recipes_whose_rows_cannot_be_cut_are_refused(tmp_path):
    recipe = cut(tiny_recipe(tmp_path), 2)
    with pytest.raises(ValueError, match="context_parallel=2 needs a number of processes that is a multiple of it"):
        distill(recipe)
    assert not recipe.folder.exists()
    with pytest.raises(ValueError, match="context_parallel=2: there is no estimate"):
        plan(recipe)
    with pytest.raises(ValueError, match="data_parallel=hybrid: there is no estimate"):
        plan(replace(recipe, run=replace(recipe.run, context_parallel=1, data_parallel="hybrid")))
    with pytest.raises(ValueError, match=r"which run\.context_parallel=2 does not allow"):
        fit_to_time(recipe, 1)
    with pytest.raises(ValueError, match=r"match.sequence_length=32 must be a multiple of run.context_parallel=3"):
        check(cut(recipe, 3))
    with pytest.raises(ValueError, match="must be 1 for a student with sliding-window layers"):
        check(replace(recipe, student=StudentSpec("KKS")))

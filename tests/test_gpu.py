"""The same on a CUDA GPU; skipped where there is none."""

import pytest
import torch

from deltify import convert, kda
from deltify.config import Stage
from deltify.data import Batch
from deltify.distill import align_step, match_step
from deltify.teacher import freeze, random_teacher

pytestmark = pytest.mark.gpu


def error(got, want):
    return float((got.cpu().double() - want).square().mean().sqrt() / want.square().mean().sqrt())


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("bounds", [None, [0, 100, 100, 333, 700]])
def test_the_operator_and_its_gradients(dtype, bound, bounds):
    T, H, K = 700, 3, 64
    shapes = [(1, T, H, K)] * 4 + [(1, T, H)]
    raw = [torch.randn(shape).to(dtype) for shape in shapes]
    A_log, dt_bias = torch.rand(H), torch.randn(H * K) - 3
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    weight = torch.randn(1, T, H, K).to(dtype)

    def run(device, work):
        leaves = [x.to(device, work).requires_grad_() for x in raw]
        gates = [
            x.to(device, torch.float64 if work is torch.float64 else None).requires_grad_() for x in (A_log, dt_bias)
        ]
        o, state = kda(*leaves, *gates, cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(device))
        loss = (o * weight.to(device, work)).sum()
        return [o, state, *torch.autograd.grad(loss, leaves + gates)]

    for got, want in zip(run("cuda", dtype), run("cpu", torch.float64)):
        assert error(got.detach(), want.detach()) < bound


def test_conversion_and_one_step_of_each_stage():
    teacher = random_teacher("llama")
    freeze(teacher.model.cuda())
    positions = torch.cat([torch.arange(40), torch.arange(24)]).expand(4, 64)
    batch = Batch(torch.randint(0, 250, (4, 64)), positions).to("cuda")
    student = convert(teacher, full_attention_layers="3:1", calibration=batch)
    student.requires_grad_(True)
    for step in (align_step, match_step):
        with torch.autocast("cuda", torch.bfloat16):
            assert torch.isfinite(step(teacher, student, batch, Stage(), 1.0)["loss"])
    ids = batch.input_ids[:, :20]
    assert student.eval().generate(ids, max_new_tokens=4, do_sample=False).shape[0] == 4

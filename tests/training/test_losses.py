"""Losses, compared with dense formulas."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deltify.training import losses
from deltify.training.losses import linear_kl, mixer_loss


def make(N=50, D=8, W=40, dtype=torch.float64):
    student, head, teacher, t_head = (torch.randn(*shape, dtype=dtype) for shape in ((N, D), (W, D), (N, 6), (W, 6)))
    labels = torch.randint(0, W, (N,))
    labels[::5] = -100
    return student.requires_grad_(), head.requires_grad_(), teacher, t_head, labels


def dense(student, head, teacher, t_head, labels, ce_weight, kind="forward", T=1.0, mask=None):
    log_p, log_q = (teacher @ t_head.t() / T).log_softmax(-1), (student @ head.t() / T).log_softmax(-1)
    middle = torch.logaddexp(log_p, log_q) - math.log(2)
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731
    rows = {"forward": kl(log_p, log_q), "reverse": kl(log_q, log_p)}.get(kind)
    rows = (kl(log_p, middle) + kl(log_q, middle)) / 2 if rows is None else rows
    chosen = (student @ head.t()).log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    mask = torch.ones(len(rows), dtype=torch.bool) if mask is None else mask
    kl, ce = rows[mask].mean(), -(chosen * (labels >= 0)).mean()
    return (1 - ce_weight) * T**2 * kl + ce_weight * ce, kl, ce


@pytest.mark.parametrize("ce_weight, temperature, masked", [(0.0, 1.0, False), (0.3, 1.0, True), (0.3, 2.0, False)])
@pytest.mark.parametrize("kind", losses.DIVERGENCES)
def test_value_and_gradients_equal_the_dense_formula(kind, ce_weight, temperature, masked, monkeypatch):
    monkeypatch.setitem(losses.CHUNK_BYTES, "cpu", 4 * 40 * 7)  # seven tokens at a time
    student, head, teacher, t_head, labels = make()
    mask = torch.rand(50) < 0.7 if masked else None
    options = {"ce_weight": ce_weight, "divergence": kind, "temperature": temperature}
    options["weights"] = None if mask is None else mask / mask.double().mean()
    got = linear_kl(student, head, teacher, t_head, labels=labels, **options)
    want = dense(student, head, teacher, t_head, labels, ce_weight, kind, temperature, mask)
    for g, w in zip(got, want):
        assert torch.allclose(g, w, rtol=0, atol=1e-12)
    got = torch.autograd.grad(2 * got[0], (student, head))
    want = torch.autograd.grad(2 * want[0], (student, head))
    for g, w in zip(got, want):
        assert torch.allclose(g, w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", losses.DIVERGENCES)
def test_a_loss_on_some_tokens_is_that_of_these_tokens_alone(kind):
    student, head, teacher, t_head, labels = make()
    mask = torch.rand(50) < 0.6
    options = {"ce_weight": 0.3, "divergence": kind}
    marks = {"labels": labels.masked_fill(~mask, -100), "weights": mask.double(), "count": mask.sum()}
    got = linear_kl(student, head, teacher, t_head, **marks, **options)
    want = linear_kl(student[mask], head, teacher[mask], t_head, labels=labels[mask], **options)
    for g, w in zip(got, want):
        assert torch.allclose(g, w, rtol=0, atol=1e-12)
    got, want = (torch.autograd.grad(result[0], (student, head)) for result in (got, want))
    for g, w in zip(got, want):
        assert torch.allclose(g, w, rtol=0, atol=1e-12)


def test_equal_models_have_no_kl_and_it_is_per_token():
    student, head, *_ = make(dtype=torch.float32)
    loss, _, _ = linear_kl(student, head, student.detach(), head.detach())
    assert abs(float(loss.detach())) < 1e-6
    student, head, teacher, t_head, _ = make()
    once = linear_kl(student, head, teacher, t_head)[1]
    twice = linear_kl(student.repeat(2, 1), head, teacher.repeat(2, 1), t_head)[1]
    assert torch.allclose(once, twice, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_no_tensor_holds_all_tokens_times_the_vocabulary(monkeypatch):
    monkeypatch.setitem(losses.CHUNK_BYTES, "cpu", 4 * 1000 * 16)
    student, head, teacher, t_head, labels = make(N=512, D=8, W=1000, dtype=torch.float32)
    with LargestTensor() as largest:
        linear_kl(student, head, teacher, t_head, labels=labels, ce_weight=0.5)[0].backward()
    assert largest.elements <= 1000 * 16 < 512 * 1000


def test_autocast_changes_only_the_products():
    student, head, teacher, t_head, _ = make(dtype=torch.float32)
    want = linear_kl(student, head, teacher, t_head)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_kl(student, head, teacher, t_head)[0]
    got.backward()
    assert got.dtype == torch.float32 and student.grad.dtype == torch.float32
    assert float((got - want).detach().abs()) < 0.02 * float(want.detach())


def test_mixer_loss_is_relative_to_the_teachers_variance():
    teacher = torch.randn(4, 100, 6) * 3 + 5
    mean = teacher.flatten(0, 1).mean(0).expand_as(teacher)
    assert float(mixer_loss(mean, teacher)) == pytest.approx(1.0, rel=1e-5)
    assert float(mixer_loss(teacher, teacher)) == 0
    assert float(mixer_loss(10 * mean, 10 * teacher)) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels are tested in test_gpu.py")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", losses.DIVERGENCES)
def test_the_kernel_in_the_interpreter_equals_the_torch_form(kind, temperature):
    kernels = pytest.importorskip("deltify.ops.triton.kl", reason="Triton is not installed")
    t, s = torch.randn(9, 5000) * 4, torch.randn(9, 5000) * 4  # two blocks, the last one partly filled
    labels, weights = torch.randint(0, 5000, (9,)), (torch.rand(9) < 0.6) * 1.3
    labels[::3] = -100
    for chosen in ((labels, weights), (None, None)):
        want = losses.divergence_and_grad(t, s, *chosen, kind, temperature, (0.7, 0.3), torch.float32)
        d, settings = torch.empty_like(s), (kind, temperature, 0.7, 0.3)
        got = (*kernels.divergence_rows(t, s, *chosen, d, *settings), d)
        for name, x, y in zip(("divergence", "cross-entropy", "gradient"), got, want):
            assert torch.allclose(x, y, atol=2e-5), name
        value = kernels.divergence_rows(t, s, *chosen, None, *settings)[0]
        assert torch.allclose(value, want[0], atol=2e-5)


def test_mixer_loss_stays_finite_and_bounded_where_the_teacher_is_constant():
    student, constant = torch.randn(2, 30, 8, requires_grad=True), torch.randn(8).expand(2, 30, 8)
    noisy = constant * (1 + 1e-4 * torch.randn(2, 30, 1))  # what rounding does to a constant
    for teacher in (torch.zeros(2, 30, 8), constant, noisy, noisy.bfloat16(), 1e-25 * noisy):
        loss = mixer_loss(student, teacher)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.isfinite() and gradient.isfinite().all()
        assert float(mixer_loss(teacher.float(), teacher)) == 0
    near = constant + 0.01 * constant.norm(dim=-1, keepdim=True) / 8**0.5 * torch.randn(2, 30, 8).sign()
    for teacher in (constant, noisy):  # an error of 1 % scores 1
        assert float(mixer_loss(near, teacher)) == pytest.approx(1, rel=0.1)


def test_an_unknown_divergence_is_named():
    student, head, teacher, t_head, _ = make()
    with pytest.raises(ValueError, match="divergence='kl' is unknown; choose one of forward"):
        linear_kl(student, head, teacher, t_head, divergence="kl")

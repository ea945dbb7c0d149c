"""The losses against dense formulas."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deltify import losses
from deltify.losses import linear_kl, mixer_loss


def make(N=50, D=8, W=40, dtype=torch.float64):
    student, head, teacher, t_head = (torch.randn(*shape, dtype=dtype) for shape in ((N, D), (W, D), (N, 6), (W, 6)))
    labels = torch.randint(0, W, (N,))
    labels[::5] = -100
    return student.requires_grad_(), head.requires_grad_(), teacher, t_head, labels


def dense(student, head, teacher, t_head, labels, ce_weight):
    log_p, log_q = (teacher @ t_head.t()).log_softmax(-1), (student @ head.t()).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    ce = -log_q[labels >= 0, labels[labels >= 0]].sum() / len(labels)
    return (1 - ce_weight) * kl + ce_weight * ce, kl, ce


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_value_and_gradients_equal_the_dense_formula(ce_weight, monkeypatch):
    monkeypatch.setitem(losses.CHUNK_BYTES, "cpu", 4 * 40 * 7)  # seven tokens at a time
    student, head, teacher, t_head, labels = make()
    got = linear_kl(student, head, teacher, t_head, labels=labels, ce_weight=ce_weight)
    want = dense(student, head, teacher, t_head, labels, ce_weight)
    for g, w in zip(got, want):
        assert torch.allclose(g, w, atol=1e-12)
    got = torch.autograd.grad(2 * got[0], (student, head))
    want = torch.autograd.grad(2 * want[0], (student, head))
    for g, w in zip(got, want):
        assert torch.allclose(g, w, atol=1e-12)


def test_equal_models_have_no_kl_and_it_is_per_token():
    student, head, *_ = make(dtype=torch.float32)
    loss, _, _ = linear_kl(student, head, student.detach(), head.detach())
    assert abs(float(loss.detach())) < 1e-6
    student, head, teacher, t_head, _ = make()
    once = linear_kl(student, head, teacher, t_head)[1]
    twice = linear_kl(student.repeat(2, 1), head, teacher.repeat(2, 1), t_head)[1]
    assert torch.allclose(once, twice, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out


def test_no_tensor_holds_all_tokens_times_the_vocabulary(monkeypatch):
    monkeypatch.setitem(losses.CHUNK_BYTES, "cpu", 4 * 1000 * 16)
    student, head, teacher, t_head, labels = make(N=512, D=8, W=1000, dtype=torch.float32)
    with LargestTensor() as largest:
        linear_kl(student, head, teacher, t_head, labels=labels, ce_weight=0.5)[0].backward()
    assert largest.numbers <= 1000 * 16 < 512 * 1000


def test_autocast_changes_the_products_alone():
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

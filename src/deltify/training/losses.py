"""The losses that a student is trained with.

Legend: N tokens, D model width, W vocabulary.
"""

import functools
import importlib
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import DIVERGENCES
from ..conversion.calibration import LEAST_VARIANCE

# bytes of one [chunk, W] float32 matrix of logits: small enough for a CPU's cache, large enough to fill a GPU
CHUNK_BYTES = {"cpu": 2**24, "cuda": 15 * 2**24}


def mixer_loss(student_BTD: Tensor, teacher_BTD: Tensor) -> Tensor:
    """Return the mean squared difference of two mixer outputs, divided by the variance of the teacher's.

    A constant equal to the teacher's mean scores 1.
    """
    difference, center_D, variance = squared_difference(student_BTD, teacher_BTD)
    return difference / at_least(variance, center_D)


def squared_difference(student_BTD: Tensor, teacher_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean squared difference of two mixer outputs, and the mean [D] and variance of the teacher's."""
    teacher = teacher_BTD.float() if teacher_BTD.dtype != torch.float64 else teacher_BTD
    teacher_ND, student_ND = teacher.flatten(0, -2), student_BTD.to(teacher.dtype).flatten(0, -2)
    center_D = teacher_ND.mean(0)
    variance = (teacher_ND - center_D).square().mean(0).sum()
    return (student_ND - teacher_ND).square().sum(-1).mean(), center_D, variance


def at_least(variance: Tensor, center_D: Tensor) -> Tensor:
    """Return a variance, or `LEAST_VARIANCE` times the squared mean if that is larger.

    Otherwise the rounding errors of a layer with constant output would outweigh all other layers.
    """
    return torch.maximum(variance, (LEAST_VARIANCE * center_D.square().sum(-1)).clamp(min=1e-12))


def hidden_state_loss(
    student: list[Tensor], teacher: list[Tensor], weights: Tensor | None = None, count: Tensor | None = None
) -> Tensor:
    """Return 1 - cosine similarity of hidden states [N, D], one tensor per layer, averaged over layers and tokens.

    Args:
        student: Hidden states of the student.
        teacher: Hidden states of the teacher.
        weights: Weights of the tokens, [N], 1 on average over all tokens of the loss. Default to 1.
        count: Number of tokens that the sum is divided by. Defaults to N.
    """
    layers = [1 - F.cosine_similarity(s.float(), t.float(), dim=-1) for s, t in zip(student, teacher)]
    if weights is not None:
        layers = [loss * weights for loss in layers]
    return torch.stack(layers).sum(-1).mean() / (len(student[0]) if count is None else count)


def linear_kl(
    student_ND: Tensor,
    student_head_WD: Tensor,
    teacher_ND: Tensor,
    teacher_head_WD: Tensor,
    *,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    divergence: str = "forward",
    temperature: float = 1.0,
    weights: Tensor | None = None,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the divergence of student and teacher and the cross-entropy, from hidden states and output embeddings.

    Logits and their gradients exist for a few hundred tokens at a time. The forward pass already turns them into the
    gradients of the student's hidden states and head, so the backward pass may run only once.

    Args:
        student_ND: Hidden states [N, D] of the student.
        student_head_WD: Output embeddings [W, D] of the student.
        teacher_ND: Hidden states of the teacher. Their width may differ.
        teacher_head_WD: Output embeddings of the teacher.
        labels: Next tokens [N], or -100 where there is none. Only the cross-entropy needs them.
        ce_weight: Weight of the cross-entropy in the loss, in [0, 1].
        divergence: forward, KL(teacher | student); reverse, KL(student | teacher); or jensen-shannon.
        temperature: Softmax temperature of both models in the divergence. The loss multiplies the divergence by its
            square (Hinton et al., arXiv 1503.02531).
        weights: Weights [N] of the tokens' divergence, 1 on average over all tokens of the loss. Default to 1. The
            cross-entropy ignores them.
        count: Number of tokens that the sums over tokens are divided by. Defaults to N. With a loss on some tokens
            only, it is their number, with weights 0 and labels -100 for all others.

    Returns:
        (loss, kl, ce). The loss is (1 - ce_weight) temperature^2 kl + ce_weight ce and carries gradients. kl is the
        weighted sum over the tokens divided by `count`, in nats. ce is the sum over labelled tokens divided by `count`.
        All are float32, or float64 for float64 inputs.

    Raises:
        ValueError: If the divergence is unknown.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence={divergence!r} is unknown; choose one of {', '.join(DIVERGENCES)}")
    options = (labels, ce_weight, divergence, temperature, weights, count)
    loss, kl, ce = _LinearKL.apply(student_ND, student_head_WD, teacher_ND, teacher_head_WD, *options)
    return loss, kl.detach(), ce.detach()


def divergence_rows(log_p: Tensor, log_q: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return the divergence [N] of each token and its gradient [N, W] by the logits of q. Overwrites its arguments."""
    p = log_p.exp()
    if kind == "forward":
        rows = log_p.sub_(log_q).mul_(p).sum(-1)
        return rows, torch.sub(log_q.exp_(), p, out=log_p)
    q = log_q.exp()
    if kind == "reverse":
        surprise = log_q.sub_(log_p)
        rows = (q * surprise).sum(-1)
        return rows, surprise.sub_(rows[:, None]).mul_(q)
    middle = ((p + q) / 2).log()
    surprise = log_q.sub_(middle)
    own = (q * surprise).sum(-1)
    rows = (log_p.sub_(middle).mul_(p).sum(-1) + own) / 2
    return rows, surprise.sub_(own[:, None]).mul_(q / 2)


def compute_logits(x_ND: Tensor, head_WD: Tensor, work: torch.dtype) -> Tensor:
    """Return the logits [N, W] in dtype `work`, on a GPU without rounding them to a narrower dtype first."""
    if x_ND.is_cuda and x_ND.dtype != work == torch.float32:
        return torch.mm(x_ND, head_WD.t(), out_dtype=work)
    return (x_ND @ head_WD.t()).to(work)


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, student, student_head, teacher, teacher_head, labels, ce_weight, divergence, temperature, weights, count
    ):
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        device, work = student.device.type, torch.promote_types(student.dtype, torch.float32)
        # under autocast the matrix products run in its precision, everything else in float32
        product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student.dtype
        h, head, t, t_head = (x.to(product) for x in (student, student_head, teacher, teacher_head))
        d_hidden = torch.empty_like(student) if needs_hidden else None
        d_head = torch.zeros_like(student_head, dtype=work) if needs_head else None
        kl, ce = (torch.zeros((), dtype=work, device=student.device) for _ in range(2))
        weights = None if weights is None else weights.to(work)
        chunk = max(1, CHUNK_BYTES.get(device, CHUNK_BYTES["cpu"]) // (4 * len(head)))
        with torch.autocast(device, enabled=False):
            for start in range(0, len(student), chunk):
                part = slice(start, start + chunk)
                chunk_labels, chunk_weights = (None if x is None else x[part] for x in (labels, weights))
                scales = (1 - ce_weight) * temperature, ce_weight
                logits = compute_logits(t[part], t_head, work), compute_logits(h[part], head, work)
                grad_dtype = product if needs_hidden or needs_head else None
                chunk_kl, chunk_ce, d = divergence_and_grad(
                    *logits, chunk_labels, chunk_weights, divergence, temperature, scales, grad_dtype
                )
                kl, ce = kl + chunk_kl.sum(), ce + chunk_ce.sum()
                if d is not None and d_hidden is not None:
                    d_hidden[part] = d @ head
                if d is not None and d_head is not None:
                    add_product(d_head, d.t(), h[part])
        count = len(student) if count is None else count
        kl, ce = kl / count, ce / count
        for gradient in (d_hidden, d_head):
            if gradient is not None:
                gradient /= count
        ctx.save_for_backward(d_hidden, None if d_head is None else d_head.to(student_head.dtype))
        return (1 - ce_weight) * temperature**2 * kl + ce_weight * ce, kl, ce

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        # in place: a copy of the head's gradient would take as much memory as everything else here
        grads = (None if d is None else d.mul_(gradients[0].to(d.dtype)) for d in ctx.saved_tensors)
        return *grads, None, None, None, None, None, None, None, None


def divergence_and_grad(
    t_NW: Tensor,
    s_NW: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    kind: str,
    temperature: float,
    scales: tuple[float, float],
    grad_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the divergence [N] and cross-entropy [N] of each token, and the gradient [N, W] of the loss.

    Args:
        t_NW: Logits of the teacher.
        s_NW: Logits of the student, which the gradient belongs to.
        labels: Next tokens [N], or -100 where there is none.
        weights: Weights [N] of the divergence. Default to 1.
        scales: Factors of the gradients of divergence and cross-entropy. The first is already divided by temperature.
        grad_dtype: Data type of the gradient, or None for no gradient.
    """
    if t_NW.is_cuda and t_NW.dtype == torch.float32 and (kernels := loss_kernels()) is not None:
        d = None if grad_dtype is None else torch.empty(t_NW.shape, dtype=grad_dtype, device=t_NW.device)
        return *kernels.divergence_rows(t_NW, s_NW, labels, weights, d, kind, temperature, *scales), d
    plain = s_NW.log_softmax(-1) if labels is not None else None
    if temperature != 1:
        t_NW, s_NW = t_NW / temperature, s_NW / temperature
    log_q = plain.clone() if plain is not None and temperature == 1 else s_NW.log_softmax(-1)
    kl, d = divergence_rows(t_NW.log_softmax(-1), log_q, kind)
    ce, d = torch.zeros_like(kl), d.mul_(scales[0])
    if weights is not None:
        kl, d = kl * weights, d.mul_(weights[:, None])
    if labels is not None and plain is not None:
        labelled, target = labels >= 0, labels.clamp(min=0).unsqueeze(1)
        ce = torch.where(labelled, -plain.gather(1, target).squeeze(1), 0.0)
        if scales[1]:
            scale = labelled.to(d.dtype).mul_(scales[1]).unsqueeze(1)
            d.addcmul_(plain.exp_(), scale).scatter_add_(1, target, -scale)
    return kl, ce, None if grad_dtype is None else d.to(grad_dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, on a GPU without rounding the product to the dtype of its factors."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


@functools.cache
def loss_kernels() -> ModuleType | None:
    """Return the module of the loss in Triton, or None where Triton is not installed."""
    try:
        return importlib.import_module("deltify.ops.triton.kl")
    except ImportError:
        return None

"""What a student is trained to do: agree with its teacher.

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
from . import distributed

# of one [chunk, W] float32 matrix of logits: on a CPU small enough for the cache, on a GPU enough to fill the chip
CHUNK_BYTES = {"cpu": 2**24, "cuda": 15 * 2**24}


def mixer_loss(student_BTD: Tensor, teacher_BTD: Tensor) -> Tensor:
    """Mean squared difference of two mixer outputs over the variance of the teacher's: its mean alone would score 1.

    The variance is that of all ranks' tokens, so that their mean loss is the loss of all. It counts as at least
    `LEAST_VARIANCE` of the squared mean: the rounding of a layer that says the same of every token would otherwise
    outweigh all other layers.
    """
    teacher = teacher_BTD.float() if teacher_BTD.dtype != torch.float64 else teacher_BTD
    teacher, student = teacher.flatten(0, -2), student_BTD.to(teacher.dtype).flatten(0, -2)
    center = distributed.mean(teacher.mean(0))
    variance = distributed.mean((teacher - center).square().mean(0)).sum()
    least = (LEAST_VARIANCE * center.square().sum()).clamp(min=1e-12)
    return (student - teacher).square().sum(-1).mean() / torch.maximum(variance, least)


def hidden_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """1 - cosine of student's and teacher's hidden states, each a list of [N, D], the mean over layers and tokens."""
    return torch.stack(
        [1 - F.cosine_similarity(s.float(), t.float(), dim=-1).mean() for s, t in zip(student, teacher)]
    ).mean()


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
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence of student and teacher, and cross-entropy, of the logits that two heads make of hidden states.

    The logits exist for a few hundred tokens at a time, never for all, and neither do their gradients: both are folded
    into the gradients of the hidden states and of the student's head as soon as they are known. So the backward may
    run once only.

    Args:
        student_ND, teacher_ND: hidden states, [N, D]; the widths may differ.
        student_head_WD, teacher_head_WD: output embeddings, [W, D].
        labels: [N] next tokens, -100 where there is none; needed only for the cross-entropy.
        ce_weight: in [0, 1], share of the cross-entropy in the loss.
        divergence: forward, KL(teacher | student); reverse, KL(student | teacher); or jensen-shannon.
        temperature: that both models' logits are divided by before the divergence, whose gradient is multiplied by its
            square (Hinton et al., arXiv 1503.02531).
        mask: [N] bool, the tokens whose divergence counts; all, if absent. Their labels count everywhere.

    Returns:
        (loss, kl, ce): the loss (1 - ce_weight) temperature^2 kl + ce_weight ce, which carries gradients, and its
        parts, in nats per token, float32: kl over the tokens of the mask, ce over all N, where those without a label
        add nothing.

    Raises:
        ValueError: for a divergence that is unknown.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence={divergence!r} is unknown; choose one of {', '.join(DIVERGENCES)}")
    options = (labels, ce_weight, divergence, temperature, mask)
    loss, kl, ce = _LinearKL.apply(student_ND, student_head_WD, teacher_ND, teacher_head_WD, *options)
    return loss, kl.detach(), ce.detach()


def divergence_rows(log_p: Tensor, log_q: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Divergence of each row [N], and its gradient [N, W] with respect to the logits of q. Overwrites its arguments."""
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


def products(x_ND: Tensor, head_WD: Tensor, work: torch.dtype) -> Tensor:
    """Logits [N, W], in the precision in which matrix units sum them, where they can be asked for it."""
    if x_ND.is_cuda and x_ND.dtype != work == torch.float32:
        return torch.mm(x_ND, head_WD.t(), out_dtype=work)
    return (x_ND @ head_WD.t()).to(work)


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, student_head, teacher, teacher_head, labels, ce_weight, divergence, temperature, mask):
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        device, work = student.device.type, torch.promote_types(student.dtype, torch.float32)
        # under autocast the matrix products run in its precision, everything else in float32
        product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student.dtype
        h, head, t, t_head = (x.to(product) for x in (student, student_head, teacher, teacher_head))
        d_hidden = torch.empty_like(student) if needs_hidden else None
        d_head = torch.zeros_like(student_head, dtype=work) if needs_head else None
        kl, ce = (torch.zeros((), dtype=work, device=student.device) for _ in range(2))
        weights = None if mask is None else mask.to(work)
        if weights is not None:
            weights *= len(weights) / weights.sum().clamp(min=1)
        rows = max(1, CHUNK_BYTES.get(device, CHUNK_BYTES["cpu"]) // (4 * len(head)))
        with torch.autocast(device, enabled=False):
            for start in range(0, len(student), rows):
                part = slice(start, start + rows)
                known, weighed = (None if x is None else x[part] for x in (labels, weights))
                scales = (1 - ce_weight) * temperature, ce_weight
                logits = products(t[part], t_head, work), products(h[part], head, work)
                wanted = product if needs_hidden or needs_head else None
                kl_rows, ce_rows, d = gradients_of_rows(
                    *logits, known, weighed, divergence, temperature, scales, wanted
                )
                kl, ce = kl + kl_rows.sum(), ce + ce_rows.sum()
                if d is not None and d_hidden is not None:
                    d_hidden[part] = d @ head
                if d is not None and d_head is not None:
                    add_product(d_head, d.t(), h[part])
        kl, ce = kl / len(student), ce / len(student)
        for gradient in (d_hidden, d_head):
            if gradient is not None:
                gradient /= len(student)
        ctx.save_for_backward(d_hidden, None if d_head is None else d_head.to(student_head.dtype))
        return (1 - ce_weight) * temperature**2 * kl + ce_weight * ce, kl, ce

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        # in place: a copy of the head's would take as much memory as everything else here
        found = (None if d is None else d.mul_(gradients[0].to(d.dtype)) for d in ctx.saved_tensors)
        return *found, None, None, None, None, None, None, None


def gradients_of_rows(
    t_NW: Tensor,
    s_NW: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    kind: str,
    temperature: float,
    scales: tuple[float, float],
    wanted: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Divergence and cross-entropy of each token, [N], and the gradient [N, W] of their sum with respect to s.

    Args:
        weights: [N], of each token's divergence; 1, if absent.
        scales: of the two gradients, that of the divergence divided by temperature.
        wanted: dtype of the gradient; None for none. On a CPU it is computed all the same.
    """
    if t_NW.is_cuda and t_NW.dtype == torch.float32 and (kernels := loss_kernels()) is not None:
        d = None if wanted is None else torch.empty(t_NW.shape, dtype=wanted, device=t_NW.device)
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
        known, target = labels >= 0, labels.clamp(min=0).unsqueeze(1)
        ce = torch.where(known, -plain.gather(1, target).squeeze(1), 0.0)
        if scales[1]:
            scale = known.to(d.dtype).mul_(scales[1]).unsqueeze(1)
            d.addcmul_(plain.exp_(), scale).scatter_add_(1, target, -scale)
    return kl, ce, None if wanted is None else d.to(wanted)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; on a GPU without rounding the product to the precision of its factors."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


@functools.cache
def loss_kernels() -> ModuleType | None:
    """The loss in Triton, where that is installed."""
    try:
        return importlib.import_module("deltify.ops.triton.kl")
    except ImportError:
        return None

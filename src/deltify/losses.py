"""What a student is trained to do: agree with its teacher.

Legend: N tokens, D model width, W vocabulary.
"""

import torch
from torch import Tensor

# of one [chunk, W] float32 matrix of logits: on a CPU small enough for the cache, on a GPU enough to fill the chip
CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**28}


def mixer_loss(student_BTD: Tensor, teacher_BTD: Tensor) -> Tensor:
    """Mean squared difference of two mixer outputs over the variance of the teacher's: its mean alone would score 1."""
    teacher = teacher_BTD.float().flatten(0, -2)
    variance = teacher.var(dim=0, unbiased=False).sum().clamp(min=1e-12)
    return (student_BTD.float().flatten(0, -2) - teacher).square().sum(-1).mean() / variance


def linear_kl(
    student_ND: Tensor,
    student_head_WD: Tensor,
    teacher_ND: Tensor,
    teacher_head_WD: Tensor,
    *,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward KL(teacher | student), and cross-entropy, of the logits that two heads make of hidden states.

    The logits exist for a few hundred tokens at a time, never for all, and neither do their gradients: both are folded
    into the gradients of the hidden states and of the student's head as soon as they are known.

    Args:
        student_ND, teacher_ND: hidden states, [N, D]; the widths may differ.
        student_head_WD, teacher_head_WD: output embeddings, [W, D].
        labels: [N] next tokens, -100 where there is none; needed only for the cross-entropy.
        ce_weight: in [0, 1], share of the cross-entropy in the loss.

    Returns:
        (loss, kl, ce): the loss (1 - ce_weight) kl + ce_weight ce, which carries gradients, and its parts, in nats per
        token (of N, also where a token has no label), float32. ce is 0 without labels.
    """
    loss, kl, ce = _LinearKL.apply(student_ND, student_head_WD, teacher_ND, teacher_head_WD, labels, ce_weight)
    return loss, kl.detach(), ce.detach()


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, student_head, teacher, teacher_head, labels, ce_weight):
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        device, work = student.device.type, torch.promote_types(student.dtype, torch.float32)
        # under autocast the matrix products run in its precision, everything else in float32
        product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student.dtype
        h, head, t, t_head = (x.to(product) for x in (student, student_head, teacher, teacher_head))
        d_hidden = torch.empty_like(student) if needs_hidden else None
        d_head = torch.zeros_like(student_head, dtype=work) if needs_head else None
        kl, ce = (torch.zeros((), dtype=work, device=student.device) for _ in range(2))
        rows = max(1, CHUNK_BYTES.get(device, CHUNK_BYTES["cpu"]) // (4 * len(head)))
        for start in range(0, len(student), rows):
            part = slice(start, start + rows)
            log_p = (t[part] @ t_head.t()).to(work).log_softmax(-1)
            log_q = (h[part] @ head.t()).to(work).log_softmax(-1)
            p = log_p.exp()
            kl += log_p.sub_(log_q).mul_(p).sum()
            known = target = None
            if labels is not None:
                known, target = labels[part] >= 0, labels[part].clamp(min=0).unsqueeze(1)
                ce -= log_q.gather(1, target).squeeze(1)[known].sum()
            if not (needs_hidden or needs_head):
                continue
            q = log_q.exp_()
            d_logits = torch.sub(q, p, out=log_p).mul_((1 - ce_weight) / len(student))
            if known is not None and target is not None and ce_weight:
                scale = (known * (ce_weight / len(student))).to(work).unsqueeze(1)
                d_logits.addcmul_(q, scale).scatter_add_(1, target, -scale)
            d_logits = d_logits.to(product)
            if d_hidden is not None:
                d_hidden[part] = d_logits @ head
            if d_head is not None:
                d_head += d_logits.t() @ h[part]
        kl, ce = kl / len(student), ce / len(student)
        ctx.save_for_backward(d_hidden, None if d_head is None else d_head.to(student_head.dtype))
        return (1 - ce_weight) * kl + ce_weight * ce, kl, ce

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        d_hidden, d_head = ctx.saved_tensors
        scale = gradients[0]
        return (
            None if d_hidden is None else d_hidden * scale.to(d_hidden.dtype),
            None if d_head is None else d_head * scale.to(d_head.dtype),
            None,
            None,
            None,
            None,
        )

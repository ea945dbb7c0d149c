"""Divergence and cross-entropy of two models' logits, with gradients, in two or three passes over the logits.

Legend: N tokens, W vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import LOG2E

LN2 = tl.constexpr(0.6931471805599453)
FORWARD, REVERSE, JENSEN_SHANNON = (tl.constexpr(n) for n in range(3))
KINDS = {"forward": FORWARD, "reverse": REVERSE, "jensen-shannon": JENSEN_SHANNON}
BLOCK = 4096


@triton.jit
def log2_mean(p, q):
    return tl.log2(tl.maximum(0.5 * (p + q), 1e-37))  # a smaller number would be a float64


@triton.jit
def divergence_kernel(
    t_ptr, s_ptr, label_ptr, weights_ptr, kl_ptr, ce_ptr, d_ptr, words, per_degree, kl_scale, ce_scale,
    KIND: tl.constexpr, BLOCK: tl.constexpr, LABELS: tl.constexpr, WEIGHTS: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Compute divergence, cross-entropy and gradient of one token.

    Exponents are base 2, and `per_degree` is 1 / temperature.
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    t_ptr, s_ptr, d_ptr = t_ptr + row * words, s_ptr + row * words, d_ptr + row * words
    weight = tl.load(weights_ptr + row).to(tl.float32) if WEIGHTS else 1.0
    slope = per_degree * LOG2E
    # each lane keeps its largest logit so far, and the sum of exponentials relative to it
    t_top, s_top = tl.full([BLOCK], -1e30, tl.float32), tl.full([BLOCK], -1e30, tl.float32)
    t_sum, s_sum, plain = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, words, BLOCK):
        there = start + lanes < words
        t = tl.load(t_ptr + start + lanes, mask=there, other=-1e30).to(tl.float32) * slope
        s = tl.load(s_ptr + start + lanes, mask=there, other=-1e30).to(tl.float32) * slope
        top = tl.maximum(t_top, t)
        t_sum = t_sum * tl.exp2(t_top - top) + tl.exp2(t - top)
        t_top = top
        top = tl.maximum(s_top, s)
        if LABELS:  # without temperature, for the cross-entropy
            plain = plain * tl.exp2((s_top - top) / per_degree) + tl.exp2((s - top) / per_degree)
        s_sum = s_sum * tl.exp2(s_top - top) + tl.exp2(s - top)
        s_top = top
    top = tl.max(t_top, 0)
    t_norm = top + tl.log2(tl.sum(t_sum * tl.exp2(t_top - top), 0))
    top = tl.max(s_top, 0)
    s_norm = top + tl.log2(tl.sum(s_sum * tl.exp2(s_top - top), 0))
    known, label, plain_norm = False, 0, 0.0
    if LABELS:
        plain_norm = top / per_degree + tl.log2(tl.sum(plain * tl.exp2((s_top - top) / per_degree), 0))
        label = tl.load(label_ptr + row)
        known = label >= 0
        said = tl.load(s_ptr + tl.maximum(label, 0)).to(tl.float32) * LOG2E
        tl.store(ce_ptr + row, tl.where(known, (plain_norm - said) * LN2, 0.0))

    total, own = 0.0, 0.0
    if KIND != FORWARD:
        sums, own_sums = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for start in tl.range(0, words, BLOCK):
            there = start + lanes < words
            log_p = tl.load(t_ptr + start + lanes, mask=there, other=-1e30).to(tl.float32) * slope - t_norm
            log_q = tl.load(s_ptr + start + lanes, mask=there, other=-1e30).to(tl.float32) * slope - s_norm
            p, q = tl.exp2(log_p), tl.exp2(log_q)
            if KIND == REVERSE:
                own_sums += tl.where(there, q * (log_q - log_p), 0.0)
            else:
                middle = log2_mean(p, q)
                own_sums += tl.where(there, 0.5 * q * (log_q - middle), 0.0)
                sums += tl.where(there, 0.5 * p * (log_p - middle), 0.0)
        own = tl.sum(own_sums, 0)
        total = own + tl.sum(sums, 0)
    if KIND == FORWARD or GRADIENT:
        sums = tl.zeros([BLOCK], tl.float32)
        for start in tl.range(0, words, BLOCK):
            there = start + lanes < words
            s = tl.load(s_ptr + start + lanes, mask=there, other=-1e30).to(tl.float32)
            log_p = tl.load(t_ptr + start + lanes, mask=there, other=-1e30).to(tl.float32) * slope - t_norm
            log_q = s * slope - s_norm
            p, q = tl.exp2(log_p), tl.exp2(log_q)
            if KIND == FORWARD:
                sums += tl.where(there, p * (log_p - log_q), 0.0)
                d = q - p
            elif KIND == REVERSE:
                d = q * (log_q - log_p - own) * LN2
            else:
                d = q * (0.5 * (log_q - log2_mean(p, q)) - own) * LN2
            if GRADIENT:
                d *= kl_scale * weight
                if LABELS:
                    at_label = (start + lanes == label).to(tl.float32)
                    ce = tl.exp2(s * LOG2E - plain_norm) - at_label
                    d += tl.where(known, ce_scale, 0.0) * ce
                tl.store(d_ptr + start + lanes, d.to(d_ptr.dtype.element_ty), mask=there)
        if KIND == FORWARD:
            total = tl.sum(sums, 0)
    tl.store(kl_ptr + row, total * LN2 * weight)


def divergence_rows(
    t_NW: Tensor, s_NW: Tensor, labels: Tensor | None, weights: Tensor | None, d_NW: Tensor | None,
    kind: str, temperature: float, kl_scale: float, ce_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return divergence and cross-entropy of each token, [N] float32.

    The gradient of kl_scale * divergence + ce_scale * cross-entropy with respect to s, times temperature, is written to
    `d_NW`. All logits are contiguous.

    Args:
        t_NW: Logits of the teacher.
        s_NW: Logits of the student.
        labels: Next tokens [N], negative where there is none. None for no cross-entropy.
        weights: Weight of each token's divergence, [N]. Defaults to 1.
        d_NW: Output for the gradient. None for no gradient.
        kind: One of `KINDS`.
        temperature: Softmax temperature of both models in the divergence.
        kl_scale: Factor of the divergence in the gradient.
        ce_scale: Factor of the cross-entropy in the gradient.
    """
    N, W = t_NW.shape
    kl, ce = (torch.zeros(N, dtype=torch.float32, device=t_NW.device) for _ in range(2))
    divergence_kernel[(N,)](
        t_NW, s_NW, labels, weights, kl, ce, s_NW if d_NW is None else d_NW, W, 1 / temperature, kl_scale,
        ce_scale, KIND=KINDS[kind], BLOCK=min(BLOCK, triton.next_power_of_2(W)),
        LABELS=labels is not None, WEIGHTS=weights is not None, GRADIENT=d_NW is not None, num_warps=8,
    )  # fmt: skip
    return kl, ce

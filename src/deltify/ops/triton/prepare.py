"""Compute everything of a chunk that does not need the state. One program handles one head of a chunk of 64 tokens.

That is: L2 norms, log-decay, cumulative decay G, the two matrices of the chunk and the triangular inverse. The results
are written in the order in which the scan reads them.

No factor exceeds the range of its type, for any log-decay. A span of 2h tokens is anchored at its middle. Where its
decay is too strong for one anchor, the anchor serves only the pairs across the middle, whose factors are at most 1, and
each half gets an anchor of its own. docs/explanation/kernels.md explains this.

Legend: B batch, T tokens, H heads, K key width, V value width, C tokens of a chunk, N documents (sequences, or packed).
"""

import triton
import triton.language as tl

from .tiles import (
    AFTER,
    CHUNK,
    EPS,
    EYE,
    FROM_MIDDLE,
    LEVELS,
    PAIRS,
    SAFE_EXPONENT,
    SAFE_EXPONENT_FP16,
    THROUGH,
    gate_tile,
    locate,
    span_factors,
    table,
)


@triton.jit
def unit_lower_inverse(L, C: tl.constexpr, D: tl.constexpr):
    """Return (I + L)^-1 of a strictly lower triangular L, by inverting diagonal blocks of 1, 2, 4 ... rows.

    Let T be the inverse of the diagonal blocks of h rows, and N the blocks below them in diagonal blocks of 2h rows.
    The inverse for 2h rows is then T - T N T, exactly, since (T N)^2 = 0. All entries stay within [-1, 1], unlike those
    of powers of L: T[i, j] is the part of k_j along k_i that remains after tokens j to i. So float16 (D) is precise
    enough for a result in bfloat16.
    """
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    T = tl.where(i == j, 1.0, 0.0) - tl.where((i ^ j) == 1, L, 0.0)
    L = L.to(D)
    half = 2
    while half < C:
        N = tl.where(((i ^ j) >= half) & ((i ^ j) < 2 * half), L, 0.0)
        T_D = T.to(D)
        TN = tl.dot(T_D, N, input_precision="ieee")
        T = tl.dot((-TN).to(D), T_D, T, input_precision="ieee")
        half *= 2
    return T


@triton.jit
def prepare_kernel(
    gate_tables, tables, q_ptr, k_ptr, f_ptr, b_ptr, A_log_ptr, dt_bias_ptr, bounds, wide, square, end_ptr,
    documents, tokens, heads, slots, lower_bound, scale,
    K: tl.constexpr, BK: tl.constexpr, BOUNDED: tl.constexpr, PACKED: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """Write k e^G, q e^G and k e^{G_C - G} as [3, slots, C, K], and A and P as [2, slots, C, C].

    A slot is a head of a chunk. q and P include the output's scale. Channels are processed in slices of BK, because all
    of them do not fit into registers.
    """
    C: tl.constexpr = CHUNK
    W: tl.constexpr = q_ptr.dtype.element_ty
    D: tl.constexpr = tl.float32 if W == tl.float32 else tl.float16
    SAFE: tl.constexpr = SAFE_EXPONENT_FP16 if W == tl.float16 else SAFE_EXPONENT
    chunk, head = tl.program_id(0), tl.program_id(1)
    document, place, begin, end = locate(chunk, bounds, documents, tokens, C, 0, PACKED, N2)
    if document < 0:
        return
    slot = chunk * heads + head
    rows = tl.arange(0, C)
    i, j = rows[:, None], rows[None, :]
    first = begin + place * C
    have = (first + rows < end)[:, None]
    # a scalar of 64 bits and offsets of 32 bits: the offsets stay in registers during the loops, and those are scarce
    here = first.to(tl.int64) * heads + head
    q_ptr, k_ptr, f_ptr, b_ptr = q_ptr + here * K, k_ptr + here * K, f_ptr + here * K, b_ptr + here
    at = rows[:, None] * (heads * K) + tl.arange(0, BK)[None, :]
    rate = tl.exp(tl.load(A_log_ptr + head).to(tl.float32))
    eye = table(tables, EYE, C)
    qq, kk, qk = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for n in tl.range(K // BK, num_stages=1):
        q = tl.dot(eye, tl.load(q_ptr + at + n * BK, mask=have, other=0.0), input_precision="ieee")
        k = tl.dot(eye, tl.load(k_ptr + at + n * BK, mask=have, other=0.0), input_precision="ieee")
        qq += tl.sum(q * q, 1)
        kk += tl.sum(k * k, 1)
        qk += tl.sum(q * k, 1)
    q_norm, k_norm = scale * tl.rsqrt(qq + EPS), tl.rsqrt(kk + EPS)
    diagonal = q_norm * k_norm * qk

    P, M = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for n in tl.range(K // BK, num_stages=1):
        channels = n * BK + tl.arange(0, BK)
        raw_f = tl.load(f_ptr + at + n * BK, mask=have, other=0.0)
        raw_k = tl.load(k_ptr + at + n * BK, mask=have, other=0.0)
        raw_q = tl.load(q_ptr + at + n * BK, mask=have, other=0.0)
        bias = tl.load(dt_bias_ptr + head * K + channels).to(tl.float32)[None, :]
        g = gate_tile(tl.dot(eye, raw_f, input_precision="ieee"), bias, rate, have, lower_bound, BOUNDED, D)
        G = tl.dot(table(gate_tables, THROUGH, C), g, input_precision="ieee")
        weak = tl.max(-G) < SAFE
        decay = tl.exp2(G)
        tl.store(end_ptr + slot.to(tl.int64) * K + (channels[None, :] + 0 * i), decay, mask=(rows == C - 1)[:, None])
        k = tl.dot(eye, raw_k, input_precision="ieee") * k_norm[:, None]
        decayed_k = (k * decay).to(W)
        wide.store([slot * C, n * BK], decayed_k)
        grown_k = tl.trans((k * tl.exp2(-G)).to(W))
        after = tl.exp2(tl.dot(table(gate_tables, AFTER, C), g, input_precision="ieee"))
        wide.store([(2 * slots + slot) * C, n * BK], (k * after).to(W))
        q = tl.dot(eye, raw_q, input_precision="ieee") * q_norm[:, None]
        decayed_q = (q * decay).to(W)
        wide.store([(slots + slot) * C, n * BK], decayed_q)
        if weak:  # the chunk's start can anchor all pairs, and the scan needs the factors from there anyway
            M = tl.dot(decayed_k, grown_k, M, input_precision="ieee")
            P = tl.dot(decayed_q, grown_k, P, input_precision="ieee")
        else:
            level = 0
            while level < LEVELS:
                X = tl.dot(table(gate_tables, FROM_MIDDLE + level, C), g, input_precision="ieee")
                once = tl.max(tl.abs(X)) < SAFE
                row_factor, col_factor = span_factors(X, once)
                pairs = table(gate_tables, PAIRS + level + tl.where(once, LEVELS, 0), C) > 0.5
                again = table(tables, EYE + tl.minimum(level, 0), C)
                k = tl.dot(again, raw_k, input_precision="ieee") * k_norm[:, None]
                cols = tl.trans((k * col_factor).to(W))
                M += tl.where(pairs, tl.dot((k * row_factor).to(W), cols, input_precision="ieee"), 0.0)
                q = tl.dot(again, raw_q, input_precision="ieee") * q_norm[:, None]
                P += tl.where(pairs, tl.dot((q * row_factor).to(W), cols, input_precision="ieee"), 0.0)
                level = tl.where(once, LEVELS, level + 1)
    # the diagonal is computed without the factors, whose product is only nearly 1
    P = tl.where(j < i, P, tl.where(i == j, diagonal[:, None], 0.0))
    square.store([(slots + slot) * C, 0], P.to(W))
    beta = tl.sigmoid(tl.load(b_ptr + rows * heads, mask=first + rows < end, other=0.0).to(tl.float32))
    A = unit_lower_inverse(tl.where(j < i, M, 0.0) * beta[:, None], C, D) * beta[None, :]
    square.store([slot * C, 0], A.to(W))

"""Everything of a chunk that does not need the state: one program per chunk of 64 tokens and head.

L2 norms, gate, cumulative decay G, the two matrices of the chunk and the triangular inverse. It writes what the scan
reads, in the order in which it reads it.

No factor leaves the range of its type, for any gate: a span of 2h tokens is anchored at its middle, and where its decay
is too strong for one anchor, only the pairs across the middle are taken (both factors are then at most 1) and the
halves are anchored again. docs/explanation/kernels.md explains it.

Legend: B batch, T tokens, H heads, K key width, V value width, C tokens of a chunk, N documents (rows, or packed).
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
    """(I + L)^-1 of a strictly lower triangular L, by inverting diagonal blocks of 1, 2, 4 ... rows.

    With T the inverse of the diagonal blocks of h rows and N what is below them in blocks of 2h, that of 2h rows is
    T - T N T: exact, since (T N)^2 = 0. All entries stay within [-1, 1], as those of no power of L would: T[i, j] is
    what is left of k_j after tokens j to i, along k_i. So float16 (D) loses nothing that a result in bfloat16 shows.
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
    """Writes k e^G, q e^G and k e^{G_C - G} as [3, slots, C, K], A and P as [2, slots, C, C]; a slot: chunk and head.

    q, and with it P, carries the output's scale. Works through the channels in slices of BK, so that registers suffice.
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
    # from a scalar in 64 bits, offsets of 32: they are kept over the loops, and registers are what is short
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
        if weak:  # one anchor, the chunk's start, serves all pairs, and with it the factors that the scan needs anyway
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
    # i = j does not pass through the factors, whose product is 1 only nearly
    P = tl.where(j < i, P, tl.where(i == j, diagonal[:, None], 0.0))
    square.store([(slots + slot) * C, 0], P.to(W))
    beta = tl.sigmoid(tl.load(b_ptr + rows * heads, mask=first + rows < end, other=0.0).to(tl.float32))
    A = unit_lower_inverse(tl.where(j < i, M, 0.0) * beta[:, None], C, D) * beta[None, :]
    square.store([slot * C, 0], A.to(W))

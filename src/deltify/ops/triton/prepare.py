"""Everything of a chunk that does not need the state: one program per chunk of 64 tokens and head.

L2 norms, gate, cumulative decay G, the two matrices of the chunk and the triangular inverse. It writes what the scan
reads, in the order in which it reads it.

No factor leaves the range of its type, for any gate: a span of 2h tokens is anchored at its middle, and where its decay
is too strong for one anchor, only the pairs across the middle are taken (both factors are then at most 1) and the
halves are anchored again. docs/kernels.md tells the story.

Legend: B batch, T tokens, H heads, K key width, V value width, C tokens of a chunk, N documents (rows, or packed).
"""

import triton
import triton.language as tl

from .tiles import (
    CHUNK,
    EPS,
    FROM_MIDDLE,
    LEVELS,
    PAIRS,
    SAFE_EXPONENT,
    SAFE_EXPONENT_FP16,
    THROUGH,
    locate,
    log2_decay,
    span_factors,
    sums,
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
    tables, q_ptr, k_ptr, f_ptr, b_ptr, A_log_ptr, dt_bias_ptr, bounds, wide_ptr, square_ptr, end_ptr, strong_ptr,
    documents, tokens, heads, slots, lower_bound, scale,
    K: tl.constexpr, BK: tl.constexpr, BOUNDED: tl.constexpr, STRONG: tl.constexpr, PACKED: tl.constexpr,
    N2: tl.constexpr,
):  # fmt: skip
    """Writes -W, q e^G and k e^{G_C - G} as [3, slots, C, K], A and P as [2, slots, C, C]; a slot is a chunk and head.

    q, and with it P, carries the output's scale. Comes in two: the lean one leaves chunks of strong gates, which it
    marks, to the other. Works through the channels in slices of BK, so that registers suffice.
    """
    C: tl.constexpr = CHUNK
    W: tl.constexpr = wide_ptr.dtype.element_ty
    INVERSE: tl.constexpr = tl.float32 if W == tl.float32 else tl.float16
    SAFE: tl.constexpr = SAFE_EXPONENT_FP16 if W == tl.float16 else SAFE_EXPONENT
    chunk, head = tl.program_id(0), tl.program_id(1)
    document, place, begin, end = locate(chunk, bounds, documents, tokens, C, 0, PACKED, N2)
    if document < 0:
        return
    slot = chunk.to(tl.int64) * heads + head
    if STRONG:
        if tl.load(strong_ptr + slot) == 0:
            return
    rows, keys = tl.arange(0, C), tl.arange(0, K)
    token = begin + place * C + rows
    have = (token < end)[:, None]
    row_head = (token.to(tl.int64) * heads + head)[:, None]
    rate = tl.exp(tl.load(A_log_ptr + head).to(tl.float32))
    q = tl.load(q_ptr + row_head * K + keys[None, :], mask=have, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + row_head * K + keys[None, :], mask=have, other=0.0).to(tl.float32)
    q_norm = scale * tl.rsqrt(tl.sum(q * q, 1) + EPS)
    k_norm = tl.rsqrt(tl.sum(k * k, 1) + EPS)
    diagonal = q_norm * k_norm * tl.sum(q * k, 1)
    P, M = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    out = wide_ptr + slot * C * K + rows[:, None] * K
    wide_step, square_step = slots.to(tl.int64) * C * K, slots.to(tl.int64) * C * C
    if not STRONG:
        strong = 0
    for n in tl.static_range(K // BK):
        channels = n * BK + tl.arange(0, BK)
        at = row_head * K + channels[None, :]
        f = tl.load(f_ptr + at, mask=have, other=0.0).to(tl.float32)
        bias = tl.load(dt_bias_ptr + head * K + channels).to(tl.float32)
        # 2^-200 is zero in float32, and so is every product with it
        g = tl.maximum(log2_decay(f, bias[None, :], rate, lower_bound, BOUNDED), -200.0)
        g = tl.where(have, g, 0.0)
        whole = tl.sum(g, 0)
        G = sums(table(tables, THROUGH, C), g)
        k = tl.load(k_ptr + at, mask=have, other=0.0).to(tl.float32) * k_norm[:, None]
        decay = tl.exp2(G)
        decayed_k = (k * decay).to(W)
        tl.store(out + channels[None, :], decayed_k)
        if STRONG:
            tl.store(out + 2 * wide_step + channels[None, :], (k * tl.exp2(whole[None, :] - G)).to(W))
            q = tl.load(q_ptr + at, mask=have, other=0.0).to(tl.float32) * q_norm[:, None]
            tl.store(out + wide_step + channels[None, :], (q * decay).to(W))
            # half <= i ^ j < 2 half says that i is in the right half and j in the left half of the same span
            level = 0
            while level < LEVELS:
                X = sums(table(tables, FROM_MIDDLE + level, C), g)
                once = tl.max(tl.abs(X)) < SAFE
                row_factor, col_factor = span_factors(X, once)
                pairs = table(tables, PAIRS + level + tl.where(once, LEVELS, 0), C) > 0.5
                cols = tl.trans((k * col_factor).to(W))
                P += tl.where(pairs, tl.dot((q * row_factor).to(W), cols, input_precision="ieee"), 0.0)
                M += tl.where(pairs, tl.dot((k * row_factor).to(W), cols, input_precision="ieee"), 0.0)
                level = tl.where(once, LEVELS, level + 1)
        else:
            strong |= (tl.min(whole) <= -SAFE).to(tl.int32)
            # one anchor, the chunk's start, serves all pairs, and with it the factors that the scan needs anyway
            grown = k * tl.exp2(-G)
            tl.store(out + 2 * wide_step + channels[None, :], (grown * tl.exp2(whole)[None, :]).to(W))
            grown = tl.trans(grown.to(W))
            M = tl.dot(decayed_k, grown, M, input_precision="ieee")
            q = tl.load(q_ptr + at, mask=have, other=0.0).to(tl.float32) * q_norm[:, None]
            decayed_q = (q * decay).to(W)
            tl.store(out + wide_step + channels[None, :], decayed_q)
            P = tl.dot(decayed_q, grown, P, input_precision="ieee")
        tl.store(end_ptr + slot * K + channels, tl.exp2(whole))
    if not STRONG:
        tl.store(strong_ptr + slot, strong.to(tl.int8))
        if strong > 0:
            return
    i, j = rows[:, None], rows[None, :]
    square = square_ptr + slot * C * C + i * C + j
    # i = j does not pass through the factors, whose product is 1 only nearly
    tl.store(square + square_step, tl.where(j < i, P, tl.where(i == j, diagonal[:, None], 0.0)).to(W))
    beta = tl.sigmoid(tl.load(b_ptr + token.to(tl.int64) * heads + head, mask=token < end, other=0.0).to(tl.float32))
    A = unit_lower_inverse(tl.where(j < i, M, 0.0) * beta[:, None], C, INVERSE)
    A = (A * beta[None, :]).to(W)
    tl.store(square, A)
    tl.debug_barrier()  # other threads wrote what is read here
    for n in tl.static_range(K // BK):
        at = out + n * BK + tl.arange(0, BK)[None, :]
        tl.store(at, (-tl.dot(A, tl.load(at), input_precision="ieee")).to(W))

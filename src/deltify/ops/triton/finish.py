"""The parallel part of the backward: from the states and their gradients to those of the inputs, a chunk at a time.

With S the state before the chunk, dS' the gradient of that after it, dP = do u^T and dM = -dv u^T (see scan.py):

    dq = (do S^T) e^G + (dP decayed) k           dk = -(dv S^T) e^G + (dM decayed) k               as rows
                                                 dk = (u dS'^T) e^{G_C - G} + (dP decayed)^T q + (dM decayed)^T k

The gradient of a gate is the sum of q dq + k dk over all rows whose pairs reach across it, and of k dk over columns.
It is summed so, span by span: the usual sums of row minus column terms lose what cancels, and with strong gates all.
Two sums over channels need no channels: q . dq = do . o, since o is linear in q, and k . dk = 2 dv . u / beta - dv . v.

Legend: B batch, T tokens, H heads, K key width, V value width, C tokens of a chunk, N documents (rows, or packed).
"""

import triton
import triton.language as tl

from .tiles import (
    ACROSS,
    BEFORE,
    CHUNK,
    EPS,
    FROM,
    FROM_MIDDLE,
    LEVELS,
    LOG2E,
    PAIRS,
    THROUGH,
    locate,
    log2_decay,
    span_factors,
    sums,
    table,
)

# log2 of the largest factor of a span whose pairs are all taken at once, its gates' gradients being differences then
SAFE_GRADIENT = tl.constexpr(24.0)
# of each token: q . dq, k . dk, do . u, and the factors that normalise q and k
Q_DQ, K_DK, DIAGONAL, Q_NORM, K_NORM, ROWS = (tl.constexpr(n) for n in range(6))


@triton.jit
def pairs_kernel(
    q_ptr, k_ptr, v_ptr, b_ptr, bounds, u_ptr, o_ptr, do_ptr, dv_ptr, db_ptr, pairs_ptr, rows_ptr,
    documents, tokens, heads, slots, scale,
    K: tl.constexpr, V: tl.constexpr, PACKED: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """What needs all channels: dP and dM, [2, slots, C, C], numbers of each token, [slots, ROWS, C], gradients of b."""
    C: tl.constexpr = CHUNK
    W: tl.constexpr = pairs_ptr.dtype.element_ty
    chunk, head = tl.program_id(0), tl.program_id(1)
    document, place, begin, end = locate(chunk, bounds, documents, tokens, C, 0, PACKED, N2)
    if document < 0:
        return
    slot = chunk.to(tl.int64) * heads + head
    rows, keys, values = tl.arange(0, C), tl.arange(0, K), tl.arange(0, V)
    token = begin + place * C + rows
    there = token < end
    row_head = token.to(tl.int64) * heads + head
    at, have = row_head[:, None] * V + values[None, :], there[:, None]
    u = tl.load(u_ptr + at, mask=have, other=0.0)
    do = tl.load(do_ptr + at, mask=have, other=0.0)
    dv = tl.load(dv_ptr + at, mask=have, other=0.0)
    square = pairs_ptr + slot * C * C + rows[:, None] * C + rows[None, :]
    tl.store(square, (tl.dot(do, tl.trans(u), input_precision="ieee") * scale).to(W))
    square += slots.to(tl.int64) * C * C
    tl.store(square, (-tl.dot(dv, tl.trans(u), input_precision="ieee")).to(W))
    u, do, dv = u.to(tl.float32), do.to(tl.float32), dv.to(tl.float32)
    out = rows_ptr + slot * ROWS * C + rows
    tl.store(out + DIAGONAL * C, scale * tl.sum(do * u, 1))
    o = tl.load(o_ptr + at, mask=have, other=0.0).to(tl.float32)
    tl.store(out + Q_DQ * C, tl.sum(do * o, 1))
    v = tl.load(v_ptr + at, mask=have, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + row_head, mask=there, other=0.0).to(tl.float32)
    dv_u = tl.sum(dv * u, 1)
    tl.store(out + K_DK * C, 2.0 * dv_u / tl.sigmoid(b) - tl.sum(dv * v, 1))
    # dbeta = dv . u / beta^2, and sigmoid's slope is beta (1 - beta)
    tl.store(db_ptr + row_head, (dv_u * tl.exp(tl.minimum(-b, 80.0))).to(db_ptr.dtype.element_ty), mask=there)
    at = row_head[:, None] * K + keys[None, :]
    q = tl.load(q_ptr + at, mask=have, other=0.0).to(tl.float32)
    tl.store(out + Q_NORM * C, tl.rsqrt(tl.sum(q * q, 1) + EPS))
    k = tl.load(k_ptr + at, mask=have, other=0.0).to(tl.float32)
    tl.store(out + K_NORM * C, tl.rsqrt(tl.sum(k * k, 1) + EPS))


@triton.jit
def finish_kernel(
    tables, q_ptr, k_ptr, f_ptr, A_log_ptr, dt_bias_ptr, bounds, u_ptr, do_ptr, dv_ptr, states_ptr, dstates_ptr,
    pairs_ptr, rows_ptr, dq_ptr, dk_ptr, df_ptr, dA_log_ptr, ddt_bias_ptr,
    documents, tokens, heads, slots, lower_bound, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BOUNDED: tl.constexpr, PACKED: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """Gradients of BK channels of q, k and f, and the chunk's share of those of A_log and dt_bias, [slots, K] each."""
    C: tl.constexpr = CHUNK
    W: tl.constexpr = q_ptr.dtype.element_ty
    chunk, head = tl.program_id(0), tl.program_id(1) // (K // BK)
    channels = tl.program_id(1) % (K // BK) * BK + tl.arange(0, BK)
    slot = chunk.to(tl.int64) * heads + head
    document, place, begin, end = locate(chunk, bounds, documents, tokens, C, 0, PACKED, N2)
    if document < 0:  # its shares are summed with the others
        tl.store(dA_log_ptr + slot * K + channels, tl.zeros([BK], tl.float32))
        tl.store(ddt_bias_ptr + slot * K + channels, tl.zeros([BK], tl.float32))
        return
    rows, values = tl.arange(0, C), tl.arange(0, V)
    token = begin + place * C + rows
    have = (token < end)[:, None]
    row_head = (token.to(tl.int64) * heads + head)[:, None]
    at, at_values = row_head * K + channels[None, :], row_head * V + values[None, :]
    of_rows = rows_ptr + slot * ROWS * C + rows
    rate = tl.exp(tl.load(A_log_ptr + head).to(tl.float32))
    bias = tl.load(dt_bias_ptr + head * K + channels).to(tl.float32)[None, :]
    x = tl.load(f_ptr + at, mask=have, other=0.0).to(tl.float32)
    g = tl.where(have, tl.maximum(log2_decay(x, bias, rate, lower_bound, BOUNDED), -200.0), 0.0)
    G = sums(table(tables, THROUGH, C), g)
    whole = tl.sum(g, 0)
    k = tl.load(k_ptr + at, mask=have, other=0.0).to(tl.float32) * tl.load(of_rows + K_NORM * C)[:, None]
    q = tl.load(q_ptr + at, mask=have, other=0.0).to(tl.float32) * tl.load(of_rows + Q_NORM * C)[:, None]
    state_at = slot * K * V + values[:, None] * K + channels[None, :]
    S, dS = tl.load(states_ptr + state_at), tl.load(dstates_ptr + state_at)
    dwhole = tl.exp2(whole) * tl.sum(S.to(tl.float32) * dS.to(tl.float32), 0)
    dk_cols = tl.dot(tl.load(u_ptr + at_values, mask=have, other=0.0), dS, input_precision="ieee")
    dk_cols *= tl.exp2(whole[None, :] - G)
    dg = sums(table(tables, BEFORE, C), k * dk_cols) + dwhole[None, :]
    decay = tl.exp2(G)
    dk_rows = -tl.dot(tl.load(dv_ptr + at_values, mask=have, other=0.0), S, input_precision="ieee") * decay
    dq = tl.dot(tl.load(do_ptr + at_values, mask=have, other=0.0), S, input_precision="ieee") * (decay * scale)
    dg += sums(table(tables, FROM, C), q * dq + k * dk_rows)
    dk = dk_rows + dk_cols

    dP_at = pairs_ptr + slot * C * C + rows[:, None] * C + rows[None, :]
    dM_at = dP_at + slots.to(tl.int64) * C * C
    level = 0
    while level < LEVELS:
        X = sums(table(tables, FROM_MIDDLE + level, C), g)
        once = tl.max(tl.abs(X)) < SAFE_GRADIENT
        row_factor, col_factor = span_factors(X, once)
        kind = level + tl.where(once, LEVELS, 0)
        pairs = table(tables, PAIRS + kind, C)
        cols = (k * col_factor).to(W)
        new = tl.dot(tl.load(dP_at) * pairs, cols, input_precision="ieee") * row_factor
        dq += new
        across = q * new
        new = tl.dot(tl.load(dM_at) * pairs, cols, input_precision="ieee") * row_factor
        dk += new
        across += k * new
        new = tl.dot(tl.trans(tl.load(dM_at) * pairs), (k * row_factor).to(W), input_precision="ieee")
        new = tl.dot(tl.trans(tl.load(dP_at) * pairs), (q * row_factor).to(W), new, input_precision="ieee")
        new *= col_factor
        dk += new
        across += tl.where(once, -k, k) * new
        dg += sums(table(tables, ACROSS + kind, C), across)
        level = tl.where(once, LEVELS, level + 1)

    diagonal = tl.load(of_rows + DIAGONAL * C)[:, None]
    dk += diagonal * q - k * tl.load(of_rows + K_DK * C)[:, None]
    dq += diagonal * k - q * tl.load(of_rows + Q_DQ * C)[:, None]
    tl.store(dk_ptr + at, dk * tl.load(of_rows + K_NORM * C)[:, None], mask=have)
    tl.store(dq_ptr + at, dq * tl.load(of_rows + Q_NORM * C)[:, None], mask=have)
    dg = tl.where(have, dg, 0.0)
    x = tl.load(f_ptr + at, mask=have, other=0.0).to(tl.float32) + bias
    if BOUNDED:
        df = dg * (lower_bound * rate) * tl.sigmoid(rate * x) / (1.0 + tl.exp2(x * (rate * LOG2E)))
        dA_log = tl.sum(df * x, 0)
    else:
        df = -rate * dg * tl.sigmoid(x)
        dA_log = tl.sum(dg * g, 0) / LOG2E
    tl.store(df_ptr + at, df, mask=have)
    tl.store(dA_log_ptr + slot * K + channels, dA_log)
    tl.store(ddt_bias_ptr + slot * K + channels, tl.sum(df, 0))

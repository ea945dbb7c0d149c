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
    AFTER,
    BEFORE,
    CHUNK,
    EPS,
    EYE,
    FROM,
    FROM_MIDDLE,
    LEVELS,
    LOG2E,
    PAIRS,
    PAIRS_T,
    THROUGH,
    gate_tile,
    locate,
    log2_decay,
    span_factors,
    sums,
    table,
)

# log2 of the largest factor of a span whose pairs are all taken at once. Its gates' gradients are then differences of
# rows and columns, which lose nothing: both sides are multiplied by the same rounded factors.
SAFE_GRADIENT = tl.constexpr(100.0)
# of each token: q . dq, k . dk, do . u, and the factors that normalise q and k
Q_DQ, K_DK, DIAGONAL, Q_NORM, K_NORM, ROWS = (tl.constexpr(n) for n in range(6))


@triton.jit
def pairs_kernel(
    q_ptr, k_ptr, v_ptr, b_ptr, bounds, u_ptr, o_ptr, do_ptr, dv_ptr, db_ptr, pairs_ptr, rows_ptr,
    documents, tokens, heads, slots, scale,
    K: tl.constexpr, V: tl.constexpr, PACKED: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """What needs all channels: dP, dM and their transposes, [4, slots, C, C], numbers of each token, [slots, ROWS, C],
    and the gradients of b."""
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
    step = slots.to(tl.int64) * C * C
    tl.store(square, (tl.dot(do, tl.trans(u), input_precision="ieee") * scale).to(W))
    tl.store(square + step, (-tl.dot(dv, tl.trans(u), input_precision="ieee")).to(W))
    tl.store(square + 2 * step, (tl.dot(u, tl.trans(do), input_precision="ieee") * scale).to(W))
    tl.store(square + 3 * step, (-tl.dot(u, tl.trans(dv), input_precision="ieee")).to(W))
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
def unit_rows(tables, zero, raw, norm):
    """q or k of a chunk, normalised, float32, out of its loaded tile. With a `zero` that the compiler cannot see
    through this is done anew at each use: to keep it would cost 32 registers of each thread."""
    return tl.dot(table(tables, EYE + zero, CHUNK), raw, input_precision="ieee") * tl.load(norm)[:, None]


@triton.jit
def finish_kernel(
    gate_tables, tables, q_ptr, k_ptr, f_ptr, A_log_ptr, dt_bias_ptr, bounds, u_ptr, do_ptr, dv_ptr, states_ptr,
    dstates_ptr, pairs_ptr, rows_ptr, partial_ptr, dq_ptr, dk_ptr, df_ptr, dA_log_ptr, ddt_bias_ptr,
    documents, tokens, heads, slots, lower_bound, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BOUNDED: tl.constexpr, PACKED: tl.constexpr, N2: tl.constexpr,
    QUERIES: tl.constexpr,
):  # fmt: skip
    """Gradients of BK channels of q, and what those of the gates owe to q, a partial sum; then (not QUERIES) those of k
    and f, and the chunk's share of those of A_log and dt_bias, [slots, K] each.

    Two launches, as one program for both sides would hold twice as many intermediate results as it has registers.
    """
    C: tl.constexpr = CHUNK
    W: tl.constexpr = q_ptr.dtype.element_ty
    D: tl.constexpr = tl.float32 if W == tl.float32 else tl.float16
    chunk, head = tl.program_id(0), tl.program_id(1) // (K // BK)
    channel = tl.program_id(1) % (K // BK) * BK
    channels = channel + tl.arange(0, BK)
    slot = chunk.to(tl.int64) * heads + head
    document, place, begin, end = locate(chunk, bounds, documents, tokens, C, 0, PACKED, N2)
    if document < 0:
        if not QUERIES:  # its shares are summed with the others
            tl.store(dA_log_ptr + slot * K + channels, tl.zeros([BK], tl.float32))
            tl.store(ddt_bias_ptr + slot * K + channels, tl.zeros([BK], tl.float32))
        return
    rows, values = tl.arange(0, C), tl.arange(0, V)
    first = begin + place * C
    have = (first + rows < end)[:, None]
    # from a scalar in 64 bits, offsets of 32: they are kept over the loops, and registers are what is short
    here, many = first.to(tl.int64) * heads + head, slots.to(tl.int64)
    corner = here * K + channel
    at = rows[:, None] * (heads * K) + tl.arange(0, BK)[None, :]
    at_values = rows[:, None] * (heads * V) + values[None, :]
    state_at = values[:, None] * K + tl.arange(0, BK)[None, :]
    states_ptr, dstates_ptr = states_ptr + slot * K * V + channel, dstates_ptr + slot * K * V + channel
    of_rows = rows_ptr + slot * ROWS * C
    q_norm, k_norm = of_rows + Q_NORM * C + rows, of_rows + K_NORM * C + rows
    rate = tl.exp(tl.load(A_log_ptr + head).to(tl.float32))
    bias = tl.load(dt_bias_ptr + head * K + channels).to(tl.float32)[None, :]
    raw_f = tl.load(f_ptr + corner + at, mask=have, other=0.0)
    raw_k = tl.load(k_ptr + corner + at, mask=have, other=0.0)
    raw_q = tl.load(q_ptr + corner + at, mask=have, other=0.0)
    S = tl.load(states_ptr + state_at)
    x = tl.dot(table(tables, EYE, C), raw_f, input_precision="ieee")
    g = gate_tile(x, bias, rate, have, lower_bound, BOUNDED, D)
    decay = tl.exp2(tl.dot(table(gate_tables, THROUGH, C), g, input_precision="ieee"))
    level = 0
    if QUERIES:
        do = tl.load(do_ptr + here * V + at_values, mask=have, other=0.0)
        dq = tl.dot(do, S, input_precision="ieee") * (decay * scale)
        crossing = unit_rows(tables, 0, raw_q, q_norm) * dq
        dg = sums(tl.zeros([C, BK], tl.float32), table(tables, FROM, C), crossing)
        while level < LEVELS:
            X = tl.dot(table(gate_tables, FROM_MIDDLE + level, C), g, input_precision="ieee")
            once = tl.max(tl.abs(X)) < SAFE_GRADIENT
            row_factor, col_factor = span_factors(X, once)
            kind = level + tl.where(once, LEVELS, 0)
            cols = (unit_rows(tables, tl.minimum(level, 0), raw_k, k_norm) * col_factor).to(W)
            dP = table(pairs_ptr, slot, C) * table(tables, PAIRS + kind, C)
            new = tl.dot(dP, cols, input_precision="ieee")
            dq += new * row_factor
            crossing = (unit_rows(tables, tl.minimum(level, 0), raw_q, q_norm) * row_factor).to(W).to(tl.float32) * new
            dg = sums(dg, table(tables, ACROSS + kind, C), crossing)
            level = tl.where(once, LEVELS, level + 1)
        dq += tl.load(of_rows + DIAGONAL * C + rows)[:, None] * unit_rows(tables, tl.minimum(level, 0), raw_k, k_norm)
        dq -= tl.load(of_rows + Q_DQ * C + rows)[:, None] * unit_rows(tables, tl.minimum(level, 0), raw_q, q_norm)
        tl.store(dq_ptr + corner + at, dq * tl.load(q_norm)[:, None], mask=have)
        tl.store(partial_ptr + corner + at, dg, mask=have)
    else:
        dS = tl.load(dstates_ptr + state_at)
        whole = tl.sum(tl.where(rows[:, None] == C - 1, decay, 0.0), 0)
        dwhole = whole * tl.sum(S.to(tl.float32) * dS.to(tl.float32), 0)
        after = tl.exp2(tl.dot(table(gate_tables, AFTER, C), g, input_precision="ieee"))
        k = unit_rows(tables, 0, raw_k, k_norm)
        u = tl.load(u_ptr + here * V + at_values, mask=have, other=0.0)
        dk = tl.dot(u, dS, input_precision="ieee") * after
        dg = tl.load(partial_ptr + corner + at, mask=have, other=0.0) + dwhole[None, :]
        dg = sums(dg, table(tables, BEFORE, C), k * dk)
        dv = tl.load(dv_ptr + here * V + at_values, mask=have, other=0.0)
        new = tl.dot(dv, S, input_precision="ieee") * -decay
        dk += new
        dg = sums(dg, table(tables, FROM, C), k * new)
        while level < LEVELS:
            X = tl.dot(table(gate_tables, FROM_MIDDLE + level, C), g, input_precision="ieee")
            once = tl.max(tl.abs(X)) < SAFE_GRADIENT
            row_factor, col_factor = span_factors(X, once)
            kind = level + tl.where(once, LEVELS, 0)
            k = unit_rows(tables, tl.minimum(level, 0), raw_k, k_norm)
            cols, k_rows = (k * col_factor).to(W), (k * row_factor).to(W)
            q_rows = (unit_rows(tables, tl.minimum(level, 0), raw_q, q_norm) * row_factor).to(W)
            dM = table(pairs_ptr, many + slot, C) * table(tables, PAIRS + kind, C)
            crossing = tl.dot(dM, cols, input_precision="ieee")
            dk += crossing * row_factor
            crossing *= k_rows.to(tl.float32)
            pairs = table(tables, PAIRS_T + kind, C)
            new = tl.dot(table(pairs_ptr, 2 * many + slot, C) * pairs, q_rows, input_precision="ieee")
            dM = table(pairs_ptr, 3 * many + slot, C) * pairs
            new = tl.dot(dM, k_rows, new, input_precision="ieee")
            dk += new * col_factor
            new *= cols.to(tl.float32)
            crossing += tl.where(once, -new, new)
            dg = sums(dg, table(tables, ACROSS + kind, C), crossing)
            level = tl.where(once, LEVELS, level + 1)
        dk += tl.load(of_rows + DIAGONAL * C + rows)[:, None] * unit_rows(tables, tl.minimum(level, 0), raw_q, q_norm)
        dk -= tl.load(of_rows + K_DK * C + rows)[:, None] * unit_rows(tables, tl.minimum(level, 0), raw_k, k_norm)
        tl.store(dk_ptr + corner + at, dk * tl.load(k_norm)[:, None], mask=have)
        dg = tl.where(have, dg, 0.0)
        x = tl.dot(table(tables, EYE + tl.minimum(level, 0), C), raw_f, input_precision="ieee") + bias
        if BOUNDED:
            df = dg * (lower_bound * rate) * tl.sigmoid(rate * x) / (1.0 + tl.exp2(x * (rate * LOG2E)))
            dA_log = tl.sum(df * x, 0)
        else:
            df = -rate * dg * tl.sigmoid(x)
            dA_log = tl.sum(dg * log2_decay(x, 0.0, rate, lower_bound, BOUNDED), 0) / LOG2E
        tl.store(df_ptr + corner + at, df, mask=have)
        tl.store(dA_log_ptr + slot * K + channels, dA_log)
        tl.store(ddt_bias_ptr + slot * K + channels, tl.sum(df, 0))

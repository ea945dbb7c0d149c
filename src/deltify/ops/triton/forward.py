"""KDA forward on a GPU in three launches, or five where the sequence is split.

prepare: one program per chunk of 64 tokens and head. Everything that does not need the state: L2 norms, gate,
    cumulative decay G, the two matrices of the chunk and the triangular inverse. It writes what the scan reads, in the
    order in which it reads it. Chunks of strong gates are left to a second launch, where the code is longer.
scan: one program per head, tile of value columns and segment of chunks. It walks its chunks, the state in registers.

        u = A v - W S            A = (I + beta M)^-1 beta,  W = A (k e^G)
        o = (q e^G) S + P u      S' = e^{G_C} S + (k e^{G_C - G})^T u

Where heads and tiles are too few to fill the chip, a sequence is split into segments. A segment maps the state S before
it to R S + S0, whatever the gates; a first pass of the scan finds R and S0 of all segments at once (R is the scan of
the identity with v = 0), the maps are combined, and the second pass starts each segment from its true state.

No factor leaves the range of its type, for any gate: a span of 2h tokens is anchored at its middle, and where its decay
is too strong for one anchor, only the pairs across the middle are taken (both factors are then at most 1) and the
halves are anchored again. docs/kernels.md tells the story.

Legend: B batch, T tokens, H heads, K key width, V value width, C tokens of a chunk, N documents (rows, or packed).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..reference import L2NORM_EPS

CHUNK = tl.constexpr(64)
EPS = tl.constexpr(L2NORM_EPS)
LOG2E = tl.constexpr(1.4426950408889634)
# log2 of the largest factor of a span anchored once: what the range of the products' type allows
SAFE_EXPONENT = tl.constexpr(100.0)
SAFE_EXPONENT_FP16 = tl.constexpr(4.0)


@triton.jit
def locate(unit, bounds, documents, tokens, size, LEAST: tl.constexpr, PACKED: tl.constexpr, N2: tl.constexpr):
    """Of a unit (a chunk, or a segment of `size` tokens): its document, its place there, and that document's tokens.

    Every document has at least LEAST units. Returns document -1 for a unit past the last.
    """
    if PACKED:
        n = tl.arange(0, N2)
        begins = tl.minimum(tl.load(bounds + n, mask=n < documents, other=0), tokens)
        ends = tl.minimum(tl.load(bounds + n + 1, mask=n < documents, other=0), tokens)
        counts = tl.where(n < documents, tl.maximum(tl.cdiv(ends - begins, size), LEAST), 0)
        after = tl.cumsum(counts, 0)
        document = tl.sum((after <= unit).to(tl.int32), 0)
        document = tl.where(document < documents, document, -1)
        mine = n == document
        place = unit - tl.sum(tl.where(mine, after - counts, 0), 0)
        begin, end = tl.sum(tl.where(mine, begins, 0), 0), tl.sum(tl.where(mine, ends, 0), 0)
    else:
        per_row = tl.maximum(tl.cdiv(tokens, size), LEAST)
        document = unit // per_row
        place = unit % per_row
        begin = document * tokens
        end = begin + tokens
        document = tl.where(document < documents, document, -1)
    return document, place, begin, end


@triton.jit
def units_before(
    document, bounds, documents, tokens, size, LEAST: tl.constexpr, PACKED: tl.constexpr, N2: tl.constexpr
):
    """How many units all documents before this one have."""
    if PACKED:
        n = tl.arange(0, N2)
        begins = tl.minimum(tl.load(bounds + n, mask=n < document, other=0), tokens)
        ends = tl.minimum(tl.load(bounds + n + 1, mask=n < document, other=0), tokens)
        return tl.sum(tl.where(n < document, tl.maximum(tl.cdiv(ends - begins, size), LEAST), 0), 0)
    else:
        return document * tl.maximum(tl.cdiv(tokens, size), LEAST)


@triton.jit
def log2_decay(f, bias, rate, lower_bound, BOUNDED: tl.constexpr):
    """Base-2 logarithm of the decay from gate logits; `rate` = exp(A_log)."""
    if BOUNDED:
        return 1.0 / (1.0 + tl.exp2((f + bias) * (rate * -LOG2E))) * lower_bound * LOG2E
    else:
        x = f * LOG2E + bias * LOG2E  # softplus in base 2: max(x, 0) + log2(1 + 2^-|x|)
        e = tl.exp2(-tl.abs(x))
        # log2(1 + e) = e p(e), p fitted at Chebyshev nodes of [0, 1]: 3e-7 relative, however small e is
        p = e * -0.012370643 + 0.063787594
        p = p * e - 0.155599967
        p = p * e + 0.256179690
        p = p * e - 0.353454679
        p = p * e + 0.480073750
        p = p * e - 0.721310735
        p = p * e + 1.442694783
        return -rate * (tl.maximum(x, 0.0) + e * p)


@triton.jit
def sums(signs, g):
    """signs @ g for signs [C, C] of -1, 0 and 1: in two halves of g, which the matrix units add exactly enough."""
    W: tl.constexpr = signs.dtype
    high = g.to(W)
    low = (g - high.to(tl.float32)).to(W)
    return tl.dot(signs, low, tl.dot(signs, high, input_precision="ieee"), input_precision="ieee")


@triton.jit
def add_products(P, M, q, k, g, G, W: tl.constexpr, C: tl.constexpr):
    """Adds to P[i, j], j < i, the sum over these channels of q_i k_j e^{G_i - G_j}, and to M likewise with k_i.

    Works for any gates. A span of 2 half tokens is anchored at its middle. Where its decay fits one anchor, all its
    pairs are taken and that was all; else those across the middle, with factors of at most 1, and its halves are spans
    again. half <= i ^ j < 2 half says that i is in the right half and j in the left half of the same span.
    """
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    safe = SAFE_EXPONENT_FP16 if W == tl.float16 else SAFE_EXPONENT
    half = C // 2
    X = G - tl.sum(tl.where(i < half, g, 0.0), 0)[None, :]
    while half > 0:
        once = tl.max(tl.abs(X)) < safe
        sign = tl.where(once, 1.0, 0.0)
        shrunk = (sign - 1.0) * tl.abs(X)
        row_factor = tl.exp2(shrunk + sign * X)
        cols = tl.trans((k * tl.exp2(shrunk - sign * X)).to(W))
        new = (j < i) & ((i ^ j) < 2 * half) & ((i ^ j) >= tl.where(once, 0, half))
        P += tl.where(new, tl.dot((q * row_factor).to(W), cols, input_precision="ieee"), 0.0)
        M += tl.where(new, tl.dot((k * row_factor).to(W), cols, input_precision="ieee"), 0.0)
        half = tl.where(once, 0, half // 2)
        if half > 0:
            middle = i // (2 * half) * (2 * half) + half - 1  # the last token of the left half of i's span
            signs = tl.where((j > middle) & (j <= i), 1.0, 0.0) - tl.where((j > i) & (j <= middle), 1.0, 0.0)
            X = sums(signs.to(W), g)
    return P, M


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
    q_ptr, k_ptr, f_ptr, b_ptr, A_log_ptr, dt_bias_ptr, bounds, wide_ptr, square_ptr, end_ptr, strong_ptr,
    documents, tokens, heads, slots, lower_bound,
    K: tl.constexpr, BOUNDED: tl.constexpr, STRONG: tl.constexpr, PACKED: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """Writes W, q e^G and k e^{G_C - G} as [3, slots, C, K], A and P as [2, slots, C, C]; a slot is a chunk and head.

    Comes in two: the lean one leaves chunks of strong gates, which it marks, to the other.
    """
    C: tl.constexpr = CHUNK
    W_DTYPE: tl.constexpr = wide_ptr.dtype.element_ty
    INVERSE_DTYPE: tl.constexpr = tl.float32 if W_DTYPE == tl.float32 else tl.float16
    chunk, head = tl.program_id(0), tl.program_id(1)
    document, place, begin, end = locate(chunk, bounds, documents, tokens, C, 0, PACKED, N2)
    if document < 0:
        return
    slot = chunk.to(tl.int64) * heads + head
    if STRONG:
        if tl.load(strong_ptr + slot) == 0:
            return
    rows, channels = tl.arange(0, C), tl.arange(0, K)
    token = begin + place * C + rows
    there = token < end
    row_head = token.to(tl.int64) * heads + head
    at = row_head[:, None] * K + channels[None, :]
    f = tl.load(f_ptr + at, mask=there[:, None], other=0.0).to(tl.float32)
    rate = tl.exp(tl.load(A_log_ptr + head).to(tl.float32))
    bias = tl.load(dt_bias_ptr + head * K + channels).to(tl.float32)
    # 2^-200 is zero in float32, and so is every product with it
    g = tl.maximum(log2_decay(f, bias[None, :], rate, lower_bound, BOUNDED), -200.0)
    g = tl.where(there[:, None], g, 0.0)
    whole = tl.sum(g, 0)
    if not STRONG:
        strong = tl.min(whole) <= -(SAFE_EXPONENT_FP16 if W_DTYPE == tl.float16 else SAFE_EXPONENT)
        tl.store(strong_ptr + slot, strong.to(tl.int8))
        if strong:
            return
    q = tl.load(q_ptr + at, mask=there[:, None], other=0.0).to(tl.float32)
    k = tl.load(k_ptr + at, mask=there[:, None], other=0.0).to(tl.float32)
    q *= tl.rsqrt(tl.sum(q * q, 1) + EPS)[:, None]
    k *= tl.rsqrt(tl.sum(k * k, 1) + EPS)[:, None]
    # i = j does not pass through the factors, whose product is 1 only nearly
    P = tl.where(rows[:, None] == rows[None, :], tl.sum(q * k, 1)[:, None], 0.0)
    out = wide_ptr + slot * C * K + rows[:, None] * K + channels[None, :]
    wide_step, square_step = slots.to(tl.int64) * C * K, slots.to(tl.int64) * C * C
    tl.store(end_ptr + slot * K + channels, tl.exp2(whole))
    G = sums(tl.where(rows[None, :] <= rows[:, None], 1.0, 0.0).to(W_DTYPE), g)
    decay = tl.exp2(G)
    decayed_q, decayed_k = (q * decay).to(W_DTYPE), (k * decay).to(W_DTYPE)
    tl.store(out + wide_step, decayed_q)
    if STRONG:
        tl.store(out + 2 * wide_step, (k * tl.exp2(whole[None, :] - G)).to(W_DTYPE))
        P, M = add_products(P, tl.zeros([C, C], tl.float32), q, k, g, G, W_DTYPE, C)
    else:
        # one anchor, the chunk's start, serves all pairs, and with it the factors that the scan needs anyway
        grown = k * tl.exp2(-G)
        tl.store(out + 2 * wide_step, (grown * tl.exp2(whole)[None, :]).to(W_DTYPE))
        grown = tl.trans(grown.to(W_DTYPE))
        past = rows[None, :] < rows[:, None]
        P += tl.where(past, tl.dot(decayed_q, grown, input_precision="ieee"), 0.0)
        M = tl.where(past, tl.dot(decayed_k, grown, input_precision="ieee"), 0.0)
    square = square_ptr + slot * C * C + rows[:, None] * C + rows[None, :]
    tl.store(square + square_step, P.to(W_DTYPE))
    beta = tl.sigmoid(tl.load(b_ptr + row_head, mask=there, other=0.0).to(tl.float32))
    A = (unit_lower_inverse(M * beta[:, None], C, INVERSE_DTYPE) * beta[None, :]).to(W_DTYPE)
    tl.store(square, A)
    tl.store(out, tl.dot(A, decayed_k, input_precision="ieee").to(W_DTYPE))


@triton.jit
def scan_kernel(
    wide, square, end_ptr, v_ptr, bounds, state_ptr, map_ptr, local_ptr, o_ptr, final_ptr,
    documents, tokens, heads, slots, segment, scale,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, MAPS: tl.constexpr, SPLIT: tl.constexpr,
    HAS_STATE: tl.constexpr, PACKED: tl.constexpr, N2: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """MAPS: the first pass, which writes each segment's map; else the pass that writes o and the final states."""
    C: tl.constexpr = CHUNK
    tile, unit = tl.program_id(0), tl.program_id(1)
    TILES: tl.constexpr = (V + K) // BV if MAPS else V // BV
    head, tile = tile // TILES, tile % TILES
    document, place, begin, end = locate(unit, bounds, documents, tokens, segment * C, 1, PACKED, N2)
    if document < 0:
        return
    chunks = tl.cdiv(end - begin, C)
    first = place * segment
    last = tl.minimum(first + segment, chunks)
    W_DTYPE: tl.constexpr = v_ptr.dtype.element_ty
    is_map = tile * BV >= V
    if MAPS:
        if last == chunks:  # no segment comes after it
            return
        if is_map and place == 0:  # the first segment starts from the known state
            return
    rows, keys, values = tl.arange(0, C), tl.arange(0, K), tile * BV + tl.arange(0, BV)
    state_at = (document.to(tl.int64) * heads + head) * K * V + keys[:, None] * V + values[None, :]
    if MAPS:
        if is_map:
            S = tl.where(keys[:, None] == (values - V)[None, :], 1.0, 0.0)
        else:
            S = tl.zeros([K, BV], tl.float32)
            if HAS_STATE:
                if place == 0:
                    S = tl.load(state_ptr + state_at)
    else:
        S = tl.zeros([K, BV], tl.float32)
        if SPLIT:
            if place > 0:
                slot = (unit - 1).to(tl.int64) * heads + head
                S = tl.load(local_ptr + slot * K * V + keys[:, None] * V + values[None, :])
        if HAS_STATE:
            if place == 0:
                S = tl.load(state_ptr + state_at)

    slot = (units_before(document, bounds, documents, tokens, C, 0, PACKED, N2) + first) * heads + head
    end_at = end_ptr + slot.to(tl.int64) * K + keys
    token = begin + first * C + rows
    v_at = (token.to(tl.int64) * heads + head)[:, None] * V + values[None, :]
    for _ in tl.range(first, last, num_stages=STAGES):
        there = (token < end)[:, None]
        S_w = S.to(W_DTYPE)
        read = tl.dot(wide.load([slot * C, 0]), S_w, input_precision="ieee")
        v = tl.load(v_ptr + v_at, mask=there & (values < V)[None, :], other=0.0)
        u = (tl.dot(square.load([slot * C, 0]), v, input_precision="ieee") - read).to(W_DTYPE)
        if not MAPS:
            o = tl.dot(wide.load([(slots + slot) * C, 0]), S_w, input_precision="ieee")
            o = tl.dot(square.load([(slots + slot) * C, 0]), u, o, input_precision="ieee")
            tl.store(o_ptr + v_at, (scale * o).to(W_DTYPE), mask=there)
        S *= tl.load(end_at)[:, None]
        S = tl.dot(tl.trans(wide.load([(2 * slots + slot) * C, 0])), u, S, input_precision="ieee")
        slot += heads
        end_at += heads * K
        token += C
        v_at += C * heads * V

    if MAPS:
        slot = unit.to(tl.int64) * heads + head
        if is_map:
            tl.store(map_ptr + slot * K * K + keys[:, None] * K + (values - V)[None, :], S)
        else:
            tl.store(local_ptr + slot * K * V + keys[:, None] * V + values[None, :], S)
    elif last == chunks:
        tl.store(final_ptr + state_at, S)


@triton.jit
def combine_kernel(
    map_ptr, local_ptr, bounds, documents, tokens, heads, segment,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """Turns `local`, what each segment adds to the state, into the state after it: S <- R S + S0 along a document."""
    tile, document = tl.program_id(0), tl.program_id(1)
    head, tile = tile // (V // BV), tile % (V // BV)
    keys, values = tl.arange(0, K), tile * BV + tl.arange(0, BV)
    size = segment * CHUNK
    slot = units_before(document, bounds, documents, tokens, size, 1, PACKED, N2).to(tl.int64) * heads + head
    length = tokens
    if PACKED:
        length = tl.load(bounds + document + 1) - tl.load(bounds + document)
    S_at = local_ptr + slot * K * V + keys[:, None] * V + values[None, :]
    R_at = map_ptr + slot * K * K + keys[:, None] * K + keys[None, :]
    S = tl.load(S_at)
    for _ in range(1, tl.cdiv(length, size) - 1):
        R_at += heads * K * K
        S_at += heads * K * V
        S = tl.dot(tl.load(R_at), S, tl.load(S_at), input_precision="tf32")
        tl.store(S_at, S)


# ---- host ------------------------------------------------------------------------------------------------------------


COMBINE_BV = 16


@dataclass(frozen=True)
class Plan:
    """How a call is cut up."""

    BV: int  # value columns of a tile
    segment: int  # chunks of a segment
    split: bool  # whether a document has several segments
    stages: int = 2  # loads in flight in the scan
    prepare_warps: int = 4
    scan_warps: int = 4


def forward(q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound, scale, plan: Plan) -> tuple[Tensor, Tensor]:
    """o and the final states by the given plan; arguments as in `deltify.ops.kda`, contiguous, `state` may be None."""
    batch, tokens, heads, K = q.shape
    V = v.shape[-1]
    C = CHUNK.value
    packed = cu_seqlens is not None
    documents = len(cu_seqlens) - 1 if packed else batch
    N2 = triton.next_power_of_2(documents) if packed else 1
    # without looking at the bounds, which would wait for the GPU: as many as there can be
    chunks = tokens // C + documents if packed else batch * triton.cdiv(tokens, C)
    size = plan.segment * C
    units = tokens // size + documents if packed else batch * triton.cdiv(tokens, size)
    work, device, n = v.dtype, q.device, chunks * heads

    wide = torch.empty(3 * n * C, K, dtype=work, device=device)
    square = torch.empty(2 * n * C, C, dtype=work, device=device)
    ends = torch.empty(n, K, dtype=torch.float32, device=device)
    o = torch.empty_like(v)
    final = torch.empty(documents, heads, K, V, dtype=torch.float32, device=device)
    bounded = lower_bound is not None
    strong = torch.empty(n, dtype=torch.int8, device=device)
    for only_strong in (False, True):
        prepare_kernel[(chunks, heads)](
            q, k, f, b, A_log, dt_bias, cu_seqlens, wide, square, ends, strong,
            documents, tokens, heads, n, lower_bound if bounded else 0.0,
            K=K, BOUNDED=bounded, STRONG=only_strong, PACKED=packed, N2=N2, num_warps=plan.prepare_warps,
        )  # fmt: skip
    wide = TensorDescriptor.from_tensor(wide, [C, K])
    square = TensorDescriptor.from_tensor(square, [C, C])
    maps = local = None
    if plan.split:
        maps = torch.empty(units * heads * K * K, dtype=torch.float32, device=device)
        local = torch.empty(units * heads * K * V, dtype=torch.float32, device=device)
    for is_first in (True, False) if plan.split else (False,):
        tiles = (K + V if is_first else V) // plan.BV
        scan_kernel[(heads * tiles, units)](
            wide, square, ends, v, cu_seqlens, state, maps, local, o, final,
            documents, tokens, heads, n, plan.segment, scale,
            K=K, V=V, BV=plan.BV, MAPS=is_first, SPLIT=plan.split, HAS_STATE=state is not None,
            PACKED=packed, N2=N2, STAGES=plan.stages, num_warps=plan.scan_warps,
        )  # fmt: skip
        if is_first:
            combine_kernel[(heads * V // COMBINE_BV, documents)](
                maps, local, cu_seqlens, documents, tokens, heads, plan.segment,
                K=K, V=V, BV=COMBINE_BV, PACKED=packed, N2=N2, num_warps=4,
            )  # fmt: skip
    return o, final

"""Run over the chunks in order, and in reverse: one program per head, tile of value columns and segment of chunks.

        u = A (v - (k e^G) S)    A = (I + beta M)^-1 beta
        o = (q e^G) S + P u      S' = e^{G_C} S + (k e^{G_C - G})^T u

The state is transposed, values by keys. Each product then leaves it and u^T in the registers from which the next
product reads them, so that nothing passes through shared memory between two steps.

Where heads and tiles are too few to fill the GPU, a sequence is split into segments. A segment maps the state S before
it to R S + S0. A first pass of the scan finds R and S0 of all segments at once (R is the scan of the identity with
v = 0). Then the maps are combined, and a second pass starts each segment from its true state.

Legend: B batch, T tokens, H heads, K key width, V value width, C tokens of a chunk, N documents (sequences, or packed).
"""

import triton
import triton.language as tl

from .tiles import CHUNK, locate, units_before


@triton.jit
def scan_kernel(
    wide, square, end_ptr, v_ptr, bounds, state_ptr, map_ptr, local_ptr, o_ptr, final_ptr, states_ptr,
    documents, tokens, heads, slots, segment,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, MAPS: tl.constexpr, KEEP: tl.constexpr, SPLIT: tl.constexpr,
    HAS_STATE: tl.constexpr, PACKED: tl.constexpr, N2: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Scan a segment.

    With MAPS, write the segment's map, [K + V, K]. Otherwise write o and the final states. With KEEP, write u in place
    of o, and the state before each chunk, [slots, V, K], which the backward pass needs.
    """
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
    W: tl.constexpr = v_ptr.dtype.element_ty
    is_map = tile * BV >= V
    if MAPS:
        if last == chunks:  # no segment comes after it
            return
        if is_map and place == 0:  # the first segment starts from the known state
            return
    rows, keys, values = tl.arange(0, C), tl.arange(0, K), tile * BV + tl.arange(0, BV)
    state_at = (document.to(tl.int64) * heads + head) * K * V + keys[None, :] * V + values[:, None]
    S = tl.zeros([BV, K], tl.float32)
    if MAPS:
        if is_map:
            S = tl.where(keys[None, :] == (values - V)[:, None], 1.0, 0.0)
        elif HAS_STATE:
            if place == 0:
                S = tl.load(state_ptr + state_at)
    else:
        if SPLIT:
            if place > 0:
                slot = (unit - 1).to(tl.int64) * heads + head
                S = tl.load(local_ptr + slot * K * V + values[:, None] * K + keys[None, :])
        if HAS_STATE:
            if place == 0:
                S = tl.load(state_ptr + state_at)

    slot = (units_before(document, bounds, documents, tokens, C, 0, PACKED, N2) + first) * heads + head
    end_at = end_ptr + slot.to(tl.int64) * K + keys
    if KEEP:
        keep_at = states_ptr + slot.to(tl.int64) * K * V + values[:, None] * K + keys[None, :]
    token = begin + first * C + rows
    v_at = (token.to(tl.int64) * heads + head)[:, None] * V + values[None, :]
    for _ in tl.range(first, last, num_stages=STAGES):
        there = (token < end)[:, None]
        S_w = S.to(W)
        v = tl.load(v_ptr + v_at, mask=there & (values < V)[None, :], other=0.0)
        r = tl.trans(v) - tl.dot(S_w, tl.trans(wide.load([slot * C, 0])), input_precision="ieee")
        u = tl.dot(r.to(W), tl.trans(square.load([slot * C, 0])), input_precision="ieee").to(W)
        if KEEP:
            tl.store(keep_at, S_w)
            keep_at += heads * K * V
            tl.store(o_ptr + v_at, tl.trans(u), mask=there)
        elif not MAPS:
            o = tl.dot(S_w, tl.trans(wide.load([(slots + slot) * C, 0])), input_precision="ieee")
            o = tl.dot(u, tl.trans(square.load([(slots + slot) * C, 0])), o, input_precision="ieee")
            tl.store(o_ptr + v_at, tl.trans(o.to(W)), mask=there)
        S *= tl.load(end_at)[None, :]
        S = tl.dot(u, wide.load([(2 * slots + slot) * C, 0]), S, input_precision="ieee")
        slot += heads
        end_at += heads * K
        token += C
        v_at += C * heads * V

    if MAPS:
        slot = unit.to(tl.int64) * heads + head
        if is_map:
            tl.store(map_ptr + slot * K * K + (values - V)[:, None] * K + keys[None, :], S)
        else:
            tl.store(local_ptr + slot * K * V + values[:, None] * K + keys[None, :], S)
    elif last == chunks:
        tl.store(final_ptr + state_at, S)


@triton.jit
def combine_kernel(
    map_ptr, local_ptr, bounds, documents, tokens, heads, segment,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """Turn `local`, the S0 of each segment, into the state after the segment: S^T <- S^T R^T + S0^T."""
    tile, document = tl.program_id(0), tl.program_id(1)
    head, tile = tile // (V // BV), tile % (V // BV)
    keys, values = tl.arange(0, K), tile * BV + tl.arange(0, BV)
    size = segment * CHUNK
    slot = units_before(document, bounds, documents, tokens, size, 1, PACKED, N2).to(tl.int64) * heads + head
    length = tokens
    if PACKED:
        length = tl.load(bounds + document + 1) - tl.load(bounds + document)
    S_at = local_ptr + slot * K * V + values[:, None] * K + keys[None, :]
    R_at = map_ptr + slot * K * K + keys[:, None] * K + keys[None, :]
    S = tl.load(S_at)
    for _ in range(1, tl.cdiv(length, size) - 1):
        R_at += heads * K * K
        S_at += heads * K * V
        S = tl.dot(S, tl.load(R_at), tl.load(S_at), input_precision="tf32")
        tl.store(S_at, S)


@triton.jit
def reverse_kernel(
    wide, square, end_ptr, do_ptr, bounds, dfinal_ptr, dv_ptr, dstate_ptr, dstates_ptr,
    documents, tokens, heads, slots,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, HAS_DFINAL: tl.constexpr,
    PACKED: tl.constexpr, N2: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute the gradient dS of the state, from the last chunk to the first.

        du = P^T do + (k e^{G_C - G}) dS'        dv = A^T du        dS = e^{G_C} dS' + (q e^G)^T do - (k e^G)^T dv

    It writes dv, dS' of each chunk as [slots, V, K], and the gradient of the initial states.
    """
    C: tl.constexpr = CHUNK
    tile, document = tl.program_id(0), tl.program_id(1)
    TILES: tl.constexpr = V // BV
    head, tile = tile // TILES, tile % TILES
    begin, end = document * tokens, (document + 1) * tokens
    if PACKED:
        begin, end = tl.load(bounds + document), tl.load(bounds + document + 1)
    chunks = tl.cdiv(end - begin, C)
    W: tl.constexpr = do_ptr.dtype.element_ty
    rows, keys, values = tl.arange(0, C), tl.arange(0, K), tile * BV + tl.arange(0, BV)
    state_at = (document.to(tl.int64) * heads + head) * K * V + keys[None, :] * V + values[:, None]
    dS = tl.zeros([BV, K], tl.float32)
    if HAS_DFINAL:
        dS = tl.load(dfinal_ptr + state_at)
    slot = (units_before(document, bounds, documents, tokens, C, 0, PACKED, N2) + chunks - 1) * heads + head
    end_at = end_ptr + slot.to(tl.int64) * K + keys
    keep_at = dstates_ptr + slot.to(tl.int64) * K * V + values[:, None] * K + keys[None, :]
    token = begin + (chunks - 1) * C + rows
    at = (token.to(tl.int64) * heads + head)[:, None] * V + values[None, :]
    for _ in tl.range(0, chunks, num_stages=STAGES):
        there = (token < end)[:, None]
        dS_w = dS.to(W)
        tl.store(keep_at, dS_w)
        do = tl.trans(tl.load(do_ptr + at, mask=there, other=0.0))
        du = tl.dot(do, square.load([(slots + slot) * C, 0]), input_precision="ieee")
        du = tl.dot(dS_w, tl.trans(wide.load([(2 * slots + slot) * C, 0])), du, input_precision="ieee").to(W)
        dv = tl.dot(du, square.load([slot * C, 0]), input_precision="ieee").to(W)
        tl.store(dv_ptr + at, tl.trans(dv), mask=there)
        dS *= tl.load(end_at)[None, :]
        dS = tl.dot(do, wide.load([(slots + slot) * C, 0]), dS, input_precision="ieee")
        dS -= tl.dot(dv, wide.load([slot * C, 0]), input_precision="ieee")
        slot -= heads
        end_at -= heads * K
        keep_at -= heads * K * V
        token -= C
        at -= C * heads * V
    tl.store(dstate_ptr + state_at, dS)

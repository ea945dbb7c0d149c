"""Short convolutions of concatenated inputs with a separate output for each part, in one pass over memory.

Legend: B batch, T tokens, D channels, W taps (the last one multiplies the current token), N documents (sequences, or
packed).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .tiles import sigmoid, wants_gradients

TAPS, MAX_PARTS = 4, 3  # supported by the kernels
CHANNELS = 256  # of a program, which is one warp: 8 channels of 2 bytes, one memory access, for each thread
TILE, TILE_BACKWARD = 32, 64  # number of tokens of a program


@triton.jit
def when(condition, kept):
    """Return the mask `kept` if a condition of the whole program holds, else an empty mask.

    Not `condition & kept`, of which Triton's interpreter makes integers.
    """
    return tl.where(condition, kept, False)


@triton.jit
def find_document(bounds, documents, token):
    """Return the document of a token, found by bisection: the last one that starts there or before."""
    low, high = documents * 0, documents - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(bounds + middle) <= token:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def load_input(x_ptr, state_ptr, token, begin, document, channel, kept, width, HAS_STATE: tl.constexpr):
    """Return a document's input at a token, which comes from the state if it is before the document's first token."""
    inside = (token >= begin) & (token >= 0)
    x = tl.load(x_ptr + token * width + channel, mask=when(inside, kept), other=0.0).to(tl.float32)
    if HAS_STATE:
        place = token - begin + 3
        at = state_ptr + (document.to(tl.int64) * width + channel) * 3 + place
        x += tl.load(at, mask=when((place >= 0) & (place < 3), kept), other=0.0).to(tl.float32)
    return x


@triton.jit
def load_past(x_ptr, state_ptr, token, begin, document, channel, kept, width, HAS_STATE: tl.constexpr):
    """Return the three inputs before a token."""
    a = load_input(x_ptr, state_ptr, token - 3, begin, document, channel, kept, width, HAS_STATE)
    b = load_input(x_ptr, state_ptr, token - 2, begin, document, channel, kept, width, HAS_STATE)
    c = load_input(x_ptr, state_ptr, token - 1, begin, document, channel, kept, width, HAS_STATE)
    return a, b, c


@triton.jit
def load_taps(taps_ptr, channel, kept, width):
    t0 = tl.load(taps_ptr + channel, mask=kept, other=0.0)
    t1 = tl.load(taps_ptr + width + channel, mask=kept, other=0.0)
    t2 = tl.load(taps_ptr + 2 * width + channel, mask=kept, other=0.0)
    t3 = tl.load(taps_ptr + 3 * width + channel, mask=kept, other=0.0)
    return t0, t1, t2, t3


@triton.jit
def load_four(x_ptr, token, stop, stride, channel, kept):
    """Load four tokens at once. All four loads are then in flight before the first is used or a store delays them."""
    at = x_ptr + token * stride + channel
    x0 = tl.load(at, mask=when(token < stop, kept), other=0.0)
    x1 = tl.load(at + stride, mask=when(token + 1 < stop, kept), other=0.0)
    x2 = tl.load(at + 2 * stride, mask=when(token + 2 < stop, kept), other=0.0)
    x3 = tl.load(at + 3 * stride, mask=when(token + 3 < stop, kept), other=0.0)
    return x0, x1, x2, x3


@triton.jit
def find_channels(part_width, BD: tl.constexpr):
    """Return the part of this program, and the indices and mask of its channels in the part."""
    blocks = tl.cdiv(part_width, BD)
    place = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    return tl.program_id(0) // blocks, place, place < part_width


@triton.jit
def choose(part, a_ptr, b_ptr, c_ptr):
    at = a_ptr
    if part == 1:
        at = b_ptr
    if part == 2:
        at = c_ptr
    return at


@triton.jit
def find_tile(tile, bounds, documents, tokens, BT: tl.constexpr, PACKED: tl.constexpr):
    """Return a tile's first token and the end of its sequence, and the document there with its bounds."""
    if PACKED:
        start = tile.to(tl.int64) * BT
        limit = tokens.to(tl.int64)
        document = find_document(bounds, documents, start)
        begin = tl.load(bounds + document).to(tl.int64)
        end = tl.load(bounds + document + 1).to(tl.int64)
    else:
        per_row = tl.cdiv(tokens, BT)
        document = tile // per_row
        begin = document.to(tl.int64) * tokens
        start = begin + tile % per_row * BT
        limit = begin + tokens
        end = limit
    return start, limit, document, begin, end


@triton.jit
def find_span(document, bounds, tokens, PACKED: tl.constexpr):
    """Return the bounds of a document."""
    if PACKED:
        begin = tl.minimum(tl.load(bounds + document), tokens).to(tl.int64)
        end = tl.minimum(tl.load(bounds + document + 1), tokens).to(tl.int64)
    else:
        begin = document.to(tl.int64) * tokens
        end = begin + tokens
    return begin, end


@triton.jit
def enter(
    token, document, begin, end, a, b, c,
    x_ptr, state_ptr, bounds, documents, channel, kept, width, HAS_STATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Return the document of the next token with its bounds, and the three inputs before that token."""
    if PACKED:
        if token == end:
            document = find_document(bounds, documents, token)
            begin = token
            end = tl.load(bounds + document + 1).to(tl.int64)
            a, b, c = load_past(x_ptr, state_ptr, token, begin, document, channel, kept, width, HAS_STATE)
    return document, begin, end, a, b, c


@triton.jit(do_not_specialize=["documents", "tokens"])
def conv_kernel(
    x_ptr, taps_ptr, state_ptr, bounds, a_ptr, b_ptr, c_ptr, last_ptr, documents, tokens, tiles, part_width,
    PARTS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, HAS_STATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write the outputs of a tile of tokens. Programs after the last tile write the new state of a document."""
    part, place, kept = find_channels(part_width, BD)
    channel, width = part * part_width + place, part_width * PARTS
    tile = tl.program_id(1)
    if tile >= tiles:
        document = tile - tiles
        begin, end = find_span(document, bounds, tokens, PACKED)
        a, b, c = load_past(x_ptr, state_ptr, end, begin, document, channel, kept, width, HAS_STATE)
        at = last_ptr + (document.to(tl.int64) * width + channel) * 3
        tl.store(at, a.to(last_ptr.dtype.element_ty), mask=kept)
        tl.store(at + 1, b.to(last_ptr.dtype.element_ty), mask=kept)
        tl.store(at + 2, c.to(last_ptr.dtype.element_ty), mask=kept)
    else:
        t0, t1, t2, t3 = load_taps(taps_ptr, channel, kept, width)
        start, limit, document, begin, end = find_tile(tile, bounds, documents, tokens, BT, PACKED)
        stop = tl.minimum(start + BT, limit)
        out_ptr = choose(part, a_ptr, b_ptr, c_ptr)
        a, b, c = load_past(x_ptr, state_ptr, start, begin, document, channel, kept, width, HAS_STATE)
        for token in range(start, stop, 4):
            four = load_four(x_ptr, token, stop, width, channel, kept)
            for i in tl.static_range(4):
                now = token + i
                document, begin, end, a, b, c = enter(
                    now, document, begin, end, a, b, c,
                    x_ptr, state_ptr, bounds, documents, channel, kept, width, HAS_STATE, PACKED,
                )  # fmt: skip
                x = four[i].to(tl.float32)
                z = t0 * a + t1 * b + t2 * c + t3 * x
                y = (z * sigmoid(z)).to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + now * part_width + place, y, mask=when(now < stop, kept))
                a, b, c = b, c, x


@triton.jit
def conv_slope(dy, z):
    """Return the gradient of z from that of SiLU(z)."""
    s = sigmoid(z)
    return dy.to(tl.float32) * s * (1.0 + z * (1.0 - s))


@triton.jit
def push(dz, first, t0, t1, t2, t3, da, db, dc, PACKED: tl.constexpr):
    """Add a token's contribution to the gradients of its four inputs: the three before it, and its own.

    `first` is the token's place in its document. Inputs before the document's first token get nothing here.
    """
    if PACKED:
        if first >= 3:
            da += t0 * dz
            db += t1 * dz
            dc += t2 * dz
        else:
            db += t1 * tl.where(first >= 2, dz, 0.0)
            dc += t2 * tl.where(first >= 1, dz, 0.0)
    else:
        da += t0 * dz
        db += t1 * dz
        dc += t2 * dz
    return da, db, dc, t3 * dz


@triton.jit(do_not_specialize=["documents", "tokens"])
def conv_backward_kernel(
    x_ptr, taps_ptr, state_ptr, bounds, a_ptr, b_ptr, c_ptr, dx_ptr, dtaps_ptr, documents, tokens, part_width,
    PARTS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, HAS_STATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a tile's inputs, and its part of the gradients of the taps.

    It reads the three tokens before the tile and the three after it.
    """
    part, place, kept = find_channels(part_width, BD)
    channel, width = part * part_width + place, part_width * PARTS
    tile = tl.program_id(1)
    t0, t1, t2, t3 = load_taps(taps_ptr, channel, kept, width)
    start, limit, document, begin, end = find_tile(tile, bounds, documents, tokens, BT, PACKED)
    stop = tl.minimum(start + BT, limit)
    dy_ptr = choose(part, a_ptr, b_ptr, c_ptr)
    a, b, c = load_past(x_ptr, state_ptr, start, begin, document, channel, kept, width, HAS_STATE)
    zero = tl.zeros([BD], tl.float32)
    da, db, dc = zero, zero, zero
    g0, g1, g2, g3 = zero, zero, zero, zero
    for token in range(start, stop, 4):
        xs = load_four(x_ptr, token, stop, width, channel, kept)
        dys = load_four(dy_ptr, token, stop, part_width, place, kept)
        for i in tl.static_range(4):
            now = token + i
            document, begin, end, a, b, c = enter(
                now, document, begin, end, a, b, c,
                x_ptr, state_ptr, bounds, documents, channel, kept, width, HAS_STATE, PACKED,
            )  # fmt: skip
            x = xs[i].to(tl.float32)
            dz = conv_slope(dys[i], t0 * a + t1 * b + t2 * c + t3 * x)
            g0 += dz * a
            g1 += dz * b
            g2 += dz * c
            g3 += dz * x
            dx, da, db, dc = push(dz, now - begin, t0, t1, t2, t3, da, db, dc, PACKED)
            at = dx_ptr + (now - 3) * width + channel
            tl.store(at, dx.to(dx_ptr.dtype.element_ty), mask=when(now - 3 >= start, kept))
            a, b, c = b, c, x
    after = start + (stop - start + 3) // 4 * 4
    xs = load_four(x_ptr, after, limit, width, channel, kept)
    dys = load_four(dy_ptr, after, limit, part_width, place, kept)
    for i in tl.static_range(3):
        now = after + i
        document, begin, end, a, b, c = enter(
            now, document, begin, end, a, b, c,
            x_ptr, state_ptr, bounds, documents, channel, kept, width, HAS_STATE, PACKED,
        )  # fmt: skip
        x = xs[i].to(tl.float32)
        dz = conv_slope(dys[i], t0 * a + t1 * b + t2 * c + t3 * x)
        dx, da, db, dc = push(dz, now - begin, t0, t1, t2, t3, da, db, dc, PACKED)
        at = dx_ptr + (now - 3) * width + channel
        tl.store(at, dx.to(dx_ptr.dtype.element_ty), mask=when((now - 3 >= start) & (now - 3 < stop), kept))
        a, b, c = b, c, x
    at = dtaps_ptr + tile.to(tl.int64) * 4 * width + channel
    tl.store(at, g0, mask=kept)
    tl.store(at + width, g1, mask=kept)
    tl.store(at + 2 * width, g2, mask=kept)
    tl.store(at + 3 * width, g3, mask=kept)


@triton.jit(do_not_specialize=["tokens"])
def conv_state_backward_kernel(
    x_ptr, taps_ptr, state_ptr, bounds, a_ptr, b_ptr, c_ptr, dlast_ptr, dx_ptr, dstate_ptr, tokens, part_width,
    PARTS: tl.constexpr, BD: tl.constexpr, HAS_STATE: tl.constexpr, HAS_DLAST: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a document's old state, and add that of its new state to the inputs that it contains."""
    part, place, kept = find_channels(part_width, BD)
    channel, width = part * part_width + place, part_width * PARTS
    document = tl.program_id(1)
    begin, end = find_span(document, bounds, tokens, PACKED)
    at = (document.to(tl.int64) * width + channel) * 3
    if HAS_STATE:
        t0, t1, t2, t3 = load_taps(taps_ptr, channel, kept, width)
        dy_ptr = choose(part, a_ptr, b_ptr, c_ptr)
        a, b, c = load_past(x_ptr, state_ptr, begin, begin, document, channel, kept, width, HAS_STATE)
        x0, x1, x2, _ = load_four(x_ptr, begin, end, width, channel, kept)
        dy0, dy1, dy2, _ = load_four(dy_ptr, begin, end, part_width, place, kept)
        x0, x1, x2 = x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32)
        dz0 = conv_slope(dy0, t0 * a + t1 * b + t2 * c + t3 * x0)
        dz1 = conv_slope(dy1, t0 * b + t1 * c + t2 * x0 + t3 * x1)
        dz2 = conv_slope(dy2, t0 * c + t1 * x0 + t2 * x1 + t3 * x2)
        da = t0 * dz0
        db = t1 * dz0 + t0 * dz1
        dc = t2 * dz0 + t1 * dz1 + t0 * dz2
        if HAS_DLAST:
            seen = end - begin
            from_last = dlast_ptr + at - seen
            da += tl.load(from_last, mask=when(seen <= 0, kept), other=0.0).to(tl.float32)
            db += tl.load(from_last + 1, mask=when(seen <= 1, kept), other=0.0).to(tl.float32)
            dc += tl.load(from_last + 2, mask=when(seen <= 2, kept), other=0.0).to(tl.float32)
        tl.store(dstate_ptr + at, da.to(dstate_ptr.dtype.element_ty), mask=kept)
        tl.store(dstate_ptr + at + 1, db.to(dstate_ptr.dtype.element_ty), mask=kept)
        tl.store(dstate_ptr + at + 2, dc.to(dstate_ptr.dtype.element_ty), mask=kept)
    if HAS_DLAST:
        for i in tl.static_range(3):
            token = end - 3 + i
            mine = when(token >= begin, kept)
            dx_at = dx_ptr + token * width + channel
            dx = tl.load(dx_at, mask=mine, other=0.0).to(tl.float32)
            dx += tl.load(dlast_ptr + at + i, mask=mine, other=0.0).to(tl.float32)
            tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask=mine)


def conv_grid(x: Tensor, parts: int, cu_seqlens: Tensor | None, tile: int) -> tuple[int, int, int]:
    """Return the numbers of blocks of channels, tiles of tokens, and documents."""
    batch, tokens, width = x.shape
    documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
    return parts * triton.cdiv(width // parts, CHANNELS), batch * triton.cdiv(tokens, tile), documents


def in_rows_of_taps(taps: Tensor) -> Tensor:
    """Return taps [D, 1, W] as [W, D] in float32, so that a thread's channels are contiguous."""
    rows = torch.empty(taps.shape[-1], len(taps), dtype=torch.float32, device=taps.device)
    return rows.copy_(taps.squeeze(1).t())


def conv_forward(x: Tensor, taps: Tensor, parts: int, state: Tensor | None, cu_seqlens: Tensor | None):
    """Return the output of each part and the new state, for contiguous x and state."""
    batch, tokens, width = x.shape
    blocks, tiles, documents = conv_grid(x, parts, cu_seqlens, TILE)
    shape = (batch, tokens, width // parts)
    out = [torch.empty(shape, dtype=x.dtype, device=x.device) for _ in range(parts)]
    last = torch.empty(documents, width, TAPS - 1, dtype=x.dtype, device=x.device)
    conv_kernel[(blocks, tiles + documents)](
        x, in_rows_of_taps(taps), state, cu_seqlens, *fill(out), last, documents, tokens, tiles, width // parts,
        PARTS=parts, BT=TILE, BD=CHANNELS, HAS_STATE=state is not None, PACKED=cu_seqlens is not None, num_warps=1,
    )  # fmt: skip
    return out, last


def fill(parts: list[Tensor]) -> list[Tensor]:
    return [*parts, *parts[-1:] * (MAX_PARTS - len(parts))]


class _ShortConvSplit(torch.autograd.Function):
    """Convolution with gradients. Saves only its inputs."""

    @staticmethod
    def forward(ctx, x, taps, parts, state, cu_seqlens):
        ctx.save_for_backward(x, taps, state, cu_seqlens)
        ctx.set_materialize_grads(False)
        out, last = conv_forward(x, taps, parts, state, cu_seqlens)
        return *out, last

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        x, taps, state, cu_seqlens = ctx.saved_tensors
        *dys, dlast = gradients
        parts, (batch, tokens, width) = len(dys), x.shape
        shape, numbers = (batch, tokens, width // parts), {"dtype": x.dtype, "device": x.device}
        dys = fill([torch.zeros(shape, **numbers) if dy is None else dy.contiguous() for dy in dys])
        blocks, tiles, documents = conv_grid(x, parts, cu_seqlens, TILE_BACKWARD)
        dx, rows = torch.empty_like(x), in_rows_of_taps(taps)
        dtaps = torch.empty(tiles, TAPS, width, dtype=torch.float32, device=x.device)
        call = (x, rows, state, cu_seqlens, *dys)
        packed = {"HAS_STATE": state is not None, "PACKED": cu_seqlens is not None}
        conv_backward_kernel[(blocks, tiles)](
            *call, dx, dtaps, documents, tokens, width // parts,
            PARTS=parts, BT=TILE_BACKWARD, BD=CHANNELS, **packed, num_warps=1,
        )  # fmt: skip
        dstate = None if state is None else torch.empty_like(state)
        if ctx.needs_input_grad[3] or dlast is not None:
            dlast = None if dlast is None else dlast.contiguous()
            conv_state_backward_kernel[(blocks, documents)](
                *call, dlast, dx, dstate, tokens, width // parts,
                PARTS=parts, BD=CHANNELS, **packed, HAS_DLAST=dlast is not None, num_warps=1,
            )  # fmt: skip
        return dx, dtaps.sum(0).t().unsqueeze(1).to(taps.dtype), None, dstate, None


def short_conv_split(
    x: Tensor, taps: Tensor, parts: int, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """Compute `deltify.ops.short_conv_split` for W = TAPS and up to MAX_PARTS parts."""
    x, state = x.contiguous(), None if state is None else state.to(x.dtype).contiguous()
    if wants_gradients(x, taps, state):
        *out, last = _ShortConvSplit.apply(x, taps, parts, state, cu_seqlens)
        return out, last
    return conv_forward(x, taps, parts, state, cu_seqlens)

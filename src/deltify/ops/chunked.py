"""Compute KDA in chunks by matrix products in PyTorch: the CPU backend, and the fallback on any device.

A chunk of C tokens needs, for every pair j <= i, the product of row i and column j decayed by exp(g_{j+1} + ... + g_i).
To use matrix products, the decay is split at an anchor into a factor for the row and one for the column. No single
anchor serves all pairs: with a log-decay of -50 per token one factor would overflow. So the chunk is halved again and
again. The boundary between a left half and the right half next to it lies between all their pairs. Both factors,
exp(sum from the boundary to i) and exp(sum from j to the boundary), are then at most 1, for any log-decay.

Factors of larger halves are products of those of smaller ones. So each gate needs one exponential, and a strong decay
does not cost its neighbours precision. The backward pass walks the same halves, and adds gradients of the log-decays
without subtracting two of them.

Notation per chunk (n = chunks x heads; state S is [K, V]; q and k normalised, q scaled):
    P = lower(q k^T decayed)          M = strictly lower(k k^T decayed)      T = (I + beta M)^-1
    x = v - (k e^G) S                 u = T (beta x)                         o = (q e^G) S + P u
    S' = e^{G_C} S + (k e^{G_C - G})^T u
Kimi Linear, arXiv 2510.26692, section 3; the halving is explained in docs/explanation/operator.md.

Legend: B batch, T tokens, H heads, K key width, V value width, C chunk, N documents, n chunks x heads.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .reference import L2NORM_EPS, document_spans, log_decay

CHUNK = 64
# elements of one work tensor: few enough for the caches of a CPU, enough to fill a GPU
SEGMENT_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}


def kda_chunked(q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound, scale):
    """Return output and final state of KDA. Arguments are those of `deltify.ops.kda` with defaults filled in.

    The sequence is processed in segments of chunks. Only the inputs and the states between segments are saved: the
    backward pass computes each segment again.
    """
    return _Chunked.apply(q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound, scale)


@dataclass(frozen=True)
class Segment:
    """Some consecutive chunks of every document, and the tokens in them.

    Chunks are ordered by their place in the document, and longer documents come first. The chunks of one step of the
    scan and their states are then both leading slices.
    """

    chunk: int
    counts: list[int]  # number of documents that still have a chunk, for each step
    tokens: slice  # tokens of every sequence, if none needs padding, so that views serve
    source: Tensor | None  # otherwise [chunks * C]: index into the flattened input [B * T], -1 for padding

    def split(self, x_BTH: Tensor) -> Tensor:
        """Return [B, T, H, ...] as [chunks, H, C, ...] with zeros for padding. It is a view if possible."""
        if self.source is None:
            y = x_BTH[:, self.tokens].unflatten(1, (-1, self.chunk)).transpose(0, 1).transpose(2, 3)
            return y.squeeze(1) if x_BTH.shape[0] == 1 else y.flatten(0, 1)
        rows = x_BTH.flatten(0, 1)[self.source.clamp(min=0)]
        rows[self.source < 0] = 0
        return rows.unflatten(0, (-1, self.chunk)).transpose(1, 2)

    def join(self, y_nC: Tensor, out_BTH: Tensor) -> None:
        """Write [chunks * H, C, ...] into the tokens of this segment in [B, T, H, ...]."""
        batch, _, heads = out_BTH.shape[:3]
        if self.source is None:
            x = y_nC.unflatten(0, (-1, batch, heads)).transpose(2, 3).transpose(0, 1)
            out_BTH[:, self.tokens].unflatten(1, (-1, self.chunk)).copy_(x)
        else:
            x = y_nC.unflatten(0, (-1, heads)).transpose(1, 2).flatten(0, 1)
            out_BTH.flatten(0, 1)[self.source[self.source >= 0]] = x[self.source >= 0].to(out_BTH.dtype)


def make_segments(q_BTHK: Tensor, cu_seqlens: Tensor | None) -> tuple[list[Segment], Tensor]:
    """Return the segments of all sequences or documents, and the document of each state in the scan, [N]."""
    batch, tokens, heads, width = q_BTHK.shape
    spans = document_spans(batch, tokens, cu_seqlens)
    longest = max(end - start for _, start, end in spans)
    chunk = min(CHUNK, 1 << max(longest - 1, 0).bit_length())
    steps_of = [-(-(end - start) // chunk) for _, start, end in spans]
    order = sorted(range(len(spans)), key=lambda n: -steps_of[n])
    counts = [sum(steps > step for steps in steps_of) for step in range(max(steps_of))]
    first = torch.tensor([spans[n][0] * tokens + spans[n][1] for n in order])
    end = torch.tensor([spans[n][0] * tokens + spans[n][2] for n in order])
    whole = cu_seqlens is None and tokens % chunk == 0
    limit = SEGMENT_ELEMENTS.get(q_BTHK.device.type, SEGMENT_ELEMENTS["cpu"])

    segments, start = [], 0
    while start < len(counts):
        stop = start + max(1, limit // (counts[start] * heads * chunk * width))
        steps = range(start, min(stop, len(counts)))
        source = None
        if not whole:
            slots = [first[: counts[step], None] + step * chunk + torch.arange(chunk) for step in steps]
            filled = [slot < end[: len(slot), None] for slot in slots]
            source = torch.cat(slots).masked_fill(~torch.cat(filled), -1).flatten().to(q_BTHK.device)
        segments.append(Segment(chunk, counts[start:stop], slice(start * chunk, stop * chunk), source))
        start = stop
    return segments, torch.tensor(order, device=q_BTHK.device)


def right_half(x: Tensor, half: int) -> Tensor:
    """Return a view of the right halves of all spans of 2 * half tokens, [n, C / (2 half), half, ...]."""
    return x.unflatten(1, (-1, 2, half))[:, :, 1]


def left_half(x: Tensor, half: int) -> Tensor:
    """Return a view of the left halves."""
    return x.unflatten(1, (-1, 2, half))[:, :, 0]


def span_blocks(matrix_nCC: Tensor, half: int) -> Tensor:
    """Return a view of the diagonal blocks (right half, left half), [n, C / (2 half), half, half]."""
    spans = matrix_nCC.unflatten(2, (-1, 2 * half)).unflatten(1, (-1, 2 * half))
    return spans.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)[:, :, half:, :half]


def flush_tiny(factor: Tensor) -> None:
    """Set float32 decay factors below 1e-30 to zero. They do not affect any sum, and denormals are slow."""
    if factor.dtype == torch.float32:
        torch.threshold_(factor, 1e-30, 0.0)


@dataclass
class Chunks:
    """The inputs of the scan for all chunks. Names are those of the module's notation."""

    q: Tensor  # [n, C, K]
    k: Tensor
    v: Tensor  # [n, C, V]
    beta: Tensor  # [n, C, 1]
    from_start: Tensor  # [n, C, K] exp(g_1 + ... + g_i)
    to_end: Tensor  # [n, C, K] exp(g_{i+1} + ... + g_C)
    levels: list[tuple[Tensor, Tensor]]  # row and column factors for half = 1, 2, 4 ...; empty unless kept
    P: Tensor
    M: Tensor
    T: Tensor
    decayed: Tensor  # [n, 2 C, K] rows of q e^G and of k e^G in turn
    k_end: Tensor  # [n, C, K] k e^{G_C - G}


def prepare(qk_nC2K: Tensor, v: Tensor, g: Tensor, beta: Tensor, keep_levels: bool) -> Chunks:
    """Compute everything that does not depend on the state, in parallel over chunks.

    g is overwritten, and so are q and k unless `keep_levels`.
    """
    n, chunk = qk_nC2K.shape[:2]
    q, k = qk_nC2K.unbind(2)
    products = qk_nC2K.new_zeros(n, chunk, 2, chunk)  # rows of P and of M in turn
    P, M = products.unbind(2)
    P.diagonal(dim1=1, dim2=2).copy_((q * k).sum(-1))
    from_start, to_end = g.exp_(), torch.ones_like(g)
    levels, half = [], 1
    while half < chunk:
        row_factor, col_factor = right_half(from_start, half), left_half(to_end, half)
        rows = right_half(qk_nC2K, half) * row_factor.unsqueeze(3)
        cols = left_half(k, half) * col_factor if half > 1 else left_half(k, half).contiguous()
        pairs = (rows.flatten(2, 3) @ cols.transpose(-1, -2)).unflatten(2, (half, 2))
        span_blocks(P, half).copy_(pairs[:, :, :, 0])
        span_blocks(M, half).copy_(pairs[:, :, :, 1])
        if keep_levels:
            levels.append((row_factor.clone(), col_factor.clone()))
        left_total, right_total = left_half(from_start, half)[:, :, -1:].clone(), row_factor[:, :, -1:].clone()
        flush_tiny(row_factor.mul_(left_total))
        flush_tiny(col_factor.mul_(right_total))
        half *= 2
    eye = torch.eye(chunk, dtype=M.dtype, device=M.device).expand_as(M)
    T = torch.linalg.solve_triangular(beta * M, eye, upper=False, unitriangular=True)
    k_end = to_end.mul_(k) if not keep_levels else k * to_end
    scaled = torch.mul(qk_nC2K, from_start.unsqueeze(2), out=None if keep_levels else qk_nC2K)
    return Chunks(q, k, v, beta, from_start, to_end, levels, P, M, T, scaled.flatten(1, 2), k_end)


def scan(c: Chunks, S: Tensor, counts: list[int], heads: int, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run over the chunks in order. S [N * H, K, V] becomes the final state in place.

    Returns:
        (o, u, x, states before each chunk). The last two are empty unless `keep`.
    """
    end_decay = c.from_start[:, -1].unsqueeze(-1)
    o, u = torch.empty_like(c.v), torch.empty_like(c.v)
    read = c.v.new_empty(len(S), 2 * c.v.shape[1], c.v.shape[2])
    x_all = torch.empty_like(c.v) if keep else c.v.new_empty(0)
    states = S.new_empty(len(c.v), *S.shape[1:]) if keep else S.new_empty(0)
    begin = 0
    for count in counts:
        now = slice(begin, begin + count * heads)
        begin = now.stop
        state = S[: count * heads]
        q_read, k_read = torch.bmm(c.decayed[now], state, out=read[: len(state)]).unflatten(1, (-1, 2)).unbind(2)
        x = c.v[now] - k_read
        if keep:
            x_all[now], states[now] = x, state
        torch.bmm(c.T[now], x.mul_(c.beta[now]), out=u[now])
        torch.baddbmm(q_read, c.P[now], u[now], out=o[now])
        state.mul_(end_decay[now]).baddbmm_(c.k_end[now].transpose(1, 2), u[now])
    return o, u, x_all, states


def scan_backward(c: Chunks, do: Tensor, dS: Tensor, S: Tensor, u: Tensor, counts: list[int], heads: int):
    """Run over the chunks in reverse. dS [N * H, K, V] turns from the final state's gradient into the initial one's.

    Returns:
        y = T^T du [n, C, V], and the gradients of k e^{G_C - G} [n, C, K] and of e^{G_C} [n, K].
    """
    decayed_q, decayed_k = c.decayed.unflatten(1, (-1, 2)).unbind(2)
    y, dk_end = torch.empty_like(u), torch.empty_like(c.from_start)
    d_end_decay = torch.empty_like(c.from_start[:, 0])
    begin = sum(counts) * heads
    for count in reversed(counts):
        now = slice(begin - count * heads, begin)
        begin = now.start
        dstate = dS[: count * heads]
        torch.bmm(u[now], dstate.transpose(1, 2), out=dk_end[now])
        torch.sum(dstate * S[now], -1, out=d_end_decay[now])
        du = torch.bmm(c.k_end[now], dstate).baddbmm_(c.P[now].transpose(1, 2), do[now])
        torch.bmm(c.T[now].transpose(1, 2), du, out=y[now])
        dstate.mul_(c.from_start[now, -1].unsqueeze(-1)).baddbmm_(decayed_q[now].transpose(1, 2), do[now])
        dstate.baddbmm_(decayed_k[now].transpose(1, 2), c.beta[now] * y[now], alpha=-1)
    return y, dk_end, d_end_decay


def chunk_gradients(c: Chunks, do: Tensor, dS: Tensor, S0: Tensor, counts: list[int], heads: int):
    """Return gradients of normalised q and k, of v, g and beta. dS becomes the initial state's gradient in place."""
    _, u, x, states = scan(c, S0, counts, heads, keep=True)
    y, dk_end, d_end_decay = scan_backward(c, do, dS, states, u, counts, heads)
    dL = (y @ u.transpose(1, 2)).tril_(-1).neg_()
    dP = do @ u.transpose(1, 2)
    dbeta = (y * x).sum(-1) + (dL * c.M).sum(-1)
    dv, dM = y.mul_(c.beta), dL.mul_(c.beta)
    dq = (do @ states.transpose(1, 2)).mul_(c.from_start)
    dk = (dv @ states.transpose(1, 2)).mul_(c.from_start).neg_()
    dk_end *= c.to_end
    # gradients of the exponents: sums of log-decays from the chunk's start, and sums to its end
    dprefix = (dq * c.q).addcmul_(dk, c.k)
    dprefix[:, -1].addcmul_(d_end_decay, c.from_start[:, -1])
    dsuffix = dk_end * c.k
    diagonal = dP.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    dq.addcmul_(diagonal, c.k)
    dk.add_(dk_end).addcmul_(diagonal, c.q)
    pair_gradients(c, dP, dM, dq, dk, dprefix, dsuffix)
    return dq, dk, dv, dprefix, dbeta


def pair_gradients(c: Chunks, dP: Tensor, dM: Tensor, dq: Tensor, dk: Tensor, dprefix: Tensor, dsuffix: Tensor) -> None:
    """Add the gradients through P and M to dq and dk, and turn `dprefix` into the gradient of g, in place.

    It undoes the halving of `prepare` from the largest halves down. In the right half of a span, the sum from the
    span's start is the left half's whole sum plus the sum from the boundary. Sums to the end are likewise.
    """
    for row_factor, col_factor in reversed(c.levels):
        half = row_factor.shape[2]
        left_half(dprefix, half)[:, :, -1] += right_half(dprefix, half).sum(2)
        right_half(dprefix, half)[:, :, -1] += left_half(dsuffix, half).sum(2)
        cols = left_half(c.k, half) * col_factor
        dcols = torch.zeros_like(cols)
        for matrix, x, dx in ((dP, c.q, dq), (dM, c.k, dk)):
            block = span_blocks(matrix, half)
            drows = (block @ cols).mul_(row_factor)
            right_half(dx, half).add_(drows)
            right_half(dprefix, half).addcmul_(drows, right_half(x, half))
            dcols += block.transpose(-1, -2) @ (right_half(x, half) * row_factor)
        dcols *= col_factor
        left_half(dk, half).add_(dcols)
        left_half(dsuffix, half).addcmul_(dcols, left_half(c.k, half))


class Inputs:
    """The raw inputs of a segment in chunk layout, and the conversion of their gradients."""

    def __init__(self, segment: Segment, q, k, v, f, b, A_log, dt_bias, lower_bound, scale):
        work = torch.promote_types(v.dtype, torch.float32)
        q, k, v, f, b = (segment.split(x) for x in (q, k, v, f, b))
        chunks, heads, chunk, width = q.shape
        self.lower_bound, self.scale = lower_bound, scale
        self.rate, self.bias = A_log.to(work).exp().view(-1, 1, 1), dt_bias.to(work).view(heads, 1, width)
        self.inverse_norms = [inverse_norm(x, work) for x in (q, k)]
        qk = torch.empty(chunks, heads, chunk, 2, width, dtype=work, device=q.device)
        torch.mul(q, self.inverse_norms[0] * scale, out=qk[..., 0, :])
        torch.mul(k, self.inverse_norms[1], out=qk[..., 1, :])
        self.qk = qk.flatten(0, 1)
        self.v = v.to(work).reshape(-1, chunk, v.shape[-1])
        self.f = f.to(work)
        g = log_decay(self.f, self.rate, self.bias, lower_bound)
        self.padding = None if segment.source is None else (segment.source < 0).view(-1, 1, chunk, 1)
        if self.padding is not None:
            g = g.masked_fill(self.padding, 0.0)
        self.g = g.reshape(-1, chunk, width)
        self.b = b.to(work).reshape(-1, chunk)

    def chunks(self, keep_levels: bool) -> Chunks:
        g = self.g.clone() if keep_levels else self.g
        return prepare(self.qk, self.v, g, torch.sigmoid(self.b).unsqueeze(-1), keep_levels)

    def qk_gradient(self, which: int, dy: Tensor) -> Tensor:
        """Return the gradient of raw q (0) or k (1) from that of the normalised, scaled one. dy is overwritten."""
        y = self.qk[:, :, which]
        inverse = self.inverse_norms[which].reshape(*y.shape[:2], 1)
        if which == 0:
            dy *= self.scale
            y = y / self.scale
        return dy.addcmul_(y, (y * dy).sum(-1, keepdim=True), value=-1).mul_(inverse)

    def b_gradient(self, dbeta: Tensor) -> Tensor:
        # not 1 - sigmoid(b), which would lose all digits at large b
        return dbeta * torch.sigmoid(self.b) * torch.sigmoid(-self.b)

    def gate_gradients(self, dg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of f [n, C, K], A_log [H] and dt_bias [H * K]."""
        dg = dg.view(self.f.shape)
        if self.padding is not None:
            dg = dg.masked_fill(self.padding, 0.0)
        x = self.f + self.bias
        if self.lower_bound is None:
            dA_log = (dg * self.g.view(dg.shape)).sum((0, 2, 3))
            dx = torch.sigmoid(x).mul_(dg).mul_(-self.rate)
        else:
            z = self.rate * x
            dz = self.lower_bound * torch.sigmoid(z) * torch.sigmoid(-z) * dg
            dA_log = (dz * z).sum((0, 2, 3))
            dx = self.rate * dz
        return dx.flatten(0, 1), dA_log, dx.sum((0, 2)).flatten()


def inverse_norm(x: Tensor, work: torch.dtype) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=work).square_().add_(L2NORM_EPS).rsqrt_()


def full_precision(method: Callable[..., Any]) -> Callable[..., Any]:
    """Disable autocast in a method, because the operator chooses its own precision."""

    @functools.wraps(method)
    def wrapped(ctx, *tensors):
        with torch.autocast(tensors[0].device.type, enabled=False):
            return method(ctx, *tensors)

    return wrapped


class _Chunked(torch.autograd.Function):
    @staticmethod
    @full_precision
    def forward(ctx, q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, lower_bound, scale):
        work, heads = torch.promote_types(v.dtype, torch.float32), q.shape[2]
        segments, order = make_segments(q, cu_seqlens)
        o, final = torch.empty_like(v), torch.empty_like(state)
        S = state[order].to(work).flatten(0, 1)
        keep_states = any(ctx.needs_input_grad)
        between = []
        for segment in segments:
            between.append(S.clone() if keep_states else S)
            x = Inputs(segment, q, k, v, f, b, A_log, dt_bias, lower_bound, scale)
            segment.join(scan(x.chunks(False), S, segment.counts, heads, keep=False)[0], o)
        final[order] = S.unflatten(0, (-1, heads)).to(final.dtype)
        ctx.save_for_backward(q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, *between)
        ctx.lower_bound, ctx.scale = lower_bound, scale
        return o, final

    @staticmethod
    @full_precision
    def backward(ctx, *gradients: Tensor):
        do, dfinal = gradients
        q, k, v, f, b, A_log, dt_bias, state, cu_seqlens, *between = ctx.saved_tensors
        work, heads = torch.promote_types(v.dtype, torch.float32), q.shape[2]
        segments, order = make_segments(q, cu_seqlens)
        dq, dk, dv, df, db = (torch.empty_like(t) for t in (q, k, v, f, b))
        dA_log, ddt_bias = (torch.zeros_like(t, dtype=work) for t in (A_log, dt_bias))
        dstate = torch.empty_like(state)
        dS = dfinal[order].to(work).flatten(0, 1)
        for segment, S in zip(reversed(segments), reversed(between)):
            x = Inputs(segment, q, k, v, f, b, A_log, dt_bias, ctx.lower_bound, ctx.scale)
            do_chunks = segment.split(do).to(work).reshape(x.v.shape)
            gq, gk, gv, gg, gbeta = chunk_gradients(x.chunks(True), do_chunks, dS, S.clone(), segment.counts, heads)
            gf, gA_log, gdt_bias = x.gate_gradients(gg)
            segment.join(x.qk_gradient(0, gq), dq)
            segment.join(x.qk_gradient(1, gk), dk)
            segment.join(gv, dv)
            segment.join(gf, df)
            segment.join(x.b_gradient(gbeta), db)
            dA_log += gA_log
            ddt_bias += gdt_bias
        dstate[order] = dS.unflatten(0, (-1, heads)).to(dstate.dtype)
        return dq, dk, dv, df, db, dA_log.to(A_log.dtype), ddt_bias.to(dt_bias.dtype), dstate, None, None, None

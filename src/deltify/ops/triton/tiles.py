"""Functions of several kernels: the place of a chunk, the log-decay and its sums, and spans of tokens.

Legend: B batch, T tokens, H heads, K key width, V value width, C tokens of a chunk, N documents (sequences, or packed).
"""

import functools

import torch
import triton
import triton.language as tl

from ..reference import L2NORM_EPS

CHUNK = tl.constexpr(64)
EPS = tl.constexpr(L2NORM_EPS)
LOG2E = tl.constexpr(1.4426950408889634)
# log2 of the largest factor of a span with one anchor, by the range of the products' data type
SAFE_EXPONENT = tl.constexpr(100.0)
SAFE_EXPONENT_FP16 = tl.constexpr(4.0)


@triton.jit
def locate(unit, bounds, documents, tokens, size, LEAST: tl.constexpr, PACKED: tl.constexpr, N2: tl.constexpr):
    """Return the document of a unit (a chunk or segment of `size` tokens), its place there, and the document's bounds.

    Every document has at least LEAST units. The document is -1 for a unit after the last.
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
    """Return the number of units of all documents before this one."""
    if PACKED:
        n = tl.arange(0, N2)
        begins = tl.minimum(tl.load(bounds + n, mask=n < document, other=0), tokens)
        ends = tl.minimum(tl.load(bounds + n + 1, mask=n < document, other=0), tokens)
        return tl.sum(tl.where(n < document, tl.maximum(tl.cdiv(ends - begins, size), LEAST), 0), 0)
    else:
        return document * tl.maximum(tl.cdiv(tokens, size), LEAST)


@triton.jit
def log2_decay(f, bias, rate, lower_bound, BOUNDED: tl.constexpr):
    """Return the base-2 logarithm of the decay from decay logits; `rate` = exp(A_log)."""
    if BOUNDED:
        return 1.0 / (1.0 + tl.exp2((f + bias) * (rate * -LOG2E))) * lower_bound * LOG2E
    else:
        x = f * LOG2E + bias * LOG2E  # softplus in base 2: max(x, 0) + log2(1 + 2^-|x|)
        e = tl.exp2(-tl.abs(x))
        # log2(1 + e) = e p(e), with p fitted at Chebyshev nodes of [0, 1]: relative error 3e-7, also for small e
        p = e * -0.012370643 + 0.063787594
        p = p * e - 0.155599967
        p = p * e + 0.256179690
        p = p * e - 0.353454679
        p = p * e + 0.480073750
        p = p * e - 0.721310735
        p = p * e + 1.442694783
        return -rate * (tl.maximum(x, 0.0) + e * p)


@triton.jit
def table(tables, n, C: tl.constexpr):
    """Return matrix n of `make_tables`, or of other contiguous matrices.

    Loading 8 KB from a cache is cheaper than computing 64 x 64 comparisons.
    """
    return tl.load(tables + n * C * C + tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :])


@triton.jit
def gate_tile(x, bias, rate, have, lower_bound, BOUNDED: tl.constexpr, D: tl.constexpr):
    """Return the log-decays of a chunk, rounded to the data type D in which the matrix units sum them.

    float16 holds them 8 times finer than bfloat16 holds the logits x. Decays below 2^-48 become 2^-48: a float32 sum
    with a neighbour would not show the difference.
    """
    g = tl.maximum(log2_decay(x, bias, rate, lower_bound, BOUNDED), -48.0)
    return tl.where(have, g, 0.0).to(D)


@triton.jit
def sums(total, signs, x):
    """Return total + signs @ x for signs [C, C] of -1, 0 and 1.

    x is split into a high and a low part, so that the result is precise enough for sums over all tokens.
    """
    W: tl.constexpr = signs.dtype
    high = x.to(W)
    low = (x - high.to(tl.float32)).to(W)
    return tl.dot(signs, low, tl.dot(signs, high, total, input_precision="ieee"), input_precision="ieee")


@triton.jit
def span_factors(X, once):
    """Return decay factors of rows and of columns from X, the log-decay from the middle of their span.

    With `once` they serve all pairs of a span. Otherwise they serve those across its middle, and are at most 1.
    """
    shrunk = -tl.abs(X)
    return tl.exp2(tl.where(once, X, shrunk)), tl.exp2(tl.where(once, -X, shrunk))


@triton.jit
def sigmoid(x):
    # rsqrt is one instruction, a division many
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2E))
    return root * root


# ---- tables ----------------------------------------------------------------------------------------------------------

LEVELS = tl.constexpr(6)  # spans of 64, 32 ... 2 tokens
# Index of the first matrix of each kind: sums, and pairs of tokens. Kinds from FROM_MIDDLE have a matrix for each
# level. Kinds from ACROSS have LEVELS more, for spans with one anchor for all pairs. A product with EYE moves a loaded
# tile to the registers in which matrix units leave their results, which is far cheaper than a change of layout.
THROUGH, AFTER, BEFORE, FROM, EYE, FROM_MIDDLE, ACROSS, PAIRS, PAIRS_T = (
    tl.constexpr(n) for n in (0, 1, 2, 3, 4, 5, 11, 23, 35)
)


@functools.cache
def make_tables(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return the matrices [47, C, C] of -1, 0 and 1 by which the kernels sum and select; i is the row, j the column.

    FROM_MIDDLE: sums of log-decays between a token and the middle of its span. ACROSS: sums, for the gradient of each
    gate, over rows from its token on and columns before it. PAIRS: pairs j < i of a span, all or those across its
    middle. PAIRS_T: their transposes.
    """
    C = CHUNK.value
    i, j = torch.arange(C)[:, None], torch.arange(C)[None, :]
    signs, across, across_once, pairs, pairs_once = [], [], [], [], []
    for half in (C // 2 >> n for n in range(LEVELS.value)):
        middle = i // (2 * half) * (2 * half) + half - 1  # the last token of the left half
        same_span, same_half = (i ^ j) < 2 * half, (i ^ j) < half
        signs.append((j <= i).float() - (j <= middle).float())
        across.append(same_half & torch.where(i > middle, j >= i, j < i))
        across_once.append(same_span & (j >= i))
        pairs.append(same_span & ~same_half & (j < i))
        pairs_once.append(same_span & (j < i))
    pairs += pairs_once
    all_of_them = [j <= i, j > i, j < i, j >= i, i == j, *signs, *across, *across_once, *pairs, *(x.T for x in pairs)]
    return torch.stack([x.float() for x in all_of_them]).to(device, dtype)


def gate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the data type in which log-decays are summed, see `gate_tile`."""
    return torch.float32 if dtype == torch.float32 else torch.float16


def wants_gradients(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)

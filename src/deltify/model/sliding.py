"""Attention to a sliding window and to sinks, the first tokens of a document (StreamingLLM, arXiv 2309.17453).

The query at position t sees the last W tokens, itself included, at their true distances. It sees the first S tokens as
if its own position was min(t, S + W - 1). No rotation thus exceeds the size of the cache, and a text may be longer than
the model's context window. A sink inside the window counts once, so that the first S + W tokens of a document get plain
causal attention.

Legend: B sequences, N tokens of all documents, D documents, H query heads, G key/value heads, K head width, W window,
S sinks, M slots, R blocks of C queries, each of which sees J = C + W - 1 keys.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half

from .cache import SinkLayer

QUERIES_AT_A_TIME = 2048  # limits the memory of the scores

Rotary = tuple[Tensor, Tensor]  # cosine and sine of positions 0, 1, ..., each [positions, K]


@dataclass(frozen=True)
class Slots:
    """Places of cached and new tokens in one sequence of M slots: for each document its cached window, then its tokens.

    `place` and `past` are None without a cache. There are then no slots for cached tokens, and slot n is token n.
    """

    place: Tensor | None  # [N], slot of each new token
    past: Tensor | None  # [D, W - 1], slots of each document's cached window
    document: Tensor  # [M], document of each slot
    position: Tensor  # [M], position of each slot in its document; negative for places of the cache that are not in use
    sink: Tensor  # [D, S], slots of the sinks
    sink_is_new: Tensor  # [D, S], whether the sinks are new tokens and not in the cache yet
    tail: Tensor  # [D, W - 1], slots of each document's last tokens, which the cache keeps
    lengths: Tensor  # [D], number of new tokens of each document

    def to(self, device: torch.device) -> "Slots":
        """accelerate calls this where a model is spread over devices."""
        moved: dict[str, Any] = {name: None if x is None else x.to(device) for name, x in vars(self).items()}
        return Slots(**moved)

    def put(self, past_DPGK: Tensor, x_NGK: Tensor) -> Tensor:
        """Return cached windows and new tokens in their slots, [M, G, K]."""
        assert self.past is not None and self.place is not None
        slots = x_NGK.new_empty(len(self.position), *x_NGK.shape[1:])
        slots = slots.index_copy(0, self.past.flatten(), past_DPGK.flatten(0, 1).to(slots.dtype))
        return slots.index_copy(0, self.place, x_NGK)


def find_slots(bounds: Tensor, tokens: int, window: int, sinks: int, seen: Tensor | None = None) -> Slots:
    """Return the slots of a pass.

    Args:
        bounds: Bounds of the documents, [D + 1].
        tokens: Number of new tokens, N.
        window: W.
        sinks: S.
        seen: Number of earlier tokens of each document, [D]. None without a cache.
    """
    lengths, device = bounds.diff(), bounds.device
    documents = torch.arange(len(lengths), device=device)
    room = 0 if seen is None else window - 1
    first = bounds[:-1] + room * documents
    before = torch.zeros_like(lengths) if seen is None else seen
    origin = first + room - before  # slot of position 0; outside the document's slots if it left the window
    total = tokens + room * len(lengths)
    document = documents.repeat_interleave(lengths + room, output_size=total)
    sink = torch.arange(sinks, device=device)
    place = past = None
    if seen is not None:
        place = torch.arange(tokens, device=device)
        place = place + room * (1 + documents.repeat_interleave(lengths, output_size=tokens))
        past = first[:, None] + torch.arange(room, device=device)
    return Slots(
        place=place,
        past=past,
        document=document,
        position=torch.arange(total, device=device) - origin[document],
        sink=(origin[:, None] + sink).clamp(0, total - 1),
        sink_is_new=(sink >= before[:, None]) & (sink < (before + lengths)[:, None]),
        # Before a document's first token, tails point to arbitrary slots. `seen` tells that these are not in use.
        tail=((first + room + lengths)[:, None] + torch.arange(1 - window, 0, device=device)).clamp(min=0),
        lengths=lengths,
    )


def sliding_attention(
    q_NHK: Tensor,
    k_NGK: Tensor,
    v_NGK: Tensor,
    slots: Slots,
    *,
    window: int,
    rotary: Rotary | None,
    cache: SinkLayer | None = None,
    tokens: int = 0,
    dropout: float = 0.0,
) -> Tensor:
    """Return the attention of many tokens, [N, H, K], in memory that grows linearly with N.

    Args:
        q_NHK: Queries, not rotated.
        k_NGK: Keys, not rotated.
        v_NGK: Values.
        slots: Slots of the tokens, from `find_slots`.
        window: W.
        rotary: Tables of `rotary_positions` positions. None for no rotation.
        cache: Cache layer. It is read if `slots` has slots for cached tokens, and written.
        tokens: Number of tokens of a sequence with padding, for the cache's count.
        dropout: Dropout probability of attention weights.
    """
    if not len(q_NHK):  # all tokens are padding
        if cache is not None:
            cache.cumulative_length += tokens
        return torch.zeros_like(q_NHK)
    if slots.place is None or cache is None:
        q, k, v = q_NHK, k_NGK, v_NGK
        sink_k, sink_v = k.new_zeros(()), v.new_zeros(())
    else:
        sink_k, past_k, sink_v, past_v = cache.parts()
        k, v = slots.put(past_k, k_NGK), slots.put(past_v, v_NGK)
        q = q_NHK.new_zeros(len(k), *q_NHK.shape[1:]).index_copy(0, slots.place, q_NHK)
    # sinks are taken from this pass when it holds a document's first tokens, and from the cache afterwards
    is_new = slots.sink_is_new[:, :, None, None]
    sink_k, sink_v = torch.where(is_new, k[slots.sink], sink_k), torch.where(is_new, v[slots.sink], sink_v)
    if cache is not None:
        kept_k, kept_v = torch.cat([sink_k, k[slots.tail]], 1), torch.cat([sink_v, v[slots.tail]], 1)
        cache.write(kept_k, kept_v, slots.lengths, tokens)

    # Slots are cut into R blocks of C queries. A block needs its own keys and the W - 1 before them, J = C + W - 1, so
    # that blocks of keys overlap. Both ends are padded: the first block has no keys before it, the last may be short.
    block, sinks, total = block_size(window), sink_k.shape[1], len(q)
    before, after = window - 1, -total % block

    def blocks(x: Tensor, fill: int = 0) -> Tensor:  # [M, ...] -> [R, J, ...]
        padded = F.pad(x, (*(0, 0) * (x.dim() - 1), before, after), value=fill)
        return padded.unfold(0, block + before, block).movedim(-1, 1)  # overlapping views, not copies

    q = F.pad(q, (0, 0, 0, 0, 0, after)).unflatten(0, (-1, block))
    k, v, document, position = blocks(k), blocks(v), blocks(slots.document), blocks(slots.position, -1)
    outputs, step = [], max(1, QUERIES_AT_A_TIME // block)
    for start in range(0, len(q), step):
        part = slice(start, start + step)
        query_document, query_position = document[part, before:], position[part, before:]
        distance = query_position[:, :, None] - position[part, None, :]
        # Position >= S leaves out the sinks, which every query sees separately. It also leaves out padding and places
        # of the cache that are not in use, whose positions are negative.
        allowed = (query_document[:, :, None] == document[part, None, :]) & (position[part, None, :] >= sinks)
        allowed &= (distance >= 0) & (distance < window)
        seen_sinks = (sink_k[query_document], sink_v[query_document])
        outputs.append(attend(q[part], k[part], v[part], allowed, *seen_sinks, query_position, window, rotary, dropout))
    y = torch.cat(outputs).flatten(0, 1)[:total]
    return y if slots.place is None else y[slots.place]


def sliding_step(
    q_BHK: Tensor, k_BGK: Tensor, v_BGK: Tensor, cache: SinkLayer, *, rotary: Rotary | None, dropout: float = 0.0
) -> Tensor:
    """Return the attention of one more token of every sequence, [B, H, K], and update `cache`.

    The result is that of `sliding_attention`. The cache must hold at least one token.
    """
    window, sinks, seen = cache.window, cache.sinks, cache.seen
    assert seen is not None
    sink_k, past_k, sink_v, past_v = cache.parts()
    is_new = (torch.arange(sinks, device=seen.device) == seen[:, None])[:, :, None, None]
    sink_k, sink_v = torch.where(is_new, k_BGK[:, None], sink_k), torch.where(is_new, v_BGK[:, None], sink_v)
    k, v = torch.cat([past_k, k_BGK[:, None]], 1), torch.cat([past_v, v_BGK[:, None]], 1)
    allowed = seen[:, None] + torch.arange(1 - window, 1, device=seen.device) >= sinks
    seen_sinks = (sink_k[:, None], sink_v[:, None])
    y = attend(q_BHK[:, None], k, v, allowed[:, None], *seen_sinks, seen[:, None], window, rotary, dropout)
    cache.write(torch.cat([sink_k, k[:, 1:]], 1), torch.cat([sink_v, v[:, 1:]], 1), torch.ones_like(seen), 1)
    return y[:, 0]


def attend(q, k, v, allowed, sink_k, sink_v, position, window: int, rotary: Rotary | None, dropout: float) -> Tensor:
    """Return the attention of blocks of queries to their windows and sinks, [R, C, H, K].

    Args:
        q: Queries [R, C, H, K], not rotated.
        k: Keys [R, J, G, K], not rotated. The last C are those of the queries' own tokens.
        v: Values [R, J, G, K].
        allowed: Whether each query sees each key of its window, [R, C, J].
        sink_k: Keys of the sinks of each query's document, [R, C, S, G, K].
        sink_v: Values of the sinks.
        position: Positions of the queries in their documents, [R, C].
        window: W.
        rotary: Rotary tables, or None.
        dropout: Dropout probability of attention weights.
    """
    sinks, before = sink_k.shape[2], k.shape[1] - q.shape[1]
    places = torch.arange(sinks, device=q.device)
    sink_q = q
    if rotary is not None:
        # towards the sinks, a query stands at most at the end of the cache
        cache_position = position.clamp(0, sinks + window - 1)
        sink_q, sink_k = rotate(q, rotary, cache_position), rotate(sink_k, rotary, places)
        # in the window only distances matter, so positions count from the start of the block
        q = rotate(q, rotary, torch.arange(before, k.shape[1], device=q.device))
        k = rotate(k, rotary, torch.arange(k.shape[1], device=q.device))
    q, sink_q = (x.unflatten(2, (k.shape[2], -1)) for x in (q, sink_q))
    scores = torch.einsum("rcghk,rjgk->rcghj", q, k)
    sink_scores = torch.einsum("rcghk,rcsgk->rcghs", sink_q, sink_k)
    mask = torch.cat([allowed, places <= position[..., None]], -1)[:, :, None, None]
    scores = (torch.cat([scores, sink_scores], -1) * q.shape[-1] ** -0.5).to(
        torch.promote_types(q.dtype, torch.float32)
    )
    # not -inf: padding sees no key at all, and the NaN of its softmax would reach the gradients
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1).to(q.dtype)
    weights, sink_weights = F.dropout(weights, dropout).split([k.shape[1], sinks], -1)
    y = torch.einsum("rcghj,rjgk->rcghk", weights, v) + torch.einsum("rcghs,rcsgk->rcghk", sink_weights, sink_v)
    return y.flatten(2, 3)


def block_size(window: int) -> int:
    """Return the number of queries of a block."""
    return max(64, window)


def rotary_positions(window: int, sinks: int) -> int:
    """Return the number of positions that `sliding_attention` needs, for a text of any length."""
    return max(block_size(window) + window - 1, sinks + window)


def rotate(x: Tensor, rotary: Rotary, position: Tensor) -> Tensor:
    """Return x [..., positions, heads, K] rotated to `position` [..., positions]."""
    cos, sin = (table[position].unsqueeze(-2) for table in rotary)
    return x * cos + rotate_half(x) * sin

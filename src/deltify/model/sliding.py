"""Attention to a sliding window and to sinks, the first tokens of a document (StreamingLLM, arXiv 2309.17453).

A query sees the last W tokens, itself included, at their true distances, and the first S tokens as if it stood at
position min(t, S + W - 1): positions are those inside the cache, so that a text may outgrow what the model was trained
on. A sink inside the window counts once; the first S + W tokens of a document thus get plain causal attention.

Legend: B rows, N tokens of all documents, D documents, H query heads, G key/value heads, K head width, W window,
S sinks, M slots, R blocks of C queries, each of which sees J = C + W - 1 keys.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half

from .cache import SinkLayer

QUERIES_AT_A_TIME = 2048  # bounds the memory of the scores

Rotary = tuple[Tensor, Tensor]  # cosine and sine of positions 0, 1, ..., each [positions, K]


@dataclass(frozen=True)
class Slots:
    """The tokens of a forward pass in one line, document after document, each after what the cache holds of it.

    `place` and `past` are None if nothing is cached: slots are tokens then.
    """

    place: Tensor | None  # [N], slot of each token
    past: Tensor | None  # [D, W - 1], slots of what the cache holds
    document: Tensor  # [M]
    position: Tensor  # [M], in the document; below 0 where there is nothing
    sink: Tensor  # [D, S], slots of the sinks, and
    sink_is_new: Tensor  # [D, S], whether they are among the tokens
    tail: Tensor  # [D, W - 1], slots of each document's last tokens
    lengths: Tensor  # [D], new tokens of each document

    def to(self, device: torch.device) -> "Slots":
        """accelerate calls this where a model is spread over devices."""
        return Slots(**{name: None if x is None else x.to(device) for name, x in vars(self).items()})

    def put(self, past_DPGK: Tensor, x_NGK: Tensor) -> Tensor:
        """What is cached and what is new, [M, G, K]."""
        slots = x_NGK.new_empty(len(self.position), *x_NGK.shape[1:])
        slots = slots.index_copy(0, self.past.flatten(), past_DPGK.flatten(0, 1).to(slots.dtype))
        return slots.index_copy(0, self.place, x_NGK)


def find_slots(bounds: Tensor, tokens: int, window: int, sinks: int, seen: Tensor | None = None) -> Slots:
    """The slots of `tokens` tokens, of documents with `bounds` [D + 1], after `seen` [D] tokens in a cache."""
    lengths, device = bounds.diff(), bounds.device
    documents = torch.arange(len(lengths), device=device)
    room = 0 if seen is None else window - 1
    first = bounds[:-1] + room * documents
    before = torch.zeros_like(lengths) if seen is None else seen
    origin = first + room - before  # the slot of position 0, wherever that would be
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
        # places before a document's start hold whatever is there: their positions are below 0, and nothing looks there
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
    """Attention of many tokens, [N, H, K]; memory grows with N alone, not with its square.

    Args:
        slots: where the tokens belong, from `find_slots`.
        rotary: tables of `rotary_positions` positions; None for no rotation.
        cache: read, if `slots` has room for it, and written.
        tokens: of a row with padding, for the cache's count.
    """
    if not len(q_NHK):  # padding alone
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
    is_new = slots.sink_is_new[:, :, None, None]
    sink_k, sink_v = torch.where(is_new, k[slots.sink], sink_k), torch.where(is_new, v[slots.sink], sink_v)
    if cache is not None:
        kept_k, kept_v = torch.cat([sink_k, k[slots.tail]], 1), torch.cat([sink_v, v[slots.tail]], 1)
        cache.write(kept_k, kept_v, slots.lengths, tokens)

    block, sinks, total = block_size(window), sink_k.shape[1], len(q)
    before, behind = window - 1, -total % block

    def blocks(x: Tensor, fill: int = 0) -> Tensor:  # [M, ...] -> [R, J, ...]
        padded = F.pad(x, (*(0, 0) * (x.dim() - 1), before, behind), value=fill)
        return padded.unfold(0, block + before, block).movedim(-1, 1)

    q = F.pad(q, (0, 0, 0, 0, 0, behind)).unflatten(0, (-1, block))
    k, v, document, position = blocks(k), blocks(v), blocks(slots.document), blocks(slots.position, -1)
    outputs, step = [], max(1, QUERIES_AT_A_TIME // block)
    for start in range(0, len(q), step):
        part = slice(start, start + step)
        query_document, query_position = document[part, before:], position[part, before:]
        distance = query_position[:, :, None] - position[part, None, :]
        allowed = (query_document[:, :, None] == document[part, None, :]) & (position[part, None, :] >= sinks)
        allowed &= (distance >= 0) & (distance < window)
        seen_sinks = (sink_k[query_document], sink_v[query_document])
        outputs.append(attend(q[part], k[part], v[part], allowed, *seen_sinks, query_position, window, rotary, dropout))
    y = torch.cat(outputs).flatten(0, 1)[:total]
    return y if slots.place is None else y[slots.place]


def sliding_step(
    q_BHK: Tensor, k_BGK: Tensor, v_BGK: Tensor, cache: SinkLayer, *, rotary: Rotary | None, dropout: float = 0.0
) -> Tensor:
    """`sliding_attention` for one more token of every row, [B, H, K]; updates `cache`, which has seen some."""
    window, sinks, seen = cache.window, cache.sinks, cache.seen
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
    """Attention of blocks of queries to their windows and sinks, [R, C, H, K].

    Args:
        q: [R, C, H, K]. k, v: [R, J, G, K], the last C of them at the queries' own places. Not rotated.
        allowed: [R, C, J], which keys of the window each query sees.
        sink_k, sink_v: [R, C, S, G, K], of each query's document.
        position: [R, C], of the queries in their documents.
    """
    sinks, before = sink_k.shape[2], k.shape[1] - q.shape[1]
    places = torch.arange(sinks, device=q.device)
    sink_q = q
    if rotary is not None:
        inside = position.clamp(0, sinks + window - 1)
        sink_q, sink_k = rotate(q, rotary, inside), rotate(sink_k, rotary, places)
        q = rotate(q, rotary, torch.arange(before, k.shape[1], device=q.device))
        k = rotate(k, rotary, torch.arange(k.shape[1], device=q.device))
    q, sink_q = (x.unflatten(2, (k.shape[2], -1)) for x in (q, sink_q))
    scores = torch.einsum("rcghk,rjgk->rcghj", q, k)
    sink_scores = torch.einsum("rcghk,rcsgk->rcghs", sink_q, sink_k)
    mask = torch.cat([allowed, places <= position[..., None]], -1)[:, :, None, None]
    scores = (torch.cat([scores, sink_scores], -1) * q.shape[-1] ** -0.5).to(
        torch.promote_types(q.dtype, torch.float32)
    )
    # not -inf: a block's unused places see nothing, and their NaN would reach the gradients
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1).to(q.dtype)
    weights, sink_weights = F.dropout(weights, dropout).split([k.shape[1], sinks], -1)
    y = torch.einsum("rcghj,rjgk->rcghk", weights, v) + torch.einsum("rcghs,rcsgk->rcghk", sink_weights, sink_v)
    return y.flatten(2, 3)


def block_size(window: int) -> int:
    return max(64, window)


def rotary_positions(window: int, sinks: int) -> int:
    """How many positions `sliding_attention` rotates to, for a text of any length."""
    return max(block_size(window) + window - 1, sinks + window)


def rotate(x: Tensor, rotary: Rotary, position: Tensor) -> Tensor:
    """x [..., positions, heads, K], rotated to `position` [..., positions]."""
    cos, sin = (table[position].unsqueeze(-2) for table in rotary)
    return x * cos + rotate_half(x) * sin

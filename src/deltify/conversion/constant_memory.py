"""Compute KDA with a constant decay per head, for many decays and write strengths of the same queries, keys and values.

A calibrated student starts with such memories. They differ in the decay of a head and in beta, which only scale the
products of queries and keys. So these products, the costly part, are computed once.

Legend: B batch, T tokens, H heads, K head width, C chunk, n chunks x batch x heads.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.chunked import CHUNK, Chunks, scan
from ..ops.reference import l2norm


@dataclass(frozen=True)
class SharedProducts:
    """What memories of the same queries, keys and values share, in chunks. Documents do not see each other.

    Attributes:
        qk: Normalised queries, scaled, and normalised keys [n, C, 2, K], zero for tokens of a document that begins in
            the chunk: they do not read the state from before.
        k_end: Normalised keys [n, C, K], zero for tokens of a document that ends in the chunk.
        v: Values [n, C, K].
        pairs: Products of queries and of keys with keys [n, 2, C, C]: of queries with keys up to the same token, of
            keys with earlier keys.
        continues: Whether the last token's document began before the chunk [n, 1, 1], as 0 or 1.
        shape: B, T, H and K of the inputs.
    """

    qk: Tensor
    k_end: Tensor
    v: Tensor
    pairs: Tensor
    continues: Tensor
    shape: torch.Size


def share_products(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, position_ids_BT: Tensor) -> SharedProducts:
    """Return the products of queries and keys, which are not normalised yet. Documents begin where positions are 0."""
    _, tokens, heads, width = q_BTHK.shape
    chunk = min(CHUNK, tokens)

    def split(x_BTH: Tensor) -> Tensor:
        """Return [B, T, H, ...] as [n, C, ...], ordered by chunk, then sequence, then head."""
        x = F.pad(x_BTH, (0, 0) * (x_BTH.dim() - 2) + (0, -tokens % chunk))
        return x.unflatten(1, (-1, chunk)).transpose(0, 1).movedim(3, 2).flatten(0, 2)

    q, k = split(l2norm(q_BTHK)) * width**-0.5, split(l2norm(k_BTHK))
    position_nC = split(position_ids_BT[..., None].expand(-1, -1, heads))
    place_C = torch.arange(chunk, device=q.device)
    document_nC = place_C - position_nC  # place in the chunk where the document begins
    same_nCC = document_nC[:, :, None] == document_nC[:, None]
    read_pairs, write_pairs = (torch.bmm(x, k.transpose(1, 2)) for x in (q, k))
    read_pairs *= same_nCC.tril()
    write_pairs *= same_nCC.tril(-1)
    before_nC = (document_nC < 0)[..., None]
    ends_with_chunk_nC = (document_nC == document_nC[:, -1:])[..., None]
    return SharedProducts(
        torch.stack([q, k], 2) * before_nC[..., None],
        k * ends_with_chunk_nC,
        split(v_BTHK),
        torch.stack([read_pairs, write_pairs], 1),
        before_nC[:, -1:].to(q.dtype),
        q_BTHK.shape,
    )


def read_memory(shared: SharedProducts, beta_BTH: Tensor, decay_rate_H: Tensor) -> Tensor:
    """Return the outputs [B, T, H, K] of KDA with log-decay -`decay_rate` in every channel, before `o_norm`."""
    batch, tokens, heads, width = shared.shape
    chunk, count = shared.v.shape[1], len(shared.v) // heads
    place_C = torch.arange(chunk, device=beta_BTH.device)
    beta = F.pad(beta_BTH, (0, 0, 0, -tokens % chunk)).unflatten(1, (-1, chunk)).permute(1, 0, 3, 2)

    def decay(tokens: Tensor) -> Tensor:
        """Return the decay [n, ...] over numbers of tokens."""
        factor = torch.exp(-decay_rate_H.view(-1, *[1] * tokens.dim()) * tokens)
        return factor.repeat(count, *[1] * tokens.dim())

    from_start, to_end = decay(place_C + 1)[..., None], decay(chunk - 1 - place_C)[..., None]
    pairs = shared.pairs * decay((place_C[:, None] - place_C).clamp(min=0))[:, None]
    P, M = pairs.unbind(1)
    beta_n = beta.flatten(0, 2)[..., None]
    eye = torch.eye(chunk, dtype=M.dtype, device=M.device).expand_as(M)
    T = torch.linalg.solve_triangular(beta_n * M, eye, upper=False, unitriangular=True)
    decayed = (shared.qk * from_start[..., None]).flatten(1, 2)
    empty = M.new_empty(0)
    c = Chunks(
        q=empty, k=empty, v=shared.v, beta=beta_n, from_start=from_start * shared.continues, to_end=empty, levels=[],
        P=P, M=M, T=T, decayed=decayed, k_end=shared.k_end * to_end,
    )  # fmt: skip
    state = shared.v.new_zeros(batch * heads, width, width)
    o, *_ = scan(c, state, [batch] * (count // batch), heads, keep=False)
    o_BTHK = o.view(-1, batch, heads, chunk, width).permute(1, 0, 3, 2, 4).flatten(1, 2)
    return o_BTHK[:, :tokens]

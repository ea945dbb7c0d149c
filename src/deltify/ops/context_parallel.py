"""KDA and its short convolution on rows of tokens that are cut over processes (context parallelism).

Every rank of a process group holds one segment of each row, of the same length. Over a segment the state S of a KDA
head changes by an affine map, S_out = M S_in + U. Each rank computes U, the final state from a state of zeros, and M,
the final state from the identity without values. The maps of all ranks are gathered. Each rank applies those of the
ranks before it in turn, and so finds the state at its own beginning. Outputs are linear in that state, too.

Rows may hold several documents. The map of a segment that contains the beginning of a document has M = 0.

Gradients pass through all of this. As in data parallelism, the gradient of a shared parameter is the sum over ranks.

Legend: R ranks, B rows, T tokens of a segment, N documents of the segments, D channels, P earlier inputs of a
convolution, H heads, K key width, V value width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from .dispatch import kda


@dataclass(frozen=True)
class CutRows:
    """Segments of B rows that are cut over a process group: rank r has the r-th segment of each row.

    Segments of all rows and ranks have the same length.

    Attributes:
        group: Process group of the ranks that share the rows.
        carried: Number of tokens in earlier segments, [B], of the document that each segment begins with. It is 0 where
            a document begins with the segment, as all do on rank 0.
    """

    group: "dist.ProcessGroup"
    carried: Tensor

    @property
    def rank(self) -> int:
        """The number of this rank's segment."""
        return self.group.rank()

    def to(self, device: torch.device) -> "CutRows":
        """Return the same with its tensor on a device."""
        return replace(self, carried=self.carried.to(device))

    def documents(self, cu_seqlens: Tensor | None, tokens: int) -> tuple[Tensor, Tensor]:
        """Return the document of the first and of the last token of each segment, both [B].

        Args:
            cu_seqlens: Bounds [N + 1] of the documents in all segments, one after the other. None if each segment
                belongs to one document.
            tokens: T.
        """
        rows = torch.arange(len(self.carried), device=self.carried.device)
        if cu_seqlens is None:
            return rows, rows
        places = torch.stack([rows * tokens, (rows + 1) * tokens - 1])
        first, last = torch.searchsorted(cu_seqlens.long(), places, right=True) - 1
        return first, last


def kda_context_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    cut: CutRows,
    cu_seqlens: Tensor | None = None,
    lower_bound: float | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return what `kda` returns for rows that are cut over processes: output and final states of this rank's segments.

    It runs `kda` twice, and gathers B * H * K * (K + V) numbers from each rank. The backward pass sums as many.

    Args:
        q: Queries of this rank's segments, [B, T, H, K], or [1, B * T, H, K] with `cu_seqlens`. k, v, f and b likewise.
        k: As in `kda`.
        v: As in `kda`.
        f: As in `kda`.
        b: As in `kda`.
        A_log: As in `kda`, equal on all ranks.
        dt_bias: As in `kda`, equal on all ranks.
        cut: How the rows are cut.
        cu_seqlens: Bounds of the documents in this rank's segments, [N + 1] int32. A document that goes on in the next
            segment ends at the border here, and goes on there. Defaults to one document per segment.
        lower_bound: As in `kda`.
        scale: As in `kda`.
        backend: As in `kda`.

    Returns:
        (o, state): outputs in v's shape and dtype, and the states at the end of each document or of its part in this
        segment, [N, H, K, V] (N = B without `cu_seqlens`).

    Raises:
        ValueError: If the tokens do not fit the number of rows, or as in `kda`.
    """
    rows, tokens = len(cut.carried), tokens_of(q, cut, cu_seqlens)
    if rows == 1 and cu_seqlens is not None and len(cu_seqlens) == 2:
        cu_seqlens = None  # one document, for which the kernels need less memory without bounds
    first, last = cut.documents(cu_seqlens, tokens)
    options = {"cu_seqlens": cu_seqlens, "lower_bound": lower_bound, "scale": scale, "backend": backend}
    with torch.autocast(v.device.type, enabled=False):
        o, state_NHKV = kda(q, k, v, f, b, A_log, dt_bias, **options)
        H, K = state_NHKV.shape[1:3]
        # the identity for documents that go on from an earlier segment; zeros stay zeros for all others
        eye = torch.eye(K, dtype=state_NHKV.dtype, device=v.device) * (cut.carried > 0).view(-1, 1, 1, 1)
        start = eye.new_zeros(len(state_NHKV), H, K, K).index_copy(0, first, eye.expand(-1, H, -1, -1))
        no_values = v.new_zeros(()).expand(q.shape)  # autograd keeps one element
        reads, map_NHKK = kda(q, k, no_values, f, b, A_log, dt_bias, state=start, **options)
        before_BHKV = state_before(map_NHKK[last], state_NHKV[last], cut)
        o_BTHV, reads_BTHK = (x.reshape(rows, tokens, H, -1) for x in (o, reads))
        o_BTHV = o_BTHV + torch.einsum("bthk,bhkv->bthv", reads_BTHK, before_BHKV.to(o.dtype))
        state_NHKV = state_NHKV.index_add(0, first, map_NHKK[first] @ before_BHKV)
    return o_BTHV.view_as(v), state_NHKV


def state_before(map_BHKK: Tensor, state_BHKV: Tensor, cut: CutRows) -> Tensor:
    """Return the state at the beginning of this rank's segments, [B, H, K, V], from the map of every rank.

    All ranks compute the states at all borders. Each then has the same autograd graph, and no rank waits in the
    backward pass for a rank that has nothing to do.
    """
    maps, states = gather(torch.cat([map_BHKK, state_BHKV], -1), cut.group).split(
        (map_BHKK.shape[-1], state_BHKV.shape[-1]), -1
    )
    borders = [torch.zeros_like(state_BHKV)]
    for rank in range(len(maps) - 1):
        borders.append(torch.matmul(maps[rank], borders[rank]) + states[rank])
    return torch.stack(borders)[cut.rank]


def inputs_before(x: Tensor, past: int, *, cut: CutRows, cu_seqlens: Tensor | None = None) -> Tensor:
    """Return the last inputs before each document for a convolution, [N, D, P]: the `state` of `short_conv_split`.

    They come from the previous rank where a document goes on from there, and are zeros elsewhere.

    Args:
        x: Inputs of this rank's segments, [B, T, D], or [1, B * T, D] with `cu_seqlens`.
        past: P, the number of taps less one.
        cut: How the rows are cut.
        cu_seqlens: As in `kda_context_parallel`.

    Raises:
        ValueError: If a segment is shorter than P, or the tokens do not fit the number of rows.
    """
    rows, tokens = len(cut.carried), tokens_of(x, cut, cu_seqlens)
    if tokens < past:
        raise ValueError(
            f"segments have {tokens} tokens, fewer than the {past} that the convolution of the next rank needs. Cut "
            "rows over fewer ranks, or make them longer"
        )
    ends_BPD = x.reshape(rows, tokens, -1)[:, tokens - past :]
    before_BPD = gather(ends_BPD, cut.group)[cut.rank - 1]  # rank 0 masks all of them
    age = torch.arange(past, 0, -1, device=x.device)
    before_BPD = before_BPD.where((age <= cut.carried[:, None]).unsqueeze(-1), 0)
    documents = rows if cu_seqlens is None else len(cu_seqlens) - 1
    first, _ = cut.documents(cu_seqlens, tokens)
    return x.new_zeros(documents, *before_BPD.shape[1:]).index_copy(0, first, before_BPD).transpose(1, 2)


def earlier_keys(k: Tensor, v: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """Return keys and values of the segments up to this rank's, [2, B, H, (rank + 1) * T, K], in v's dtype.

    Args:
        k: Keys of this rank's segments, [B, H, T, K].
        v: Values, likewise.
        group: Process group of the ranks that share the rows.
    """
    # under autocast, v has its precision and k that of the rotary tables
    parts = gather(torch.stack([k.to(v.dtype), v]), group)[: group.rank() + 1]
    return parts.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)


def tokens_of(x: Tensor, cut: CutRows, cu_seqlens: Tensor | None) -> int:
    """Return the number of tokens of each segment in x, [B, T, ...] or [1, B * T, ...].

    Raises:
        ValueError: If there are none, or if they do not fit the number of rows.
    """
    rows, (batch, tokens) = len(cut.carried), x.shape[:2]
    if batch != (rows if cu_seqlens is None else 1) or not tokens or (batch * tokens) % rows:
        want = f"[{rows}, tokens, ...]" if cu_seqlens is None else f"[1, {rows} * tokens, ...]"
        raise ValueError(f"inputs have shape {list(x.shape)}; segments of {rows} rows must be {want}, with tokens")
    return batch * tokens // rows


def gather(x: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """Return the tensors of all ranks, [R, ...]. Its gradient is the sum of all ranks' gradients.

    All ranks of the group must call it with equal shapes and dtypes, and so must their backward passes.
    """
    return _Gather.apply(x, group)


def collective(name: str, old_name: str) -> Callable:
    """Return a collective operation of torch, which 2.13 has renamed."""
    return getattr(dist, name, None) or getattr(dist, old_name)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        parts = x.new_empty(group.size(), *x.shape)
        collective("all_gather_single", "all_gather_into_tensor")(parts.flatten(), x.flatten(), group=group)
        return parts

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        (d,) = gradients
        dx = d.new_empty(d.shape[1:])
        collective("reduce_scatter_single", "reduce_scatter_tensor")(dx.flatten(), d.flatten(), group=ctx.group)
        return dx, None

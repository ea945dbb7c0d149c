"""Find the documents of rows that are cut over processes.

Legend: B rows, T tokens of a segment, R ranks of the group.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops import CutRows, gather
from .documents import document_starts
from .mixers import Packing


def positions_of_rows(position_ids: Tensor | None, like_BTD: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """Return the positions of whole rows, [B, R * T], from those of this rank's segments, [B, T].

    Without positions, each row is one document that begins at position 0.
    """
    if position_ids is not None:
        return gather(position_ids, group).transpose(0, 1).flatten(1)
    rows, tokens = like_BTD.shape[:2]
    return torch.arange(group.size() * tokens, device=like_BTD.device).expand(rows, -1)


def cut_packing(positions: Tensor, group: "dist.ProcessGroup") -> Packing:
    """Return the packing of this rank's segments for positions [B, R * T] of whole rows."""
    tokens = positions.shape[1] // group.size()
    begin = group.rank() * tokens
    starts = document_starts(positions).view_as(positions)
    place = torch.arange(begin + 1, device=positions.device)
    carried = begin - place.where(starts[:, : begin + 1], 0).amax(1)
    own = starts[:, begin : begin + tokens].clone()
    own[:, 0] = True
    bounds = torch.cat([own.flatten().nonzero().squeeze(1), place.new_tensor([own.numel()])])
    return Packing(None, bounds.int(), CutRows(group, carried))


def cut_mask(positions: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """Return which tokens of its row each token of this rank's segments attends to, [B, 1, T, (rank + 1) * T].

    These are the earlier tokens of its document, and itself. No token attends to a segment of a later rank.

    Args:
        positions: Positions [B, R * T] of whole rows.
    """
    end = positions.shape[1] // group.size() * (group.rank() + 1)
    document = document_starts(positions).view_as(positions)[:, :end].cumsum(1)
    place = torch.arange(end, device=positions.device)
    own = slice(-(positions.shape[1] // group.size()), None)
    return (document[:, None, own, None] == document[:, None, None]) & (place[own, None] >= place)


def check_cut(kinds: Iterable[str], attention: str | None, **given: object) -> None:
    """Check that a model can compute its rows in segments.

    Args:
        kinds: Kinds of its layers.
        attention: Implementation of its full attention.
        given: Arguments of its forward that need whole rows, by name.

    Raises:
        ValueError: If a kind of layer, the implementation of attention, or an argument does not support it.
    """
    if "sliding_attention" in kinds:
        raise ValueError(
            "row_group: rows of a model with sliding_attention layers cannot be cut over processes. Only those of "
            "linear_attention and full_attention layers can"
        )
    if "full_attention" in kinds and attention != "sdpa":
        raise ValueError(
            f"row_group: full attention of rows that are cut over processes needs attn_implementation='sdpa', not "
            f"{attention!r}. Call set_attn_implementation('sdpa')"
        )
    if refused := [name for name, value in given.items() if value is not None]:
        raise ValueError(
            f"row_group with {', '.join(refused)}: rows that are cut over processes take none of these. Mark documents "
            "by position_ids, leave out padding, and compute losses from the logits"
        )

"""Where documents begin in packed rows, from any of the forms in which transformers, trl and fla give it.

Legend: B rows, T tokens, N documents.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

OFFSETS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")  # [N + 1], over the rows one after the other
BOUNDS = (*OFFSETS, "seq_idx")  # [B, T], the number of each token's document


def document_starts(position_ids: Tensor) -> Tensor:
    """[B * T] bool: whether a token begins a document, or its row, for positions [B, T]."""
    return F.pad(position_ids.diff(dim=-1) != 1, (1, 0), value=True).flatten()


def check_positions(position_ids: Tensor | None, rows: int, tokens: int) -> Tensor | None:
    """Return positions as [B, T]; one row of them serves all rows.

    Raises:
        ValueError: If they have another shape.
    """
    if position_ids is None:
        return None
    if position_ids.dim() != 2 or position_ids.shape[1] != tokens or len(position_ids) not in (1, rows):
        raise ValueError(
            f"position_ids has shape {list(position_ids.shape)}; give [{rows}, {tokens}], or [1, {tokens}]"
        )
    return position_ids.expand(rows, -1)


def positions_of(
    bounds: dict[str, Tensor], position_ids: Tensor | None, attention_mask: Tensor | None, rows: int, tokens: int
) -> Tensor:
    """Return positions [B, T] that start again at each document.

    Args:
        bounds: Some of `BOUNDS`, by name.
        position_ids: Positions [B, T], or None.
        attention_mask: Mask [B, T], or None.

    Raises:
        ValueError: If two of them contradict each other, or if there is padding, which bounds do not place.
    """
    if attention_mask is not None and not attention_mask.bool().all():
        raise ValueError(
            f"{', '.join(bounds)} beside an attention_mask with padding: bounds do not say where padding is. Leave the "
            "padding out, or mark documents by position_ids that start again"
        )
    starts = {name: starts_of(name, torch.as_tensor(given), rows, tokens) for name, given in bounds.items()}
    if position_ids is not None:
        starts["position_ids"] = document_starts(position_ids).to(next(iter(starts.values())).device)
    (first, want), *others = starts.items()
    for name, found in others:
        if not torch.equal(found.to(want.device), want):
            raise ValueError(
                f"{first} and {name} contradict each other: they mark {int(want.sum())} and {int(found.sum())} "
                "documents, or other places. Give one of them, or make them agree"
            )
    if position_ids is not None:
        return position_ids
    place = torch.arange(rows * tokens, device=want.device)
    return (place - place.where(want, 0).cummax(0).values).view(rows, tokens)


def starts_of(name: str, given: Tensor, rows: int, tokens: int) -> Tensor:
    """[B * T] bool: whether a token begins a document, from bounds of one form."""
    row_starts = torch.arange(rows * tokens, device=given.device) % tokens == 0
    if name == "seq_idx":
        if list(given.shape) != [rows, tokens]:
            raise ValueError(
                f"seq_idx has shape {list(given.shape)}; give the document of each token, {[rows, tokens]}"
            )
        return F.pad(given.diff(dim=-1) != 0, (1, 0), value=True).flatten()
    total, offsets = rows * tokens, given.long()
    if given.dim() != 1 or not len(given) or offsets[0] != 0 or offsets[-1] != total or (offsets.diff() < 0).any():
        raise ValueError(f"{name}={given.tolist()} must rise from 0 to the number of tokens, {total}")
    starts = torch.zeros(total, dtype=torch.bool, device=given.device)
    starts[offsets[:-1][offsets.diff() > 0]] = True
    if (row_starts & ~starts).any():
        raise ValueError(f"{name}={given.tolist()} lets a document reach into the next row of {tokens} tokens")
    return starts

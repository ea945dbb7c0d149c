"""Find where documents begin in packed sequences, from any of the forms that transformers, trl and fla use.

Legend: B sequences, T tokens, N documents.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

OFFSETS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")  # [N + 1], bounds over all sequences one after the other
BOUNDS = (*OFFSETS, "seq_idx")  # [B, T], the number of each token's document


def document_starts(position_ids: Tensor) -> Tensor:
    """Return whether each token begins a document or its sequence, [B * T], for positions [B, T]."""
    return F.pad(position_ids.diff(dim=-1) != 1, (1, 0), value=True).flatten()


def check_positions(position_ids: Tensor | None, rows: int, tokens: int) -> Tensor | None:
    """Return positions as [B, T]. Positions [1, T] apply to all sequences.

    Raises:
        ValueError: If they have another shape.
    """
    if position_ids is None:
        return None
    if position_ids.dim() != 2 or position_ids.shape[1] != tokens or len(position_ids) not in (1, rows):
        raise ValueError(
            f"position_ids has shape {list(position_ids.shape)}; it must be [{rows}, {tokens}] or [1, {tokens}]"
        )
    return position_ids.expand(rows, -1)


def positions_of(
    bounds: dict[str, Tensor], position_ids: Tensor | None, attention_mask: Tensor | None, rows: int, tokens: int
) -> Tensor:
    """Return positions [B, T] that restart at each document.

    Args:
        bounds: Bounds by name, one or more of `BOUNDS`.
        position_ids: Positions [B, T], or None.
        attention_mask: Mask [B, T], or None.
        rows: B.
        tokens: T.

    Raises:
        ValueError: If two of them contradict each other, or there is padding, whose place bounds do not give.
    """
    if attention_mask is not None and not attention_mask.bool().all():
        raise ValueError(
            f"{', '.join(bounds)} with an attention_mask with padding: bounds do not give the place of padding. Remove "
            "the padding, or mark documents by position_ids that restart"
        )
    starts = {name: starts_of(name, torch.as_tensor(given), rows, tokens) for name, given in bounds.items()}
    if position_ids is not None:
        starts["position_ids"] = document_starts(position_ids).to(next(iter(starts.values())).device)
    (first_name, first_starts), *others = starts.items()
    for name, other_starts in others:
        if not torch.equal(other_starts.to(first_starts.device), first_starts):
            raise ValueError(
                f"{first_name} and {name} contradict each other: they mark {int(first_starts.sum())} and "
                f"{int(other_starts.sum())} documents, or different places. Give one of them, or make them agree"
            )
    if position_ids is not None:
        return position_ids
    place = torch.arange(rows * tokens, device=first_starts.device)
    return (place - place.where(first_starts, 0).cummax(0).values).view(rows, tokens)


def starts_of(name: str, given: Tensor, rows: int, tokens: int) -> Tensor:
    """Return whether each token begins a document, [B * T], from bounds of one form.

    Raises:
        ValueError: If the bounds do not fit the sequences.
    """
    row_starts = torch.arange(rows * tokens, device=given.device) % tokens == 0
    if name == "seq_idx":
        if list(given.shape) != [rows, tokens]:
            raise ValueError(
                f"seq_idx has shape {list(given.shape)}; it must be the document of each token, {[rows, tokens]}"
            )
        return F.pad(given.diff(dim=-1) != 0, (1, 0), value=True).flatten()
    total, offsets = rows * tokens, given.long()
    if given.dim() != 1 or not len(given) or offsets[0] != 0 or offsets[-1] != total or (offsets.diff() < 0).any():
        raise ValueError(f"{name}={given.tolist()} must rise from 0 to the number of tokens, {total}")
    starts = torch.zeros(total, dtype=torch.bool, device=given.device)
    starts[offsets[:-1][offsets.diff() > 0]] = True
    if (row_starts & ~starts).any():
        raise ValueError(f"{name}={given.tolist()} lets a document reach into the next sequence of {tokens} tokens")
    return starts

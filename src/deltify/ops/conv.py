"""Causal depthwise short convolution with SiLU, with states and document bounds.

Legend: B batch, T tokens, D channels, W taps (the last one multiplies the current token), P = W - 1, N documents.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import count_documents


def short_conv(
    x_BTD: Tensor, weight_D1W: Tensor, *, state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return SiLU(causal depthwise convolution of x) and the last W - 1 inputs of every document.

    Args:
        x_BTD: Inputs. B = 1 with `cu_seqlens`.
        weight_D1W: Taps in torch's Conv1d layout, without bias.
        state: The W - 1 inputs before each document, [N, D, W - 1]. Defaults to zeros.
        cu_seqlens: Bounds of the documents of a packed sequence, [N + 1] int32. Empty documents keep their state.

    Returns:
        (y, state): [B, T, D] and [N, D, W - 1], in x's dtype.
    """
    batch, tokens, width = x_BTD.shape
    past = weight_D1W.shape[-1] - 1
    documents = count_documents(batch, cu_seqlens)
    before = x_BTD.new_zeros(documents, past, width) if state is None else state.transpose(1, 2).to(x_BTD.dtype)
    if cu_seqlens is None:
        padded = torch.cat([before, x_BTD], dim=1)
        return F.silu(_Convolve.apply(padded, weight_D1W)), padded[:, tokens:].transpose(1, 2)

    # Insert the W - 1 earlier inputs of each document ahead of it in the sequence. A plain convolution of the longer
    # sequence then never reaches into another document. Its outputs at the inserted places are not used.
    bounds = cu_seqlens.long()
    document = torch.arange(documents, device=x_BTD.device)
    place = torch.arange(tokens, device=x_BTD.device)
    # documents 0 to n have inserted places ahead of the tokens of document n
    place = place + past * (1 + document.repeat_interleave(bounds.diff(), output_size=tokens))
    before_place = (bounds[:-1] + past * document)[:, None] + torch.arange(past, device=x_BTD.device)
    padded = x_BTD.new_empty(tokens + past * documents, width)
    padded = padded.index_copy(0, place, x_BTD[0]).index_copy(0, before_place.flatten(), before.flatten(0, 1))
    y = _Convolve.apply(padded[None], weight_D1W)[0, place - past]  # output n has inputs n to n + W - 1
    last = before_place + bounds.diff()[:, None]  # the same window, moved by the document's length
    return F.silu(y)[None], padded[last].transpose(1, 2)


def short_conv_split_torch(
    x_BTD: Tensor, weight_D1W: Tensor, parts: int, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """Compute `deltify.ops.short_conv_split` in PyTorch, on any device."""
    y, state = short_conv(x_BTD, weight_D1W, state=state, cu_seqlens=cu_seqlens)
    return [part.contiguous() for part in y.chunk(parts, dim=-1)], state


class _Convolve(torch.autograd.Function):
    """Convolution of [B, P + T, D] with taps [D, 1, W] to [B, T, D]. Saves only its inputs for the backward pass."""

    @staticmethod
    def forward(ctx, padded, weight):
        ctx.save_for_backward(padded, weight)
        taps_WD = weight.squeeze(1).t().to(padded.dtype).contiguous()
        tokens = padded.shape[1] - len(taps_WD) + 1
        y = padded[:, :tokens] * taps_WD[0]
        for w in range(1, len(taps_WD)):
            y.addcmul_(padded[:, w : w + tokens], taps_WD[w])
        return y

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        (dy,) = gradients
        padded, weight = ctx.saved_tensors
        taps_WD = weight.squeeze(1).t().to(dy.dtype).contiguous()
        tokens = dy.shape[1]
        dx = torch.zeros_like(padded)
        dtaps = torch.empty_like(taps_WD, dtype=torch.promote_types(dy.dtype, torch.float32))
        for w in range(len(taps_WD)):
            dx[:, w : w + tokens].addcmul_(dy, taps_WD[w])
            dtaps[w] = (padded[:, w : w + tokens] * dy).sum((0, 1), dtype=dtaps.dtype)
        return dx, dtaps.t().unsqueeze(1).to(weight.dtype)


def short_conv_step(x_BD: Tensor, weight_D1W: Tensor, state_BDP: Tensor) -> Tensor:
    """Return the output of `short_conv` for one token, [B, D], and shift `state_BDP` in place."""
    taps_DW = weight_D1W.squeeze(1).to(x_BD.dtype)
    window = torch.cat([state_BDP.to(x_BD.dtype), x_BD.unsqueeze(-1)], dim=-1)
    state_BDP.copy_(window[..., 1:])
    return F.silu((window * taps_DW).sum(-1))

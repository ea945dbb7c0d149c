"""Causal depthwise short convolution with SiLU, its state, and document bounds.

Legend: B batch, T tokens, D channels, W taps (the last one meets the current token), N documents.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def short_conv(
    x_BTD: Tensor, weight_D1W: Tensor, *, state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """SiLU(causal depthwise convolution of x) and the last W - 1 inputs of every document.

    Args:
        x_BTD: inputs, [B, T, D]; B = 1 with `cu_seqlens`.
        weight_D1W: taps in torch's Conv1d layout, [D, 1, W], no bias.
        state: the W - 1 inputs before each document, [N, D, W - 1]; zeros if absent.
        cu_seqlens: document bounds of a packed row, [N + 1] int32; empty documents keep their state.

    Returns:
        (y, state): [B, T, D] and [N, D, W - 1], in x's dtype.
    """
    taps_WD = weight_D1W.squeeze(1).t().to(x_BTD.dtype)
    past = taps_WD.shape[0] - 1
    batch, tokens, width = x_BTD.shape
    if cu_seqlens is None:
        before = x_BTD.new_zeros(batch, past, width) if state is None else state.transpose(1, 2).to(x_BTD.dtype)
        padded = torch.cat([before, x_BTD], dim=1)
        y = sum(padded[:, w : w + tokens] * taps_WD[w] for w in range(past + 1))
        return F.silu(y), padded[:, tokens:].transpose(1, 2)

    documents = cu_seqlens.numel() - 1
    before = x_BTD.new_zeros(documents, past, width) if state is None else state.transpose(1, 2).to(x_BTD.dtype)
    rows = torch.cat([before.reshape(-1, width), x_BTD[0]])
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    token = torch.arange(tokens, device=x_BTD.device)
    document = torch.repeat_interleave(torch.arange(documents, device=x_BTD.device), ends - starts, output_size=tokens)

    def row_of(position: Tensor, document: Tensor) -> Tensor:
        """Where the input of `position` (in the packed row) lies in `rows`, seen from `document`."""
        before_start = position - starts[document]
        return torch.where(before_start < 0, document * past + past + before_start, documents * past + position)

    y = x_BTD[0] * taps_WD[past]
    for shift in range(1, past + 1):
        y = y + rows[row_of(token - shift, document)] * taps_WD[past - shift]
    every = torch.arange(documents, device=x_BTD.device)[:, None].expand(documents, past)
    last = ends[:, None] - past + torch.arange(past, device=x_BTD.device)
    return F.silu(y)[None], rows[row_of(last, every)].transpose(1, 2)


def short_conv_step(x_BD: Tensor, weight_D1W: Tensor, state_BDP: Tensor) -> Tensor:
    """`short_conv` for one token, [B, D] -> [B, D]; shifts `state_BDP` [B, D, W - 1] in place."""
    taps_DW = weight_D1W.squeeze(1).to(x_BD.dtype)
    window = torch.cat([state_BDP.to(x_BD.dtype), x_BD.unsqueeze(-1)], dim=-1)
    state_BDP.copy_(window[..., 1:])
    return F.silu((window * taps_DW).sum(-1))

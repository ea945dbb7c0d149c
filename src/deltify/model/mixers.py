"""Token mixers: KDA, full attention, and attention to a sliding window with sinks; and the packing of documents.

Legend: B batch, T tokens, D model width, H heads, K head width (keys and values), N documents.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, LinearAttentionLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from ..ops import (
    CutRows,
    earlier_keys,
    gated_rms_norm,
    inputs_before,
    kda,
    kda_context_parallel,
    kda_layer_step,
    relu_squared,
    rms_norm,
    short_conv_split,
)
from .cache import SinkLayer, layer_of, read_states, writable, write_states
from .configuration import DeltifyConfig
from .documents import document_starts
from .sliding import Rotary, Slots, sliding_attention, sliding_step

# torch.compile compiles the other parts of a layer. The operator has nothing to fuse, and its loops break graphs.
kda, kda_layer_step, short_conv_split = map(torch.compiler.disable, (kda, kda_layer_step, short_conv_split))
earlier_keys, inputs_before, kda_context_parallel = map(
    torch.compiler.disable, (earlier_keys, inputs_before, kda_context_parallel)
)


@dataclass(frozen=True)
class Packing:
    """Documents of a batch, when they are not simply its rows: padded rows, or several documents packed in a row.

    KDA layers see the tokens in one row with bounds, so that padding costs nothing and documents do not meet.
    """

    index: Tensor | None  # rows of the flattened [B * T] that are tokens; None if all are
    cu_seqlens: Tensor  # [N + 1] int32
    cut: CutRows | None = None  # how the rows are cut over processes, if they are

    def to(self, device: torch.device) -> "Packing":
        """accelerate calls this where a model is spread over devices."""
        index = None if self.index is None else self.index.to(device)
        cut = None if self.cut is None else self.cut.to(device)
        return Packing(index, self.cu_seqlens.to(device), cut)

    def gather(self, x_BTD: Tensor) -> Tensor:
        flat = x_BTD.flatten(0, 1)
        return (flat if self.index is None else flat[self.index])[None]

    def scatter(self, y_1ND: Tensor, like_BTD: Tensor) -> Tensor:
        if self.index is None:
            return y_1ND.view_as(like_BTD)
        flat = y_1ND.new_zeros(like_BTD.shape[0] * like_BTD.shape[1], y_1ND.shape[-1])
        return flat.index_copy(0, self.index, y_1ND[0]).view_as(like_BTD)


MEET = "position_ids start again within a row: packed documents cannot go on from a cache"


def fixed_packing(position_ids: Tensor, documents: int) -> Packing:
    starts = document_starts(position_ids)
    places = torch.arange(len(starts), device=starts.device)
    bounds = torch.full((documents + 1,), len(starts), device=starts.device)
    return Packing(None, bounds.scatter_reduce(0, starts.cumsum(0) - 1, places, "amin").int())


def find_packing(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    tokens: int,
    cached: bool,
    max_documents: int | None = None,
) -> Packing | None:
    """Packing of the last `tokens` of each row, or None if every row is one document without padding.

    `attention_mask` [B, >= T] marks padding with 0. Without a cache, a position that does not follow that of the token
    before it in its row starts a document, as in transformers' own packed attention masks.

    Args:
        max_documents: Number of documents to pack a batch without padding as. The last ones are empty. The packing then
            has a fixed shape and is found without waiting for the GPU, as CUDA graphs need it. The batch must not have
            more documents.

    Raises:
        ValueError: If a row holds several documents, but is to go on from a cache.
    """
    if position_ids is not None and (position_ids.dim() != 2 or position_ids.shape[1] != tokens):
        position_ids = None  # not one position for each token, so they mark no documents
    if attention_mask is not None and attention_mask.dim() == 2:
        mask = attention_mask[:, -tokens:].bool()
        if not mask.all():
            packing = padded_packing(mask, position_ids)
            if cached and len(packing.cu_seqlens) - 1 > len(mask):
                raise ValueError(MEET)
            return packing
    if position_ids is None or (tokens == 1 and cached):
        return None
    if max_documents is not None and not cached:
        return fixed_packing(position_ids, max_documents)
    if (starts := document_starts(position_ids)).sum() == len(position_ids):
        return None
    if cached:
        raise ValueError(MEET)
    return Packing(None, F.pad(starts.nonzero().squeeze(1), (0, 1), value=position_ids.numel()).int())


def padded_packing(mask_BT: Tensor, position_ids: Tensor | None) -> Packing:
    """Return the packing of rows with padding: each a document, or several, where positions do not rise.

    A row of padding alone is an empty document.
    """
    index = mask_BT.flatten().nonzero().squeeze(1)
    rows = F.pad(mask_BT.sum(1).cumsum(0), (1, 0))
    if position_ids is None or not len(index):
        return Packing(index, rows.int())
    places, row = position_ids.expand(len(mask_BT), -1).flatten()[index], index // mask_BT.shape[1]
    starts = F.pad((places.diff() <= 0) | (row.diff() != 0), (1, 0), value=True).nonzero().squeeze(1)
    empty = rows[:-1][rows.diff() == 0]  # so that there are more documents than rows only where a row holds several
    return Packing(index, torch.cat([starts, empty, rows[-1:]]).sort().values.int())


class DeltifyRMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class DeltifyGatedRMSNorm(nn.Module):
    """weight * RMSNorm(x) * sigmoid(gate), over the last dimension, in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return gated_rms_norm(x, gate, self.weight, self.eps)


class DeltifyReLUSquared(nn.Module):
    """relu(x)^2."""

    def forward(self, x: Tensor) -> Tensor:
        return relu_squared(x)


class DeltifyTaps(nn.Conv1d):
    """Taps of a short convolution, [channels, 1, taps].

    They are read by a call of the module, because accelerate moves offloaded weights to the device at calls.
    """

    def __init__(self, channels: int, taps: int):
        super().__init__(channels, channels, taps, groups=channels, bias=False)

    def forward(self) -> Tensor:  # pyrefly: ignore[bad-override]  # a Conv1d for its initialisation only
        return self.weight


ALIGNED = 8  # weights get rows up to a multiple of it: for other numbers of rows, cuBLAS has slow kernels only


def project(x: Tensor, *linears: nn.Module) -> Tensor:
    """Apply several linear layers to one input [B, T, D] and concatenate the results.

    Uses one matmul if the weights are contiguous (see `fuse_weights_`), or if copying them pays off: for more than one
    token.
    """
    if (fused := fused_weight(linears)) is not None:
        return F.linear(x, fused)[..., : rows_of(linears)]
    if x.shape[1] == 1 or (plain := all_plain(linears)) is None:
        return torch.cat([linear(x) for linear in linears], dim=-1)
    if plain[0].bias is not None:
        return F.linear(x, torch.cat([y.weight for y in plain]), torch.cat([y.bias for y in plain]))
    return F.linear(x, join_weights(plain))[..., : rows_of(linears)]


def rows_of(linears: Sequence[nn.Module]) -> int:
    return sum(len(linear.get_parameter("weight")) for linear in linears)


def join_weights(plain: Sequence[nn.Linear]) -> Tensor:
    """Return the weights of linear layers as one matrix, with rows of zeros up to a multiple of ALIGNED."""
    weights = [linear.weight for linear in plain]
    fill = -rows_of(plain) % ALIGNED
    return torch.cat([*weights, weights[0].new_zeros(fill, weights[0].shape[1])] if fill else weights)


def fused_weight(linears: Sequence[nn.Module]) -> Tensor | None:
    """Return the weights of linear layers as one matrix, without a copy, or None.

    Further rows up to a multiple of ALIGNED follow if there is memory after the weights. They have any values.

    None if a layer has a bias, if the weights are not contiguous in memory, or if gradients are enabled: they would
    reach the first weight only.
    """
    plain = None if torch.is_grad_enabled() else all_plain(linears)
    if plain is None or any(linear.bias is not None for linear in plain):
        return None
    return adjacent([linear.weight for linear in plain], ALIGNED)


def adjacent(parts: Sequence[Tensor], aligned: int = 1) -> Tensor | None:
    """Return tensors that follow each other in memory as one, without a copy, or None if they do not.

    With `aligned`, it has further rows up to a multiple, with any values, if there is memory after the tensors.
    """
    if torch.compiler.is_compiling():
        return None
    storage, end = parts[0].untyped_storage(), parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.untyped_storage().data_ptr() != storage.data_ptr():
            return None
        if not part.is_contiguous():
            return None
        end += part.nbytes
    rows = sum(map(len, parts))
    fill = -rows % aligned
    if end + fill * parts[0][0].nbytes <= storage.data_ptr() + storage.nbytes():
        rows += fill
    return parts[0].detach().as_strided((rows, *parts[0].shape[1:]), parts[0].stride())


@torch.no_grad()
def fuse_weights_(mixer: "DeltifyKDA") -> None:
    """Move the weights of a mixer's projections into one contiguous buffer, and its taps into another.

    They stay separate parameters. What holds their old addresses, such as a CUDA graph of a training step, is stale.
    """
    plain = all_plain(mixer.projections)
    if fused_weight(mixer.projections) is None and plain is not None and all(x.bias is None for x in plain):
        move_([linear.weight for linear in plain], join_weights(plain))
    convolutions = mixer.q_conv1d, mixer.k_conv1d, mixer.v_conv1d
    taps = [convolution.weight for convolution in convolutions]
    if not any(map(is_observed, convolutions)) and not any(x.is_meta for x in taps) and adjacent(taps) is None:
        move_(taps, torch.cat(taps))


def move_(parameters: Sequence[Tensor], joined: Tensor) -> None:
    """Let parameters use the memory of a tensor that begins with their values, in this order."""
    sizes = list(map(len, parameters))
    for parameter, part in zip(parameters, joined[: sum(sizes)].split(sizes)):
        parameter.data = part


def all_plain(linears: Sequence[nn.Module]) -> list[nn.Linear] | None:
    """Return the modules if all of them are plain linear layers, see `is_plain`, or None."""
    plain = [linear for linear in linears if is_plain(linear)]
    return plain if len(plain) == len(linears) else None


def is_plain(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a module computes x W^T + b with a weight in memory.

    False for adapters, quantized or offloaded weights, and modules with hooks or with a forward of their own.
    """
    plain = type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and not linear.weight.is_meta
    return plain and not is_observed(linear)


def is_observed(module: nn.Module) -> bool:
    """Return whether calls of a module do more than its class says: if it has hooks, or another forward.

    The hooks that transformers leaves behind after `output_hidden_states` do nothing in other calls.
    """
    hooks = [
        hook for hook in module._forward_hooks.values() if getattr(hook, "__name__", "") != "output_capturing_hook"
    ]
    others = module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any((hooks, *others)) or "forward" in vars(module)


def factors(low_rank: nn.Sequential) -> tuple[nn.Linear, nn.Linear]:
    """Return the two linear layers of `f_proj` or `g_proj`, the narrow one first."""
    low, high = low_rank
    assert isinstance(low, nn.Linear) and isinstance(high, nn.Linear)
    return low, high


class DeltifyKDA(nn.Module):
    """Kimi Delta Attention (arXiv 2510.26692, section 4), parameters named as in AFM-4.5B-Base-KDA-Only."""

    def __init__(self, config: DeltifyConfig, layer_idx: int):
        super().__init__()
        width, heads, head = config.hidden_size, config.num_attention_heads, config.head_dim
        self.layer_idx, self.head_dim, self.lower_bound = layer_idx, head, config.gate_lower_bound
        inner = heads * head
        self.q_proj = nn.Linear(width, inner, bias=config.kda_bias)
        self.k_proj = nn.Linear(width, inner, bias=config.kda_bias)
        self.v_proj = nn.Linear(width, inner, bias=config.kda_bias)
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (DeltifyTaps(inner, config.conv_size) for _ in range(3))
        self.f_proj = nn.Sequential(nn.Linear(width, head, bias=False), nn.Linear(head, inner, bias=False))
        self.b_proj = nn.Linear(width, heads, bias=False)
        self.g_proj = nn.Sequential(nn.Linear(width, head, bias=False), nn.Linear(head, inner, bias=config.gate_bias))
        self.A_log = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(inner, dtype=torch.float32))
        self.o_norm = DeltifyGatedRMSNorm(head, config.o_norm_eps)
        self.o_proj = nn.Linear(inner, width, bias=config.attention_out_bias)

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """The six layers that read the input: three wide ones (q, k, v), three narrow ones (decay, gate, beta)."""
        return self.q_proj, self.k_proj, self.v_proj, self.f_proj[0], self.g_proj[0], self.b_proj

    def forward(self, hidden_states: Tensor, cache: Cache | None = None, packing: Packing | None = None) -> Tensor:
        """Return outputs [B, T, D] for inputs [B, T, D].

        Reads and writes the layer's convolution and recurrent state in `cache`.
        """
        x = hidden_states if packing is None else packing.gather(hidden_states)
        y = self.o_proj(self.inner(x, cache, packing))
        return y if packing is None else packing.scatter(y, hidden_states)

    def inner(self, x: Tensor, cache: Cache | None = None, packing: Packing | None = None) -> Tensor:
        """Return the input of `o_proj`, [B, T, H * K]."""
        past = layer_of(cache, self.layer_idx, LinearAttentionLayer)
        states = None if past is None else read_states(past)
        wide, narrow = self.projections[:3], self.projections[3:]
        of_qkv = [self.q_conv1d(), self.k_conv1d(), self.v_conv1d()]
        taps = None if torch.is_grad_enabled() else adjacent(of_qkv)
        taps = torch.cat(of_qkv) if taps is None else taps
        if x.shape[1] > 1:
            # contiguous, because a matmul with a bias needs two passes for strided rows
            qkv = project(x, *wide)
            parts = project(x, *narrow).tensor_split((self.head_dim, 2 * self.head_dim), dim=-1)
            low_f, low_gate, b = (part.contiguous() for part in parts)
        elif (fused := fused_weight(self.projections)) is not None:
            inner = len(self.dt_bias)
            cuts = 3 * inner, 3 * inner + self.head_dim, 3 * inner + 2 * self.head_dim
            rows = F.linear(x, fused)[..., : rows_of(self.projections)]
            qkv, low_f, low_gate, b = (part.contiguous() for part in rows.tensor_split(cuts, dim=-1))
        else:
            qkv, (low_f, low_gate, b) = project(x, *wide), (linear(x) for linear in narrow)
        f, gate = self.f_proj[1](low_f), self.g_proj[1](low_gate)
        is_step = x.shape[1] == 1 and packing is None and not torch.is_grad_enabled()
        is_step = is_step and not self.o_norm.weight.is_meta  # accelerate loads offloaded weights at calls of modules
        if is_step and states is not None and all(writable(buffer) for buffer in states):
            conv_state, state = states
            inputs = (qkv[:, 0], conv_state, taps, f[:, 0], b[:, 0], gate[:, 0], self.A_log, self.dt_bias)
            norm = {"norm_eps": self.o_norm.eps, "lower_bound": self.lower_bound}
            return kda_layer_step(*inputs, self.o_norm.weight, state, **norm).unsqueeze(1)
        conv_state, state = states or (None, None)
        bounds, cut = (None, None) if packing is None else (packing.cu_seqlens, packing.cut)
        if cut is not None:
            conv_state = inputs_before(qkv, taps.shape[-1] - 1, cut=cut, cu_seqlens=bounds)
        qkv, conv_state = short_conv_split(qkv, taps, 3, state=conv_state, cu_seqlens=bounds)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in qkv)
        gates = {"lower_bound": self.lower_bound, "cu_seqlens": bounds}
        inputs = (q, k, v, f.view_as(q), b, self.A_log, self.dt_bias)
        if cut is None:
            o, state = kda(*inputs, state=state, **gates)
        else:
            o, state = kda_context_parallel(*inputs, cut=cut, **gates)
        if past is not None:
            write_states(past, conv_state, state)
        return self.o_norm(o, gate.view_as(o)).flatten(2)


class DeltifyGroupedQueryAttention(nn.Module):
    """Parameters of grouped-query attention, for layers that stay attention."""

    def __init__(self, config: DeltifyConfig, layer_idx: int):
        super().__init__()
        width, heads, kv_heads, head = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.config, self.layer_idx, self.head_dim = config, layer_idx, head
        self.num_key_value_groups = heads // kv_heads
        self.scaling, self.attention_dropout, self.is_causal = head**-0.5, config.attention_dropout, True
        self.use_rope = config.use_rope[layer_idx]
        self.q_proj = nn.Linear(width, heads * head, bias=config.attention_bias)
        self.k_proj = nn.Linear(width, kv_heads * head, bias=config.attention_bias)
        self.v_proj = nn.Linear(width, kv_heads * head, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * head, width, bias=config.attention_out_bias)
        if config.qk_norm:
            self.q_norm = DeltifyRMSNorm(head, config.rms_norm_eps)
            self.k_norm = DeltifyRMSNorm(head, config.rms_norm_eps)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of x [B, T, D], each [B, T, heads, K]."""
        heads = (-1, self.head_dim)
        q, k, v = (proj(x).unflatten(-1, heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return (self.q_norm(q), self.k_norm(k), v) if self.config.qk_norm else (q, k, v)


class DeltifyAttention(DeltifyGroupedQueryAttention):
    """Attention to all earlier tokens, with or without RoPE."""

    def forward(self, hidden_states, position_embeddings, attention_mask, cache, cut: CutRows | None = None, **kwargs):
        q, k, v = (x.transpose(1, 2) for x in self.project(hidden_states))
        if self.use_rope:
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        if cut is not None:
            k, v = earlier_keys(k, v, cut.group)
        backend = self.config._attn_implementation or "eager"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        if backend == "sdpa" and is_one_query(q, k, v, attention_mask, dropout):
            y, weights = attend_once(q, k, v, attention_mask, self.scaling), None
        else:
            y, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(y.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


LONG, PIECES = 8192, 8  # from LONG keys on, they are read in PIECES pieces, so that the whole GPU is busy


def is_one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> bool:
    """Return whether `attend_once` can compute this attention, and faster than SDPA."""
    if mask is None or mask.dtype != torch.bool or mask.shape[1:] != (1, 1, k.shape[2]):
        return False
    half = q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    on_nvidia = q.is_cuda and not torch.version.hip
    return q.shape[2] == 1 and half and on_nvidia and not dropout and not torch.is_grad_enabled()


def attend_once(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return the attention [B, 1, H, K] of one query per sequence, with scores in float32.

    Keys and values are read once for all heads that share them. With a mask, transformers' SDPA copies them for each
    head, which takes eight times as long after 32,000 tokens (H200, 20 heads over 4).

    Args:
        q: Queries [B, H, 1, K], in bfloat16 or float16 on a GPU, or float32.
        k: Keys [B, G, R, K].
        v: Values, likewise.
        mask: True for keys to attend to, [B, 1, 1, R].
        scale: Factor of the scores.
    """
    (B, G, R, K), H = k.shape, q.shape[1]
    pieces = PIECES if R >= LONG and R % PIECES == 0 else 1
    product = torch.bmm if q.dtype == torch.float32 else functools.partial(torch.bmm, out_dtype=torch.float32)
    scores = product(q.reshape(B * G, H // G, K), k.reshape(B * G, R, K).mT).view(B, H, R) * scale
    weights = scores.masked_fill(~mask[:, 0], torch.finfo(scores.dtype).min).softmax(-1).to(v.dtype)
    weights = weights.view(B * G, H // G, pieces, -1).transpose(1, 2).flatten(0, 1)
    y = product(weights, v.reshape(B * G * pieces, -1, K))
    return y.view(B * G, pieces, H // G, K).sum(1).view(B, 1, H, K).to(q.dtype)


class DeltifySlidingAttention(DeltifyGroupedQueryAttention):
    """Attention to a window of the last tokens and to the first tokens of the document, see `sliding`."""

    def forward(
        self,
        hidden_states: Tensor,
        rotary: Rotary | None,
        slots: Slots | None,
        packing: Packing | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, None]:
        """Return outputs [B, T, D] and None in place of attention weights.

        Args:
            hidden_states: Inputs [B, T, D].
            rotary: Rotary tables, see `sliding_attention`.
            slots: Slots of the tokens, see `find_slots`. None for one more token of each sequence in `cache`.
            packing: Documents of the inputs.
            cache: Cache that is read and written.
        """
        x = hidden_states if packing is None else packing.gather(hidden_states)
        q, k, v = (part.flatten(0, 1) for part in self.project(x))
        past = layer_of(cache, self.layer_idx, SinkLayer)
        rotary, dropout = rotary if self.use_rope else None, self.attention_dropout * self.training
        if slots is None:
            assert past is not None  # a pass without slots continues from a cache
            y = sliding_step(q, k, v, past, rotary=rotary, dropout=dropout)
        else:
            sizes = {"window": self.config.sliding_window, "tokens": hidden_states.shape[1]}
            y = sliding_attention(q, k, v, slots, cache=past, rotary=rotary, dropout=dropout, **sizes)
        y = self.o_proj(y.flatten(1)).view_as(x)
        return y if packing is None else packing.scatter(y, hidden_states), None


def init_gates(mixer: DeltifyKDA) -> None:
    """Initialise the decay as fla 0.6 does: A uniform in [1, 16], softplus(dt_bias) log-uniform in [1e-3, 0.1]."""
    init.copy_(mixer.A_log, torch.empty_like(mixer.A_log).uniform_(1, 16).log())
    dt = torch.empty_like(mixer.dt_bias).uniform_(math.log(1e-3), math.log(0.1)).exp()
    init.copy_(mixer.dt_bias, inverse_softplus(dt))


def inverse_softplus(y: Tensor) -> Tensor:
    """Return x with softplus(x) = y, for y > 0."""
    return y + torch.log(-torch.expm1(-y))

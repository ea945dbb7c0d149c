"""The KDA language model in transformers' conventions.

Legend: B batch, T tokens, D model width, H heads, K head width (keys and values), N documents.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, LinearAttentionLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..ops import kda, kda_step, short_conv, short_conv_step
from .configuration import ArceeKDAConfig, DeltifyConfig
from .loading import check_shapes, checkpoint_shapes, layer_types_of


class DeltifyCache(DynamicCache):
    """transformers' cache, except that it knows how many tokens it has seen when no attention layer is left.

    `DynamicCache.get_seq_length` raises on a cache of linear-attention layers alone (transformers 5.16 to 5.23).
    """

    seen_tokens: int = 0
    # a cache without attention layers counts as compileable, and generate would then hand over 4-D masks
    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if self.layers and all(isinstance(layer, LinearAttentionLayer) for layer in self.layers):
            return self.seen_tokens
        return super().get_seq_length(layer_idx)


@dataclass(frozen=True)
class Packing:
    """Documents of a batch, when they are not simply its rows: padded rows, or several documents packed in a row.

    KDA layers see the tokens in one row with bounds, so that padding costs nothing and documents do not meet.
    """

    index: Tensor | None  # rows of the flattened [B * T] that are tokens; None if all are
    cu_seqlens: Tensor  # [N + 1] int32

    def gather(self, x_BTD: Tensor) -> Tensor:
        flat = x_BTD.flatten(0, 1)
        return (flat if self.index is None else flat[self.index])[None]

    def scatter(self, y_1ND: Tensor, like_BTD: Tensor) -> Tensor:
        if self.index is None:
            return y_1ND.view_as(like_BTD)
        flat = y_1ND.new_zeros(like_BTD.shape[0] * like_BTD.shape[1], y_1ND.shape[-1])
        return flat.index_copy(0, self.index, y_1ND[0]).view_as(like_BTD)


def find_packing(attention_mask: Tensor | None, position_ids: Tensor | None, tokens: int, cached: bool):
    """Packing of the last `tokens` of each row, or None if every row is one document without padding.

    `attention_mask` [B, >= T] marks padding with 0. Without padding and without a cache, a position that does not
    follow its neighbour's starts a document, as in transformers' own packed attention masks.
    """
    if tokens == 1 and cached:
        return None
    if attention_mask is not None and attention_mask.dim() == 2:
        mask = attention_mask[:, -tokens:].bool()
        if not mask.all():
            return Packing(mask.flatten().nonzero().squeeze(1), F.pad(mask.sum(1).cumsum(0), (1, 0)).int())
    if position_ids is None or cached or position_ids.dim() != 2:
        return None
    jumps = position_ids.diff(dim=-1) != 1
    if not jumps.any():
        return None
    starts = F.pad(jumps, (1, 0), value=True).flatten().nonzero().squeeze(1)
    return Packing(None, F.pad(starts, (0, 1), value=position_ids.numel()).int())


class DeltifyRMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float() if x.dtype != torch.float64 else x
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


class DeltifyGatedRMSNorm(DeltifyRMSNorm):
    """weight * RMSNorm(x) * sigmoid(gate), over the last dimension, in float32."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        work = torch.promote_types(x.dtype, torch.float32)
        x32 = x.to(work)
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight.to(work) * x32 * torch.sigmoid(gate.to(work))).to(x.dtype)


class DeltifyKDA(nn.Module):
    """Kimi Delta Attention (arXiv 2510.26692, section 4), parameters named as in AFM-4.5B-Base-KDA-Only."""

    def __init__(self, config: DeltifyConfig, layer_idx: int):
        super().__init__()
        width, heads, head = config.hidden_size, config.num_attention_heads, config.head_dim
        self.layer_idx, self.head_dim, self.lower_bound = layer_idx, head, config.gate_lower_bound
        inner = heads * head
        self.q_proj = nn.Linear(width, inner, bias=config.attention_bias)
        self.k_proj = nn.Linear(width, inner, bias=config.attention_bias)
        self.v_proj = nn.Linear(width, inner, bias=config.attention_bias)
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (
            nn.Conv1d(inner, inner, config.conv_size, groups=inner, bias=False) for _ in range(3)
        )
        self.f_proj = nn.Sequential(nn.Linear(width, head, bias=False), nn.Linear(head, inner, bias=False))
        self.b_proj = nn.Linear(width, heads, bias=False)
        self.g_proj = nn.Sequential(nn.Linear(width, head, bias=False), nn.Linear(head, inner, bias=True))
        self.A_log = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(inner, dtype=torch.float32))
        self.o_norm = DeltifyGatedRMSNorm(head, config.rms_norm_eps)
        self.o_proj = nn.Linear(inner, width, bias=config.attention_out_bias)

    def forward(self, hidden_states: Tensor, cache: Cache | None = None, packing: Packing | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; reads and writes the layer's convolution and recurrent state in `cache`."""
        x = hidden_states if packing is None else packing.gather(hidden_states)
        y = self.o_proj(self.inner(x, cache, packing))
        return y if packing is None else packing.scatter(y, hidden_states)

    def inner(self, x: Tensor, cache: Cache | None = None, packing: Packing | None = None) -> Tensor:
        """What o_proj reads, [B, T, H * K]."""
        past = None if cache is None else cache.layers[self.layer_idx]
        conv_state = state = None
        if past is not None and past.has_previous_state[0]:
            conv_state, state = past.conv_states[0], past.recurrent_states[0]
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        taps = torch.cat([self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight])
        f, b = self.f_proj(x).unflatten(-1, (-1, self.head_dim)), self.b_proj(x)
        if state is not None and x.shape[1] == 1 and packing is None and not torch.is_grad_enabled():
            qkv = short_conv_step(qkv[:, 0], taps, conv_state).unflatten(-1, (-1, self.head_dim))
            q, k, v = qkv.chunk(3, dim=1)
            step = (q, k, v, f[:, 0], b[:, 0], self.A_log, self.dt_bias, state)
            o = kda_step(*step, lower_bound=self.lower_bound).unsqueeze(1)
        else:
            bounds = None if packing is None else packing.cu_seqlens
            qkv, conv_state = short_conv(qkv, taps, state=conv_state, cu_seqlens=bounds)
            q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).chunk(3, dim=2)
            gates = {"lower_bound": self.lower_bound, "cu_seqlens": bounds}
            o, state = kda(q, k, v, f, b, self.A_log, self.dt_bias, state=state, **gates)
            if past is not None:
                store(past, conv_state, state)
        return self.o_norm(o, self.g_proj(x).view_as(o)).flatten(2)


def store(layer: LinearAttentionLayer, conv_state: Tensor, state: Tensor) -> None:
    """Copies the states into the cache layer's buffers, whose addresses never change."""
    if not layer.is_recurrent_states_initialized[0]:
        layer.lazy_initialization(conv_states=conv_state, recurrent_states=state)
    layer.conv_states[0].copy_(conv_state)
    layer.recurrent_states[0].copy_(state)
    layer.has_previous_state[0] = True


class DeltifyAttention(nn.Module):
    """Grouped-query attention, with or without RoPE, for the layers a hybrid keeps."""

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

    def forward(self, hidden_states, position_embeddings, attention_mask, cache, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (proj(hidden_states).view(shape) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if self.use_rope:
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        y, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(y.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class DeltifyMLP(nn.Module):
    def __init__(self, config: DeltifyConfig):
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gated = config.mlp_gated
        if self.gated:
            self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.act_fn(self.up_proj(x)))


class DeltifyDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: DeltifyConfig, layer_idx: int):
        super().__init__()
        self.linear = config.layer_types[layer_idx] == "linear_attention"
        self.self_attn = DeltifyKDA(config, layer_idx) if self.linear else DeltifyAttention(config, layer_idx)
        self.mlp = DeltifyMLP(config)
        self.input_layernorm = DeltifyRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = DeltifyRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, position_embeddings, attention_mask, packing, past_key_values=None, **kwargs):
        x = self.input_layernorm(hidden_states)
        if self.linear:
            x = self.self_attn(x, past_key_values, packing)
        else:
            x, _ = self.self_attn(x, position_embeddings, attention_mask, past_key_values, **kwargs)
        hidden_states = hidden_states + x
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class DeltifyPreTrainedModel(PreTrainedModel):
    config: DeltifyConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeltifyDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = {"A_log", "dt_bias"}
    _supports_sdpa = True
    _supports_flash_attn = True
    _is_stateful = True
    _can_record_outputs = {"hidden_states": DeltifyDecoderLayer, "attentions": DeltifyAttention}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """As in transformers, but strict: every tensor must be there, expected, and of the right shape.

        Which layers are KDA is read from the tensors' names, so that a config need not say it.
        """
        source = pretrained_model_name_or_path
        shapes = None if source is None else checkpoint_shapes(str(source), kwargs)
        if shapes is None:
            return super().from_pretrained(source, *args, config=config, **kwargs)
        if not isinstance(config, PreTrainedConfig):
            config = cls.config_class.from_pretrained(source if config is None else config)
        config.layer_types = layer_types_of(shapes, config.num_hidden_layers)
        with torch.device("meta"):
            wanted = cls(config)
        tied = set(wanted._tied_weights_keys) if config.tie_word_embeddings else set()
        check_shapes(shapes, {name: tuple(x.shape) for name, x in wanted.state_dict().items()}, tied)
        return super().from_pretrained(source, *args, config=config, use_safetensors=True, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, DeltifyKDA):
            library_gates(module)


def library_gates(mixer: DeltifyKDA) -> None:
    """The field's default start: decay rate A in U(1, 16), softplus(dt_bias) log-uniform in [1e-3, 0.1] (fla 0.6)."""
    init.copy_(mixer.A_log, torch.empty_like(mixer.A_log).uniform_(1, 16).log())
    dt = torch.empty_like(mixer.dt_bias).uniform_(math.log(1e-3), math.log(0.1)).exp()
    init.copy_(mixer.dt_bias, inverse_softplus(dt))


def inverse_softplus(y: Tensor) -> Tensor:
    """x with softplus(x) = y, for y > 0."""
    return y + torch.log(-torch.expm1(-y))


class DeltifyModel(DeltifyPreTrainedModel):
    def __init__(self, config: DeltifyConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([DeltifyDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = DeltifyRMSNorm(config.hidden_size, config.rms_norm_eps)
        kept = [i for i, kind in enumerate(config.layer_types or ()) if kind == "full_attention"]
        self.has_attention = bool(kept)
        self.rotary_emb = LlamaRotaryEmbedding(config) if any(config.use_rope[i] for i in kept) else None
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Last hidden states [B, T, D], normalised, and the cache.

        `position_ids` [B, T] that restart mark packed documents, which do not see each other in any layer.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        tokens = x.shape[1]
        packing = find_packing(attention_mask, position_ids, tokens, past_key_values is not None)
        packed_documents = packing is not None and packing.index is None
        if use_cache and past_key_values is None and not packed_documents:
            past_key_values = DeltifyCache(config=self.config)
        seen = 0
        if past_key_values is not None and (self.has_attention or isinstance(past_key_values, DeltifyCache)):
            seen = past_key_values.get_seq_length()
        mask = position_embeddings = None
        if self.has_attention:
            if position_ids is None:
                position_ids = torch.arange(seen, seen + tokens, device=x.device).unsqueeze(0)
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=x,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
            if self.rotary_emb is not None:
                position_embeddings = self.rotary_emb(x, position_ids=position_ids)
        for layer in self.layers:
            x = layer(x, position_embeddings, mask, packing, past_key_values=past_key_values, **kwargs)
        if isinstance(past_key_values, DeltifyCache):
            past_key_values.seen_tokens = seen + tokens
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)


class DeltifyForCausalLM(DeltifyPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DeltifyConfig):
        super().__init__(config)
        self.model = DeltifyModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocabulary] (of the last `logits_to_keep` tokens, if not 0) and, with labels, the loss."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if type(model_kwargs.get("past_key_values")) is DynamicCache:
            model_kwargs["past_key_values"] = DeltifyCache(config=self.config)


class ArceeKDAForCausalLM(DeltifyForCausalLM):
    config: ArceeKDAConfig

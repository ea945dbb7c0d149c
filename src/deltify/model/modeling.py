"""The KDA language model in transformers' conventions.

Legend: B batch, T tokens, D model width, H heads, K head width (keys and values), N documents.
"""

import inspect
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..ops import add_rms_norm
from .cache import DeltifyCache, SinkLayer
from .capture import captured_logits
from .configuration import ArceeKDAConfig, DeltifyConfig, has_rope
from .context_parallel import check_cut, cut_mask, cut_packing, positions_of_rows
from .documents import BOUNDS, check_positions, positions_of
from .generation import DeltifyGenerationMixin
from .loading import HUB_OPTIONS, check_shapes, checkpoint_shapes, kda_biases, layer_types_of, renamings, with_prefix
from .mixers import (
    DeltifyAttention,
    DeltifyKDA,
    DeltifyReLUSquared,
    DeltifyRMSNorm,
    DeltifySlidingAttention,
    Packing,
    find_packing,
    init_gates,
    is_observed,
)
from .sliding import Slots, find_slots, rotary_positions

# name of the cache in transformers' masks and outputs, which changed in 5.24
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
# arguments of callers that have no effect on this model: those of the loss, sizes that follow from bounds, arguments of
# other models, and those that generate (transformers 5.24) adds for stop_strings
HARMLESS = frozenset(
    (
        *("num_items_in_batch", "shift_labels", "ignore_index", "output_router_logits", "return_dict", "debug_io"),
        *("max_length_q", "max_length_k", "token_type_ids", "cache_position", "tokenizer"),
    )
)
OUTPUTS = frozenset(("output_hidden_states", "output_attentions"))
MIXERS = {
    "linear_attention": DeltifyKDA,
    "full_attention": DeltifyAttention,
    "sliding_attention": DeltifySlidingAttention,
}


class DeltifyMLP(nn.Module):
    def __init__(self, config: DeltifyConfig):
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gated = config.mlp_gated
        if self.gated:
            self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.act_fn = DeltifyReLUSquared() if config.hidden_act == "relu2" else ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.act_fn(self.up_proj(x)))


class DeltifyDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: DeltifyConfig, layer_idx: int):
        super().__init__()
        self.kind = config.layer_types[layer_idx]
        self.linear = self.kind == "linear_attention"
        self.self_attn = MIXERS[self.kind](config, layer_idx)
        self.mlp = DeltifyMLP(config)
        self.input_layernorm = DeltifyRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = DeltifyRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden_states, position_embeddings, attention_mask, packing, sliding=(), past_key_values=None, **kwargs
    ):
        x = self.input_layernorm(hidden_states)
        if self.kind == "linear_attention":
            x = self.self_attn(x, past_key_values, packing)
        elif self.kind == "sliding_attention":
            x, _ = self.self_attn(x, *sliding, packing, past_key_values)
        else:
            x, _ = self.self_attn(x, position_embeddings, attention_mask, past_key_values, **kwargs)
        norm = self.post_attention_layernorm
        if type(norm) is DeltifyRMSNorm and not is_observed(norm):
            hidden_states, x = add_rms_norm(hidden_states, x, norm.weight, norm.eps)
        else:
            hidden_states = hidden_states + x
            x = norm(hidden_states)
        return hidden_states + self.mlp(x)


class DeltifyPreTrainedModel(PreTrainedModel):
    config: DeltifyConfig  # pyrefly: ignore[bad-override-mutable-attribute]  # as in all models of transformers
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
        """Load as transformers does, but refuse missing and unexpected tensors and other shapes.

        The names of the tensors decide which layers are KDA and whether these have biases. The configuration need not
        name them.
        """
        source = pretrained_model_name_or_path
        shapes = None if source is None else checkpoint_shapes(str(source), kwargs)
        if shapes is None:
            return super().from_pretrained(source, *args, config=config, **kwargs)
        if not isinstance(config, PreTrainedConfig):
            assert cls.config_class is not None
            hub = {name: value for name, value in kwargs.items() if name in HUB_OPTIONS}
            facts = {n: v for n, v in kwargs.items() if hasattr(cls.config_class, n) and n not in ("dtype", *hub)}
            config = cls.config_class.from_pretrained(source if config is None else config, **hub, **facts)
            kwargs = {name: value for name, value in kwargs.items() if name not in facts}
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False asks for pickled weights, which are not loaded. Leave it out")
        kwargs |= renamings(shapes) | {"use_safetensors": True}
        cls.skeleton(config, shapes)
        return super().from_pretrained(source, *args, config=config, **kwargs)

    @classmethod
    def skeleton(cls, config: PreTrainedConfig, shapes: dict[str, tuple[int, ...]]):
        """Return the model of a checkpoint without weights, on the meta device.

        Args:
            config: Configuration. Fields that the tensors decide are set.
            shapes: Shapes of the checkpoint's tensors by name.

        Raises:
            ValueError: If a tensor is missing, unexpected or of another shape.
        """
        shapes = with_prefix(shapes)
        if "lm_head.weight" in shapes:  # the head is not tied, whatever the configuration says
            config.tie_word_embeddings = False
        config.layer_types = layer_types_of(shapes, config.num_hidden_layers, config.layer_types)
        config.kda_bias, config.gate_bias = kda_biases(shapes)
        with torch.device("meta"):
            model = cls(config)
        expected = with_prefix({name: tuple(x.shape) for name, x in model.state_dict().items()})
        if "lm_head.weight" not in expected:  # a model without a head may be loaded from a checkpoint with one
            shapes.pop("lm_head.weight", None)
        check_shapes(shapes, expected, {"lm_head.weight"} if config.tie_word_embeddings else set())
        return model

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, DeltifyKDA):
            init_gates(module)


class DeltifyModel(DeltifyPreTrainedModel):
    def __init__(self, config: DeltifyConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([DeltifyDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = DeltifyRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.kinds = list(config.layer_types)
        self.has_attention = "full_attention" in self.kinds
        self.rotary_emb = rotary_embedding(config) if has_rope(config) else None
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
        cache: Cache | None = None,
        max_documents: int | None = None,
        row_group: "dist.ProcessGroup | None" = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Return the normalised last hidden states [B, T, D] and the cache.

        Packed documents do not see each other in any layer. They are marked by `position_ids` [B, T] that restart, or
        by bounds in one of the forms of `documents.BOUNDS`: `cu_seq_lens_q` and `cu_seq_lens_k` (transformers, trl),
        `cu_seqlens` (fla) or `seq_idx`. `cache` is the name of `past_key_values` since transformers 5.24.
        `max_documents` gives the packing a fixed shape, as CUDA graphs need it; see `find_packing`.

        With `row_group`, the rows are cut into segments of equal length over the ranks of a process group, in order
        (context parallelism). Each rank gives its own segments, and gets their hidden states. `position_ids` are those
        in the whole rows. All ranks must call forward and backward equally often. The gradient of the sum of all
        ranks' losses is the sum of the ranks' gradients.

        Raises:
            ValueError: If an argument is unknown, or does not fit the others or the cache. Arguments in `HARMLESS` are
                ignored.
        """
        past_key_values = cache if past_key_values is None else past_key_values
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        bounds = {name: kwargs.pop(name) for name in BOUNDS if kwargs.get(name) is not None}
        refuse_unknown(kwargs)
        if row_group is not None:
            whole = {"attention_mask": attention_mask, CACHE: past_key_values, "max_documents": max_documents}
            check_cut(self.kinds, self.config._attn_implementation, **whole, **bounds)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        rows, tokens = x.shape[:2]
        if not tokens:
            raise ValueError(f"the input has shape {list(x.shape)}, without a token. Give each sequence at least one")
        seen = self.check_cache(past_key_values, rows)
        attention_mask = self.mask_so_far(attention_mask, past_key_values, tokens)
        self.check_mask(attention_mask, rows, seen + tokens if self.has_attention else tokens)
        position_ids = check_positions(position_ids, rows, tokens)
        if bounds:
            if past_key_values is not None:
                raise ValueError(f"{', '.join(bounds)} with a cache: packed documents cannot continue from a cache")
            position_ids = positions_of(bounds, position_ids, attention_mask, rows, tokens).to(x.device)
        mask = position_embeddings = None
        own = slice(None)  # this pass's tokens in position_ids
        if row_group is None:
            packing = find_packing(attention_mask, position_ids, tokens, past_key_values is not None, max_documents)
        else:
            position_ids = positions_of_rows(position_ids, x, row_group)
            own = slice(row_group.rank() * tokens, (row_group.rank() + 1) * tokens)
            packing = cut_packing(position_ids, row_group)
            mask = cut_mask(position_ids, row_group) if self.has_attention else None
            kwargs["cut"] = packing.cut
        packed_documents = row_group is None and packing is not None and len(packing.cu_seqlens) - 1 > len(x)
        if packed_documents and self.has_attention:
            if packing.index is not None:
                raise ValueError(
                    "padding and several documents in one sequence: attention layers support only one of them"
                )
            attention_mask = None  # with a mask, transformers would not find the documents by their positions
            # FlashAttention finds them by their positions in a single sequence only
            kwargs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), packing.cu_seqlens)
            kwargs |= dict.fromkeys(("max_length_q", "max_length_k"), tokens)
        if use_cache and past_key_values is None and not packed_documents and row_group is None:
            past_key_values = DeltifyCache(config=self.config)
        sliding = ()
        if self.has_attention:
            if position_ids is None:
                position_ids = torch.arange(seen, seen + tokens, device=x.device).unsqueeze(0)
            if row_group is None:
                mask = create_causal_mask(
                    config=self.config,
                    inputs_embeds=x,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    **cache_argument(past_key_values),
                )
            if self.rotary_emb is not None:
                # of whole rows, because some kinds of RoPE depend on the largest position
                position_embeddings = tuple(table[:, own] for table in self.rotary_emb(x, position_ids=position_ids))
        if "sliding_attention" in self.kinds:
            sliding = self.rotary_tables(x), self.slots(x, packing, past_key_values)
        for layer in self.layers:
            x = layer(x, position_embeddings, mask, packing, sliding, past_key_values=past_key_values, **kwargs)
        if isinstance(past_key_values, DeltifyCache):
            past_key_values.seen_tokens = seen + tokens
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), **cache_argument(past_key_values))

    def check_cache(self, cache: Cache | None, rows: int) -> int:
        """Return the number of tokens of each sequence in a cache, with padding.

        Raises:
            ValueError: If the cache does not fit the model or the number of sequences, or would be written twice.
        """
        if cache is None:
            return 0
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise ValueError(
                "past_key_values with activation checkpointing: the backward pass computes layers again, and would "
                "write the cache twice. Call gradient_checkpointing_disable(), or give no cache"
            )
        if len(cache.layers) < len(self.layers):
            raise ValueError(
                f"past_key_values has {len(cache.layers)} layers, the model {len(self.layers)}. Give a "
                "DeltifyCache(config=model.config), or no cache"
            )
        if isinstance(cache, DeltifyCache) and cache.rows() not in (None, rows):
            raise ValueError(
                f"past_key_values has {cache.rows()} sequences, the input {rows}. Repeat sequences of the cache by "
                "batch_repeat_interleave, select some by batch_select_indices, or empty it by reset"
            )
        return cache.get_seq_length() if self.has_attention or isinstance(cache, DeltifyCache) else 0

    def mask_so_far(self, attention_mask: Tensor | None, cache: Cache | None, tokens: int) -> Tensor | None:
        """Return a mask without columns for tokens that come later, which a text read in pieces may have.

        Raises:
            ValueError: If the mask is longer than the input, and the cache does not count its tokens.
        """
        ours = isinstance(cache, DeltifyCache)
        if attention_mask is None or attention_mask.dim() != 2 or not (cache is None or ours or self.has_attention):
            return attention_mask
        seen = 0 if cache is None else cache.get_seq_length()
        if attention_mask.shape[1] <= seen + tokens:
            return attention_mask
        if ours and not seen and cache.rows() is not None:
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}, but the cache of a state counts no tokens. "
                f"Give the mask of the {tokens} new tokens"
            )
        return attention_mask[:, : seen + tokens]

    def check_mask(self, attention_mask: Tensor | None, rows: int, tokens: int) -> None:
        """Check that a mask covers the last `tokens` tokens of each sequence.

        Raises:
            ValueError: If it has another shape.
        """
        if attention_mask is None or (attention_mask.dim() != 2 and set(self.kinds) == {"full_attention"}):
            return
        shape = list(attention_mask.shape)
        if len(shape) != 2:
            raise ValueError(
                f"attention_mask has shape {shape}; KDA and sliding layers need [sequences, tokens], with 1 for tokens "
                "and 0 for padding"
            )
        if shape[0] != rows or shape[1] < tokens:
            raise ValueError(
                f"attention_mask has shape {shape}; it must be [{rows}, {tokens}], tokens in the cache included"
            )

    def rotary_tables(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return cosine and sine of all positions that sliding layers use, for a text of any length."""
        if self.rotary_emb is None:
            return None
        places = torch.arange(rotary_positions(self.config.sliding_window, self.config.sink_tokens), device=x.device)
        cos, sin = self.rotary_emb(x, position_ids=places[None])
        return cos[0], sin[0]

    def slots(self, x: Tensor, packing: Packing | None, cache: Cache | None) -> Slots | None:
        """Return the slots of this pass's tokens in sliding layers, or None for one more token of each sequence."""
        rows, tokens = x.shape[:2]
        past = None if cache is None else cache.layers[self.kinds.index("sliding_attention")]
        if past is not None and not isinstance(past, SinkLayer):
            raise ValueError(f"past_key_values is a {type(cache).__name__}, which keeps no sinks. Give a DeltifyCache")
        seen = None if past is None else past.seen
        if seen is not None and tokens == 1 and packing is None:
            return None
        sizes = (self.config.sliding_window, self.config.sink_tokens)
        if packing is None:
            return find_slots(torch.arange(0, rows * tokens + 1, tokens, device=x.device), rows * tokens, *sizes, seen)
        count = rows * tokens if packing.index is None else len(packing.index)
        return find_slots(packing.cu_seqlens.long(), count, *sizes, seen)


class DeltifyForCausalLM(DeltifyPreTrainedModel, DeltifyGenerationMixin):
    """A language model with KDA layers, or with KDA, full-attention and sliding-attention layers."""

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
        cache: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, T, vocabulary], or of the last `logits_to_keep` tokens if not 0, and with labels the loss.

        `logits_to_keep=1`, which generation uses, selects the last token of each sequence on either side of padding.
        """
        past_key_values = cache if past_key_values is None else past_key_values
        if labels is not None and kwargs.get("row_group") is not None:
            raise ValueError(
                "labels with row_group: the label of a segment's last token is in the next rank's segment. Compute the "
                "loss from the logits"
            )
        new = input_ids if inputs_embeds is None else inputs_embeds
        if new is not None:
            attention_mask = self.model.mask_so_far(attention_mask, past_key_values, new.shape[1])
        asked = [name for name, value in kwargs.items() if value is not None and value is not False]
        plain = labels is None and HARMLESS.issuperset(asked)
        plain = plain and not (self.config.output_hidden_states or self.config.output_attentions)
        step = (input_ids, past_key_values, attention_mask, position_ids)
        if plain and (logits := captured_logits(self, *step)) is not None:
            return CausalLMOutputWithPast(logits=logits, **cache_argument(past_key_values))
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
        if isinstance(logits_to_keep, int):
            kept = last_of_rows(hidden, attention_mask) if logits_to_keep == 1 else hidden[:, -logits_to_keep:]
        else:
            kept = hidden[:, logits_to_keep]
        logits = self.lm_head(kept)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **cache_argument(getattr(outputs, CACHE)),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def run_with_full_weights(self, function):
        """Return `function(self)`. Inside, weights that are sharded over processes are whole, as in forward."""
        return function(self)


def cache_argument(cache: Cache | None) -> dict[str, Any]:
    """Return the argument by which transformers' masks and outputs take a cache."""
    return {CACHE: cache}


def rotary_embedding(config: DeltifyConfig) -> LlamaRotaryEmbedding:
    """Return Llama's rotary embedding, which reads no other fields than DeltifyConfig has."""
    return LlamaRotaryEmbedding(cast(Any, config))


def refuse_unknown(arguments: dict) -> None:
    """Refuse arguments of forward that would be ignored.

    Raises:
        ValueError: If an argument is unknown.
    """
    known = HARMLESS | OUTPUTS | ({"is_causal"} if arguments.get("is_causal") else set())  # the model always is
    if unknown := sorted(name for name, value in arguments.items() if value is not None and name not in known):
        raise ValueError(
            f"forward does not know {', '.join(unknown)}, and would ignore it. Leave it out. Packed documents are "
            f"marked by position_ids, or by {', '.join(BOUNDS)}"
        )


def last_of_rows(hidden_BTD: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the last token of each sequence that is not padding, [B, 1, D]."""
    tokens = hidden_BTD.shape[1]
    if attention_mask is None or attention_mask.dim() != 2 or tokens == 1 or attention_mask[:, -1].all():
        return hidden_BTD[:, -1:]
    place = torch.arange(1, tokens + 1, device=hidden_BTD.device)
    last = (attention_mask[:, -tokens:].bool() * place).argmax(1)
    return hidden_BTD[torch.arange(len(last), device=last.device), last][:, None]


class ArceeKDAModel(DeltifyModel):
    config_class = ArceeKDAConfig


class ArceeKDAForCausalLM(DeltifyForCausalLM):
    config_class = ArceeKDAConfig

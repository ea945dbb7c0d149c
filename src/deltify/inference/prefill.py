"""Prefill of long texts in pieces, so that memory grows only with the cache of attention layers.

Legend: B batch, T tokens, D model width, W vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..conversion.teacher import head_width
from ..model import DeltifyConfig

# upper bounds of one forward pass and of the cache
PREFILL_CHUNK = {"cpu": 4096, "cuda": 16384}  # tokens of one sequence in a forward pass
FORWARD_TOKENS = 2**14  # tokens of all sequences in a forward pass
MASK_BYTES = 2**28  # attention mask [B, piece, context] of one byte per entry
CACHE_BYTES = 2**31  # keys and values of all sequences on a CPU
CACHE_SHARE = 0.25  # keys and values of all sequences, as a fraction of a GPU's free memory


def has_growing_cache(model: PreTrainedModel) -> bool:
    """Return whether the cache of some layer grows with the text."""
    return not isinstance(model.config, DeltifyConfig) or "full_attention" in model.config.layer_types


def piece_length(model: PreTrainedModel, batch_size: int, context: int) -> int:
    """Return how many tokens of each sequence to read at a time: a multiple of 64.

    Args:
        model: Model that reads.
        batch_size: Number of sequences.
        context: Number of tokens of each sequence.
    """
    tokens = min(PREFILL_CHUNK.get(model.device.type, PREFILL_CHUNK["cpu"]), FORWARD_TOKENS // batch_size)
    if has_growing_cache(model):
        tokens = min(tokens, MASK_BYTES // (batch_size * context))
    return max(64, tokens // 64 * 64)


def max_batch_size(model: PreTrainedModel, context: int, max_rows: int = 128) -> int:
    """Return how many sequences of `context` tokens fit into memory together: 1 to `max_rows`."""
    if not has_growing_cache(model):
        return max_rows
    return max(1, min(max_rows, max_cache_bytes(model) // teacher_cache_bytes(model, context)))


def max_cache_bytes(model: PreTrainedModel) -> int:
    """Return the bytes that keys and values of all sequences may take on the model's device."""
    if model.device.type == "cuda":
        return int(CACHE_SHARE * torch.cuda.mem_get_info(model.device)[0])
    return CACHE_BYTES


def teacher_cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Return the bytes of keys and values of `tokens` tokens if all layers are attention, as in a student's teacher."""
    return model.config.num_hidden_layers * tokens * key_value_bytes(model.config, model.dtype.itemsize)


def key_value_bytes(config: PreTrainedConfig, element_bytes: int) -> int:
    """Return the bytes of one token's keys and values in one attention layer."""
    head_dim = head_width(config)
    return 2 * config.num_key_value_heads * head_dim * element_bytes


@torch.no_grad()
def read_pieces(model: PreTrainedModel, ids_BT: Tensor, cache: DynamicCache, piece: int) -> Iterator[Tensor]:
    """Yield the last hidden states [B, up to `piece`, D] of sequences that continue from `cache`."""
    for part in ids_BT.split(piece, dim=1):
        yield model.model(input_ids=part, past_key_values=cache, use_cache=True).last_hidden_state


@torch.no_grad()
def prefill(model: PreTrainedModel, ids_BT: Tensor, cache: DynamicCache, *, context: int | None = None) -> Tensor:
    """Read sequences into `cache` and return the logits [B, W] after their last token.

    Args:
        model: Model that reads.
        ids_BT: Token ids.
        cache: Cache that the sequences continue from.
        context: Number of tokens of each sequence, with those in the cache. Defaults to T, for an empty cache.
    """
    batch_size, tokens = ids_BT.shape
    last_hidden_BD = torch.empty(0)
    for hidden_BTD in read_pieces(model, ids_BT, cache, piece_length(model, batch_size, context or tokens)):
        last_hidden_BD = hidden_BTD[:, -1]
    return model.lm_head(last_hidden_BD)


def cache_bytes(cache: DynamicCache) -> int:
    """Return the bytes of all tensors in a cache."""

    def size(value: object) -> int:
        if isinstance(value, Tensor):
            return value.numel() * value.element_size()
        if isinstance(value, dict):
            return sum(map(size, value.values()))
        return sum(map(size, value)) if isinstance(value, list | tuple) else 0

    return sum(size(value) for layer in cache.layers for value in vars(layer).values())


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the end-of-sequence tokens of the tokenizer and of the model's generation settings."""
    settings = model.generation_config
    eos = settings.eos_token_id if settings is not None else None
    eos_token_ids = eos if isinstance(eos, list) else [eos]
    return {token for token in (tokenizer.eos_token_id, *eos_token_ids) if token is not None}

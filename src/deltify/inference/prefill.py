"""Long texts, read in pieces: memory does not grow with the text, save for what attention layers keep of it.

Legend: B rows, T tokens, D model width, W vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..model import DeltifyConfig
from ..model.modeling import DeltifyCache

PIECE = {"cpu": 4096, "cuda": 16384}  # tokens of a row in one forward pass, at most
FORWARD_TOKENS = 2**14  # of all rows in one forward pass
MASK_BYTES = 2**28  # of an attention mask [B, piece, context], one byte each
CACHE_BYTES = 2**31  # of the keys and values of all rows, on a CPU
CACHE_SHARE = 0.25  # of a GPU's free memory


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache of the kind that the model needs."""
    kind = DeltifyCache if isinstance(model.config, DeltifyConfig) else DynamicCache
    return kind(config=model.config)


def keeps_tokens(model: PreTrainedModel) -> bool:
    """Whether some layer's cache grows with the text."""
    return not isinstance(model.config, DeltifyConfig) or "full_attention" in (model.config.layer_types or ())


def piece_length(model: PreTrainedModel, rows: int, context: int) -> int:
    """Tokens of a row to read at a time, a multiple of 64, on the way to `context` tokens."""
    tokens = min(PIECE.get(model.device.type, PIECE["cpu"]), FORWARD_TOKENS // rows)
    if keeps_tokens(model):
        tokens = min(tokens, MASK_BYTES // (rows * context))
    return max(64, tokens // 64 * 64)


def rows_at_once(model: PreTrainedModel, context: int, most: int = 128) -> int:
    """Rows of `context` tokens whose keys and values have room, at most so many; at least one."""
    if not keeps_tokens(model):
        return most
    room = CACHE_BYTES
    if model.device.type == "cuda":
        room = int(CACHE_SHARE * torch.cuda.mem_get_info(model.device)[0])
    row = model.config.num_hidden_layers * context * key_value_bytes(model.config, model.dtype.itemsize)
    return max(1, min(most, room // row))


def key_value_bytes(config, number_bytes: int) -> int:
    """Bytes that one attention layer keeps of one token."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_key_value_heads * head_dim * number_bytes


@torch.no_grad()
def read_pieces(model: PreTrainedModel, ids_BT: Tensor, cache: DynamicCache, piece: int) -> Iterator[Tensor]:
    """Last hidden states [B, up to `piece`, D] of rows that go on from `cache`, piece by piece."""
    for part in ids_BT.split(piece, dim=1):
        yield model.model(input_ids=part, past_key_values=cache, use_cache=True).last_hidden_state


@torch.no_grad()
def prefill(model: PreTrainedModel, ids_BT: Tensor, cache: DynamicCache, *, context: int | None = None) -> Tensor:
    """Logits [B, W] after the last token. `context`: tokens of a row with those that the cache has seen."""
    rows, tokens = ids_BT.shape
    last = torch.empty(0)
    for hidden in read_pieces(model, ids_BT, cache, piece_length(model, rows, context or tokens)):
        last = hidden[:, -1]
    return model.lm_head(last)


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of all tensors in a cache."""

    def size(value) -> int:
        if isinstance(value, Tensor):
            return value.numel() * value.element_size()
        if isinstance(value, dict):
            return sum(map(size, value.values()))
        return sum(map(size, value)) if isinstance(value, list | tuple) else 0

    return sum(size(value) for layer in cache.layers for value in vars(layer).values())


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """End-of-sequence tokens of the tokenizer and of the model's generation settings."""
    settings = model.generation_config
    ends = settings.eos_token_id if settings is not None else None
    ends = ends if isinstance(ends, list) else [ends]
    return {token for token in (tokenizer.eos_token_id, *ends) if token is not None}

"""The cache of a model: states of KDA layers, sinks and windows of sliding layers, keys and values of attention layers.

Buffers are written in place where possible: CUDA graphs need constant addresses.

Legend: B sequences, G key/value heads, K head width, S sinks, W window.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, LinearAttentionLayer

from .configuration import DeltifyConfig

Layer = TypeVar("Layer")


def layer_of(cache: Cache | None, index: int, kind: type[Layer]) -> Layer | None:
    """Return a layer of a cache, or None without a cache.

    Raises:
        ValueError: If the layer is not of this kind.
    """
    if cache is None:
        return None
    layer = cache.layers[index]
    if not isinstance(layer, kind):
        raise ValueError(
            f"layer {index} of past_key_values is a {type(layer).__name__}, not a {kind.__name__}. Give a "
            "DeltifyCache(config=model.config)"
        )
    return layer


def writable(buffer: Tensor) -> bool:
    """Return whether a buffer may be written in place.

    Not if it requires gradients, nor outside inference mode if it was created in it.
    """
    return not buffer.requires_grad and (torch.is_inference_mode_enabled() or not buffer.is_inference())


def keep(buffer: Tensor | None, new: Tensor) -> Tensor:
    """Return the buffer with the values of `new`, or a copy of `new` if the buffer cannot be written in place."""
    if buffer is not None and buffer.shape == new.shape and writable(buffer) and not new.requires_grad:
        return buffer.copy_(new)
    return new.clone(memory_format=torch.contiguous_format)


def write_states(layer: LinearAttentionLayer, conv_state: Tensor, state: Tensor) -> None:
    """Write the states of a KDA layer into its cache layer."""
    if not layer.is_recurrent_states_initialized[0]:
        layer.lazy_initialization(conv_states=conv_state, recurrent_states=state)
    layer.conv_states[0] = keep(layer.conv_states[0], conv_state)
    layer.recurrent_states[0] = keep(layer.recurrent_states[0], state)
    layer.has_previous_state[0] = True


def read_states(layer: LinearAttentionLayer) -> tuple[Tensor, Tensor] | None:
    """Return the convolution and recurrent state of a KDA layer, or None before its first token."""
    if not layer.has_previous_state[0]:
        return None
    for states in (layer.conv_states, layer.recurrent_states):
        if (x := states[0]) is not None and x.is_inference() and not torch.is_inference_mode_enabled():
            states[0] = x.clone()  # autograd cannot save it, and a step cannot write it
    return states_of(layer)


def states_of(layer: object) -> tuple[Tensor, Tensor]:
    """Return the convolution and recurrent state of a KDA layer after its first token, as they are stored."""
    assert isinstance(layer, LinearAttentionLayer)
    conv_state, state = layer.conv_states[0], layer.recurrent_states[0]
    assert conv_state is not None and state is not None
    return conv_state, state


class SinkLayer(CacheLayerMixin):
    """The cache of a sliding layer: keys and values of S sinks and of the last W - 1 tokens, before rotation.

    `keys` and `values` are [B, G, S + W - 1, K] from the first token. `seen` [B] counts the tokens of each sequence,
    without padding; it determines which places are in use.
    """

    is_sliding = True
    supports_early_init = False

    def __init__(self, window: int, sinks: int):
        super().__init__()
        self.window, self.sinks = window, sinks
        self.cumulative_length = 0  # number of tokens with padding, as in transformers
        self.seen: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers for keys of shape [B, G, any, K]."""
        rows, heads, _, width = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros(rows, heads, self.sinks + self.window - 1, width)
        self.values = torch.zeros_like(self.keys)
        self.seen = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        raise NotImplementedError("only DeltifySlidingAttention writes a sliding layer with sinks")

    def put(self, keys: Tensor, values: Tensor, seen: Tensor) -> None:
        """Set keys and values [B, G, S + W - 1, K] of sequences of `seen` [B] tokens."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.keys, self.values, self.seen = keep(self.keys, keys), keep(self.values, values), keep(self.seen, seen)

    def write(self, keys: Tensor, values: Tensor, new: Tensor, tokens: int) -> None:
        """Set sinks and windows [B, S + W - 1, G, K] after `new` [B] more tokens; with padding they are `tokens`."""
        self.put(keys.transpose(1, 2), values.transpose(1, 2), new if self.seen is None else self.seen + new)
        self.cumulative_length += tokens

    def tensors(self) -> dict[str, Tensor]:
        """Return the layer's tensors by name."""
        named = {"keys": self.keys, "values": self.values, "seen": self.seen}
        return {name: x for name, x in named.items() if x is not None}

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return keys of the sinks [B, S, G, K] and of the window [B, W - 1, G, K], then the values of both."""
        assert self.keys is not None and self.values is not None
        sizes = [self.sinks, self.window - 1]
        sink_keys, keys = self.keys.transpose(1, 2).split(sizes, 1)
        sink_values, values = self.values.transpose(1, 2).split(sizes, 1)
        return sink_keys, keys, sink_values, values

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.keys = self.values = self.seen = None
        self.is_initialized, self.cumulative_length = False, 0


class DeltifyCache(DynamicCache):
    """transformers' cache with three changes.

    Sliding layers keep their sinks. The cache counts its tokens: `DynamicCache.get_seq_length` raises on a cache with
    linear-attention layers only (transformers 5.16 to 5.23). Its sequences can be selected and repeated, which
    transformers supports for keys and values only.
    """

    # without attention layers, transformers would call it compileable, and generate would give 4-D masks
    is_compileable = False

    def __init__(self, config: DeltifyConfig):
        super().__init__(config=config)
        self.seen_tokens = 0
        for i, kind in enumerate(config.layer_types):
            if kind == "sliding_attention":
                self.layers[i] = SinkLayer(config.sliding_window, config.sink_tokens)

    @property
    def is_linear(self) -> list[bool]:
        """False for each layer: since 5.24, generate feeds all tokens again if a cache has only linear layers."""
        return [False] * len(self.layers)

    @property
    def is_sliding(self) -> list[bool]:
        """True but for full attention: transformers makes its mask from the first layer that is not sliding."""
        return [type(layer) is not DynamicLayer for layer in self.layers]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if self.layers and all(isinstance(layer, LinearAttentionLayer) for layer in self.layers):
            return self.seen_tokens
        return super().get_seq_length(layer_idx)

    def rows(self) -> int | None:
        """Return the number of sequences in the cache, or None before the first token."""
        return next((len(x) for layer in self.layers for x in held(layer)), None)

    def reset(self) -> None:
        self.seen_tokens = 0
        for layer in self.layers:
            if isinstance(layer, LinearAttentionLayer):
                layer.has_previous_state[0] = False  # keep the buffers for the next pass
            elif isinstance(layer, SinkLayer):
                layer.reset()
            elif isinstance(layer, CacheLayerMixin):
                # transformers before 5.23 fills keys and values with zeros instead of dropping them
                layer.keys = layer.values = None
                layer.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.change_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.change_rows(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.change_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to all tensors of all layers. Their first dimension is the sequences."""
        for layer in self.layers:
            if isinstance(layer, LinearAttentionLayer):
                for states in (layer.conv_states, layer.recurrent_states):
                    states[0] = None if states[0] is None else keep(states[0], change(states[0]))
            elif isinstance(layer, CacheLayerMixin) and (keys_and_values := held(layer)):
                layer.keys, layer.values = map(change, keys_and_values)
                if isinstance(layer, SinkLayer) and layer.seen is not None:
                    layer.seen = change(layer.seen)

    def crop(self, *args, **kwargs) -> None:
        self.refuse_rolling_back("crop")
        super().crop(*args, **kwargs)

    def activate_past_recording(self) -> None:
        self.refuse_rolling_back("activate_past_recording")
        super().activate_past_recording()

    def refuse_rolling_back(self, name: str) -> None:
        """Raise ValueError unless all layers keep every token."""
        if any(isinstance(layer, LinearAttentionLayer | SinkLayer) for layer in self.layers):
            raise ValueError(
                f"{name}: the states of KDA and sliding layers cannot be rolled back. Copy the cache beforehand "
                "(copy.deepcopy(cache)), and continue from the copy"
            )


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """Return an empty cache of the model's class, for a student or a teacher."""
    config = model.config
    return DeltifyCache(config=config) if isinstance(config, DeltifyConfig) else DynamicCache(config=config)


def held(layer) -> list[Tensor]:
    """Return the tensors in a cache layer, each [B, ...]."""
    if isinstance(layer, LinearAttentionLayer):
        tensors = [layer.conv_states[0], layer.recurrent_states[0]] if layer.has_previous_state[0] else []
    else:
        tensors = [layer.keys, layer.values]
    return [x for x in tensors if x is not None and x.numel()]

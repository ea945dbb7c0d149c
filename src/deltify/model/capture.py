"""Decode on a GPU by one CUDA graph.

An eager step of a large model waits for Python to launch hundreds of small kernels; a replay does not. The states of
KDA layers keep their size and address, so one captured graph serves any context length. Keys and values of attention
layers grow. They are kept in buffers with room for more tokens, and a new graph is captured when the room is full.

Legend: B sequences, G key/value heads, R room in tokens, K head width.
"""

import warnings
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

from ..ops import linear
from .cache import DeltifyCache, states_of, writable
from .configuration import has_fixed_rope
from .mixers import DeltifyAttention, DeltifyKDA, DeltifySlidingAttention, fuse_weights_, is_observed

LEAST_ROOM = 1024  # tokens for which new buffers have room
CLOSE = 0.05  # relative difference of a captured step's logits from the eager ones; .024 is rounding in 36 layers


class RoomyCache:
    """The cache of a captured step: states as they are, and keys and values in buffers [B, G, R, K] with room.

    The keys and values of the real cache are views of the used parts of these buffers.
    """

    def __init__(self, cache: DeltifyCache, device: torch.device):
        self.layers = cache.layers
        self.attention = attention_layers(cache)
        used = cache.get_seq_length()
        self.room = -(-(used + max(LEAST_ROOM, used // 4)) // 256) * 256
        self.buffers = {}
        for i, layer in self.attention.items():
            keys, values = keys_of(layer)
            self.buffers[i] = self.roomy(keys), self.roomy(values)
        self.place = torch.zeros(1, dtype=torch.long, device=device)  # of the new token

    def roomy(self, x_BGTK: Tensor) -> Tensor:
        """Return an empty buffer for keys or values like these. Unused places are masked, but must be finite."""
        rows, heads, _, width = x_BGTK.shape
        return x_BGTK.new_zeros(rows, heads, self.room, width)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write keys and values [B, G, 1, K] of the new token, and return the whole buffers."""
        for buffer, new in zip(self.buffers[layer_idx], (keys, values)):
            buffer.index_copy_(2, self.place, new)
        return self.buffers[layer_idx]

    def take(self, used: int) -> None:
        """Copy keys and values of the real cache that are not in the buffers, and point to the place after them."""
        for i, layer in self.attention.items():
            for buffer, x in zip(self.buffers[i], keys_of(layer)):
                if x.data_ptr() != buffer.data_ptr():  # an eager step, or one that selects sequences, made them anew
                    buffer[:, :, :used].copy_(x)
        self.place.fill_(used)

    def give(self, used: int) -> None:
        """Make the used parts of the buffers the keys and values of the real cache."""
        for i, layer in self.attention.items():
            layer.keys, layer.values = (buffer[:, :, :used] for buffer in self.buffers[i])


class FastProducts(TorchFunctionMode):
    """Inside this context, linear layers of any module call `deltify.ops.linear`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (linear if func is F.linear else func)(*args, **(kwargs or {}))


class DecodeStep:
    """One decoding step of a model on the states of one cache, with inputs and outputs at constant addresses."""

    def __init__(self, model: PreTrainedModel, cache: DeltifyCache, rows: int):
        for module in model.modules():
            if isinstance(module, DeltifyKDA):
                fuse_weights_(module)
        self.model, self.addresses = model, addresses(cache)
        self.ids, self.positions = (torch.zeros(rows, 1, dtype=torch.long, device=model.device) for _ in range(2))
        self.cache = RoomyCache(cache, model.device)
        self.allowed = torch.ones(rows, self.cache.room, dtype=torch.bool, device=model.device)
        self.logits: Tensor | None = None
        self.replay = self.compute

    def compute(self) -> None:
        """Run the step on the inputs, and write the states and `logits`."""
        model = self.model.model
        x, mask, rotary = model.embed_tokens(self.ids), None, None
        if self.cache.attention:
            earlier = torch.arange(self.cache.room, device=x.device) <= self.cache.place
            mask = (self.allowed & earlier)[:, None, None]
            if model.rotary_emb is not None:
                rotary = model.rotary_emb(x, position_ids=self.positions)
        with FastProducts():
            for layer in model.layers:
                x = layer(x, rotary, mask, None, (), past_key_values=self.cache)
            self.logits = self.model.lm_head(model.norm(x))

    def __call__(
        self,
        ids_B1: Tensor,
        cache: DeltifyCache,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Return logits [B, 1, vocabulary] of one more token, which the cache then contains."""
        used = cache.get_seq_length()
        self.ids.copy_(ids_B1)
        if self.cache.attention:
            self.positions.copy_(torch.tensor(used) if position_ids is None else position_ids)
            self.allowed[:, : used + 1] = True if attention_mask is None else attention_mask.bool()
            self.cache.take(used)
        self.replay()
        self.cache.give(used + 1)
        cache.seen_tokens = used + 1
        assert self.logits is not None
        return self.logits.clone()

    def fits(self, model: PreTrainedModel, cache: DeltifyCache, rows: int) -> bool:
        """Return whether this step can make the cache's next step."""
        written = (self.ids, *(buffer for buffers in self.cache.buffers.values() for buffer in buffers))
        full = bool(self.cache.attention) and cache.get_seq_length() >= self.cache.room
        same = self.model is model and self.addresses == addresses(cache) and len(self.ids) == rows
        return same and not full and all(map(writable, written))


class CapturedStep(DecodeStep):
    """A decoding step as a CUDA graph, after `capture`."""

    def capture(self) -> None:
        """Capture the graph. This does not run the step."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.compute()
        self.replay = graph.replay


# by cache: its captured step; None after the first, eager step; False if it decodes eagerly for good
STEPS: "WeakKeyDictionary[Cache, CapturedStep | bool | None]" = WeakKeyDictionary()


def captured_logits(
    model: PreTrainedModel,
    ids: Tensor | None,
    cache: Cache | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
) -> Tensor | None:
    """Return logits [B, 1, vocabulary] of one more token by replaying a graph, or None if the model must run eagerly.

    The first token decoded with a cache runs eagerly, which initialises all libraries. The second one is captured. The
    captured step is compared with the eager one first. A model that has hooks at the first token decodes eagerly. Hooks
    that are added later are not called.
    """
    if not isinstance(cache, DeltifyCache):  # others do not count the tokens that a replay adds
        return None
    if ids is None or ids.shape[1] != 1 or not ids.is_cuda or torch.is_grad_enabled():
        return None
    if torch.compiler.is_compiling() or len(set(vars(model).get("hf_device_map", {}).values())) > 1:
        return None
    if not all(map(begun, cache.layers)) or not all(map(writable, states(cache))):
        return None
    if attention_mask is not None and (attention_mask.dim() != 2 or not attention_mask[:, -1].all()):
        return None
    if attention_layers(cache) and not can_be_captured(model, cache, attention_mask):
        return None
    if cache not in STEPS:
        STEPS[cache] = None if has_known_mixers(model) and not any(map(is_observed, model.modules())) else False
        return None
    step = STEPS[cache]
    if step is False:
        return None
    if isinstance(step, CapturedStep) and step.fits(model, cache, len(ids)):
        return step(ids, cache, attention_mask, position_ids)
    return first_logits(model, ids, cache, attention_mask, position_ids)


def is_captured(cache: Cache) -> bool:
    """Return whether the last token of a cache came from a graph."""
    return isinstance(STEPS.get(cache), CapturedStep)


def first_logits(
    model: PreTrainedModel, ids: Tensor, cache: DeltifyCache, attention_mask: Tensor | None, position_ids: Tensor | None
) -> Tensor | None:
    """Return the logits of one more token, eagerly, and keep a captured step if it gives the same.

    None, if the GPU's memory does not hold the states twice.
    """
    used = cache.get_seq_length()
    try:
        before = copy_states(cache)
    except torch.OutOfMemoryError:
        give_up(cache, "the GPU's memory does not hold the states twice")
        return None
    kept = [(layer, keys_of(layer)) for layer in attention_layers(cache).values()]
    options = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": cache}

    def eagerly() -> Tensor:
        return model.lm_head(model.model(input_ids=ids, use_cache=True, **options).last_hidden_state)

    def take_back() -> None:
        for state, old in zip(states(cache), before):
            state.copy_(old)
        for layer, (keys, values) in kept:
            layer.keys, layer.values = keys, values
        cache.seen_tokens = used

    want = eagerly()
    take_back()
    try:
        step = CapturedStep(model, cache, len(ids))
        step(ids, cache, attention_mask, position_ids)  # not as a graph yet: kernels are chosen at their first use
        take_back()
        step.capture()
        got = step(ids, cache, attention_mask, position_ids)
        error = float((got.float() - want.float()).norm() / want.float().norm())
        reason = None if error < CLOSE else f"its logits differ by {error:.2g} from the eager ones"
    except RuntimeError as failure:
        step, reason = False, str(failure).splitlines()[0]
    if reason is None:
        STEPS[cache] = step
        return want
    give_up(cache, reason)
    take_back()
    return eagerly()


def give_up(cache: DeltifyCache, reason: str) -> None:
    """Decode eagerly with this cache from now on, and say why."""
    warnings.warn(f"decoding runs without a CUDA graph: {reason}", stacklevel=2)
    STEPS[cache] = False


def has_known_mixers(model: PreTrainedModel) -> bool:
    """Return whether all mixers are deltify's own. Others, such as those of controls, may count tokens themselves."""
    own = DeltifyKDA, DeltifyAttention, DeltifySlidingAttention
    return all(isinstance(layer.self_attn, own) for layer in model.model.layers)


def can_be_captured(model: PreTrainedModel, cache: DeltifyCache, attention_mask: Tensor | None) -> bool:
    """Return whether a step of a model with attention layers can be captured."""
    whole = attention_mask is None or attention_mask.shape[1] == cache.get_seq_length() + 1
    return model.config._attn_implementation == "sdpa" and has_fixed_rope(model.config) and whole


def begun(layer: object) -> bool:
    """Return whether a layer of a cache is one that a graph can use, and has tokens."""
    if type(layer) is LinearAttentionLayer:
        return layer.has_previous_state[0]
    return type(layer) is DynamicLayer and layer.get_seq_length() > 0


def attention_layers(cache: Cache) -> dict[int, DynamicLayer]:
    """Return the attention layers of a cache by index."""
    return {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, DynamicLayer)}


def keys_of(layer: DynamicLayer) -> tuple[Tensor, Tensor]:
    """Return keys and values [B, G, T, K] of an attention layer after its first token."""
    assert layer.keys is not None and layer.values is not None
    return layer.keys, layer.values


def states(cache: Cache) -> list[Tensor]:
    """Return the convolution and recurrent states of all KDA layers."""
    return [x for layer in cache.layers if isinstance(layer, LinearAttentionLayer) for x in states_of(layer)]


def copy_states(cache: Cache) -> list[Tensor]:
    return [x.clone() for x in states(cache)]


def addresses(cache: Cache) -> list[int]:
    """Return the addresses of the states. Repeating the sequences of a cache, for example, changes them."""
    return [x.data_ptr() for x in states(cache)]

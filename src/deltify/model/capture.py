"""Decode on a GPU by one CUDA graph.

An eager step of a large model waits for Python to launch hundreds of small kernels; a replay does not. The states keep
their size and address, so one captured graph serves any context length.
"""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionLayer

from .cache import DeltifyCache, states_of, writable
from .mixers import DeltifyKDA, fuse_weights_


class CapturedStep:
    """The captured graph of one decoding step of a model of KDA layers, on the states of one cache."""

    def __init__(self, model: PreTrainedModel, cache: DeltifyCache, rows: int):
        for module in model.modules():
            if isinstance(module, DeltifyKDA):
                fuse_weights_(module.projections)
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
        self.addresses = addresses(cache)
        self.graph, seen = torch.cuda.CUDAGraph(), cache.seen_tokens
        with torch.cuda.graph(self.graph):
            hidden = model.model(input_ids=self.ids, past_key_values=cache, use_cache=True).last_hidden_state
            self.logits = model.lm_head(hidden)
        cache.seen_tokens = seen  # capturing does not run the step

    def __call__(self, ids_B1: Tensor, cache: DeltifyCache) -> Tensor:
        """Return logits [B, 1, vocabulary] of one more token, which the cache then contains."""
        self.ids.copy_(ids_B1)
        self.graph.replay()
        cache.seen_tokens += 1
        return self.logits.clone()


# by cache: its captured step, or None after the first, eager step
STEPS: "WeakKeyDictionary[Cache, CapturedStep | None]" = WeakKeyDictionary()


def captured_logits(
    model: PreTrainedModel, ids: Tensor | None, cache: Cache | None, attention_mask: Tensor | None
) -> Tensor | None:
    """Return logits [B, 1, vocabulary] of one more token by replaying a graph, or None if the model must run eagerly.

    The first token decoded with a cache runs eagerly, which initialises all libraries. The second one is captured.
    """
    if not isinstance(cache, DeltifyCache):  # others do not count the tokens that a replay adds
        return None
    if ids is None or ids.shape[1] != 1 or not ids.is_cuda or torch.is_grad_enabled():
        return None
    if not all(type(layer) is LinearAttentionLayer and layer.has_previous_state[0] for layer in cache.layers):
        return None
    if torch.compiler.is_compiling() or len(set(vars(model).get("hf_device_map", {}).values())) > 1:
        return None
    if not all(map(writable, states(cache))):
        return None
    if attention_mask is not None and (attention_mask.dim() != 2 or not attention_mask[:, -1].all()):
        return None
    if cache not in STEPS:
        STEPS[cache] = None
        return None
    step = STEPS[cache]
    if step is None or step.addresses != addresses(cache) or len(step.ids) != len(ids) or not writable(step.ids):
        step = STEPS[cache] = CapturedStep(model, cache, len(ids))
    return step(ids, cache)


def states(cache: Cache) -> list[Tensor]:
    """Return the convolution and recurrent states of all layers."""
    return [x for layer in cache.layers for x in states_of(layer)]


def addresses(cache: Cache) -> list[int]:
    """Return the addresses of the states. Repeating the sequences of a cache, for example, changes them."""
    return [x.data_ptr() for x in states(cache)]

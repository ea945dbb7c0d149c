"""Memory and time of decoding by the number of tokens in the cache."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..inference.prefill import cache_bytes, prefill
from ..model.cache import new_cache
from ..model.capture import is_captured
from ..utils.devices import device_name

WARM_UP_TOKENS = 4  # tokens decoded before each measurement
STEPS = 16  # tokens decoded at each context


@torch.no_grad()
def decode_cost(
    models: Mapping[str, PreTrainedModel],
    contexts: Sequence[int],
    *,
    ids: Sequence[int] | Tensor | None = None,
    steps: int = STEPS,
    log: Callable[[str], None] = lambda line: None,
) -> list[dict]:
    """Return the bytes of the cache and the milliseconds per token of each model at each context, with batch size 1.

    Every model reads the text once. At each context it decodes `steps` tokens one by one, of whose times the median is
    taken. A model that runs out of memory keeps the rows that it has.

    Args:
        models: Models by name.
        contexts: Numbers of tokens in the cache.
        ids: Token ids [max(contexts) + steps] of the text. Defaults to all ids in turn, as the cost is the same for any
            text.
        steps: Number of tokens decoded at each context.
        log: Function that is called with a line for each row.

    Returns:
        Rows with model, context, cache_bytes, ms_per_token, cuda_graph (whether one decoded), device, dtype.

    Raises:
        ValueError: If contexts are too small or too close, or the text is too short.
    """
    contexts = check_contexts(contexts, steps)
    if ids is not None and len(ids) < contexts[-1] + steps:
        raise ValueError(f"The text has {len(ids)} tokens. {contexts[-1] + steps} are needed.")
    rows: list[dict] = []
    for name, model in models.items():
        text = torch.arange(contexts[-1] + steps) % model.config.vocab_size if ids is None else ids
        ids_1T = torch.as_tensor(text, dtype=torch.long, device=model.device)[None]
        cache, seen, context = new_cache(model), 0, 0
        try:
            for context in contexts:
                prefill(model, ids_1T[:, seen : context - WARM_UP_TOKENS], cache, context=context)
                for at in range(context - WARM_UP_TOKENS, context):
                    time_token(model, ids_1T[:, at : at + 1], cache)
                size = cache_bytes(cache)
                seen = context + steps
                seconds = [time_token(model, ids_1T[:, at : at + 1], cache) for at in range(context, seen)]
                row = {
                    "model": name,
                    "context": context,
                    "cache_bytes": size,
                    "ms_per_token": 1000 * statistics.median(seconds),
                    "cuda_graph": is_captured(cache),
                    "device": device_name(model.device),
                    "dtype": str(model.dtype).removeprefix("torch."),
                }
                rows.append(row)
                log(f"{name} at {context:,} tokens: {size:,} bytes, {row['ms_per_token']:.2f} ms per token")
        except torch.OutOfMemoryError:
            log(f"{name} runs out of memory before {context:,} tokens")
    return rows


def check_contexts(contexts: Iterable[int], steps: int = STEPS) -> list[int]:
    """Return the contexts in order.

    Raises:
        ValueError: If they leave no space for warming up and for `steps` tokens between them.
    """
    contexts = sorted(set(contexts))
    if not contexts or contexts[0] <= WARM_UP_TOKENS:
        raise ValueError(f"contexts={contexts} must have entries, all of more than {WARM_UP_TOKENS} tokens.")
    if any(after - before <= steps + WARM_UP_TOKENS for before, after in pairwise(contexts)):
        raise ValueError(
            f"contexts={contexts} are too close. They must be more than {steps + WARM_UP_TOKENS} tokens apart."
        )
    return contexts


def time_token(model: PreTrainedModel, token_11: Tensor, cache: Cache) -> float:
    """Decode one token and return the seconds that it took."""
    synchronize(model.device)
    started = time.perf_counter()
    model(input_ids=token_11, past_key_values=cache, use_cache=True)
    synchronize(model.device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

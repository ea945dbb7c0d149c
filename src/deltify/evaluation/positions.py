"""How a model does far into a text: perplexity and agreement with the teacher by position, cost of decoding by context.

Also the controls that stand beside a student: its teacher with a sliding window, and itself without a memory.

Legend: B batch, T tokens, D model width, n tokens of a piece.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import chain, pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..conversion.student import sliding_control
from ..conversion.teacher import Teacher
from ..inference.prefill import cache_bytes, key_value_bytes, new_cache, piece_length, prefill, read_pieces
from ..model import DeltifyForCausalLM
from ..model.mixers import Packing
from ..training.losses import CHUNK_BYTES

# ---- by position -----------------------------------------------------------------------------------------------------


def position_edges(tokens: int, *extra: int) -> list[int]:
    """Bounds of position buckets: 0, 128, 512, then doubling, and `extra`, as far as `tokens` goes."""
    edges = {0, 128, tokens, *extra}
    edge = 512
    while edge < tokens:
        edges.add(edge)
        edge *= 2
    return sorted(edge for edge in edges if edge <= tokens)


@torch.no_grad()
def token_scores(
    models: dict[str, PreTrainedModel], teacher: PreTrainedModel, ids: Tensor, *, piece: int | None = None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per model, and for "teacher", two arrays [T - 1] in nats: loss of the next token, and KL(teacher | model).

    All models read `ids` [T] side by side, `piece` tokens at a time; a few hundred tokens' logits exist at a time. The
    teacher reads as far as its max_position_embeddings: from there on its loss, and every KL, is NaN.
    """
    readers = {"teacher": teacher, **models}
    caches = {name: new_cache(model) for name, model in readers.items()}
    limit = min(len(ids), teacher.config.max_position_embeddings)
    if piece is None:
        piece = min(piece_length(model, 1, limit if model is teacher else len(ids)) for model in readers.values())
    scores = {name: np.full((2, len(ids) - 1), np.nan, np.float32) for name in readers}
    row = torch.as_tensor(ids, dtype=torch.long, device=teacher.device)
    rows = max(1, CHUNK_BYTES.get(teacher.device.type, CHUNK_BYTES["cpu"]) // (4 * teacher.config.vocab_size))
    for start, end in pairwise(sorted({*range(0, len(row) - 1, piece), min(limit, len(row) - 1), len(row) - 1})):
        names = [name for name in readers if name != "teacher" or start < limit]
        hidden = {}
        for name in names:
            pieces = read_pieces(readers[name], row[None, start:end], caches[name], piece)
            hidden[name] = torch.cat(list(pieces), 1)[0]
        if start >= limit:
            caches.pop("teacher", None)
        for first in range(start, end, rows):
            part = slice(first, min(first + rows, end))
            inside = slice(first - start, part.stop - start)
            labels = row[first + 1 : part.stop + 1, None]
            log_p = None
            for name in names:
                log_q = readers[name].lm_head(hidden[name][inside]).float().log_softmax(-1)
                scores[name][0, part] = -log_q.gather(1, labels)[:, 0].cpu()
                if name == "teacher":
                    log_p = log_q
                if log_p is not None:
                    scores[name][1, part] = (log_p.exp() * (log_p - log_q)).sum(-1).cpu()
    return {name: (both[0], both[1]) for name, both in scores.items()}


def by_position(
    models: dict[str, PreTrainedModel],
    teacher: PreTrainedModel,
    documents: Sequence[Sequence[int] | Tensor],
    *,
    max_tokens: int | None = None,
    piece: int | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> list[dict]:
    """Perplexity and KL to the teacher by position in whole documents, for the teacher and each model.

    Args:
        models: by name; "teacher" is taken.
        documents: token ids of each.
        max_tokens: of a document; all if absent.
        piece: tokens read at a time; by default as many as fit.

    Returns:
        Rows with model, start, end (positions in a document), tokens, documents, perplexity, loss (its logarithm, nats
        per token), loss_stderr, kl (nats per token), kl_stderr. Standard errors are over documents, None for one. There
        are no teacher's rows past its max_position_embeddings, and kl is None in those of the others.
    """
    if "teacher" in models:
        raise ValueError("a model to compare cannot be named 'teacher'; rename it")
    ids = [torch.as_tensor(document, dtype=torch.long)[:max_tokens] for document in documents]
    if not ids or min(map(len, ids)) < 2:
        raise ValueError("every document needs two tokens at least, and one document is needed at least")
    limit = teacher.config.max_position_embeddings
    edges = position_edges(max(map(len, ids)) - 1, limit)
    found = []
    for number, document in enumerate(ids, 1):
        found.append(token_scores(models, teacher, document, piece=piece))
        report(f"document {number} of {len(ids)}: {len(document):,} tokens read")
    rows = []
    for name in ("teacher", *models):
        for start, end in pairwise(edges):
            stretches = [scores[name][0][start:end] for scores in found if len(scores[name][0]) > start]
            kls = [scores[name][1][start:end] for scores in found if len(scores[name][1]) > start]
            loss, loss_stderr = mean_over(stretches)
            kl, kl_stderr = mean_over(kls)
            if loss is None:
                continue
            rows.append(
                {
                    "model": name,
                    "start": start,
                    "end": end,
                    "tokens": sum(map(len, stretches)),
                    "documents": len(stretches),
                    "perplexity": math.exp(min(loss, 700.0)),
                    "loss": loss,
                    "loss_stderr": loss_stderr,
                    "kl": kl,
                    "kl_stderr": kl_stderr,
                }
            )
    return rows


def mean_over(documents: list[np.ndarray]) -> tuple[float | None, float | None]:
    """Mean of all tokens and its standard error over documents; None where it is not known."""
    if any(np.isnan(values).any() for values in documents):
        return None, None
    sizes = np.array([len(values) for values in documents])
    sums = np.array([values.sum(dtype=np.float64) for values in documents])
    mean = sums.sum() / sizes.sum()
    if len(documents) < 2:
        return float(mean), None
    spread = np.square(sums - mean * sizes).sum() * len(documents) / (len(documents) - 1)
    return float(mean), float(np.sqrt(spread) / sizes.sum())


# ---- cost of decoding ------------------------------------------------------------------------------------------------


@torch.no_grad()
def decode_cost(
    models: dict[str, PreTrainedModel],
    contexts: Sequence[int],
    *,
    ids: Sequence[int] | Tensor | None = None,
    steps: int = 16,
    report: Callable[[str], None] = lambda line: None,
) -> list[dict]:
    """Bytes of the cache after so many tokens, and milliseconds for one more, batch of one: rows for each model.

    Every model reads the text once and stops at each context to decode `steps` tokens one by one; their median counts.
    A model that runs out of memory keeps the rows that it has.

    Args:
        ids: the text, [max(contexts) + steps]; if absent, all token ids in turn, as the cost is the same for any text.

    Returns:
        Rows with model, context, cache_bytes, ms_per_token, device, dtype.
    """
    contexts = sorted(set(contexts))
    if not contexts or contexts[0] <= WARM_UP:
        raise ValueError(f"contexts={contexts}; give some, of more than {WARM_UP} tokens")
    if any(after - before <= steps + WARM_UP for before, after in pairwise(contexts)):
        raise ValueError(f"contexts={contexts} are too close for {steps} steps and {WARM_UP} to warm up")
    if ids is not None and len(ids) < contexts[-1] + steps:
        raise ValueError(f"the text has {len(ids)} tokens; {contexts[-1] + steps} are needed")
    rows = []
    for name, model in models.items():
        text = torch.arange(contexts[-1] + steps) % model.config.vocab_size if ids is None else ids
        row = torch.as_tensor(text, dtype=torch.long, device=model.device)[None]
        cache, seen, context = new_cache(model), 0, 0
        try:
            for context in contexts:
                prefill(model, row[:, seen : context - WARM_UP], cache, context=context)
                for at in range(context - WARM_UP, context):
                    decode(model, row[:, at : at + 1], cache)
                size = cache_bytes(cache)
                seconds = [decode(model, row[:, at : at + 1], cache) for at in range(context, context + steps)]
                seen = context + steps
                rows.append(
                    {
                        "model": name,
                        "context": context,
                        "cache_bytes": size,
                        "ms_per_token": 1000 * statistics.median(seconds),
                        "device": device_name(model.device),
                        "dtype": str(model.dtype).removeprefix("torch."),
                    }
                )
                report(f"{name} at {context:,} tokens: {size:,} bytes, {rows[-1]['ms_per_token']:.2f} ms a token")
        except torch.OutOfMemoryError:
            report(f"{name} runs out of memory before {context:,} tokens")
    return rows


WARM_UP = 4  # tokens decoded before the clock starts


def decode(model: PreTrainedModel, token: Tensor, cache: Cache) -> float:
    """Seconds that the model takes for one token."""
    synchronize(model.device)
    started = time.perf_counter()
    model(input_ids=token, past_key_values=cache, use_cache=True)
    synchronize(model.device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# ---- controls --------------------------------------------------------------------------------------------------------


def controls(
    teacher: Teacher, student: DeltifyForCausalLM, *, window: int = 64, sinks: int = 4, chunk: int = 64
) -> dict[str, DeltifyForCausalLM]:
    """Models that a student must beat, by name, to be used wherever the student is; all share weights with theirs.

    - the teacher, untrained, with a sliding window of `window` tokens and `sinks` first tokens (StreamingLLM);
    - the same with the window whose cache takes as many bytes as the student's states;
    - the student with its states zeroed every `chunk` tokens.
    """
    equal = equal_window(teacher, student, sinks)
    return {
        f"teacher, window {window}": sliding_control(teacher, window=window, sinks=sinks),
        f"teacher, window {equal} (the states' bytes)": sliding_control(teacher, window=equal, sinks=sinks),
        f"student, state zeroed every {chunk}": forgetful(student, chunk),
    }


def state_bytes(student: DeltifyForCausalLM, number_bytes: int = 2) -> int:
    """Bytes of one KDA layer's states: recurrent [H, K, V] in float32, and convolution [3 H K, taps - 1]."""
    config = student.config
    inner = config.num_attention_heads * config.head_dim
    return 4 * inner * config.head_dim + number_bytes * 3 * inner * (config.conv_size - 1)


def equal_window(teacher: Teacher, student: DeltifyForCausalLM, sinks: int = 4, number_bytes: int = 2) -> int:
    """The window whose cache takes as many bytes in a layer as a KDA layer's states, in bfloat16 unless told otherwise.

    A layer with a window of W keeps `sinks` + W - 1 tokens, as the newest token's query comes with its own key.
    """
    tokens = state_bytes(student, number_bytes) // key_value_bytes(teacher.config, number_bytes)
    return max(1, tokens - sinks + 1)


def forgetful(student: DeltifyForCausalLM, chunk: int) -> DeltifyForCausalLM:
    """The student, weights shared, but its KDA layers begin anew every `chunk` tokens of a text; attention goes on."""
    if chunk < 1:
        raise ValueError(f"chunk={chunk}; give a number of tokens, 1 at least")
    shared = {id(x): x for x in chain(student.parameters(), student.buffers())}
    model = copy.deepcopy(student, shared)
    for layer in model.model.layers:
        if layer.linear:
            layer.self_attn = ForgetfulKDA(layer.self_attn, chunk)
    return model.eval()


class ForgetfulKDA(nn.Module):
    """A KDA layer whose convolution and recurrent states are zeroed every `chunk` tokens.

    Without a cache, each document counts from its own start; with one, all rows count together, padding included.
    """

    def __init__(self, mixer: nn.Module, chunk: int):
        super().__init__()
        self.mixer, self.chunk, self.layer_idx = mixer, chunk, int(mixer.layer_idx)

    def forward(self, hidden_states: Tensor, cache: Cache | None = None, packing: Packing | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D], as `DeltifyKDA.forward`."""
        if cache is None:
            return self.mixer(hidden_states, None, self.cut(hidden_states, packing))
        rows, tokens = hidden_states.shape[:2]
        mask_BT = torch.ones(rows * tokens, dtype=torch.bool, device=hidden_states.device)
        if packing is not None:
            mask_BT = torch.zeros_like(mask_BT).index_fill(0, packing.index, True)
        mask_BT, outputs = mask_BT.view(rows, tokens), []
        for begin, end in pairwise(sorted({0, tokens, *range(-cache.seen_tokens % self.chunk, tokens, self.chunk)})):
            if (cache.seen_tokens + begin) % self.chunk == 0:
                cache.layers[self.layer_idx].reset()
            x, mask, part = hidden_states[:, begin:end], mask_BT[:, begin:end], None
            if packing is not None:
                part = Packing(mask.flatten().nonzero().squeeze(1), F.pad(mask.sum(1).cumsum(0), (1, 0)).int())
            outputs.append(
                torch.zeros_like(x) if packing is not None and not mask.any() else self.mixer(x, cache, part)
            )
        return torch.cat(outputs, 1)

    def cut(self, x_BTD: Tensor, packing: Packing | None) -> Packing:
        """The packing of all chunks, each of which is a document."""
        rows, tokens = x_BTD.shape[:2]
        if packing is None:
            packing = Packing(None, torch.arange(0, rows * tokens + 1, tokens, device=x_BTD.device))
        bounds = packing.cu_seqlens.tolist()
        starts = [at for begin, end in pairwise(bounds) for at in range(begin, end, self.chunk)]
        return Packing(packing.index, torch.tensor([*starts, bounds[-1]], dtype=torch.int32, device=x_BTD.device))

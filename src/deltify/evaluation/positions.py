"""Perplexity and KL to the teacher by position in long documents.

Legend: T tokens, N tokens of a chunk, D model width, W vocabulary.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..inference.prefill import piece_length, read_pieces
from ..model.cache import new_cache
from ..training.distributed import check_same, share_out
from ..training.losses import CHUNK_BYTES
from ..utils.scoring import kl_terms, label_log_probs, log_probs, perplexity
from ..utils.statistics import mean_over_documents


def position_edges(tokens: int, *extra: int) -> list[int]:
    """Return the bounds of position buckets up to `tokens`: 0, 128, 512, then doubling, and `extra`."""
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
    """Return two arrays [T - 1] in nats for each model and "teacher": next-token loss, and KL(teacher | model).

    All models read `ids` [T] side by side. Logits exist for a few hundred tokens at a time. The teacher reads up to its
    max_position_embeddings; beyond it, its loss and every KL are NaN.

    Args:
        piece: Number of tokens read at a time. Defaults to as many as fit into memory.
    """
    readers = {"teacher": teacher, **models}
    caches = {name: new_cache(model) for name, model in readers.items()}
    limit = min(len(ids), teacher.config.max_position_embeddings)
    if piece is None:
        piece = min(piece_length(model, 1, limit if model is teacher else len(ids)) for model in readers.values())
    scores = {name: np.full((2, len(ids) - 1), np.nan, np.float32) for name in readers}
    ids_T = torch.as_tensor(ids, dtype=torch.long, device=teacher.device)
    last = len(ids_T) - 1  # the last token has no label
    chunk_tokens = max(1, CHUNK_BYTES.get(teacher.device.type, CHUNK_BYTES["cpu"]) // (4 * teacher.config.vocab_size))
    for start, end in pairwise(sorted({*range(0, last, piece), min(limit, last), last})):
        names = [name for name in readers if name != "teacher" or start < limit]
        hidden = {}
        for name in names:
            pieces = read_pieces(readers[name], ids_T[None, start:end], caches[name], piece)
            hidden[name] = torch.cat(list(pieces), 1)[0]
        if start >= limit:
            caches.pop("teacher", None)  # it reads no further, so its memory is freed
        for first in range(start, end, chunk_tokens):
            chunk = slice(first, min(first + chunk_tokens, end))
            in_piece = slice(first - start, chunk.stop - start)
            labels_N = ids_T[first + 1 : chunk.stop + 1]
            log_p = None
            for name in names:
                log_q = log_probs(readers[name], hidden[name][in_piece])
                scores[name][0, chunk] = -label_log_probs(log_q, labels_N).cpu()
                if name == "teacher":
                    log_p = log_q
                if log_p is not None:
                    scores[name][1, chunk] = kl_terms(log_p, log_q).sum(-1).cpu()
    return {name: (losses, kls) for name, (losses, kls) in scores.items()}


def by_position(
    models: dict[str, PreTrainedModel],
    teacher: PreTrainedModel,
    documents: Sequence[Sequence[int] | Tensor],
    *,
    max_tokens: int | None = None,
    piece: int | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> list[dict]:
    """Return perplexity and KL to the teacher by position in documents, for the teacher and each model.

    Args:
        models: Models by name. The name "teacher" is reserved.
        documents: Token ids of each document.
        max_tokens: Number of tokens read of each document. Defaults to all.
        piece: Number of tokens read at a time. Defaults to as many as fit into memory.
        log: Function that is called with a line for each document.

    Returns:
        Rows with model, start, end (positions in a document), tokens, documents, perplexity, loss (its logarithm in
        nats per token), loss_stderr, kl (nats per token), kl_stderr. Standard errors are over documents, and None for a
        single one. Beyond the teacher's max_position_embeddings it has no rows, and kl is None in those of the others.

    Raises:
        ValueError: If a model is called "teacher", there is no document, or one has fewer than two tokens.
    """
    if "teacher" in models:
        raise ValueError("A model to compare cannot be named 'teacher'. Rename it.")
    ids = [torch.as_tensor(document, dtype=torch.long)[:max_tokens] for document in documents]
    if not ids or min(map(len, ids)) < 2:
        raise ValueError("Curves by position need at least one document, and at least two tokens in each.")
    edges = position_edges(max(map(len, ids)) - 1, teacher.config.max_position_embeddings)
    scores = []
    check_same("documents", lambda: [document.tolist() for document in ids])
    read = share_out(ids, lambda document: token_scores(models, teacher, document, piece=piece))
    for number, (document, of_document) in enumerate(read, 1):
        if broken := [name for name in models if not np.isfinite(of_document[name][0]).all()]:
            raise FloatingPointError(f"{', '.join(broken)} put out numbers that are not finite in document {number}")
        scores.append(of_document)
        log(f"document {number} of {len(ids)}: {len(document):,} tokens read")
    rows = [
        bucket_row(name, start, end, [of_document[name] for of_document in scores])
        for name in ("teacher", *models)
        for start, end in pairwise(edges)
    ]
    return [row for row in rows if row is not None]


def bucket_row(name: str, start: int, end: int, scores: list[tuple[np.ndarray, np.ndarray]]) -> dict | None:
    """Return the row of one model in one bucket, or None where the model has no loss.

    Args:
        scores: Loss and KL of each token, for each document.
    """
    losses = [loss[start:end] for loss, _ in scores if len(loss) > start]
    kls = [kl[start:end] for _, kl in scores if len(kl) > start]
    loss, loss_stderr = mean_over_documents(losses)
    kl, kl_stderr = mean_over_documents(kls)
    if loss is None:
        return None
    return {
        "model": name,
        "start": start,
        "end": end,
        "tokens": sum(map(len, losses)),
        "documents": len(losses),
        "perplexity": perplexity(loss),
        "loss": loss,
        "loss_stderr": loss_stderr,
        "kl": kl,
        "kl_stderr": kl_stderr,
    }

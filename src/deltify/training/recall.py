"""The recall curve: how well a model predicts tokens that repeat earlier ones, by their distance.

Legend: B documents, T tokens, N answer tokens, D model width, W vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.batches import Batch
from ..data.probes import SPARE, Probe, beginnings, text_probes
from ..data.token_files import TokenFile
from ..model import DeltifyForCausalLM
from ..utils.scoring import label_log_probs, log_probs
from ..utils.statistics import mean_over_documents
from .losses import CHUNK_BYTES
from .steps import hidden_states

DISTANCES = tuple(128 * 2**i for i in range(10))  # 128 to 65,536: the smallest distance of each bucket
MAX_TOKENS = 12_288  # of the documents of a validation: less than a tenth of the time of 65,536 validation tokens
SHARE = 5  # smallest number of validation tokens per token of these documents
SHORTEST = 512  # tokens of the shortest documents
LEAST_TOKENS = 2048  # of the documents of a validation; with fewer, recall is noise and not measured
LOG_PROB = "recall_logprob_"  # begins the names of a curve's figures, which end in the smallest distance


@dataclass(frozen=True)
class RecallBucket:
    """Scores of the answer tokens that repeat a token `distance` to 2 * `distance` - 1 tokens back.

    The last bucket has no upper bound. Standard errors are over documents, and None for a single one.

    Args:
        distance: Smallest distance in tokens.
        tokens: Number of answer tokens.
        documents: Number of documents that have any.
        log_prob: Mean log-probability of the answer tokens in nats.
        log_prob_stderr: Standard error of `log_prob`.
        right: Fraction of answer tokens that are the model's most likely next token.
        right_stderr: Standard error of `right`.
    """

    distance: int
    tokens: int
    documents: int
    log_prob: float
    log_prob_stderr: float | None
    right: float
    right_stderr: float | None


def recall_buckets(distances: Sequence[np.ndarray], scores: Sequence[np.ndarray]) -> list[RecallBucket]:
    """Return the buckets that have answer tokens, by ascending distance. Distances below the first are left out.

    Args:
        distances: Distance [N] of each answer token, for each document.
        scores: `answer_scores` [2, N] of the same tokens.
    """
    buckets = []
    for low, high in zip(DISTANCES, (*DISTANCES[1:], np.inf)):
        inside = [s[:, (d >= low) & (d < high)] for d, s in zip(distances, scores)]
        inside = [s for s in inside if s.size]
        if inside:
            log_prob, log_prob_stderr = mean_over_documents([s[0] for s in inside])
            right, right_stderr = mean_over_documents([s[1] for s in inside])
            if log_prob is None or right is None:
                raise FloatingPointError("a score of recall is not a number. The model puts out NaN")
            tokens = sum(s.shape[1] for s in inside)
            buckets.append(RecallBucket(low, tokens, len(inside), log_prob, log_prob_stderr, right, right_stderr))
    return buckets


@torch.no_grad()
def answer_scores(model: PreTrainedModel, hidden_ND: Tensor, labels_N: Tensor) -> np.ndarray:
    """Return the log-probability of each label, and whether it is the most likely token (1 or 0), [2, N].

    Args:
        model: Language model.
        hidden_ND: Last hidden states that the labels are predicted from.
        labels_N: Token ids.
    """
    vocab_size = model.config.vocab_size
    chunk = max(1, CHUNK_BYTES.get(labels_N.device.type, CHUNK_BYTES["cpu"]) // (4 * vocab_size))
    scores = []
    for hidden, labels in zip(hidden_ND.split(chunk), labels_N.split(chunk)):
        log_p_NW = log_probs(model, hidden)
        scores.append(torch.stack([label_log_probs(log_p_NW, labels), (log_p_NW.argmax(-1) == labels).float()]))
    return torch.cat(scores, 1).cpu().numpy()


@torch.no_grad()
def read_answers(model: DeltifyForCausalLM, probes: list[Probe]) -> list[np.ndarray]:
    """Return the `answer_scores` [2, N] of each document. All must have one length."""
    ids_BT = torch.from_numpy(np.stack([probe.ids for probe in probes]))
    length = ids_BT.shape[1]
    batch = Batch(ids_BT, torch.arange(length).repeat(len(probes), 1)).to(model.device)
    places = [row * length + probe.answers for row, probe in enumerate(probes)]
    places_N = torch.from_numpy(np.concatenate(places)).to(model.device)
    hidden_ND = hidden_states(model, batch)[places_N - 1]
    scores = answer_scores(model, hidden_ND, batch.input_ids.flatten()[places_N])
    return np.split(scores, np.cumsum([len(x) for x in places])[:-1], axis=1)


@torch.no_grad()
def evaluate_recall(student: DeltifyForCausalLM, probes: list[Probe], autocast: Callable) -> dict[str, float]:
    """Return the recall curve of a student as figures of metrics.jsonl. Without probes there are none.

    `recall` is the mean of the buckets' log-probabilities. `recall_logprob_512` and `recall_right_512` are those of the
    bucket of 512 to 1,023 tokens.
    """
    scores: list[np.ndarray] = []
    for _, group in groupby(probes, key=lambda probe: len(probe.ids)):
        documents = list(group)
        with autocast():
            scores += student.run_with_full_weights(partial(read_answers, probes=documents))
    buckets = recall_buckets([probe.distances for probe in probes], scores)
    if not buckets:
        return {}
    figures = {"recall": sum(bucket.log_prob for bucket in buckets) / len(buckets)}
    figures |= {f"{LOG_PROB}{bucket.distance}": bucket.log_prob for bucket in buckets}
    return figures | {f"recall_right_{bucket.distance}": bucket.right for bucket in buckets}


def curve_of(figures: dict) -> dict[int, float]:
    """Return the mean log-probability by distance in a line of metrics.jsonl."""
    return {int(key.removeprefix(LOG_PROB)): value for key, value in figures.items() if key.startswith(LOG_PROB)}


def recall_text(figures: dict[str, float]) -> str:
    """Return `recall` for a line of the terminal, or nothing where it was not measured."""
    return f", recall {figures['recall']:.2f}" if "recall" in figures else ""


# ---- the documents of a run ------------------------------------------------------------------------------------------


def heldout_probes(
    heldout: list[TokenFile], sequence_length: int, heldout_tokens: int, tokenizer: PreTrainedTokenizerBase
) -> list[Probe]:
    """Return the documents that a run's validations read, the same at every step.

    They are made of the run's validation text. For two documents of `sequence_length` tokens, there is one four times
    as long, where that fits. Few fit, so the curve of a validation is noisy: of 65,536 validation tokens and sequences
    of 8,192, there is one. `deltify evaluate --recall` reads more.

    Args:
        heldout: Validation texts.
        sequence_length: Longest training sequence of the run.
        heldout_tokens: Number of tokens of a validation.
        tokenizer: Tokenizer of the model.
    """
    tokens = min(MAX_TOKENS, heldout_tokens // SHARE)
    if tokens < LEAST_TOKENS or not tokenizer.is_fast:
        return []
    length = min(max(sequence_length, SHORTEST), tokens)
    long = tokens // (6 * length)
    counts = {length: tokens // length - 4 * long} | ({4 * length: long} if long else {})
    return text_probes(beginnings(heldout, int(SPARE * tokens), tokenizer), counts, tokenizer)

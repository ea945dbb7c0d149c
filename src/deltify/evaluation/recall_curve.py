"""The recall curve of any model: how well it predicts tokens that repeat earlier ones, by their distance.

    probes = recall_probes(tokenizer, RecallSpec(max_tokens=4096))
    buckets = recall_curve(model, probes)

A document is read once, without generation: the model gets the right token after each of its predictions. Training
computes the same curve at each validation, on fewer documents (training/recall.py).

Legend: T tokens, N answer tokens.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.probes import Probe, make_probe, text_probes
from ..data.sources import documents
from ..inference.prefill import piece_length, read_pieces
from ..model.cache import new_cache
from ..training.distributed import check_same, from_first, rank, share_out
from ..training.recall import SHORTEST, RecallBucket, answer_scores, recall_buckets
from ..utils.console import with_progress
from ..utils.files import append_jsonl, read_jsonl
from ..utils.fingerprint import fingerprint
from .needles import NeedleMaker, Sample
from .settings import RecallSpec

NEEDLE_TASKS = ("niah_single_1", "niah_single_2", "niah_multikey_1")
ANSWER_TOKENS = 16  # kept free for the digits of a needle


def recall_curve(model: PreTrainedModel, probes: Iterable[Probe], *, piece: int | None = None) -> list[RecallBucket]:
    """Return the recall curve of a model, by ascending distance.

    Args:
        model: Model to test.
        probes: Documents.
        piece: Number of tokens read at a time. Defaults to as many as fit into memory.
    """
    pairs = [(probe.distances, read_probe(model, probe, piece)) for probe in probes]
    return recall_buckets([distances for distances, _ in pairs], [scores for _, scores in pairs])


@torch.no_grad()
def read_probe(model: PreTrainedModel, probe: Probe, piece: int | None = None) -> np.ndarray:
    """Return the `answer_scores` [2, N] of a document, which is read in pieces. Logits exist for answers only."""
    ids_T, answers_N = (torch.from_numpy(x).to(model.device) for x in (probe.ids, probe.answers))
    read_T = ids_T[: int(probe.answers[-1])]  # nothing follows the last answer
    piece = piece or piece_length(model, 1, len(read_T))
    scores, start = [], 0
    for hidden_BTD in read_pieces(model, read_T[None], new_cache(model), piece):
        end = start + hidden_BTD.shape[1]
        inside_N = answers_N[(answers_N > start) & (answers_N <= end)]
        scores.append(answer_scores(model, hidden_BTD[0, inside_N - 1 - start], ids_T[inside_N]))
        start = end
    return np.concatenate(scores, 1)


def needle_probe(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Probe:
    """Return the probe of a needle task: its prompt, and the first value asked for as the answer."""
    value, end = sample.expected[0], len(sample.prompt) + 1
    stated = sample.question.index(value)
    spans = slice(stated, stated + len(value)), slice(end, end + len(value))
    return make_probe(sample.task, f"{sample.prompt} {value}", [spans], tokenizer)


def recall_probes(tokenizer: PreTrainedTokenizerBase, spec: RecallSpec) -> list[Probe]:
    """Return the documents of an evaluation: sparse recall text, and needles."""
    lengths = lengths_up_to(spec.max_tokens)
    probes = text_probes(documents(spec.haystack), dict.fromkeys(lengths, spec.samples), tokenizer)
    make = NeedleMaker(tokenizer, spec.haystack, answer_tokens=ANSWER_TOKENS)
    samples = product(NEEDLE_TASKS, lengths, range(spec.samples))
    return probes + [needle_probe(make(*sample), tokenizer) for sample in samples]


def lengths_up_to(max_tokens: int) -> list[int]:
    """Return the lengths of documents: SHORTEST, doubling, and `max_tokens` at the end."""
    lengths = []
    while SHORTEST << len(lengths) < max_tokens:
        lengths.append(SHORTEST << len(lengths))
    return [*lengths, max_tokens]


def measure_recall(
    model: PreTrainedModel,
    probes: Iterable[Probe],
    path: Path,
    *,
    name: str,
    log: Callable[[str], None] = lambda line: None,
) -> list[dict]:
    """Measure the recall curve of a model, append the scores of new documents to a file, and return the curve's rows.

    Scores that the file has for the same documents, weights and dtype are reused, so that an interrupted evaluation
    resumes. Processes under torchrun share the documents.

    Args:
        model: Model to test.
        probes: Documents.
        path: JSON lines file of scores.
        name: Name of the model.
        log: Function that is called with a line for each kind of document.

    Returns:
        Rows with model, task, and the fields of `RecallBucket`.
    """
    mine = {"model": name, "weights": f"{fingerprint(model)}-{str(model.dtype).removeprefix('torch.')}"}
    on_file = from_first(lambda: read_jsonl(path, repair=True))
    done = {row["probe"]: row["scores"] for row in on_file if mine.items() <= row.items()}
    probes = list(probes)
    keyed = {probe.fingerprint: probe for probe in probes}
    check_same("documents of the recall curve", lambda: list(keyed))
    missing = sorted((key for key in keyed if key not in done), key=lambda key: len(keyed[key].ids))
    read = share_out(missing, lambda key: read_probe(model, keyed[key]).tolist())
    for key, scores in with_progress(read, f"{name}: recall", len(missing)):
        probe, done[key] = keyed[key], scores
        row = {"task": probe.task, "tokens": len(probe.ids), "probe": key, "distances": probe.distances.tolist()}
        if rank() == 0:
            append_jsonl(path, [mine | row | {"scores": scores}])
    by_task: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for probe in probes:
        by_task.setdefault(probe.task, []).append((probe.distances, np.asarray(done[probe.fingerprint])))
    rows = []
    for task, pairs in by_task.items():
        buckets = recall_buckets(*zip(*pairs))
        rows += [{"model": name, "task": task, **asdict(bucket)} for bucket in buckets]
        log(f"{name}: recall, {task}: " + ", ".join(f"{b.log_prob:.2f} from {b.distance:,}" for b in buckets))
    return rows

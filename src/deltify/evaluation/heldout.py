"""Scores on held-out text: perplexity, KL to the teacher, top-1 agreement, and n-gram baselines."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from ..config import Recipe
from ..conversion.teacher import Teacher
from ..data.batches import Batch, heldout_batches
from ..data.sources import recall_over
from ..data.token_files import TokenFile, open_data, sharing
from ..training.distributed import check_same, from_first, share_out
from ..training.history import Trained
from ..training.run_folder import read_run
from ..training.steps import hidden_states, next_tokens
from ..utils.console import with_progress
from ..utils.scoring import kl_terms, label_log_probs, log_probs, perplexity

CHUNK_TOKENS = 256  # tokens whose logits exist at a time
NGRAM_TOKENS = 10_000_000  # tokens of each source that the n-gram models are counted on
BATCH_SEQUENCES = 8


@dataclass(frozen=True)
class Score:
    """Scores of one model on held-out text. Those that do not apply are None.

    Args:
        name: Name of the model.
        perplexity: Perplexity of the text.
        kl: KL divergence from the teacher in nats per token.
        top1: Fraction of tokens at which model and teacher agree on the likeliest next token.
        tokens: Number of tokens that the model was trained on.
    """

    name: str
    perplexity: float
    kl: float | None = None
    top1: float | None = None
    tokens: int = 0


def heldout_scores(
    teacher: Teacher,
    runs: Mapping[str, Recipe],
    models: Mapping[str, PreTrainedModel],
    trained: Mapping[str, Trained],
    heldout: str | Path | None = None,
) -> dict:
    """Return the entries of results.json on held-out text: size, hash, and scores of teacher, n-grams and models.

    Processes under torchrun share the batches of the text.

    Args:
        runs: Recipes by the path of their run. The first one gives text and sequence length.
        models: Models to score by name.
        trained: What they were trained on by name.
        heldout: Source of the text. Defaults to that of the first run.

    Raises:
        ValueError: If the first run had other validation text, as it may have trained on what is now held out. Or if a
            run was trained on the text.
    """
    path, recipe = next(iter(runs.items()))
    tokens, length = recipe.run.heldout_tokens, recipe.run.heldout_sequence_length
    options = recipe.teacher.model, teacher.tokenizer, tokens, length
    train, held = open_data(recipe.data, *options)
    check_unseen(runs, heldout)
    if heldout is None:
        check_unchanged(Path(path), held)
    else:
        _, held = open_data(replace(recipe.data, train={}, heldout=str(heldout)), *options)
    batches = heldout_batches(held, length, BATCH_SEQUENCES, tokens)
    check_same("held-out text", lambda: [batch.input_ids.tolist() for batch in batches])
    scored = {"teacher": teacher.model, **models}
    read = share_out(batches, lambda batch: sums_of(scored, teacher.model, batch))
    sums = np.sum([each for _, each in with_progress(read, "held-out text", len(batches))], 0)
    measured = {name: means(*of_model) for name, of_model in zip(scored, sums.tolist())}
    scores = [Score("teacher", *measured.pop("teacher"))]
    scores += from_first(lambda: ngram_baselines(train, batches, teacher.config.vocab_size))
    scores += [Score(name, *values, trained[name].tokens) for name, values in measured.items()]
    return {
        "heldout_tokens": sum(batch.input_ids.numel() for batch in batches),
        "heldout_sequence_length": batches[0].input_ids.shape[1],
        "heldout_digest": hashlib.sha256(b"".join(b.input_ids.numpy().tobytes() for b in batches)).hexdigest()[:16],
        "scores": [asdict(score) for score in scores],
    }


def check_unseen(runs: Mapping[str, Recipe], heldout: str | Path | None) -> None:
    """Raise ValueError if a run was trained on the text to score.

    Runs that hold back a part of a source hold back the same documents. So only a run with validation text of its own
    was trained on what another one held back.
    """
    first = next(iter(runs.values())).data
    for path, recipe in runs.items():
        data = recipe.data
        if heldout is not None or first.heldout is not None:
            scored = [str(heldout or first.heldout)]
        else:
            scored = [] if data.heldout is None else [source for source in first.train if not recall_over(source)]
        if leaks := [source for source in scored if sharing(source, data.train)]:
            raise ValueError(
                f"{path} was trained on text of {', '.join(leaks)}, which would be scored as held out. Name another "
                "text with --heldout"
            )


def check_unchanged(run: Path, heldout: list[TokenFile]) -> None:
    """Raise ValueError if held-out texts are not those that a run began with."""
    then = read_run(run).get("data", {})
    now = {f"held-out text {number}": file.digest for number, file in enumerate(heldout, 1)}
    if changed := [name for name in now if then.get(name, now[name]) != now[name]]:
        raise ValueError(
            f"{', '.join(changed)} of {run} changed since the run began, which may have trained on what is held out "
            "now. Restore the text, or name a text to score with --heldout"
        )


@torch.no_grad()
def sums_of(models: Mapping[str, PreTrainedModel], teacher: PreTrainedModel, batch: Batch) -> np.ndarray:
    """Return sums over the tokens of a batch, as the arguments of `means`: [models, 5].

    Log-probabilities are float32.
    """
    batch = batch.to(teacher.device)
    labels = next_tokens(batch).flatten()
    teacher_hidden, sums = hidden_states(teacher, batch), np.zeros((len(models), 5))
    for row, model in zip(sums, models.values()):
        hidden = teacher_hidden if model is teacher else hidden_states(model, batch)
        for start in range(0, len(labels), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            log_p = log_probs(teacher, teacher_hidden[part])
            log_q = log_p if model is teacher else log_probs(model, hidden[part])
            known = labels[part] >= 0  # the last token of a document has no label
            ce = -label_log_probs(log_q[known], labels[part][known]).sum()
            agreed = (log_p.argmax(-1) == log_q.argmax(-1)).sum()
            row += [float(ce), int(known.sum()), float(kl_terms(log_p, log_q).sum()), int(agreed), len(log_q)]
    return sums


def means(ce: float, labelled: float, kl: float, agreed: float, tokens: float) -> tuple[float, float, float]:
    """Return perplexity, KL(teacher | model) in nats per token, and top-1 agreement.

    Args:
        ce: Cross-entropy, summed over the tokens that have a label, in nats.
        labelled: Number of these tokens.
        kl: KL, summed over all tokens.
        agreed: Number of tokens at which model and teacher agree.
        tokens: Number of all tokens.
    """
    return perplexity(ce / labelled), kl / tokens, agreed / tokens


def ngram_baselines(train: list[TokenFile], heldout: list[Batch], vocab_size: int) -> list[Score]:
    """Score a unigram and a bigram model of the training text, which a useful student must beat.

    They are counted on the first `NGRAM_TOKENS` tokens of each source. The unigram p has one count added to each token.
    The bigram is (count(a b) + m p(b)) / (count(a) + m) with m = 5.
    """
    ids = np.concatenate([file.tokens[:NGRAM_TOKENS] for file in train]).astype(np.int64)
    p = np.bincount(ids, minlength=vocab_size) + 1.0
    p /= p.sum()
    pairs, counts = np.unique(ids[:-1] * vocab_size + ids[1:], return_counts=True)
    first_counts = np.bincount(ids[:-1], minlength=vocab_size)
    first = np.concatenate([batch.input_ids.flatten().numpy() for batch in heldout])
    second = np.concatenate([next_tokens(batch).flatten().numpy() for batch in heldout])
    a, b = first[second >= 0], second[second >= 0]
    index = np.searchsorted(pairs, a * vocab_size + b).clip(max=len(pairs) - 1)
    pair_counts = np.where(pairs[index] == a * vocab_size + b, counts[index], 0)
    bigram = (pair_counts + 5 * p[b]) / (first_counts[a] + 5)
    return [
        Score("unigram model", math.exp(-np.log(p[b]).mean())),
        Score("bigram model", math.exp(-np.log(bigram).mean())),
    ]

"""Scores on held-out text: perplexity, KL to the teacher, top-1 agreement, and n-gram baselines."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from ..config import STAGES, Recipe, load_recipe
from ..conversion.teacher import Teacher
from ..data.batches import Batch, heldout_batches
from ..data.token_files import TokenFile, open_data
from ..training.metrics import read_stages
from ..training.steps import hidden_states, next_tokens
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
    heldout: str | Path | None = None,
) -> dict:
    """Return the entries of results.json on held-out text: its size, and scores of teacher, n-grams and models.

    Args:
        runs: Recipes by the path of their run. The first one gives text and sequence length.
        models: Models to score by name.
        heldout: Source of the text. Defaults to that of the first run.
    """
    recipe = next(iter(runs.values()))
    data = recipe.data if heldout is None else replace(recipe.data, heldout=str(heldout))
    tokens, length = recipe.run.heldout_tokens, recipe.run.heldout_sequence_length
    train, held = open_data(data, recipe.teacher.model, teacher.tokenizer, tokens, length)
    batches = heldout_batches(held, length, BATCH_SEQUENCES, tokens)
    teacher_perplexity, _, _ = score_against_teacher(teacher.model, teacher.model, batches)
    scores = [Score("teacher", teacher_perplexity, 0.0, 1.0)]
    scores += ngram_baselines(train, batches, teacher.config.vocab_size)
    trained = trained_tokens(recipe) | {Path(path).name: trained_tokens(run)["extend"] for path, run in runs.items()}
    for name, model in models.items():
        scores.append(Score(name, *score_against_teacher(teacher.model, model, batches), trained.get(name, 0)))
    return {
        "heldout_tokens": sum(batch.input_ids.numel() for batch in batches),
        "heldout_sequence_length": batches[0].input_ids.shape[1],
        "scores": [asdict(score) for score in scores],
    }


@torch.no_grad()
def score_against_teacher(
    teacher: PreTrainedModel, model: PreTrainedModel, heldout: list[Batch]
) -> tuple[float, float, float]:
    """Return perplexity, KL(teacher | model) in nats per token, and top-1 agreement.

    Both models run in their own precision; log-probabilities are float32.
    """
    ce = kl = agreed = tokens = labelled = 0.0
    for batch in heldout:
        batch = batch.to(model.device)
        labels = next_tokens(batch).flatten()
        student_hidden, teacher_hidden = hidden_states(model, batch), hidden_states(teacher, batch)
        for start in range(0, len(labels), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            log_q, log_p = log_probs(model, student_hidden[part]), log_probs(teacher, teacher_hidden[part])
            kl += float(kl_terms(log_p, log_q).sum())
            agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            known = labels[part] >= 0  # the last token of a document has no label
            ce -= float(label_log_probs(log_q[known], labels[part][known]).sum())
            labelled += int(known.sum())
        tokens += len(labels)
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


def trained_tokens(recipe: Recipe) -> dict[str, int]:
    """Return the number of tokens that each stage's model was trained on.

    It includes earlier stages, and the run whose student this one started from.
    """
    parent = Path(recipe.student.init).expanduser() / "recipe.yaml"
    start = total = trained_tokens(load_recipe(parent))["extend"] if parent.is_file() else 0
    last = {name: records[-1]["tokens"] for name, records in read_stages(recipe.folder)}
    trained = {}
    for name in STAGES:
        total = start + last[name] if name in last else total
        trained[name] = total
    return trained

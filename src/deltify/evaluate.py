"""What came out: perplexity, agreement with the teacher, samples; models side by side.

Legend: N tokens, W vocabulary.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from .config import STAGES, Recipe
from .data import Batch, TokenFile, heldout_batches
from .distill import hidden_states, next_tokens, open_data, open_teacher, pick_device
from .teacher import Teacher

PROMPTS = ("The capital of France is", "To open a file in Python, you", "Once upon a time, there was a")
CHUNK = 256  # tokens whose logits exist at a time
COUNTED = 10_000_000  # tokens of each source that the n-gram models are counted on


@dataclass(frozen=True)
class Score:
    """One model on held-out text. Figures that do not apply are None."""

    name: str
    perplexity: float
    kl: float | None = None  # nats per token, from the teacher
    top1: float | None = None  # share of tokens whose likeliest next token is the teacher's
    tokens: int = 0  # trained on


@torch.no_grad()
def agreement(teacher: nn.Module, model: nn.Module, heldout: list[Batch]) -> tuple[float, float, float]:
    """(perplexity, KL(teacher | model) in nats per token, top-1 agreement) in the models' own precision."""
    ce = kl = same = tokens = labelled = 0.0
    for batch in heldout:
        batch = batch.to(model.device)
        labels = next_tokens(batch).flatten()
        student, wanted = hidden_states(model, batch), hidden_states(teacher, batch)
        for start in range(0, len(labels), CHUNK):
            part = slice(start, start + CHUNK)
            log_q = model.lm_head(student[part]).float().log_softmax(-1)
            log_p = teacher.lm_head(wanted[part]).float().log_softmax(-1)
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            known = labels[part] >= 0
            ce -= float(log_q[known].gather(1, labels[part][known, None]).sum())
            labelled += int(known.sum())
        tokens += len(labels)
    return math.exp(min(ce / labelled, 700.0)), kl / tokens, same / tokens


def count_models(train: list[TokenFile], heldout: list[Batch], vocabulary: int) -> list[Score]:
    """Perplexity of a unigram and of a bigram model of the training text: what a student must beat to be of any use.

    Counted on the first `COUNTED` tokens of each source. The unigram p has one count added to each token; the bigram is
    (count(a b) + m p(b)) / (count(a) + m) with m = 5.
    """
    ids = np.concatenate([file.tokens[:COUNTED] for file in train]).astype(np.int64)
    p = np.bincount(ids, minlength=vocabulary) + 1.0
    p /= p.sum()
    pairs, counts = np.unique(ids[:-1] * vocabulary + ids[1:], return_counts=True)
    firsts = np.bincount(ids[:-1], minlength=vocabulary)
    first = np.concatenate([batch.input_ids.flatten().numpy() for batch in heldout])
    second = np.concatenate([next_tokens(batch).flatten().numpy() for batch in heldout])
    a, b = first[second >= 0], second[second >= 0]
    place = np.searchsorted(pairs, a * vocabulary + b).clip(max=len(pairs) - 1)
    seen = np.where(pairs[place] == a * vocabulary + b, counts[place], 0)
    bigram = (seen + 5 * p[b]) / (firsts[a] + 5)
    return [
        Score("unigram model", math.exp(-np.log(p[b]).mean())),
        Score("bigram model", math.exp(-np.log(bigram).mean())),
    ]


def evaluate_run(recipe: Recipe, *, samples: bool = True) -> Path:
    """Scores the teacher and every stage of a run on its held-out text; writes results.json and returns its path."""
    device = pick_device(recipe.run.device)
    teacher = open_teacher(recipe, device, torch.float32)
    train, held = open_data(recipe, teacher)
    heldout = heldout_batches(held, recipe.run.heldout_length, 8, recipe.run.heldout_tokens)
    perplexity, _, _ = agreement(teacher.model, teacher.model, heldout)
    scores = [Score("teacher", perplexity, 0.0, 1.0), *count_models(train, heldout, teacher.config.vocab_size)]
    texts = {"teacher": sample(teacher, teacher.model)} if samples else {}
    trained = trained_tokens(recipe)
    for name in ("converted", *STAGES):
        if not (recipe.folder / name / "config.json").is_file():
            continue
        model = AutoModelForCausalLM.from_pretrained(recipe.folder / name, dtype=torch.float32).to(device).eval()
        scores.append(Score(name, *agreement(teacher.model, model, heldout), trained.get(name, 0)))
        if samples:
            texts[name] = sample(teacher, model)
    path = recipe.folder / "results.json"
    result = {
        "teacher": recipe.teacher.model,
        "device": str(device),
        "heldout_tokens": sum(batch.input_ids.numel() for batch in heldout),
        "heldout_length": heldout[0].input_ids.shape[1],
        "scores": [asdict(score) for score in scores],
        "samples": texts,
    }
    path.write_text(json.dumps(result, indent=1))
    return path


def trained_tokens(recipe: Recipe) -> dict[str, int]:
    """Tokens that each stage's model has seen, earlier stages included."""
    seen, total = {}, 0
    lines = (recipe.folder / "metrics.jsonl").read_text().splitlines()
    last = {record["stage"]: record["tokens"] for record in map(json.loads, lines)}
    for name in STAGES:
        total += last.get(name, 0)
        seen[name] = total
    return seen


@torch.no_grad()
def sample(teacher: Teacher, model: nn.Module, tokens: int = 32) -> list[str]:
    """Greedy continuations of a few fixed prompts."""
    texts = []
    for prompt in PROMPTS:
        ids = teacher.tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        texts.append(str(teacher.tokenizer.decode(out[0], skip_special_tokens=True)))
    return texts

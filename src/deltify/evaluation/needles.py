"""Needles in haystacks: retrieval of sentences hidden in a long text, by length and depth.

These are the eight `niah` tasks of RULER (arXiv 2404.06654), with the prompts and the score of lm-eval:

    make = NeedleMaker(tokenizer)                       # haystack: CPython's documentation, or any text
    sample = make("niah_single_2", 4096, index=0)       # prompt and answer take 4,096 tokens together
    ask_needles(model, make, "needles.jsonl", tasks=["niah_single_2"], lengths=[1024, 4096], samples=32)

Prompts are assembled from the token ids of words, so that a haystack is tokenized only once.
"""

import difflib
import hashlib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, cycle, product
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.sources import PYTHON_DOCS
from ..inference.prefill import max_batch_size, prefill, stop_tokens
from ..model.cache import new_cache
from ..training.distributed import from_first, rank, share_out
from ..utils.files import append_jsonl, read_jsonl
from ..utils.fingerprint import fingerprint
from .haystack import Haystack, Words, distinct, draw, fill, line_haystack, text_haystack

# ---- tasks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A task of RULER.

    Args:
        haystack: "noise" (five short sentences, repeated), "text", or "needles" (nothing but other needles).
        keys: Kind of keys, "words" or "uuids".
        values: Kind of values, "numbers" or "uuids".
        num_keys: Number of hidden keys.
        num_values: Number of values of each key.
        num_asked: Number of keys that the question asks for.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_asked: int = 1


TASKS = {
    "niah_single_1": Task("noise"),
    "niah_single_2": Task("text"),
    "niah_single_3": Task("text", values="uuids"),
    "niah_multikey_1": Task("text", num_keys=4),
    "niah_multikey_2": Task("needles"),
    "niah_multikey_3": Task("needles", keys="uuids", values="uuids"),
    "niah_multivalue": Task("text", num_values=4),
    "niah_multiquery": Task("text", num_keys=4, num_asked=4),
}

# sentences of the benchmark, in singular and plural: lm-eval rewrites its templates for a single answer
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
HEAD = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n",
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n",
)
QUESTION = (
    "What is the special magic {kind} for {query} mentioned in the provided text?",
    "What are all the special magic {kind} for {query} mentioned in the provided text?",
)
ANSWER = (
    "The special magic {kind} for {query} mentioned in the provided text is",
    "The special magic {kind} for {query} mentioned in the provided text are",
)

MIN_HAYSTACK_TOKENS = 16
GROUP_TOKENS = 2**20  # tokens of samples that are asked together; several GPUs share the groups
ANSWER_TOKENS = 128  # tokens of an answer in lm-eval; a sample's length includes them
DEPTHS = (6, 19, 31, 44, 56, 69, 81, 94)  # in percent of the haystack, evenly spread like the 40 depths of lm-eval


def task_of(name: str) -> Task:
    """Return the task of this name. Raise ValueError if there is none."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 3, 0.3) or sorted(TASKS)
        raise ValueError(f"There is no needle task {name!r}. Did you mean {' or '.join(near)}?")
    return TASKS[name]


# ---- make ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A prompt and the values that answer it.

    Args:
        task: Name of the task.
        length: Number of tokens of prompt and answer together.
        index: Index of the sample within its task and length.
        depth: Depth of the first value asked for, in percent of the haystack.
        depths: Depth of each value asked for.
        question: Text of haystack and question.
        prefix: Text that the answer begins with.
        expected: Values asked for.
        ids: Token ids of the prompt, [length - answer_tokens] int32.
    """

    task: str
    length: int
    index: int
    depth: float
    depths: list[float]
    question: str
    prefix: str
    expected: list[str]
    ids: np.ndarray

    @property
    def prompt(self) -> str:
        """Return question and prefix."""
        return f"{self.question} {self.prefix}"

    @property
    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that identify the prompt."""
        return hashlib.sha256(self.ids.tobytes()).hexdigest()[:16]

    def document(self) -> dict:
        """Return the sample as a document of lm-eval's niah tasks."""
        return {
            "index": self.index,
            "input": self.question,
            "outputs": self.expected,
            "length": self.length,
            "max_length": self.length,
            "gen_prefix": self.prefix,
        }


class NeedleMaker:
    """A maker of samples. `make(task, length, index)` depends only on its arguments and on these:

    Args:
        tokenizer: Tokenizer of the model.
        source: Source of the text to hide needles in, see `data.sources.documents`.
        seed: Random seed for keys, values, places and the beginning of the text.
        depths: Depths of needles in percent of the haystack. Successive samples take them in wide steps, so that a few
            samples cover the haystack.
        answer_tokens: Number of tokens kept free for the answer.

    Raises:
        ValueError: If a depth is not in [0, 100], or there is none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: str = PYTHON_DOCS,
        *,
        seed: int = 0,
        depths: Sequence[float] = DEPTHS,
        answer_tokens: int = ANSWER_TOKENS,
    ):
        if not depths or not all(0 <= depth <= 100 for depth in depths):
            raise ValueError(f"depths={list(depths)} must have at least one entry, each in percent: 0 to 100.")
        self.tokenizer, self.source, self.seed = tokenizer, source, seed
        self.depths, self.answer_tokens = list(depths), answer_tokens
        self.words = Words(tokenizer)
        self.noise = line_haystack([NOISE], self.words)
        self.text: Haystack | None = None  # read at the first use

    def __call__(self, task: str, length: int, index: int) -> Sample:
        """Return a sample whose prompt and answer take `length` tokens.

        If no words fill the last gap, it takes slightly fewer.

        Raises:
            ValueError: If the task is unknown, or the length too small for question and needles.
        """
        spec = task_of(task)
        rng = random.Random(f"{self.seed}/{task}/{length}/{index}")
        keys = distinct(spec.keys, spec.num_keys, rng)
        values = distinct(spec.values, spec.num_keys * spec.num_values, rng)
        hidden = [(keys[i // spec.num_values], value) for i, value in enumerate(values)]
        asked_keys = rng.sample(keys, spec.num_asked)
        asked_values = [(key, value) for name in asked_keys for key, value in hidden if key == name]
        depth = self.depths[index * stride(len(self.depths)) % len(self.depths)]
        others = [d for d in self.depths if d != depth] or [depth]
        rng.shuffle(others)
        depths = dict(zip(hidden, cycle(others))) | {asked_values[0]: depth}
        needles = [(depths[k, v], NEEDLE.format(kind=spec.values, key=k, value=v)) for k, v in hidden]

        several = len(asked_values) > 1
        kind = spec.values if several else spec.values[:-1]
        query = asked_keys[0] if len(asked_keys) == 1 else f"{', '.join(asked_keys[:-1])}, and {asked_keys[-1]}"
        head, question, prefix = (part[several].format(kind=kind, query=query) for part in (HEAD, QUESTION, ANSWER))
        tail, tokens = f"{question} {prefix}", length - self.answer_tokens
        fixed = len(self.words.start) + sum(map(self.words.count, (head, tail, *(needle for _, needle in needles))))
        if tokens < fixed + MIN_HAYSTACK_TOKENS:
            raise ValueError(
                f"{length} tokens are too few: the answer needs {self.answer_tokens}, question and needles {fixed}, "
                f"and the haystack at least {MIN_HAYSTACK_TOKENS}."
            )
        haystack = self.haystack(spec, tokens - fixed, keys, rng)
        start = rng.choice(haystack.joints) if spec.haystack == "text" else 0
        lines = spec.haystack != "text"
        text, ids = fill(haystack, self.words, tokens, head, needles, tail, start=start, lines=lines)
        expected = [value for _, value in asked_values]
        asked_depths = [depths[pair] for pair in asked_values]
        return Sample(task, length, index, depth, asked_depths, text[: -len(prefix) - 1], prefix, expected, ids)

    def haystack(self, spec: Task, budget: int, keys: list[str], rng: random.Random) -> Haystack:
        """Return a haystack for the task.

        A haystack of needles is made for each sample. It has more than `budget` tokens, and none of the hidden keys.
        """
        if spec.haystack == "noise":
            return self.noise
        if spec.haystack == "text":
            self.text = self.text or text_haystack(self.source, self.words)
            return self.text
        lines, grown = [], None
        while grown is None or len(grown.ids) <= budget:
            more = 8 if grown is None else 4 + len(lines) * (budget - len(grown.ids)) // len(grown.ids)
            while more > 0:
                key, value = draw(spec.keys, rng), draw(spec.values, rng)
                if key not in keys:
                    lines.append(NEEDLE.format(kind=spec.values, key=key, value=value))
                    more -= 1
            grown = line_haystack(lines, self.words)
        return grown


def stride(number: int) -> int:
    """Return a step of about 0.6 * `number` that visits all of `number` places, taken modulo `number`."""
    return next(step for step in count(max(1, round(0.6 * number))) if math.gcd(step, number) == 1)


# ---- ask and score ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: list[Sample], max_tokens: int = ANSWER_TOKENS
) -> list[str]:
    """Return greedy answers of at most `max_tokens` tokens. All prompts must have one length.

    As in lm-eval, an answer ends at an end-of-sequence token. It also ends once it holds every expected value, as
    further tokens cannot change its score.
    """
    ids = torch.from_numpy(np.stack([sample.ids for sample in samples])).long().to(model.device)
    cache = new_cache(model)
    logits = prefill(model, ids, cache)
    stops = stop_tokens(model, tokenizer)
    tokens: list[list[int]] = [[] for _ in samples]
    answers, unfinished = [""] * len(samples), set(range(len(samples)))
    for step in range(max_tokens):
        token_B = logits.argmax(-1)
        chosen = token_B.tolist()
        for i in sorted(unfinished):
            if chosen[i] in stops:
                unfinished.remove(i)
                continue
            tokens[i].append(chosen[i])
            answers[i] = str(tokenizer.decode(tokens[i], skip_special_tokens=True))
            if all(hits(answers[i], samples[i].expected)):
                unfinished.remove(i)
        if not unfinished or step == max_tokens - 1:
            break
        logits = model(input_ids=token_B.unsqueeze(1), past_key_values=cache, use_cache=True).logits[:, -1]
    return answers


def hits(answer: str, expected: list[str]) -> list[bool]:
    """Return for each expected value whether the answer holds it, ignoring case.

    This is RULER's string match. RULER and lm-eval also strip the answer and replace control characters, which changes
    no result, as no value has any.
    """
    return [value.lower() in answer.lower() for value in expected]


def ask_needles(
    model: PreTrainedModel,
    make: NeedleMaker,
    path: str | Path,
    *,
    name: str,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    log: Callable[[str], None] = lambda line: None,
) -> list[dict]:
    """Run needle tasks on a model, append new rows to a file, and return all rows.

    Rows that the file has for the same prompts, weights and dtype are reused, so that an interrupted run resumes.
    Processes under torchrun share groups of samples, which are the same for any number of processes. Lengths may exceed
    the model's context window.

    Args:
        model: Model to test.
        make: Maker of the samples.
        path: JSON lines file of rows.
        name: Name of the model.
        tasks: Names of tasks.
        lengths: Numbers of tokens of prompt and answer.
        samples: Number of samples of each task and length.
        log: Function that is called with a line for each task and length.

    Returns:
        Rows with model, task, length, tokens (of prompt and answer), depth (of the first value asked for, in percent),
        depths (of each value), sample (index), correct (fraction of the values in the answer), hits (0 or 1 for each
        value), answer, expected, prompt and weights (fingerprints).
    """
    path, weights = Path(path), f"{fingerprint(model)}-{str(model.dtype).removeprefix('torch.')}"
    on_file = from_first(lambda: read_jsonl(path, repair=True))
    done = {row_key(row): row for row in on_file if row["model"] == name and row.get("weights") == weights}
    tasks, lengths = list(dict.fromkeys(tasks)), list(dict.fromkeys(lengths))
    keys: dict[tuple[int, str], list[tuple]] = {pair: [] for pair in product(lengths, tasks)}
    unfinished, rows = list(keys), []

    def missing_samples(length: int) -> Iterator[Sample]:
        for task, index in product(tasks, range(samples)):
            sample = make(task, length, index)
            key = (name, task, length, index, sample.fingerprint)
            keys[length, task].append(key)
            if key not in done:
                yield sample

    def answer(group: list[Sample]) -> list[dict]:
        texts = ask(model, make.tokenizer, group, make.answer_tokens)
        found = [result_row(name, sample, text, make.answer_tokens) for sample, text in zip(group, texts)]
        return [row | {"weights": weights} for row in found]

    def take_finished() -> None:
        """Move rows of finished tasks and lengths to `rows`."""
        while unfinished and len(own := [done[key] for key in keys[unfinished[0]] if key in done]) == samples:
            length, task = unfinished.pop(0)
            score = sum(row["correct"] for row in own) / max(1, samples)
            log(f"{name}: {task} at {length:,} tokens: {score:.0%} found in {samples} samples")
            rows.extend(own)

    sizes = from_first(lambda: {length: group_size(model, length) for length in lengths})
    groups = (group for length in lengths for group in batches(missing_samples(length), sizes[length]))
    for _, found in share_out(groups, answer):
        if rank() == 0:
            append_jsonl(path, found)
        done |= {row_key(row): row for row in found}
        take_finished()
    take_finished()
    if unfinished:
        raise ValueError(f"The processes have different haystacks, {make.source}. Give all of them the same text.")
    return rows


def group_size(model: PreTrainedModel, length: int) -> int:
    """Return how many samples of `length` tokens are asked together.

    It is a power of two, so that it is the same for a little more or less free memory.
    """
    fitting = min(max_batch_size(model, length), max(1, GROUP_TOKENS // length))
    return 2 ** (fitting.bit_length() - 1)


def batches(samples: Iterable[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """Yield groups of samples with prompts of one length, as soon as a group is full."""
    by_size: dict[int, list[Sample]] = {}
    for sample in samples:
        group = by_size.setdefault(len(sample.ids), [])
        group.append(sample)
        if len(group) == batch_size:
            yield by_size.pop(len(sample.ids))
    yield from by_size.values()


def result_row(name: str, sample: Sample, answer: str, answer_tokens: int) -> dict:
    """Return the row of an answer."""
    in_answer = hits(answer, sample.expected)
    return {
        "model": name,
        "task": sample.task,
        "length": sample.length,
        "tokens": len(sample.ids) + answer_tokens,
        "depth": sample.depth,
        "depths": sample.depths,
        "sample": sample.index,
        "correct": sum(in_answer) / len(in_answer),
        "hits": [int(hit) for hit in in_answer],
        "answer": answer,
        "expected": sample.expected,
        "prompt": sample.fingerprint,
    }


def row_key(row: dict) -> tuple:
    """Return what identifies a row among those of the same weights."""
    return row["model"], row["task"], row["length"], row["sample"], row["prompt"]


# ---- results ---------------------------------------------------------------------------------------------------------


def summarise(rows: list[dict]) -> list[dict]:
    """Return a row for each model, task and length: score, standard error (None for a single item), items."""
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["task"], row["length"]), []).append(row["correct"])
    result = []
    for (model, task, length), right in groups.items():
        score, items = sum(right) / len(right), len(right)
        stderr = None
        if items > 1:
            stderr = math.sqrt(sum((x - score) ** 2 for x in right) / (items - 1) / items)
        result.append(
            {"model": model, "task": task, "length": length, "score": score, "stderr": stderr, "items": items}
        )
    return result

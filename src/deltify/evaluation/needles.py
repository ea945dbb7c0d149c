"""Needles in haystacks: sentences hidden in a long text, and asked for; by length and by depth.

The eight `niah` tasks of RULER (arXiv 2404.06654), with the prompts and the score that lm-eval gives them:

    make = NeedleMaker(tokenizer)                       # haystack: CPython's own documentation, or any text
    sample = make("niah_single_2", 4096, index=0)       # prompt and answer take 4,096 tokens together
    ask_needles(model, make, "needles.jsonl", tasks=["niah_single_2"], lengths=[1024, 4096], samples=32)

A prompt is put together from tokens, word by word, so that a haystack is tokenized once, not for every sample.
"""

import difflib
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, cycle, product
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.sources import PYTHON_DOCS
from ..inference.prefill import new_cache, prefill, rows_at_once, stop_tokens
from ..utils.fingerprint import fingerprint
from .haystack import Haystack, Words, distinct, draw, fill, line_haystack, text_haystack

# ---- tasks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What one of RULER's tasks hides, and where."""

    haystack: str  # "noise": five short sentences repeated, "text", or "needles": nothing but needles
    keys: str = "words"  # or "uuids"
    values: str = "numbers"  # or "uuids"
    num_keys: int = 1
    num_values: int = 1  # of each key
    num_asked: int = 1  # keys


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

# the benchmark's fixed sentences; with one answer, lm-eval rewrites the template in the singular
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

LEAST = 16  # tokens of a haystack
ROOM = 128  # tokens that lm-eval lets a model answer with; a sample's length counts them
GRID = (6, 19, 31, 44, 56, 69, 81, 94)  # depths in percent of the haystack: spread evenly, as lm-eval's 40 are


def task_of(name: str) -> Task:
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 3, 0.3) or sorted(TASKS)
        raise ValueError(f"there is no needle task {name!r}; did you mean {' or '.join(near)}?")
    return TASKS[name]


# ---- make ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A prompt, as text and as tokens, and the values that it asks for."""

    task: str
    length: int  # tokens of prompt and answer
    index: int
    depth: float  # of the first value asked for, in percent of the haystack
    depths: list[float]  # of each
    question: str  # haystack and question
    prefix: str  # how the answer begins
    expected: list[str]
    ids: np.ndarray  # [length - room] int32

    @property
    def prompt(self) -> str:
        return f"{self.question} {self.prefix}"

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.ids.tobytes()).hexdigest()[:16]

    def document(self) -> dict:
        """The sample as lm-eval's niah tasks hold it."""
        return {
            "index": self.index,
            "input": self.question,
            "outputs": self.expected,
            "length": self.length,
            "max_length": self.length,
            "gen_prefix": self.prefix,
        }


class NeedleMaker:
    """Makes samples for one tokenizer: `make(task, length, index)` is a pure function of its arguments and of these.

    Args:
        source: of the text to hide needles in: a text file, a JSON lines file, a folder of such, or "python-docs".
        seed: of keys, values, places and the text's beginning.
        depths: where needles go, in percent of the haystack. Successive samples walk through them in wide steps, so
            that a few are spread already.
        room: tokens kept free for the answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: str = PYTHON_DOCS,
        *,
        seed: int = 0,
        depths: Sequence[float] = GRID,
        room: int = ROOM,
    ):
        if not depths or not all(0 <= depth <= 100 for depth in depths):
            raise ValueError(f"depths={list(depths)}; give at least one, in percent: 0 to 100")
        self.tokenizer, self.source, self.seed, self.depths, self.room = tokenizer, source, seed, list(depths), room
        self.words = Words(tokenizer)
        self.noise = line_haystack([NOISE], self.words)
        self.text: Haystack | None = None  # read when first needed

    def __call__(self, task: str, length: int, index: int) -> Sample:
        """One sample. Its tokens and `room` make `length`, or if no words fit the last gap, the closest below.

        Raises:
            ValueError: for an unknown task, or a length that the question and the needles do not fit into.
        """
        spec = task_of(task)
        rng = random.Random(f"{self.seed}/{task}/{length}/{index}")
        keys = distinct(spec.keys, spec.num_keys, rng)
        values = distinct(spec.values, spec.num_keys * spec.num_values, rng)
        hidden = [(keys[i // spec.num_values], value) for i, value in enumerate(values)]
        asked = rng.sample(keys, spec.num_asked)
        wanted = [(key, value) for name in asked for key, value in hidden if key == name]
        depth = self.depths[index * stride(len(self.depths)) % len(self.depths)]
        others = [d for d in self.depths if d != depth] or [depth]
        rng.shuffle(others)
        depths = dict(zip(hidden, cycle(others))) | {wanted[0]: depth}
        needles = [(depths[k, v], NEEDLE.format(kind=spec.values, key=k, value=v)) for k, v in hidden]

        several = len(wanted) > 1
        kind = spec.values if several else spec.values[:-1]
        query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        head, question, prefix = (part[several].format(kind=kind, query=query) for part in (HEAD, QUESTION, ANSWER))
        tail, tokens = f"{question} {prefix}", length - self.room
        fixed = len(self.words.start) + sum(map(self.words.count, (head, tail, *(needle for _, needle in needles))))
        if tokens < fixed + LEAST:
            raise ValueError(
                f"{length} tokens are too few: the answer needs {self.room}, question and needles {fixed}, "
                f"and the haystack {LEAST} at least"
            )
        haystack = self.haystack(spec, tokens - fixed, keys, rng)
        start = rng.choice(haystack.joints) if spec.haystack == "text" else 0
        lines = spec.haystack != "text"
        text, ids = fill(haystack, self.words, tokens, head, needles, tail, start=start, lines=lines)
        expected = [value for _, value in wanted]
        places = [depths[pair] for pair in wanted]
        return Sample(task, length, index, depth, places, text[: -len(prefix) - 1], prefix, expected, ids)

    def haystack(self, spec: Task, budget: int, keys: list[str], rng: random.Random) -> Haystack:
        """A haystack of the task's kind; one of needles is made anew, longer than `budget` tokens, of other keys."""
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
    """A step about 0.6 of the way through so many places, that meets them all."""
    return next(step for step in count(max(1, round(0.6 * number))) if math.gcd(step, number) == 1)


# ---- ask and score ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: list[Sample], room: int = ROOM
) -> list[str]:
    """Greedy answers of at most `room` tokens; the samples' prompts must have equally many tokens.

    As lm-eval does, an answer ends at an end-of-sequence token only. It also ends once it holds every expected value,
    after which no token could change its score.
    """
    ids = torch.from_numpy(np.stack([sample.ids for sample in samples])).long().to(model.device)
    cache = new_cache(model)
    logits = prefill(model, ids, cache)
    stops = stop_tokens(model, tokenizer)
    tokens: list[list[int]] = [[] for _ in samples]
    answers, going = [""] * len(samples), set(range(len(samples)))
    for step in range(room):
        token = logits.argmax(-1)
        chosen = token.tolist()
        for row in sorted(going):
            if chosen[row] in stops:
                going.remove(row)
                continue
            tokens[row].append(chosen[row])
            answers[row] = str(tokenizer.decode(tokens[row], skip_special_tokens=True))
            if all(hits(answers[row], samples[row].expected)):
                going.remove(row)
        if not going or step == room - 1:
            break
        logits = model(input_ids=token.unsqueeze(1), past_key_values=cache, use_cache=True).logits[:, -1]
    return answers


def hits(answer: str, expected: list[str]) -> list[bool]:
    """For each expected value whether the answer holds it, in any case: RULER's string match, as in lm-eval.

    They also strip the answer and replace control characters, which changes nothing: no value has any.
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
    report: Callable[[str], None] = lambda line: None,
) -> list[dict]:
    """Asks a model `samples` of each task and length; returns its rows.

    They are appended to the file `path` as they come. Those that are there already, for the same prompts and the same
    weights in the same dtype, are not asked again, so that a run that broke off goes on. A model is asked beyond the
    length that its config allows, too, and reported as it answers.

    Returns:
        Rows with model, task, length, tokens (of prompt and room), depth (of the first value asked for, in percent),
        depths (of each), sample (index), correct (share of the values that the answer holds), hits (for each value),
        answer, expected, prompt and weights (fingerprints).
    """
    path, weights = Path(path), f"{fingerprint(model)}-{str(model.dtype).removeprefix('torch.')}"
    done = {row_key(row): row for row in read_rows(path) if row["model"] == name and row.get("weights") == weights}
    rows = []
    for length in lengths:
        keys: dict[str, list[tuple]] = {task: [] for task in tasks}

        def waiting(length: int = length, keys: dict[str, list[tuple]] = keys) -> Iterator[Sample]:
            for task, index in product(tasks, range(samples)):
                sample = make(task, length, index)
                keys[task].append((name, task, length, index, sample.fingerprint))
                if keys[task][-1] not in done:
                    yield sample

        for group in batches(waiting(), rows_at_once(model, length)):
            answers = ask(model, make.tokenizer, group, make.room)
            with path.open("a", encoding="utf-8") as out:
                for sample, answer in zip(group, answers):
                    row = result_row(name, sample, answer, make.room) | {"weights": weights}
                    out.write(json.dumps(row) + "\n")
                    done[row_key(row)] = row
        for task in tasks:
            mine = [done[key] for key in keys[task]]
            score = sum(row["correct"] for row in mine) / max(1, len(mine))
            report(f"{name}: {task} at {length:,} tokens: {score:.2f} of {len(mine)} samples")
            rows += mine
    return rows


def batches(samples: Iterable[Sample], most: int) -> Iterator[list[Sample]]:
    """Groups of samples with equally many tokens, as soon as one is full."""
    by_size: dict[int, list[Sample]] = {}
    for sample in samples:
        group = by_size.setdefault(len(sample.ids), [])
        group.append(sample)
        if len(group) == most:
            yield by_size.pop(len(sample.ids))
    yield from by_size.values()


def result_row(name: str, sample: Sample, answer: str, room: int) -> dict:
    found = hits(answer, sample.expected)
    return {
        "model": name,
        "task": sample.task,
        "length": sample.length,
        "tokens": len(sample.ids) + room,
        "depth": sample.depth,
        "depths": sample.depths,
        "sample": sample.index,
        "correct": sum(found) / len(found),
        "hits": [int(hit) for hit in found],
        "answer": answer,
        "expected": sample.expected,
        "prompt": sample.fingerprint,
    }


def row_key(row: dict) -> tuple:
    return row["model"], row["task"], row["length"], row["sample"], row["prompt"]


def read_rows(path: Path) -> list[dict]:
    """The rows of a file; one that was cut while it was written is cut off."""
    if not path.is_file():
        return []
    whole, newline, broken = path.read_text(encoding="utf-8").rpartition("\n")
    if broken:
        path.write_text(whole + newline, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


# ---- results ---------------------------------------------------------------------------------------------------------


def summarise(rows: list[dict]) -> list[dict]:
    """One row per model, task and length: score, its standard error (None for one item), items."""
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


def needle_table(rows: list[dict]) -> Table:
    """Scores in percent with standard errors; tasks and models down, lengths across."""
    summary = {(row["task"], row["model"], row["length"]): row for row in summarise(rows)}
    lengths = sorted({length for _, _, length in summary})
    items = sorted({row["items"] for row in summary.values()})
    table = Table(title=f"needles found, %; {' to '.join({str(items[0]): 0, str(items[-1]): 0})} samples a cell")
    table.add_column("task")
    table.add_column("model")
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    for task, model in dict.fromkeys(key[:2] for key in sorted(summary, key=lambda key: list(TASKS).index(key[0]))):
        cells = []
        for length in lengths:
            row = summary.get((task, model, length))
            if row is None:
                cells.append("-")
            elif row["stderr"] is None:
                cells.append(f"{100 * row['score']:.0f}")
            else:
                cells.append(f"{100 * row['score']:.0f} ± {100 * row['stderr']:.0f}")
        table.add_row(task, model, *cells)
    return table

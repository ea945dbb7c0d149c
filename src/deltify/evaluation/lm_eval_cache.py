"""A cache of a model's answers to lm-eval, kept in files of items.

lm-eval's own CachingLM keeps answers only. This one also scores each document as soon as it is answered, and writes
it as an item.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, hash_args
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import handle_non_serializable, hash_string
from tqdm import tqdm

from ..model import DeltifyForCausalLM
from ..model.capture import has_known_mixers
from ..training.distributed import check_same, from_first, rank, share_out
from ..utils.files import atomic_write, read_jsonl
from ..utils.fingerprint import fingerprint
from ..utils.tokens import TOKENIZER_PROBE
from .lm_eval_model import ConstantStateLM

Answer = tuple[float, bool] | float | str  # log-likelihood and whether greedy, rolling log-likelihood, text
Document = tuple[str, int]  # task, number
PIECE_DOCUMENTS = 256  # largest number of documents that a process answers before it exchanges answers with others


def answer_key(lm: HFLM) -> str:
    """Return a hash of all that answers depend on: weights, dtype, tokenizer and longest input."""
    facts = [fingerprint(lm.model), str(lm.model.dtype), lm.tok_encode(TOKENIZER_PROBE), lm.max_length]
    if isinstance(lm.model, DeltifyForCausalLM) and not has_known_mixers(lm.model):
        facts.append("read as a whole")  # earlier versions read controls with zeroed states in parts
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


class CachedLM(LM):
    """A model that answers from a file where it can, and writes new answers and items to it.

    An item is a line of JSON with the answers and scores of one document. Until a task is complete, the file also has
    single answers between the items, so that an interrupted task resumes. Documents with repeated requests, or with
    requests of several types, are not cached.

    Under torchrun every process has all answers, gives its share of the new ones, and only the first one writes.
    """

    def __init__(self, lm: HFLM, tasks: dict[str, Task], path: Path):
        super().__init__()
        self.lm, self.tasks, self.path, self.model = lm, tasks, path, answer_key(lm)
        self.on_first_request = contextlib.ExitStack()
        self.answers: dict[str, Answer] = {}  # by the key of the request
        self.items: dict[Document, dict] = {}
        self.unused: dict[str, Answer] = {}  # of other items, examples or data types, for later evaluations
        self.documents: dict[Document, list[Instance]] = {}
        self.missing: dict[Document, int] = {}  # number of answers that a document lacks
        self.waiting: dict[str, list[Document]] = {}  # documents that need the answer with this key
        self.started = False
        lm.set_cache_hook(self)  # pyrefly: ignore[bad-argument-type]  # lm-eval only calls its add_partial

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return self.answer("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self.answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self.answer("generate_until", requests)

    def answer(self, kind: str, requests: list[Instance]) -> list:
        """Return the answers to requests of one type, from the file where it has them, else from the model."""
        self.on_first_request.close()
        if not self.started:
            self.start()
        answers = [self.answers.get(self.key(kind, request.args)) for request in requests]

        def ask(indices: list[int]) -> list[Answer]:
            torch.manual_seed(indices[0])  # for tasks that sample
            return getattr(self.lm, kind)([requests[i] for i in indices], disable_tqdm=True)

        missing = {i: requests[i] for i, answer in enumerate(answers) if answer is None}
        hidden = not missing or rank() > 0 or not sys.stderr.isatty()
        with self.opened(append=True) as self.file, tqdm(total=len(missing), desc=kind, disable=hidden) as bar:
            for indices, new in share_out(self.pieces(missing), ask):
                for i, answer in zip(indices, new):
                    if not isinstance(answer, str) and np.isnan(np.ravel(answer)[0]):
                        raise FloatingPointError(f"the model's answer to {requests[i].args[0][:60]!r} is not a number")
                    self.keep(self.key(kind, requests[i].args), answer)
                    answers[i] = answer
                bar.update(len(indices))
        return answers

    def pieces(self, requests: Mapping[int, Instance]) -> list[list[int]]:
        """Return the indices of requests in pieces of whole documents, which processes under torchrun share.

        Pieces do not depend on the number of processes, so neither do batches, on which rounding depends. Long pieces
        come first. A piece has documents of similar length, or neighbours if the model reads shared prefixes once.
        """
        sizes = {i: sum(len(part) for part in r.args if isinstance(part, str)) for i, r in requests.items()}
        documents: dict[tuple, list[int]] = {}
        for i, request in requests.items():
            documents.setdefault((request.task_name, request.doc_id), []).append(i)

        def longest(groups: Iterable[list[int]]) -> list[list[int]]:
            return sorted(groups, key=lambda indices: -sum(sizes[i] for i in indices))

        neighbours = isinstance(self.lm, ConstantStateLM)
        ordered = list(documents.values()) if neighbours else longest(documents.values())
        size = min(int(self.lm.batch_size), PIECE_DOCUMENTS)
        return longest(list(chain(*ordered[at : at + size])) for at in range(0, len(ordered), size))

    def opened(self, *, append: bool) -> contextlib.AbstractContextManager[TextIO | None]:
        """Open the file, to append to it or to replace it. Only the first process has a file."""
        if rank() > 0:
            return contextlib.nullcontext()
        return self.path.open("a", encoding="utf-8") if append else atomic_write(self.path)

    def start(self) -> None:
        """Read the file, and rewrite it with the answers that are needed now."""
        self.started = True
        for name, task in self.tasks.items():
            for instance in task.instances:
                assert instance.doc_id is not None  # lm-eval sets it when it builds requests
                self.documents.setdefault((name, instance.doc_id), []).append(instance)
        for document, instances in self.documents.items():
            kind = instances[0].request_type
            if any(instance.repeats != 1 or instance.request_type != kind for instance in instances):
                continue
            keys = {self.key(kind, instance.args) for instance in instances}
            self.missing[document] = len(keys)
            for key in keys:
                self.waiting.setdefault(key, []).append(document)
        check_same("benchmark items or examples", lambda: [self.model, *sorted(self.waiting)])
        lines = from_first(lambda: read_jsonl(self.path))
        known = {key: answer for line in lines for key, answer in answers_of(line)}
        self.unused = {key: answer for key, answer in known.items() if key not in self.waiting}
        with self.opened(append=False) as self.file:
            self.write_unused()
            for key in list(self.waiting):
                if key in known:
                    self.keep(key, known[key])

    def write_unused(self) -> None:
        """Write the answers that this evaluation does not need."""
        for key, answer in self.unused.items():
            self.write({"request": key, "answer": answer})

    def key(self, kind: str, args: Iterable) -> str:
        """Return the key of a request."""
        return hash_args(f"{self.model} {kind}", args)[:16]

    def add_partial(self, kind: str, args: Iterable, answer: Answer) -> None:
        """Keep an answer. This is lm-eval's hook, which models call with each of theirs."""
        self.keep(self.key(kind, args), answer)

    def keep(self, key: str, answer: Answer) -> None:
        """Write an answer, and each document that it completes."""
        for document in self.waiting.pop(key, ()):
            if key not in self.answers:
                self.answers[key] = answer
                self.write({"request": key, "answer": answer})
            self.missing[document] -= 1
            if self.missing[document] == 0:
                self.items[document] = self.item(document)
                self.write(self.items[document])

    def write(self, line: dict) -> None:
        """Write a line of JSON at once."""
        if self.file is None:
            return
        self.file.write(json.dumps(line, default=handle_non_serializable) + "\n")
        self.file.flush()

    def finish(self) -> list[dict]:
        """Rewrite the file with items and unused answers, and return the items by task and document."""
        order = {name: number for number, name in enumerate(self.tasks)}
        items = [self.items[key] for key in sorted(self.items, key=lambda key: (order[key[0]], key[1]))]
        with self.opened(append=False) as self.file:
            for item in items:
                self.write(item)
            self.write_unused()
        return items

    def item(self, document: Document) -> dict:
        """Return the item of a document, with scores by the task's own metrics."""
        task, instances = self.tasks[document[0]], self.documents[document]
        doc, kind = instances[0].doc, instances[0].request_type
        keys = [self.key(kind, instance.args) for instance in instances]
        answers: list = [self.answers[key] for key in keys]
        text = json.dumps(doc, default=handle_non_serializable, ensure_ascii=False)
        line: dict = {"task": document[0], "doc": document[1], "hash": hash_string(text)[:16], "requests": keys}
        line |= {name: doc[name] for name in (task.config.metadata or {}).get("keep", ())}
        if kind == "loglikelihood":
            line |= {name: [answer[i] for answer in answers] for i, name in enumerate(("loglikelihoods", "greedy"))}
        else:
            line["texts" if kind == "generate_until" else "loglikelihoods"] = answers
        if isinstance(task, ConfigurableTask) and task.OUTPUT_TYPE == "multiple_choice":
            choices = task.doc_to_choice(doc)
            gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
            line["gold"] = choices.index(gold) if isinstance(gold, str) and gold in choices else gold
            line["lengths"] = [len(choice) for choice in choices]
            line["predicted"] = int(np.argmax(line["loglikelihoods"][: len(choices)]))
        elif kind == "generate_until":
            line["gold"] = task.doc_to_target(doc)
        return line | {"scores": score_document(task, doc, instances, answers)}


def score_document(task: Task, doc: dict, instances: list[Instance], answers: list) -> dict:
    """Return the scores of a document by metric, after each of the task's filters."""
    answered = [
        dataclasses.replace(instance, resps=[answer], filtered_resps={}) for instance, answer in zip(instances, answers)
    ]
    scores = {}
    for ensemble in task._filters:
        ensemble.apply(answered)
        results = task.process_results(doc, [instance.filtered_resps[ensemble.name] for instance in answered])
        assert results is not None
        scores |= {metric_name(metric, ensemble.name): value for metric, value in results.items()}
    return scores


def metric_name(metric: str, filter_name: str) -> str:
    """Return the metric's name, followed by lm-eval's filter if there is one."""
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def answers_of(line: dict) -> Iterator[tuple[str, Answer]]:
    """Yield the request and the answer of each answer in a line of the file."""
    if "request" in line:
        answer = line["answer"]
        yield line["request"], tuple(answer) if isinstance(answer, list) else answer
    elif "greedy" in line:
        yield from zip(line["requests"], zip(line["loglikelihoods"], line["greedy"]))
    else:
        yield from zip(line["requests"], line.get("texts", line.get("loglikelihoods")))

"""What lm-eval asked and a model answered, by item, on file: nothing is asked twice."""

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, hash_args
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import handle_non_serializable, hash_string

from ..utils.fingerprint import fingerprint

Answer = tuple[float, bool] | float | str  # log-likelihood and whether greedy, rolling log-likelihood, text
Document = tuple[str, int]  # task, number


def answer_key(lm: HFLM) -> str:
    """Return a hash of what answers depend on: the model's weights and dtype, the tokenizer, and the length read."""
    probe = lm.tok_encode("Ünïcode, 1234567890 = 3.14;\n\tdef f(x): return 'x'  # 漢字")
    facts = [fingerprint(lm.model), str(lm.model.dtype), probe, lm.max_length]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


class Recorder(LM):
    """Hands requests to a model, except those whose answers are on file, and writes answers and items as they come.

    An item is a line of JSON: one document's answers and scores. Until the last item of the task is there, single
    answers stand between the items, so that nothing is asked twice after an interruption. Documents that are asked
    repeatedly, or in several ways, are passed through and not kept.
    """

    def __init__(self, lm: HFLM, tasks: dict[str, Task], path: Path):
        super().__init__()
        self.lm, self.tasks, self.path, self.model = lm, tasks, path, answer_key(lm)
        self.on_first_request = contextlib.ExitStack()
        self.answers: dict[str, Answer] = {}  # by key of the request
        self.items: dict[Document, dict] = {}
        self.documents: dict[Document, list[Instance]] = {}
        self.missing: dict[Document, int] = {}  # answers
        self.waiting: dict[str, list[Document]] = {}  # documents that need the answer
        self.started = False
        lm.set_cache_hook(self)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return self.answer("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self.answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self.answer("generate_until", requests)

    def answer(self, kind: str, requests: list[Instance]) -> list:
        """The answers from the file, and from the model where there is none."""
        self.on_first_request.close()
        if not self.started:
            self.start()
        known = [self.answers.get(self.key(kind, request.args)) for request in requests]
        new = [request for request, answer in zip(requests, known) if answer is None]
        if not new:
            return known
        with self.path.open("a", encoding="utf-8") as self.file:
            answers = getattr(self.lm, kind)(new, disable_tqdm=not sys.stderr.isatty())
            for request, answer in zip(new, answers):  # of a model that does not call the hook
                self.keep(self.key(kind, request.args), answer)
        fresh = iter(answers)
        return [next(fresh) if answer is None else answer for answer in known]

    def start(self) -> None:
        """Takes what is on file and of use now, and writes it anew."""
        self.started = True
        for task in self.tasks.values():
            for instance in task.instances:
                self.documents.setdefault((instance.task_name, instance.doc_id), []).append(instance)
        for document, asked in self.documents.items():
            if any(instance.repeats != 1 or instance.request_type != asked[0].request_type for instance in asked):
                continue
            keys = {self.key(instance.request_type, instance.args) for instance in asked}
            self.missing[document] = len(keys)
            for key in keys:
                self.waiting.setdefault(key, []).append(document)
        known = {key: answer for line in read_lines(self.path) for key, answer in answers_of(line)}
        with replaced(self.path) as self.file:
            for key in list(self.waiting):
                if key in known:
                    self.keep(key, known[key])

    def key(self, kind: str, args: Iterable) -> str:
        return hash_args(f"{self.model} {kind}", args)[:16]

    def add_partial(self, kind: str, args: Iterable, answer: Answer) -> None:
        """lm-eval's hook: models call it with each answer."""
        self.keep(self.key(kind, args), answer)

    def keep(self, key: str, answer: Answer) -> None:
        for document in self.waiting.pop(key, ()):
            if key not in self.answers:
                self.answers[key] = answer
                self.write({"request": key, "answer": answer})
            self.missing[document] -= 1
            if self.missing[document] == 0:
                self.items[document] = self.item(document)
                self.write(self.items[document])

    def write(self, line: dict) -> None:
        self.file.write(json.dumps(line, default=handle_non_serializable) + "\n")
        self.file.flush()

    def finish(self) -> list[dict]:
        """The items in the order of tasks and documents; the file then holds them alone."""
        order = {name: number for number, name in enumerate(self.tasks)}
        items = [self.items[key] for key in sorted(self.items, key=lambda key: (order[key[0]], key[1]))]
        with replaced(self.path) as self.file:
            for item in items:
                self.write(item)
        return items

    def item(self, document: Document) -> dict:
        """One document: what was answered, and how it scores by the task's own metrics."""
        task, asked = self.tasks[document[0]], self.documents[document]
        doc, kind = asked[0].doc, asked[0].request_type
        keys = [self.key(kind, instance.args) for instance in asked]
        answers: list = [self.answers[key] for key in keys]
        text = json.dumps(doc, default=handle_non_serializable, ensure_ascii=False)
        line: dict = {"task": document[0], "doc": document[1], "hash": hash_string(text)[:16], "requests": keys}
        line |= {name: doc[name] for name in (task.config.metadata or {}).get("keep", ())}
        if kind == "loglikelihood":
            line |= {name: [answer[i] for answer in answers] for i, name in enumerate(("loglikelihoods", "greedy"))}
        else:
            line["texts" if kind == "generate_until" else "loglikelihoods"] = answers
        if task.OUTPUT_TYPE == "multiple_choice":
            choices = task.doc_to_choice(doc)
            gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
            line["gold"] = choices.index(gold) if isinstance(gold, str) and gold in choices else gold
            line["lengths"] = [len(choice) for choice in choices]
            line["predicted"] = int(np.argmax(line["loglikelihoods"][: len(choices)]))
        elif kind == "generate_until":
            line["gold"] = task.doc_to_target(doc)
        answered = [
            dataclasses.replace(instance, resps=[answer], filtered_resps={}) for instance, answer in zip(asked, answers)
        ]
        line["scores"] = {}
        for ensemble in task._filters:
            ensemble.apply(answered)
            results = task.process_results(doc, [instance.filtered_resps[ensemble.name] for instance in answered])
            line["scores"] |= {metric_name(metric, ensemble.name): value for metric, value in results.items()}
        return line


def metric_name(metric: str, filter_name: str) -> str:
    """The metric, and behind it lm-eval's filter where there is one."""
    return metric if filter_name == "none" else f"{metric},{filter_name}"


@contextlib.contextmanager
def replaced(path: Path):
    """A file to write, which takes the place of `path` at the end, whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        yield file
    unfinished.replace(path)


def read_lines(path: Path) -> list[dict]:
    """The JSON lines of a file, if there is one; a last line that was cut short is left out."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def answers_of(line: dict) -> Iterator[tuple[str, Answer]]:
    """(request, answer) of each answer that a line of a file of items holds."""
    if "request" in line:
        answer = line["answer"]
        yield line["request"], tuple(answer) if isinstance(answer, list) else answer
    elif "greedy" in line:
        yield from zip(line["requests"], zip(line["loglikelihoods"], line["greedy"]))
    else:
        yield from zip(line["requests"], line.get("texts", line.get("loglikelihoods")))

"""What came out: models side by side, on held-out text, benchmarks, needles, by position and while decoding.

    deltify.evaluate(["runs/kda"], tasks=("hellaswag", "arc_easy"), needles=("niah_single_1",), lengths=(1024, 4096))

Everything goes into one results.json, written anew after each measure, and files of items beside it: what is there is
not asked again. `deltify.report` makes pages of it.

Legend: N tokens, W vocabulary.
"""

import json
import math
import platform
import shlex
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..config import STAGES, Recipe, load_recipe
from ..conversion.teacher import Teacher, load_teacher
from ..data.batches import Batch, heldout_batches
from ..data.sources import PYTHON_DOCS, documents
from ..data.token_files import TokenFile, file_name, open_data
from ..training.metrics import read_stages
from ..training.run_folder import check_weights
from ..training.steps import hidden_states, next_tokens
from ..training.teachers import open_teacher
from ..utils.console import log
from ..utils.devices import pick_device
from ..utils.files import write_text
from ..utils.fingerprint import fingerprint
from ..utils.folders import model_folder
from ..utils.tokens import token_ids
from .benchmarks import paired, read_items, run_benchmarks
from .needles import NeedleMaker, ask_needles, summarise
from .positions import by_position, controls, decode_cost, device_name

PROMPTS = ("The capital of France is", "To open a file in Python, you", "Once upon a time, there was a")
CHUNK = 256  # tokens whose logits exist at a time
COUNTED = 10_000_000  # tokens of each source that the n-gram models are counted on
# the figure that stands for a task, where it has several: lm-eval's papers' choice
MAIN_METRICS = ("acc_norm", "acc", "exact_match,flexible-extract", "acc_generated")
ACC_TASKS = ("arc_easy", "mmlu", "piqa")


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


def evaluate(
    sources: list[str],
    *,
    output: Path | None = None,
    teacher: str | None = None,
    heldout: str | None = None,
    tasks: tuple[str, ...] = (),
    limit: int | None = None,
    data: Path | None = None,
    needles: tuple[str, ...] = (),
    lengths: tuple[int, ...] = (1024, 4096),
    needle_samples: int = 16,
    haystack: str = PYTHON_DOCS,
    books: str | None = None,
    book_tokens: int = 8192,
    book_count: int = 4,
    contexts: tuple[int, ...] = (),
    with_controls: bool = True,
    with_stages: bool = True,
    samples: bool = True,
    device: str = "auto",
    dtype: str = "auto",
) -> Path:
    """Measures a teacher, its students and their controls side by side; returns the path of results.json.

    Args:
        sources: runs (folders with a recipe), or models (folders or hub ids). Of one run, every stage is scored on
            held-out text; of several, and for all that costs more, the last stage alone, under the run's name.
        output: folder to write to; the run's own, if there is one run and nothing else.
        teacher: what the models are compared with: hub id, folder or GGUF file; a run's own if absent.
        heldout: text in place of the first run's own held-out text, as data.heldout of recipes.
        tasks, limit, data: benchmarks, see `benchmarks.run_benchmarks`.
        needles, lengths, needle_samples, haystack: see `needle.ask_needles`.
        books, book_tokens, book_count: text for curves by position (see `data.documents`), and how much of it.
        contexts: tokens read before decoding is timed.
        with_controls: measure the teacher with a sliding window and the last student with its state zeroed, too.
        with_stages: score one run as if it were one of several, so that `report` can put it beside others.
        samples: greedy continuations of a few prompts.
        dtype: float32, bfloat16, float16, or auto: float32 on a CPU, bfloat16 on a GPU.

    Raises:
        ValueError: for sources that do not fit together, or a measure's bad argument; names what is allowed.
    """
    runs = {path: load_recipe(Path(path) / "recipe.yaml") for path in sources if (Path(path) / "recipe.yaml").is_file()}
    if output is None and (len(runs) != 1 or len(sources) > 1):
        raise ValueError(f"{len(sources)} sources; say with --output where the results should go")
    place = pick_device(device)
    number = pick_dtype(dtype, place)
    folder = Path(output) if output else Path(sources[0])
    folder.mkdir(parents=True, exist_ok=True)
    reference = open_reference(teacher, list(runs.values()), place, number)
    results = Results(folder / "results.json", reference, runs, place, number)

    stages = open_models(sources, runs, place, number, whole=with_stages and len(sources) == 1)
    students = {name: model for name, (model, final) in stages.items() if final}
    everyone: dict[str, PreTrainedModel] = {} if reference is None else {"teacher": reference.model}
    if reference is not None:
        if runs:
            results.add(
                **heldout_scores(reference, runs, heldout, {name: model for name, (model, _) in stages.items()})
            )
        if with_controls:
            last = list(students)[-1]
            everyone |= {name.replace("student", last): m for name, m in controls(reference, students[last]).items()}
    everyone |= students
    results.add(students=[describe(name, model, results.content) for name, model in students.items()])
    tokenizer = reference.tokenizer if reference else AutoTokenizer.from_pretrained(model_folder(sources[0]))
    no_controls = {name: model for name, model in everyone.items() if name == "teacher" or name in students}
    if samples:
        results.add(samples={name: sample(tokenizer, model) for name, model in no_controls.items()})
    if tasks:
        rows = []
        for name, model in everyone.items():
            items = folder / "items" / file_name(name)
            to_log = lambda line, name=name: log(f"{name}: {line}")  # noqa: E731
            new = run_benchmarks(model, tokenizer, tasks, items_folder=items, data=data, limit=limit, log=to_log)
            rows += [{"model": name, **row} for row in new]
            results.add(benchmarks=rows)
        results.add(benchmarks=compare(rows, folder / "items"))
    if needles:
        make, rows = NeedleMaker(tokenizer, haystack), []
        for name, model in everyone.items():
            asked = {"tasks": needles, "lengths": lengths, "samples": needle_samples, "report": log}
            rows += ask_needles(model, make, folder / "needles.jsonl", name=name, **asked)
            results.add(needles=summarise(rows), needle_rows=rows)
    if books and reference is not None:
        rest = {name: model for name, model in everyone.items() if name != "teacher"}
        results.add(
            positions=by_position(
                rest, reference.model, open_books(books, book_count, tokenizer), max_tokens=book_tokens, report=log
            )
        )
    if contexts:
        results.add(decode=decode_cost(no_controls, contexts, report=log))
    return results.path


def describe(name: str, model: PreTrainedModel, measured: dict) -> dict:
    """What a student is, for the head of its report."""
    words = {"linear_attention": "KDA", "full_attention": "full attention", "sliding_attention": "sliding attention"}
    counts = Counter(getattr(model.config, "layer_types", None) or ())
    tokens = {score["name"]: score["tokens"] for score in measured.get("scores", [])}
    return {
        "name": name,
        "layers": ", ".join(f"{count} layers of {words.get(kind, kind)}" for kind, count in counts.items()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": tokens.get(name, 0),
    }


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    known["auto"] = torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in known:
        raise ValueError(f"--dtype {name!r} is unknown; choose one of {sorted(known)}")
    return known[name]


class Results:
    """results.json: what was measured so far and how, whole at any time."""

    def __init__(self, path: Path, teacher: Teacher | None, runs: dict[str, Recipe], device, dtype: torch.dtype):
        self.path, self.started = path, time.time()
        trained = [
            recipe.stage(s).sequence_length for recipe in runs.values() for s in STAGES if recipe.stage(s).tokens
        ]
        self.content: dict = {
            "teacher": next((r.teacher.model for r in runs.values()), None) or (teacher and teacher.model.name_or_path),
            "runs": list(runs),
            "trained_length": max(trained, default=None),
            "device": device_name(device),
            "dtype": str(dtype).removeprefix("torch."),
            "versions": versions(),
            "command": command_line(),
            "date": time.strftime("%Y-%m-%d"),
        }

    def add(self, **measured) -> None:
        self.content |= measured
        self.content["seconds"] = round(time.time() - self.started, 1)
        write_text(self.path, json.dumps(self.content, indent=1))


def command_line() -> str:
    """What was typed; a script that calls `evaluate` is named itself."""
    script = Path(sys.argv[0]).name
    program = ["deltify"] if script in ("deltify", "cli.py") else ["python", script]
    return shlex.join([*program, *sys.argv[1:]])


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("deltify", "torch", "transformers", "lm_eval"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def open_reference(source: str | None, recipes: list[Recipe], device, dtype: torch.dtype) -> Teacher | None:
    """The teacher that was named, or the runs' own, which must be the same.

    Raises:
        ValueError: if the runs have different teachers, or their teacher's weights changed since.
    """
    if source is not None:
        return load_teacher(source, dtype=dtype, device=device)
    if len(names := {recipe.teacher.model for recipe in recipes}) > 1:
        raise ValueError(f"the runs have different teachers, {', '.join(sorted(names))}; evaluate them apart")
    if not recipes:
        return None
    teacher = open_teacher(recipes[0], device, dtype)
    if dtype != torch.float16:  # which has another fingerprint
        weights = fingerprint(teacher.model)
        for recipe in recipes:
            check_weights(recipe, weights, f"the teacher {recipe.teacher.model}")
    return teacher


def open_models(
    sources: list[str], runs: dict[str, Recipe], device, dtype, whole: bool
) -> dict[str, tuple[PreTrainedModel, bool]]:
    """Students by name, and whether each is a run's last stage, or a model of its own; with `whole`, a run's stages."""
    found: dict[str, tuple[PreTrainedModel, bool]] = {}
    for source in sources:
        folders = {Path(source).name: model_folder(source)}
        if source in runs:
            last = model_folder(source)
            names = [n for n in ("converted", *STAGES) if (Path(source) / n / "config.json").is_file()]
            folders = {n: str(Path(source) / n) for n in names} if whole else {Path(source).name: last}
        for name, folder in folders.items():
            if name in found or name == "teacher":
                raise ValueError(f"two models would be called {name!r}; rename the folder {source}")
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
            found[name] = model, name == list(folders)[-1]
    return found


def open_books(source: str, count: int, tokenizer) -> list[list[int]]:
    """Token ids of the longest of a source's first documents."""
    texts = sorted((text for _, text in zip(range(20 * count), documents(source))), key=len, reverse=True)
    return [token_ids(tokenizer, text) for text in texts[:count]]


def heldout_scores(
    teacher: Teacher, runs: dict[str, Recipe], heldout: str | None, models: dict[str, PreTrainedModel]
) -> dict:
    """Perplexity and agreement on held-out text, by default the first run's, with n-gram models beside."""
    recipe = next(iter(runs.values()))
    text = recipe.data if heldout is None else replace(recipe.data, heldout=heldout)
    train, held = open_data(
        text, recipe.teacher.model, teacher.tokenizer, recipe.run.heldout_tokens, recipe.run.heldout_sequence_length
    )
    batches = heldout_batches(held, recipe.run.heldout_sequence_length, 8, recipe.run.heldout_tokens)
    perplexity, _, _ = agreement(teacher.model, teacher.model, batches)
    scores = [Score("teacher", perplexity, 0.0, 1.0), *count_models(train, batches, teacher.config.vocab_size)]
    trained = trained_tokens(recipe) | {Path(path).name: trained_tokens(run)["extend"] for path, run in runs.items()}
    scores += [Score(name, *agreement(teacher.model, m, batches), trained.get(name, 0)) for name, m in models.items()]
    return {
        "heldout_tokens": sum(batch.input_ids.numel() for batch in batches),
        "heldout_sequence_length": batches[0].input_ids.shape[1],
        "scores": [asdict(score) for score in scores],
    }


def compare(rows: list[dict], items: Path) -> list[dict]:
    """The rows with each model's ratio to the teacher, plain and above chance, and their 95% intervals, paired."""
    if not any(row["model"] == "teacher" for row in rows):
        return rows
    main = {task: main_metric(rows, task) for task in dict.fromkeys(row["task"] for row in rows)}
    teachers = {task: items_of(items / "teacher", task) for task in main}
    compared = []
    for row in rows:
        row = dict(row, main=row["metric"] == main[row["task"]])
        if row["model"] != "teacher" and row["main"]:
            mine, theirs = items_of(items / file_name(row["model"]), row["task"]), teachers[row["task"]]
            row["ratio"] = paired(mine, theirs, row["metric"])
            row["ratio_above_chance"] = paired(mine, theirs, row["metric"], above_chance=True)
        compared.append(row)
    return compared


def items_of(folder: Path, task: str) -> list[dict]:
    """The items of a task, which may be one of several in a file."""
    path = folder / f"{task}.jsonl"
    if path.is_file():
        return read_items(path)
    return [item for path in sorted(folder.glob("*.jsonl")) for item in read_items(path) if item["task"] == task]


def main_metric(rows: list[dict], task: str) -> str:
    """The metric that stands for a task: acc_norm, but acc where its papers report that."""
    there = [row["metric"] for row in rows if row["task"] == task]
    wanted = ("acc", *MAIN_METRICS) if task.split("@")[0].startswith(ACC_TASKS) else MAIN_METRICS
    return next((metric for metric in wanted if metric in there), there[0])


def trained_tokens(recipe: Recipe) -> dict[str, int]:
    """Tokens that each stage's model has seen, earlier stages included, and the run's that it started from."""
    before, seen = Path(recipe.student.init).expanduser() / "recipe.yaml", {}
    begun = total = trained_tokens(load_recipe(before))["extend"] if before.is_file() else 0
    last = {name: records[-1]["tokens"] for name, records in read_stages(recipe.folder)}
    for name in STAGES:
        total = begun + last[name] if name in last else total
        seen[name] = total
    return seen


@torch.no_grad()
def sample(tokenizer, model: nn.Module, tokens: int = 32) -> list[str]:
    """Greedy continuations of a few fixed prompts."""
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([token_ids(tokenizer, prompt)], device=model.device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        texts.append(str(tokenizer.decode(out[0], skip_special_tokens=True)))
    return texts

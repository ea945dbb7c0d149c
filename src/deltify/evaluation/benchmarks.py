"""Benchmarks through lm-eval: rows of scores, and the items behind them on file.

rows = run_benchmarks(model, tokenizer, ["hellaswag", "mmlu@5"], items_folder=Path("runs/x/items/match"))
rows += run_benchmarks(model, tokenizer, ["mmlu_rotated"], ...)  # by generation, options in every order
paired(read_items(ours), read_items(teachers), "acc_norm")  # ratio, low, high
"""

import contextlib
import io
import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from .lm_eval_tasks import LETTERS, ROTATED, Benchmark, load_benchmark, parse_letter

TASKS = ("mmlu", "mmlu_continuation", "arc_challenge", "arc_easy", "hellaswag", "piqa", "gsm8k")
SEED = 1234  # lm-eval's own, so that few-shot examples are those of its command line


def run_benchmarks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = TASKS,
    *,
    items_folder: Path,
    data: Path | None = None,
    limit: int | Mapping[str, int] | None = None,
    seed: int = SEED,
    fast: bool = True,
    batch_size: int | None = None,
    max_length: int | None = None,
    log: Callable[[str], None] = print,
) -> list[dict]:
    """Scores a model: one row per task and metric.

    A row is {"task", "metric", "value", "stderr" (None where lm-eval has none), "items", "chance" (None where there is
    no choice), "tokens_read", "tokens_whole" (read for answers that were not on file, and what HFLM would have read;
    None if HFLM itself runs the model)}. `items_folder`, one per model, gets a file TASK.jsonl of items and, after each
    task, rows.json. Answers that are on file there are not asked again, unless the model has changed.

    Args:
        tasks: names of lm-eval's tasks, groups or tags, or of `ROTATED`; "mmlu@5" for another number of examples than
            the task's own.
        data: folder of JSON lines in place of the hub.
        limit: items of each task; a mapping limits the tasks that it names.
        seed: of the examples' choice.
        fast: read shared beginnings once, where all layers are KDA.
        batch_size, max_length: as in `lm_for`.

    Raises:
        ValueError, OSError: as `load_benchmark`, before anything runs.
    """
    from .lm_eval_model import lm_for

    limits = dict(limit) if isinstance(limit, Mapping) else dict.fromkeys(tasks, limit)
    if unknown := [name for name in limits if name not in tasks]:
        raise ValueError(f"limit names {unknown}, which are not among the tasks {list(tasks)}")
    for name, items in limits.items():
        if items is not None and items < 1:
            raise ValueError(f"limit={items} for {name}; give 1 or more items, or none for all")
    benchmarks = [load_benchmark(name, data=data, limit=limits.get(name)) for name in dict.fromkeys(tasks)]
    lm = lm_for(model, tokenizer, fast=fast, batch_size=batch_size, max_length=max_length)
    items_folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for benchmark in benchmarks:
        started = time.perf_counter()
        new = run_benchmark(lm, benchmark, items_folder, seed)
        rows += new
        (items_folder / "rows.json").write_text(json.dumps(rows, indent=1))
        scores = ", ".join(f"{row['metric']} {row['value']:.4f}" for row in new)
        log(f"{benchmark.name}: {scores}; {new[0]['items']} items, {time.perf_counter() - started:.1f} s")
    return rows


def run_benchmark(lm, benchmark: Benchmark, items_folder: Path, seed: int = SEED) -> list[dict]:
    """The rows of one benchmark for a model of `lm_for`; its items go to a file."""
    from lm_eval.evaluator import evaluate

    from .lm_eval_cache import Recorder
    from .lm_eval_model import ConstantStateLM

    set_seed(seed)
    for task in benchmark.tasks.values():
        task.set_fewshot_seed(seed)
    counted = isinstance(lm, ConstantStateLM)
    if counted:
        lm.tokens_read = lm.tokens_whole = 0
    recorder = Recorder(lm, benchmark.tasks, items_folder / f"{benchmark.name}.jsonl")
    with recorder.on_first_request as building:  # lm-eval shows a bar for each task whose requests it builds
        building.enter_context(contextlib.redirect_stderr(io.StringIO()))
        loaded = {"tasks": benchmark.tasks, "groups": benchmark.groups}
        results = evaluate(recorder, loaded, samples=benchmark.samples, bootstrap_iters=1000, log_samples=False)
    items = recorder.finish()
    rows = letter_bias(items) if benchmark.base in ROTATED else score_rows(benchmark, results["results"], items)
    tokens = (lm.tokens_read, lm.tokens_whole) if counted else (None, None)
    return [
        {**row, "task": row.get("task", benchmark.name), "tokens_read": tokens[0], "tokens_whole": tokens[1]}
        for row in rows
    ]


def score_rows(benchmark: Benchmark, results: Mapping[str, Mapping], items: list[dict]) -> list[dict]:
    """lm-eval's figures as rows: of the group where it has any of its own, else of each task."""
    from .lm_eval_cache import metric_name

    whole = any("," in key for key in results.get(benchmark.base, ()))
    rows = []
    for name in [benchmark.base] if whole else benchmark.tasks:
        own = items if whole else [item for item in items if item["task"] == name]
        for key, value in results[name].items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr"):
                continue
            error = results[name][f"{metric}_stderr,{filter_name}"]
            metric = metric_name(metric, filter_name)
            scores = [item["scores"][metric] for item in own]
            if name in benchmark.groups and np.ndim(scores) == 1:  # lm-eval gives up where a task has a single item
                error = standard_error(scores)
            row = {"task": benchmark.name if whole else name, "metric": metric, "value": float(value)}
            row |= {"stderr": float(error) if isinstance(error, float) else None, "items": results[name]["sample_len"]}
            rows.append(row | {"chance": mean_guess(own) if metric.startswith("acc") else None})
    return rows


def read_items(path: Path) -> list[dict]:
    """The items in a file of `run_benchmarks`; those that are there so far, if the task was interrupted."""
    if not path.is_file():
        raise FileNotFoundError(f"there are no items {path}; run the benchmark first")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    return [line for line in lines if "scores" in line]


def standard_error(scores: Sequence[float]) -> float | None:
    """Of the mean of a sample."""
    return float(np.std(scores, ddof=1) / len(scores) ** 0.5) if len(scores) > 1 else None


def guess(item: dict) -> float | None:
    """The accuracy of guessing; None where there is no choice."""
    choices = item.get("choices") or len(item.get("lengths", ()))
    return 1 / choices if choices else None


def mean_guess(items: list[dict]) -> float | None:
    guesses = [guess(item) for item in items]
    return float(np.mean(guesses)) if guesses and None not in guesses else None


def letter_bias(items: list[dict]) -> list[dict]:
    """Rows on what letters do to the answers, from the items of a rotated task; standard errors are over questions.

    acc_generated: right in the original order. acc_rotated: mean over all orders. share_A, ...: of the answers in all
    orders, where each option stands once at each letter; share_none: answers that name no letter. same_content: of the
    answers in another order, those that choose what was chosen in the original one. A model that always says "A" has
    acc_rotated at chance, share_A 1 and same_content 0.
    """
    questions: dict[tuple[str, int], list[dict]] = defaultdict(list)
    for item in items:
        questions[item["task"], item["item"]].append(item)
    whole = [asked for asked in questions.values() if len(asked) == asked[0]["choices"]]
    if not whole:
        raise ValueError(f"none of {len(questions)} questions was asked in all orders; run the task to its end")
    letters = LETTERS[: max(len(asked) for asked in whole)]
    values: dict[str, list[float]] = defaultdict(list)
    chances: dict[str, list[float]] = defaultdict(list)
    for asked in whole:
        asked.sort(key=lambda item: item["rotation"])
        n = len(asked)
        said = [parse_letter(item["texts"][0], n) for item in asked]
        content = [None if letter is None else (LETTERS.index(letter) + r) % n for r, letter in enumerate(said)]
        right = [letter == item["gold"] for letter, item in zip(said, asked)]
        row = {"acc_generated": float(right[0]), "acc_rotated": float(np.mean(right))}
        row |= {f"share_{letter}": said.count(letter) / n for letter in letters} | {"share_none": said.count(None) / n}
        row["same_content"] = float(np.mean([c is not None and c == content[0] for c in content[1:]]))
        for metric, value in row.items():
            values[metric].append(value)
            impossible = metric.startswith("share_") and metric[-1] not in LETTERS[:n]
            chances[metric].append(0.0 if impossible else 1 / n)
    return [
        {
            "metric": metric,
            "value": float(np.mean(scores)),
            "stderr": standard_error(scores),
            "items": len(scores),
            "chance": None if metric == "share_none" else float(np.mean(chances[metric])),
        }
        for metric, scores in values.items()
    ]


def paired(
    items: list[dict],
    teacher: list[dict],
    metric: str = "acc",
    *,
    above_chance: bool = False,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float] | None:
    """(ratio, low, high): a model's mean score over the teacher's on the same items, with a 95% interval.

    The interval is of a paired bootstrap over items (over questions, where each is asked in several orders). With
    `above_chance` the ratio is (score - chance) / (teacher - chance). None where what the teacher has to divide by is
    not above zero with 97.5% confidence: then no ratio means anything.

    Args:
        metric: one that items have scores of; of rotated tasks, acc_generated or acc_rotated.

    Raises:
        ValueError: if the two were not scored on the same documents, or not by this metric.
    """
    if metric == "acc_generated":
        items, teacher = ([item for item in side if item["rotation"] == 0] for side in (items, teacher))
        metric = "acc_rotated"
    ours, theirs = ({(item["task"], item["doc"], item["hash"]): item for item in side} for side in (items, teacher))
    if ours.keys() != theirs.keys() or not ours:
        raise ValueError(
            f"{len(ours.keys() & theirs.keys())} documents are the same, of {len(ours)} and {len(theirs)}; "
            "score both models on the same tasks, data and limit"
        )
    if known := [item["scores"].keys() for item in (*items, *teacher) if metric not in item["scores"]]:
        raise ValueError(f"items have no score {metric!r}; they have {sorted(known[0])}")
    questions: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for key, item in ours.items():
        floor = (guess(item) or 0.0) if above_chance else 0.0
        scores = (item["scores"][metric] - floor, theirs[key]["scores"][metric] - floor)
        questions[item["task"], item.get("item", item["doc"])].append(scores)
    pairs = np.array([np.mean(scores, axis=0) for scores in questions.values()])
    generator, means = np.random.default_rng(seed), []
    for start in range(0, draws, 100):
        counts = generator.multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), min(100, draws - start))
        means.append(counts @ pairs)
    ours_drawn, theirs_drawn = np.concatenate(means).T
    if np.quantile(theirs_drawn, 0.025) <= 0:
        return None
    possible = theirs_drawn > 0
    low, high = np.quantile(ours_drawn[possible] / theirs_drawn[possible], [0.025, 0.975])
    return float(pairs[:, 0].mean() / pairs[:, 1].mean()), float(low), float(high)

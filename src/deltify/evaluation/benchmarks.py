"""Benchmarks through lm-eval: rows of scores, and files with the items that they come from.

rows = run_benchmarks(model, tokenizer, ["hellaswag", "mmlu@5"], items_folder=Path("runs/x/items/match"))
rows += run_benchmarks(model, tokenizer, ["mmlu_rotated"], ...)  # generates letters, options in every order
paired(read_items(student), read_items(teacher), "acc_norm")  # ratio, low, high
"""

import contextlib
import io
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.token_files import file_name
from ..training.distributed import all_gather, rank
from ..utils.files import read_jsonl
from .lm_eval_tasks import LETTERS, ROTATED, Benchmark, load_benchmark, parse_letter

TASKS = ("mmlu", "mmlu_continuation", "arc_challenge", "arc_easy", "hellaswag", "piqa", "gsm8k")
SEED = 1234  # the seed of lm-eval's command line, which decides the few-shot examples
# the metric that stands for a task with several, in order of preference
MAIN_METRICS = ("acc_norm", "acc", "exact_match,flexible-extract", "acc_generated")
ACC_TASKS = ("arc_easy", "mmlu", "piqa")  # tasks whose papers report acc


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
    """Run benchmarks on a model and return a row for each task and metric.

    Args:
        model: Model to score.
        tokenizer: Tokenizer of the model.
        tasks: Names of lm-eval's tasks, groups or tags, or of `ROTATED`. "mmlu@5" sets the number of examples.
        items_folder: Folder of this model for TASK.jsonl with the items and, after each task, rows.json. Answers that
            it has already are reused, unless the model changed.
        data: Folder with the tasks' data as JSON lines. Defaults to the Hugging Face hub.
        limit: Number of items of each task. A mapping limits the tasks that it names.
        seed: Random seed for the choice of examples.
        fast: Whether to read shared prefixes once, if all layers are KDA.
        batch_size: Sequences per batch, as in `lm_for`.
        max_length: Largest number of tokens of a request, as in `lm_for`.
        log: Function that is called with a line for each task.

    Returns:
        Rows with task, metric, value, stderr (None where lm-eval has none), items, chance (None where there is no
        choice, or where answers are not just right or wrong), fraction (whether the scores of items are from 0 to 1,
        and higher is better), by_task (whether a group's value is the mean over its tasks, not over its items), file
        (name of the file of items), tokens_read (for new answers) and tokens_whole (what HFLM would have read). The
        last two are None if HFLM runs the model.

    Raises:
        ValueError: If a task or limit is unknown or wrong. Nothing has run then.
        OSError: If the data of a task is missing. Nothing has run then.
    """
    from .lm_eval_model import lm_for

    limits = dict(limit) if isinstance(limit, Mapping) else dict.fromkeys(tasks, limit)
    if unknown := [name for name in limits if name not in tasks]:
        raise ValueError(f"limit names {unknown}, which are not among the tasks {list(tasks)}.")
    for name, items in limits.items():
        if items is not None and items < 1:
            raise ValueError(f"limit={items} for {name} must be 1 or more items. Without a limit, all items are used.")
    benchmarks = [load_benchmark(name, data=data, limit=limits.get(name)) for name in dict.fromkeys(tasks)]
    lm = lm_for(model, tokenizer, fast=fast, batch_size=batch_size, max_length=max_length)
    items_folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for benchmark in benchmarks:
        started = time.perf_counter()
        new = run_benchmark(lm, benchmark, items_folder, seed)
        known = {(row["task"], row["metric"]) for row in rows}  # a task can be named, and be in a tag, too
        rows += [row for row in new if (row["task"], row["metric"]) not in known]
        if rank() == 0:
            (items_folder / "rows.json").write_text(json.dumps(rows, indent=1))
        scores = ", ".join(f"{row['metric']} {row['value']:.4f}" for row in new)
        log(f"{benchmark.name}: {scores}; {new[0]['items']} items, {time.perf_counter() - started:.1f} s")
    return rows


def run_benchmark(lm, benchmark: Benchmark, items_folder: Path, seed: int = SEED) -> list[dict]:
    """Run one benchmark on a model of `lm_for`, write its items, and return its rows."""
    from lm_eval.evaluator import evaluate
    from transformers import set_seed  # imports peft and bitsandbytes, which takes a second

    from .lm_eval_cache import CachedLM
    from .lm_eval_model import ConstantStateLM

    set_seed(seed)
    for task in benchmark.tasks.values():
        task.set_fewshot_seed(seed)
    counted = isinstance(lm, ConstantStateLM)
    if counted:
        lm.tokens_read = lm.tokens_whole = 0
    cached = CachedLM(lm, benchmark.tasks, items_folder / f"{benchmark.name}.jsonl")
    with cached.on_first_request as building:  # hides lm-eval's progress bar for each task whose requests it builds
        building.enter_context(contextlib.redirect_stderr(io.StringIO()))
        loaded = {"tasks": benchmark.tasks, "groups": benchmark.groups}
        results = evaluate(cached, loaded, samples=benchmark.samples, bootstrap_iters=1000, log_samples=False)
    items = cached.finish()
    rows = letter_bias(items) if benchmark.base in ROTATED else score_rows(benchmark, results, items)
    counts = all_gather((lm.tokens_read, lm.tokens_whole) if counted else (0, 0))
    tokens = tuple(map(sum, zip(*counts))) if counted else (None, None)
    return [
        {"task": benchmark.name, **row, "file": benchmark.name, "tokens_read": tokens[0], "tokens_whole": tokens[1]}
        for row in rows
    ]


def score_rows(benchmark: Benchmark, evaluated: Mapping[str, Mapping], items: list[dict]) -> list[dict]:
    """Return lm-eval's results as rows: those of the group if it has its own, else those of each task."""
    from .lm_eval_cache import metric_name

    results, better_high = evaluated["results"], evaluated.get("higher_is_better", {})
    is_group = any("," in key for key in results.get(benchmark.base, ()))
    suffix = benchmark.name.removeprefix(benchmark.base)  # @SHOTS
    rows = []
    for name in [benchmark.base] if is_group else benchmark.tasks:
        own = items if is_group else [item for item in items if item["task"] == name]
        for key, value in results[name].items():
            kind, _, filter_name = key.partition(",")
            if not filter_name or kind.endswith("_stderr"):
                continue
            error = results[name][f"{kind}_stderr,{filter_name}"]
            metric = metric_name(kind, filter_name)
            scores = [item["scores"][metric] for item in own if metric in item["scores"]]  # subtasks may have others
            if name in benchmark.groups and np.ndim(scores) == 1:  # lm-eval has none where a task has a single item
                error = standard_error(scores)
            row = {"task": name + suffix, "metric": metric, "value": float(value)}
            row |= {"stderr": float(error) if isinstance(error, float) else None, "items": results[name]["sample_len"]}
            graded = np.isin(scores, (0, 1)).all()  # right or wrong, unlike truthfulqa_mc2, which shares out one point
            row["chance"] = mean_chance(own) if metric.startswith("acc") and graded else None
            row["fraction"] = are_fractions(scores) and better_high.get(name, {}).get(kind) is not False
            rows.append(row | {"by_task": is_group and averages_tasks(benchmark, kind)})
    return rows


def are_fractions(scores: Sequence) -> bool:
    """Return whether scores of items are numbers from 0 to 1, unlike perplexities."""
    return bool(scores) and all(isinstance(x, int | float) and 0 <= x <= 1 for x in scores)


def averages_tasks(benchmark: Benchmark, metric: str) -> bool:
    """Return whether a group's score is the mean of its tasks' scores, and not of its items'."""
    group = benchmark.groups.get(benchmark.base)
    means = () if group is None else group.aggregate_metric_list or ()
    return any(mean.metric == metric and not mean.weight_by_size for mean in means)


def read_items(path: Path) -> list[dict]:
    """Return the items in a file of `run_benchmarks`. An interrupted task has only some of them.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There are no items {path}. Run the benchmark first.")
    return [line for line in read_jsonl(path) if "scores" in line]


def standard_error(scores: Sequence[float]) -> float | None:
    """Return the standard error of the mean, or None for a single score."""
    return float(np.std(scores, ddof=1) / len(scores) ** 0.5) if len(scores) > 1 else None


def chance(item: dict) -> float | None:
    """Return the accuracy of random answers, or None where there is no choice."""
    choices = item.get("choices") or len(item.get("lengths", ()))
    return 1 / choices if choices else None


def mean_chance(items: list[dict]) -> float | None:
    """Return the mean accuracy of random answers, or None where an item has no choice."""
    chances = [known for item in items if (known := chance(item)) is not None]
    return float(np.mean(chances)) if chances and len(chances) == len(items) else None


def letter_bias(items: list[dict]) -> list[dict]:
    """Return rows on how answers depend on letters, from the items of a rotated task.

    A model that always answers "A" has acc_rotated at chance, share_A 1 and same_content 0. The metrics are:

    - acc_generated: Accuracy with the options in their original order.
    - acc_rotated: Mean accuracy over all orders, in which each option has each letter once.
    - share_A and so on: Fraction of answers with this letter, over all orders. share_none: Answers without a letter.
    - same_content: Fraction of answers in another order that choose the same option as in the original order.

    Standard errors are over questions.

    Raises:
        ValueError: If no question has answers in all orders.
    """
    questions: dict[tuple[str, int], list[dict]] = defaultdict(list)
    for item in items:
        questions[item["task"], item["item"]].append(item)
    complete = [orders for orders in questions.values() if len(orders) == orders[0]["choices"]]
    if not complete:
        raise ValueError(f"None of {len(questions)} questions has answers in all orders. Run the task to its end.")
    letters = LETTERS[: max(len(orders) for orders in complete)]
    values: dict[str, list[float]] = defaultdict(list)
    chances: dict[str, list[float]] = defaultdict(list)
    for orders in complete:
        orders.sort(key=lambda item: item["rotation"])
        n = len(orders)
        answers = [parse_letter(item["texts"][0], n) for item in orders]
        content = [None if letter is None else (LETTERS.index(letter) + r) % n for r, letter in enumerate(answers)]
        right = [letter == item["gold"] for letter, item in zip(answers, orders)]
        row = {"acc_generated": float(right[0]), "acc_rotated": float(np.mean(right))}
        row |= {f"share_{letter}": answers.count(letter) / n for letter in letters}
        row["share_none"] = answers.count(None) / n
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
    by_task: bool = False,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float] | None:
    """Return the ratio of a model's mean score to the teacher's, and its 95% interval, as (ratio, low, high).

    The interval comes from a paired bootstrap over items, or over questions if each has several orders. The ratio has
    no meaning, and None is returned, if the denominator is not above zero with 97.5% confidence.

    Args:
        items: Items of the model.
        teacher: Items of the teacher on the same documents.
        metric: Metric that the items have scores of. Rotated tasks have acc_generated and acc_rotated.
        above_chance: Whether the ratio is (score - chance) / (teacher - chance).
        by_task: Whether each score is the mean over tasks. Otherwise it is the mean over items.
        draws: Number of bootstrap samples.
        seed: Random seed of the bootstrap.

    Raises:
        ValueError: If the two have different documents, or lack the metric.
    """
    if metric == "acc_generated":
        items, teacher = ([item for item in side if item["rotation"] == 0] for side in (items, teacher))
        metric = "acc_rotated"
    ours, theirs = ({(item["task"], item["doc"], item["hash"]): item for item in side} for side in (items, teacher))
    if ours.keys() != theirs.keys() or not ours:
        raise ValueError(
            f"{len(ours.keys() & theirs.keys())} documents are the same, of {len(ours)} and {len(theirs)}. "
            "Score both models on the same tasks, data and limit."
        )
    if lacking := [item["scores"].keys() for item in (*items, *teacher) if metric not in item["scores"]]:
        raise ValueError(f"Items have no score {metric!r}. They have {sorted(lacking[0])}.")
    questions: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for key, item in ours.items():
        subtracted = (chance(item) or 0.0) if above_chance else 0.0
        scores = (item["scores"][metric] - subtracted, theirs[key]["scores"][metric] - subtracted)
        questions[item["task"], item.get("item", item["doc"])].append(scores)
    pairs = np.array([np.mean(scores, axis=0) for scores in questions.values()])
    if by_task:
        sizes = Counter(task for task, _ in questions)
        pairs *= np.array([[len(pairs) / sizes[task] / len(sizes)] for task, _ in questions])
    generator, means = np.random.default_rng(seed), []
    for start in range(0, draws, 100):
        counts = generator.multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), min(100, draws - start))
        means.append(counts @ pairs)
    ours_drawn, theirs_drawn = np.concatenate(means).T
    if np.quantile(theirs_drawn, 0.025) <= 0:
        return None
    positive = theirs_drawn > 0
    low, high = np.quantile(ours_drawn[positive] / theirs_drawn[positive], [0.025, 0.975])
    return float(pairs[:, 0].mean() / pairs[:, 1].mean()), float(low), float(high)


# ---- comparison with the teacher -------------------------------------------------------------------------------------


def compare_with_teacher(rows: list[dict], items: Path) -> list[dict]:
    """Return the rows with the ratio of each model's score to the teacher's, plain and above chance.

    Args:
        rows: Rows of `run_benchmarks` with the name of their model.
        items: Folder with a folder of items for each model.
    """
    if not any(row["model"] == "teacher" for row in rows):
        return rows
    main = {task: main_metric(rows, task) for task in dict.fromkeys(row["task"] for row in rows)}
    compared = []
    for row in rows:
        row = dict(row, main=row["metric"] == main[row["task"]])
        if row["model"] != "teacher" and row["main"] and row.get("fraction", True):
            ours, theirs = (items_of(items / file_name(name), row) for name in (row["model"], "teacher"))
            options = {"metric": row["metric"], "by_task": row.get("by_task", False)}
            row["ratio"] = paired(ours, theirs, **options)
            above = row["chance"] is not None
            row["ratio_above_chance"] = paired(ours, theirs, above_chance=True, **options) if above else row["ratio"]
        compared.append(row)
    return compared


def items_of(folder: Path, row: dict) -> list[dict]:
    """Return the items of a row's task. Their file may have those of other tasks, too."""
    items = read_items(folder / f"{row['file']}.jsonl")
    own = items if row["task"] == row["file"] else [i for i in items if i["task"] == row["task"].partition("@")[0]]
    return [item for item in own if row["metric"] in item["scores"] or "rotation" in item]


def main_metric(rows: list[dict], task: str) -> str:
    """Return the metric that stands for a task: acc_norm if it has it, but acc for `ACC_TASKS`."""
    measured = [row["metric"] for row in rows if row["task"] == task]
    preferred = ("acc", *MAIN_METRICS) if task.split("@")[0].startswith(ACC_TASKS) else MAIN_METRICS
    return next((metric for metric in preferred if metric in measured), measured[0])

"""Tasks of lm-eval by name, with data from the hub or a folder, and multiple choice with options in every order.

lm-eval is imported inside functions, so that results can be read without it.
"""

import contextlib
import difflib
import functools
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

ROTATED = {"mmlu_rotated": "mmlu", "arc_challenge_rotated": "arc_challenge", "arc_easy_rotated": "arc_easy"}
LETTERS = "ABCDEFGH"

# names of hub datasets in a folder of data, PREFIX_SPLIT.jsonl; others have the name of their task as the prefix
PREFIXES = {
    ("Rowan/hellaswag", None): "hellaswag",
    ("allenai/ai2_arc", "ARC-Challenge"): "arc_challenge",
    ("allenai/ai2_arc", "ARC-Easy"): "arc_easy",
    ("baber/piqa", None): "piqa",
    ("openai/gsm8k", "main"): "gsm8k",
}
MMLU = "cais/mmlu"  # one file for all subjects, with a column `subject`
SPLIT_FIELDS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark by name, and the tasks that it consists of.

    Args:
        name: Name with @SHOTS, if given.
        tasks: Tasks by name.
        groups: Groups by name: the benchmark, if it is one, and those inside it.
        samples: Documents of each task. None stands for all.
    """

    name: str
    tasks: dict[str, "Task"]
    groups: dict[str, "Group"]
    samples: dict[str, range] | None

    @property
    def base(self) -> str:
        """Return the name without @SHOTS."""
        return self.name.partition("@")[0]


@functools.cache
def task_manager():
    """Return lm-eval's index of tasks, which takes seconds to build."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def check_benchmark(name: str, data: Path | None) -> None:
    """Check the name of a benchmark and the folder of its data, without loading anything.

    The arguments and errors are those of `load_benchmark`.
    """
    base, _, shots = name.partition("@")
    if "@" in name and not shots.isdigit():
        raise ValueError(f"{name!r}: the number of examples after @ must be 0 or more, as in mmlu@5.")
    if data is not None and not data.is_dir():
        raise FileNotFoundError(f"There is no folder {data} with the data of {name}.")
    manager = task_manager()
    if ROTATED.get(base, base) not in manager.task_index:
        near = difflib.get_close_matches(base, [*manager.all_tasks, *ROTATED], 5)
        raise ValueError(f"There is no task {base!r} in lm-eval. Similar names: {', '.join(near) or 'none'}.")


def load_benchmark(name: str, *, data: Path | None = None, limit: int | None = None) -> Benchmark:
    """Load a benchmark with its data.

    Args:
        name: Name of a task, group or tag of lm-eval, or one of `ROTATED`. The suffix @SHOTS sets the number of
            examples.
        data: Folder of JSON lines. Defaults to lm-eval's own sources, mostly the hub.
        limit: Number of items. A group spreads it evenly over its tasks. Defaults to all.

    Raises:
        ValueError: If there is no such benchmark (the message has similar names), or SHOTS is no number.
        FileNotFoundError: If the folder lacks data. The message names the file.
        OSError: If the hub has no data or cannot be reached.
    """
    from .lm_eval_model import quiet

    check_benchmark(name, data)
    base, _, shots = name.partition("@")
    manager = task_manager()
    index, stock = manager.task_index, ROTATED.get(base, base)
    entries = {leaf: index[leaf] for leaf in leaves(index, stock)}
    changed = {}
    for leaf, entry in entries.items():
        config = task_config(entry, data, int(shots) if shots else None)
        changed[leaf] = rotated_config(config) if base in ROTATED else config
    try:
        index.update({leaf: replace(entries[leaf], yaml_path=None, cfg=config) for leaf, config in changed.items()})
        with quiet(), contextlib.redirect_stderr(io.StringIO()):  # hides a progress bar for each split
            loaded = manager.load([*changed] if base in ROTATED else [stock])
    except OSError as error:
        raise OSError(f"{name}: no data ({error}). Without a network, give a folder of JSON lines as data.") from error
    finally:
        index.update(entries)
    tasks, groups = loaded["tasks"], loaded.get("groups", {})
    for task in tasks.values():
        if shots:
            task.set_config("num_fewshot", int(shots))
        absent = (task.config.metadata or {}).get("absent")
        if task.config.num_fewshot and absent:
            raise FileNotFoundError(f"Task {task.task_name} needs its examples in {data}: there is no {absent}.")
    if limit is None:
        return Benchmark(name, tasks, groups, None)
    return limited(Benchmark(name, tasks, groups, None), limit)


def limited(benchmark: Benchmark, limit: int) -> Benchmark:
    """Return the benchmark with `limit` items, spread over its tasks. Tasks without any are removed."""
    documents = {leaf: items_in_documents(task.eval_docs) for leaf, task in benchmark.tasks.items()}
    quotas = spread(limit, {leaf: len(ends) for leaf, ends in documents.items()})
    samples = {leaf: range(documents[leaf][quota - 1]) for leaf, quota in quotas.items() if quota}
    for leaf in benchmark.tasks.keys() - samples.keys():
        for group in benchmark.groups.values():
            group.pop(leaf)
    return replace(benchmark, tasks={leaf: benchmark.tasks[leaf] for leaf in samples}, samples=samples)


def leaves(index: Mapping, name: str) -> Iterator[str]:
    """Yield the names of the tasks in a task, tag or group of the index."""
    entry = index[name]
    if entry.kind.name not in ("TAG", "GROUP"):
        yield name
        return
    members = sorted(entry.tags) if entry.kind.name == "TAG" else list(entry.cfg["task"])
    while members:
        member = members.pop(0)
        if isinstance(member, dict) and isinstance(member.get("task"), list):  # a group defined inside another
            members += member["task"]
            continue
        child = member if isinstance(member, str) else member.get("task", member.get("group"))
        if child in index:
            yield from leaves(index, child)


def items_in_documents(docs) -> Sequence[int]:
    """Return how many documents the first 1, 2, ... items of a task take.

    An item takes one document, or one for each order of its options.
    """
    if "item" not in docs.column_names:
        return range(1, len(docs) + 1)
    return (1 + np.flatnonzero(np.diff(docs["item"], append=-1))).tolist()


def spread(limit: int, sizes: dict[str, int]) -> dict[str, int]:
    """Return a share of `limit` for each name, as even as the sizes allow. No share exceeds its size."""
    quotas, remaining = {}, limit
    for number, name in enumerate(sorted(sizes, key=lambda name: sizes[name])):
        quotas[name] = min(sizes[name], remaining // (len(sizes) - number))
        remaining -= quotas[name]
    return {name: quotas[name] for name in sizes}


def task_config(entry, data: Path | None, shots: int | None) -> dict:
    """Return lm-eval's configuration of a task, with the data of a folder if one is given.

    Raises:
        ValueError: If the task loads its data in Python, so that a folder cannot replace it.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(entry.yaml_path)
    if "class" in config:
        if data is not None:
            raise ValueError(f"Task {entry.name} loads its data in Python, not from a folder. Run it without data.")
        return config
    config["num_fewshot"] = (config.get("num_fewshot") or 0) if shots is None else shots
    if data is None or "custom_dataset" in config:
        return config
    splits = read_splits(config, data)
    if any("query" in rows.column_names for rows in splits.values()):
        config["process_docs"] = None  # these rows of HellaSwag went through process_docs already
    examples = config.get("fewshot_split") or config.get("training_split")
    metadata = {} if examples in splits else {"absent": file_name(config, examples)}
    gone = {field: None for field in SPLIT_FIELDS if config.get(field) not in splits}
    return config | gone | {"custom_dataset": lambda **_: splits, "metadata": metadata | {"keep": ()}}


def read_splits(config: dict, data: Path) -> dict:
    """Return the splits of a task that are in a folder.

    Raises:
        FileNotFoundError: If the split that is scored is absent.
        ValueError: If a file has no rows of the task.
    """
    from datasets import Dataset

    scored = config.get("test_split") or config.get("validation_split")
    splits = {}
    for split in dict.fromkeys(config[field] for field in SPLIT_FIELDS if config.get(field)):
        path = data / file_name(config, split)
        if path.is_file():
            rows = read_rows(path, path.stat().st_mtime_ns)
            if config["dataset_path"] == MMLU:
                rows = [row for row in rows if row["subject"] == config["dataset_name"]]
            if not rows:
                raise ValueError(f"{path} has no rows for task {config['task']}.")
            splits[split] = Dataset.from_list(rows)
        elif split == scored:
            raise FileNotFoundError(
                f"Task {config['task']} needs its {split} split in {data}: there is no {path.name}."
            )
    return splits


def file_name(config: dict, split: str | None) -> str:
    """Return the name of a split's file in a folder of data."""
    if config["dataset_path"] == MMLU:
        return f"mmlu_{'val' if split == 'validation' else split}.jsonl"
    prefix = PREFIXES.get((config["dataset_path"], config.get("dataset_name")), config["task"])
    return f"{prefix}_{split}.jsonl"


@functools.lru_cache(maxsize=4)
def read_rows(path: Path, modified: int) -> list[dict]:
    """Return the JSON lines of a file. It is read again only if its time of modification changes.

    Raises:
        ValueError: If a line is not JSON.
    """
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}, is not JSON: {error}.") from error
    return rows


# ---- options in every order ------------------------------------------------------------------------------------------


def rotated_config(config: dict) -> dict:
    """Return a task that generates a letter, with the options in each cyclic order, from a task of MMLU or ARC.

    The prompt is that of MMLU. Options of examples keep their original order.
    """
    from datasets import load_dataset

    lead = "" if config["dataset_path"] == MMLU else "Question: "
    examples = config.get("fewshot_split") or config.get("training_split")
    load = config.get("custom_dataset") or functools.partial(
        load_dataset, config["dataset_path"], config["dataset_name"]
    )

    def dataset(**_):
        splits = load()
        test = splits["test"]
        made = {"test": test.from_list([doc for item, row in enumerate(test.to_list()) for doc in orders(item, row)])}
        if config["num_fewshot"]:
            made["examples"] = test.from_list(
                [next(orders(item, row)) for item, row in enumerate(splits[examples].to_list())]
            )
        return made

    def prompt(doc) -> str:
        options = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, doc["options"]))
        return f"{lead}{doc['question']}\n{options}Answer:"

    def score(doc, results) -> dict[str, float]:
        return {"acc_rotated": float(parse_letter(results[0], doc["choices"]) == doc["target"])}

    return {
        "task": config["task"],
        "custom_dataset": dataset,
        "description": config.get("description", ""),
        "test_split": "test",
        "fewshot_split": "examples" if config["num_fewshot"] else None,
        "num_fewshot": config["num_fewshot"],
        "fewshot_config": config.get("fewshot_config"),
        "doc_to_text": prompt,
        "doc_to_target": "target",
        "process_results": score,
        "output_type": "generate_until",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": 8},
        "metric_list": [{"metric": "acc_rotated", "aggregation": "mean", "higher_is_better": True}],
        "metadata": config.get("metadata", {}) | {"keep": ("item", "rotation", "choices")},
    }


def orders(item: int, row: dict) -> Iterator[dict]:
    """Yield a question of MMLU or ARC in each cyclic order of its options. Order r begins with option r."""
    if isinstance(row["choices"], dict):
        options, gold = row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])
    else:
        options, gold = row["choices"], row["answer"]
    n = len(options)
    for r in range(n):
        yield {
            "question": row["question"].strip(),
            "options": [*options[r:], *options[:r]],
            "target": LETTERS[(gold - r) % n],
            "item": item,
            "rotation": r,
            "choices": n,
        }


ANSWER = re.compile(r"[\s(\[*\"'`]*(?:[Tt]he (?:correct )?answer is:?\s*)?[(\[*\"'`]*([A-Z])(?!\w|[^\S\n]+[a-z])")


def parse_letter(text: str, choices: int) -> str | None:
    """Return the letter that an answer begins with, as in " B", "(B)" or "B. Paris", but not in "A cat".

    None stands for no letter, or one that is no option.
    """
    match = ANSWER.match(text)
    return match[1] if match and match[1] in LETTERS[:choices] else None

"""Convert Qwen2.5-Coder-1.5B-Instruct to a KDA-only model and a hybrid, beside Arcee's recipe at equal tokens and text.

    run="python experiments/qwen_coder.py --teacher qwen.gguf --text TEXT --out OUT"
    $run answers                                  # questions, and the teacher's answers to them
    $run align kda-only hybrid                    # may run at the same time, on other GPUs
    $run rates kda-only                           # optional: learning rates of match, compared
    $run train kda-only hybrid arcee              # 75M tokens each, those of align counted
    $run measure kda-only hybrid arcee
    $run report

Run them in this order. The teacher is a folder, a GGUF file or a hub id. TEXT is a folder with train/ and eval/. In
train/ are openstax, changelog and gutenberg-0.jsonl.zst; in eval/ are heldout_dev, heldout_test, heldout_books and the
splits of the benchmarks. WinoGrande is measured if eval/ has winogrande_validation.jsonl.

- `answers`: The teacher answers the training questions of GSM8K, four times each. Answers with the right last number
  are kept. It also answers requests about passages of the textbooks, once each.
- `align`: The align stage of our models is a run of its own, in OUT/MODEL-align. Its text is textbooks, podcasts, books
  and sparse recall text.
- `rates`: Short match runs that begin with the model of `align`, one after the other, with its text. Each has another
  pair of learning rates (`RATES`). Prints KL and recall of each.
- `train`: The other stages begin with the model of `align`, which is trained first if it is not there. Their text is
  that of align and these answers, or those kinds that --answers names. Of the answers, only the teacher's tokens count.
- `measure`: Each model is measured in parts. The teacher's answers of a part are copied, not repeated.
- `report`: One report of all parts, and OUT/report/card.md, a table beside the figures of AFM-4.5B-Base-KDA-Only.

Each model has GPUs of its own, --gpus of them. Models wait if there are too few. What each program prints is in
OUT/logs. Finished work is not repeated. Stopped work is resumed: answers by file, training by checkpoint, measures by
item. Where a command may run for ten minutes only, give `train` --max-minutes 8 and repeat it. --smoke does all of it
on the CPU in small, to try the script with a tiny teacher.
"""

import argparse
import dataclasses
import json
import os
import queue
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
from result import copy_teacher_answers

from deltify import report
from deltify.config import STAGES, Recipe, load_recipe, write_recipe
from deltify.data.sources import documents
from deltify.evaluation.needles import TASKS as NEEDLES
from deltify.evaluation.report import combine
from deltify.training.checkpoint import is_finished
from deltify.training.metrics import read_stages

# weights of sources in align, in match and, for our models, in longer sequences; not tuned
ALIGN_MIX = {"openstax": 0.3, "changelog": 0.15, "gutenberg-0": 0.3, "sparse-recall:openstax": 0.25}
MIX = {
    "openstax": 0.2, "changelog": 0.1, "gutenberg-0": 0.2, "sparse-recall:openstax": 0.25, "chat:gsm8k": 0.15,
    "chat:textbooks": 0.1,
}  # fmt: skip
LONG_MIX = {
    "openstax": 0.05, "changelog": 0.15, "gutenberg-0": 0.4, "sparse-recall:openstax": 0.25, "chat:gsm8k": 0.1,
    "chat:textbooks": 0.05,
}  # fmt: skip
# recipe of each model, the fraction of the tokens in each stage, and fields that differ from the recipe's
OURS = {"align": 5 / 16, "match": 10 / 16, "extend": 1 / 16}
MODELS: dict[str, tuple[str, dict[str, float], dict[str, object]]] = {
    "kda-only": ("qwen2.5-1.5b-kda", OURS, {}),
    "hybrid": ("qwen2.5-1.5b-hybrid", OURS, {}),
    "hybrid-rope": ("qwen2.5-1.5b-hybrid", OURS, {"student.keep_rope": "true"}),
    "arcee": ("baselines/arcee", {"match": 7 / 8, "extend": 1 / 8}, {}),
}
# learning rates of mixers and of other parameters that `rates` compares
RATES = ((6e-4, 2e-5), (2e-4, 2e-5), (6e-4, 1e-4), (2e-4, 1e-4))
SHARD = 250  # questions of a file of answers; what is answered when time ends can be used, but for the last file
REQUESTS = (
    "Explain this passage to a student who reads about its subject for the first time.\n\n{}",
    "Summarize this passage in three sentences.\n\n{}",
    "Write five questions about this passage, each with its answer.\n\n{}",
    "Which terms does this passage introduce? Define each of them in a sentence.\n\n{}",
    "Give an example of what this passage describes, and say why it is one.\n\n{}",
    "{}\n\nWhich statement of this passage matters most? Which facts in it support this statement?",
)
# options of `deltify sample` for each set of questions
ANSWERS = {
    "gsm8k": {"samples": 4, "length": 640, "keep-number": "answer"},
    "textbooks": {"samples": 1, "length": 1024},
}
# lm-eval tasks of each part, and the largest number of items of a task
CHOICES = {
    "choices": (("arc_challenge", "arc_easy", "piqa", "winogrande", "hellaswag"), None),
    "mmlu": (("mmlu@5",), 2850),
    "gsm8k": (("gsm8k@5",), 500),
}
# tasks, lengths, and samples of each task and length
HAYSTACKS = {
    "needles": (tuple(NEEDLES)[:6], (1024, 2048, 4096, 8192), 32),
    "needles-long": (("niah_single_1", "niah_single_2", "niah_multikey_1"), (16384, 32768, 65536), 8),
}
PARTS = (*CHOICES, "gsm8k-chat", *HAYSTACKS, "positions")
# what the model card of AFM-4.5B-Base-KDA-Only reports of its teacher's score, in percent: raw, and above chance
AFM = {"mmlu@5": "88.4, 80.8", "arc_challenge": "89.7", "hellaswag": "95.3", "gsm8k@5": "51.4"}


# ---- answers ---------------------------------------------------------------------------------------------------------


def answers(options: argparse.Namespace) -> None:
    """Write the questions, and the teacher's answers to each file of them. The kinds of questions take turns."""
    shards: list[tuple[int, str, list[dict]]] = []
    kinds = {"gsm8k": gsm8k_questions, "textbooks": textbook_questions}
    for name in options.answers:
        chosen = list(islice(kinds[name](options), options.questions))
        shards += [(first // SHARD, name, chosen[first : first + SHARD]) for first in range(0, len(chosen), SHARD)]
    for number, name, shard in sorted(shards, key=lambda shard: shard[:2]):
        lines = "".join(json.dumps(line) + "\n" for line in shard)
        answer_file(name, options.out / "questions" / f"{name}-{number:02}.jsonl", lines, options)


def answer_file(name: str, asked: Path, lines: str, options: argparse.Namespace) -> None:
    """Write a file of questions and let the teacher answer them, unless it has answered these, and perhaps more."""
    done, unfinished = options.out / "answers" / name / asked.name, options.out / "unfinished" / asked.name
    asked.parent.mkdir(parents=True, exist_ok=True)
    if not asked.exists() or not asked.read_text().startswith(lines):
        done.unlink(missing_ok=True)
        asked.write_text(lines)
    if done.exists():
        return
    unfinished.unlink(missing_ok=True)
    settings = ANSWERS[name] | {"count": SHARD, "batch": options.batch, "temperature": 0.7}
    if options.smoke:  # a random teacher is never right
        settings = {"samples": 8, "length": ANSWERS[name]["length"], "count": SHARD, "batch": 64, "device": "cpu"}
    command = ["sample", options.teacher, asked, "--chat", "--field", "question", "-o", unfinished]
    run_deltify([*command, *flags(settings)], visible_gpus(options), options.out / "logs" / f"answers-{asked.stem}.log")
    done.parent.mkdir(parents=True, exist_ok=True)
    unfinished.rename(done)


def gsm8k_questions(options: argparse.Namespace) -> Iterator[dict]:
    """Yield question and answer of GSM8K's training split."""
    with (options.text / "eval" / "gsm8k_train.jsonl").open() as lines:
        yield from map(json.loads, lines)


def textbook_questions(options: argparse.Namespace) -> Iterator[dict]:
    """Yield requests about passages of 80 to 250 words, two of each textbook module, in a fixed order."""
    rng = random.Random(0)
    for text in documents(str(options.text / "train" / "openstax.jsonl.zst")):
        found = list(passages(text.split("\n\n")))
        for passage in rng.sample(found, min(2, len(found))):
            yield {"question": rng.choice(REQUESTS).format(passage)}


def passages(paragraphs: list[str]) -> Iterator[str]:
    """Yield stretches of paragraphs that have 80 to 250 words."""
    together: list[str] = []
    for paragraph in paragraphs:
        together.append(paragraph)
        words = sum(len(part.split()) for part in together)
        if words >= 80:
            if words <= 250:
                yield "\n\n".join(together)
            together = []


# ---- training --------------------------------------------------------------------------------------------------------


def align(model: str, gpus: list[str], options: argparse.Namespace) -> None:
    """Train the align stage of a model of `MODELS`, or go on with it."""
    distill(make_recipe(model, options, only_align=True), gpus, options)


def train(model: str, gpus: list[str], options: argparse.Namespace) -> None:
    """Train a model of `MODELS`, or go on with it."""
    if "align" in MODELS[model][1] and not is_finished(align_folder(model, options)):
        align(model, gpus, options)
    distill(make_recipe(model, options), gpus, options)


def rates(model: str, gpus: list[str], options: argparse.Namespace) -> None:
    """Train match for --rate-tokens from the model of `align`, once for each pair of `RATES`, and print the results."""
    if not is_finished(align_folder(model, options)):
        align(model, gpus, options)
    for pair in RATES:
        recipe = rate_recipe(model, pair, options)
        distill(recipe, gpus, options)
        line = [line for line in dict(read_stages(recipe.folder))["match"] if "heldout_kl" in line][-1]
        recall = line.get("recall", float("nan"))
        print(f"{recipe.name}: {line['tokens']:,} tokens, KL {line['heldout_kl']:.4f}, recall {recall:.2f}", flush=True)


def rate_recipe(model: str, pair: tuple[float, float], options: argparse.Namespace) -> Recipe:
    """Return a recipe of match alone, with the text of align and a pair of `RATES`."""
    recipe, match = make_recipe(model, options, only_align=True), make_recipe(model, options).match
    return dataclasses.replace(
        recipe,
        name=f"{model}-rates-{pair[0]:g}-{pair[1]:g}",
        student=dataclasses.replace(recipe.student, init=str(align_folder(model, options))),
        align=dataclasses.replace(recipe.align, tokens=0),
        match=dataclasses.replace(
            match, tokens=int(options.rate_tokens * 1e6), lr_mixers=pair[0], lr_other=pair[1], data_weights=None
        ),
    )


def align_folder(model: str, options: argparse.Namespace) -> Path:
    return options.out / f"{model}-align" / "align"


def distill(recipe: Recipe, gpus: list[str], options: argparse.Namespace) -> None:
    path = options.out / "recipes" / f"{recipe.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_recipe(recipe, path)
    more = ["--resume"] if (recipe.folder / "recipe.yaml").exists() else []
    if options.max_minutes is not None:
        more += ["--max-minutes", options.max_minutes]
    run_deltify(["distill", path, *more], gpus, options.out / "logs" / f"train-{recipe.name}.log")


def make_recipe(model: str, options: argparse.Namespace, only_align: bool = False) -> Recipe:
    """Return the recipe of a model's align stage, or of its other stages, with the command line's texts and tokens."""
    name, shares, changes = MODELS[model]
    stages = {stage: share for stage, share in shares.items() if (stage == "align") == only_align}
    fields: dict[str, object] = {
        "name": f"{model}-align" if only_align else model, "output": options.out, "seed": options.seed,
        "teacher.model": options.teacher, "teacher.architecture": "qwen2",
        "data.train": json.dumps(named(ALIGN_MIX if only_align else MIX, options)), "data.max_tokens": "null",
        "data.heldout": options.text / "eval" / "heldout_dev.jsonl", "data.folder": options.data,
        "run.heldout_tokens": 131_072, "run.heldout_sequence_length": 2048, "run.save_every_minutes": 10_000,
        "run.keep_checkpoints": 1,
    } | changes  # fmt: skip
    if "align" in shares and not only_align:
        fields["student.init"] = align_folder(model, options)
        fields["extend.data_weights"] = json.dumps(named(LONG_MIX, options))
    steps = []
    for stage, settings in zip(STAGES, map(load_recipe(name).stage, STAGES)):
        tokens = fields[f"{stage}.tokens"] = int(stages.get(stage, 0) * options.tokens * 1e6)
        if not tokens:
            continue
        length = settings.sequence_length
        wanted = options.batch_tokens or settings.batch_size * length
        each = max(1, wanted // (length * options.gpus))  # sequences of a GPU
        rows = each * options.gpus
        fields[f"{stage}.batch_size"] = rows
        # at most 8,192 tokens at a time
        fields[f"{stage}.micro_batch_size"] = max(
            n for n in range(1, each + 1) if each % n == 0 and n <= max(1, 8192 // length)
        )
        steps.append(tokens // (rows * length))
    fields["run.eval_every"] = max(1, max(steps) // options.validations) if options.validations else 10**9
    if options.smoke:
        fields |= smoke_fields(stages)
        fields |= {"student.full_attention_layers": "measured:1"} if name == "qwen2.5-1.5b-hybrid" else {}
    return load_recipe(name, flags_of(fields))


def smoke_fields(shares: dict[str, float]) -> dict[str, object]:
    """Return fields for two short steps of each stage on the CPU."""
    fields: dict[str, object] = {
        "run.heldout_tokens": 512, "run.heldout_sequence_length": 64, "run.eval_every": 1, "run.device": "cpu",
        "data.max_tokens": 300_000,
        "student.calibration_tokens": 512, "student.calibration_sequence_length": 64,
    }  # fmt: skip
    for stage in shares:
        short = {"tokens": 2 * 2 * 512, "sequence_length": 512, "batch_size": 2, "micro_batch_size": 1}
        fields |= {f"{stage}.{field}": value for field, value in short.items()}
    return fields


def named(weights: dict[str, float], options: argparse.Namespace) -> dict[str, float]:
    """Return weights of sources by the sources' full names, without answers that --answers does not name."""

    def full(source: str) -> str:
        kind, _, name = source.rpartition(":")
        path = options.out / "answers" / name if kind == "chat" else options.text / "train" / f"{name}.jsonl.zst"
        return f"{kind}:{path}" if kind else str(path)

    left_out = {f"chat:{kind}" for kind in ANSWERS if kind not in options.answers}
    return {full(source): weight for source, weight in weights.items() if source not in left_out}


# ---- measures --------------------------------------------------------------------------------------------------------


def measure(model: str, gpus: list[str], options: argparse.Namespace) -> None:
    """Evaluate a model part by part. Each model begins with another part, so that it can copy the teacher's answers.

    Raises:
        RuntimeError: If the model is not trained to its end, as its parts would not be measured again after more
            training. Also if a part fails: the other parts are measured first.
    """
    if not options.unfinished and not is_finished(options.out / model / "extend"):
        raise RuntimeError(f"{model} is not trained to its end. Run: train {model}. Or give --unfinished")
    chosen, failed = options.parts or PARTS, []
    first = list(MODELS).index(model) * len(chosen) // len(MODELS) if model in MODELS else 0
    for part in (*chosen[first:], *chosen[:first]):
        try:
            measure_part(model, part, gpus, options)
        except RuntimeError as error:
            failed.append(str(error))
    if failed:
        raise RuntimeError("\n\n".join(failed))


def measure_part(model: str, part: str, gpus: list[str], options: argparse.Namespace) -> None:
    """Evaluate one part of a model, unless that is done."""
    output, log = options.out / "parts" / f"{model}-{part}", options.out / "logs" / f"measure-{model}-{part}.log"
    if part == "gsm8k-chat":
        for name in (model, "teacher"):
            chat_answers(name, gpus, options)
    elif not (output / "finished").exists():  # results.json is written after each measure of a part
        copy_teacher_answers(options.out / "parts", output, part)
        command = ["evaluate", options.out / model, "--output", output, *part_flags(part, options)]
        run_deltify(command, gpus, log)
        (output / "finished").touch()


def part_flags(part: str, options: argparse.Namespace) -> list[str]:
    """Return the options of `deltify evaluate` for a part."""
    folder = options.text / "eval"
    fields: dict[str, object] = {"heldout": folder / "heldout_test.jsonl"}
    if options.smoke:
        fields["device"] = "cpu"
    books = folder / "heldout_books.jsonl"
    if part in CHOICES:
        tasks, limit = CHOICES[part]
        if not (folder / "winogrande_validation.jsonl").is_file():
            tasks = tuple(task for task in tasks if task != "winogrande")
        limit = options.limit or limit
        fields |= {"tasks": ",".join(tasks), "data": folder} | ({"limit": limit} if limit else {})
    elif part in HAYSTACKS:
        tasks, lengths, samples = HAYSTACKS[part]
        if options.smoke:
            tasks, lengths, samples = tasks[:1], (1024,), 2
        lengths = ",".join(map(str, lengths))
        fields |= {"needles": ",".join(tasks), "lengths": lengths, "needle-samples": samples, "haystack": books}
    else:
        contexts = (1024, 8192, options.book_tokens)
        fields |= {"books": books, "book-tokens": options.book_tokens, "contexts": ",".join(map(str, contexts))}
        if options.smoke:
            fields |= {"contexts": "64", "book-count": 1}
    unused = [] if part == "positions" else ["--no-controls", "--no-samples"]
    recall = ["--recall", "--haystack", str(books)] if part == "positions" and not options.smoke else []
    return [*flags(fields), "--no-stages", *unused, *recall]


def chat_answers(model: str, gpus: list[str], options: argparse.Namespace) -> None:
    """Write a model's right answers to GSM8K's test questions in its chat format, unless it has.

    The file holds right answers only. Its name ends with the number of questions.
    """
    questions = options.text / "eval" / "gsm8k_test.jsonl"
    with questions.open() as lines:
        count = min(options.limit or CHOICES["gsm8k"][1], sum(1 for line in lines if line.strip()))
    done = options.out / "parts" / "gsm8k-chat" / f"{model}-{count}.jsonl"
    unfinished = options.out / "unfinished" / f"gsm8k-chat-{model}-{os.getpid()}-{'-'.join(gpus)}.jsonl"
    if done.exists():
        return
    unfinished.unlink(missing_ok=True)
    source = options.teacher if model == "teacher" else options.out / model
    settings = {
        "field": "question", "keep-number": "answer", "count": count, "temperature": 0, "length": 640,
        "batch": options.batch,
    }  # fmt: skip
    if options.smoke:
        settings |= {"device": "cpu", "length": 512}
    command = ["sample", source, questions, "--chat", "-o", unfinished]
    log = options.out / "logs" / f"measure-{model}-gsm8k-chat.log"
    run_deltify([*command, *flags(settings)], gpus, log)
    done.parent.mkdir(parents=True, exist_ok=True)
    unfinished.rename(done)


def report_all(options: argparse.Namespace) -> None:
    """Write the report of all measured parts, and the table beside AFM-4.5B-Base-KDA-Only."""
    models = options.models or [*MODELS]
    folders = [options.out / "parts" / f"{model}-{part}" for part in PARTS for model in models]
    done = [folder for folder in folders if (folder / "results.json").is_file()]
    if not done:
        raise SystemExit(f"nothing is measured in {options.out / 'parts'}. Run: measure {' '.join(models)}")
    if halves := [folder.name for folder in done if not (folder / "finished").exists()]:
        print(f"measured in part only: {', '.join(halves)}", file=sys.stderr)
    folder = combine(done, options.out / "report")
    report(folder)
    table = card_table(json.loads((folder / "results.json").read_text()), options.out / "parts" / "gsm8k-chat")
    (folder / "card.md").write_text(table)
    print(table)


def card_table(results: dict, chats: Path) -> str:
    """Return benchmarks as a Markdown table: scores, and shares of the teacher's score, raw and above chance.

    Args:
        results: Measured parts.
        chats: Folder of `chat_answers`.
    """
    rows = [
        row | {"task": row["task"] + (", strict" if "strict" in row["metric"] else "")}
        for row in results.get("benchmarks", [])
        if row["main"] or "strict" in row["metric"]
    ]
    for path in sorted(chats.glob("*-[0-9]*.jsonl")):
        model, _, count = path.stem.rpartition("-")
        value = len(path.read_text().splitlines()) / int(count)
        rows.append({"model": model, "task": "gsm8k, chat", "value": value, "chance": None, "items": int(count)})
    models = list(dict.fromkeys(row["model"] for row in rows if row["model"] != "teacher"))
    lines = [
        "Score in percent. In brackets: share of the teacher's score, raw and above chance, in percent.\n",
        "| task | items | teacher | " + " | ".join(models) + " | AFM-4.5B-Base-KDA-Only, shares (its card) |",
        "|---" * (len(models) + 4) + "|",
    ]
    for task, items in dict.fromkeys((row["task"], row["items"]) for row in rows):
        of_task = {row["model"]: row for row in rows if (row["task"], row["items"]) == (task, items)}
        teacher = of_task.get("teacher")
        cells = [score_cell(of_task.get(model), teacher) for model in ("teacher", *models)]
        lines.append(f"| {task} | {items} | {' | '.join(cells)} | {AFM.get(task.partition(',')[0], '')} |")
    return "\n".join(lines) + "\n"


def score_cell(row: dict | None, teacher: dict | None) -> str:
    """Return a score, and for a student its shares of the teacher's."""
    if row is None:
        return ""
    shown = f"{100 * row['value']:.1f}"
    if teacher is None or row["model"] == "teacher":
        return shown
    chance = row["chance"] or 0.0
    parts = [(row["value"], teacher["value"]), (row["value"] - chance, teacher["value"] - chance)]
    shares = [f"{100 * mine / theirs:.1f}" if theirs > 0 else "none" for mine, theirs in parts]
    return f"{shown} ({', '.join(shares)})"


# ---- processes -------------------------------------------------------------------------------------------------------


def flags(fields: dict) -> list[str]:
    return [part for name, value in fields.items() for part in (f"--{name}", str(value))]


def flags_of(fields: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in fields.items()]


def visible_gpus(options: argparse.Namespace) -> list[str]:
    """Return the numbers of the GPUs that CUDA_VISIBLE_DEVICES names, or of all."""
    if options.smoke:
        return []
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return names or [str(gpu) for gpu in range(torch.cuda.device_count())]


def run_deltify(arguments: list, gpus: list[str], log: Path) -> None:
    """Run a command of deltify on some GPUs, or on the CPU without any, and write what it prints to a file.

    Raises:
        RuntimeError: If it fails.
    """
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={len(gpus)}"] if len(gpus) > 1 else []
    command = [sys.executable, *start, "-m", "deltify.cli", *map(str, arguments)]
    print(f"{log.stem}: GPUs {', '.join(gpus) or 'none'}, {log}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    (log.parent.parent / "unfinished").mkdir(exist_ok=True)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    with log.open("a") as out:
        out.write(f"$ {' '.join(command)}\n")
        out.flush()
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        raise RuntimeError(f"{log.stem} failed with status {code}. Its last lines:\n{log.read_text()[-2000:]}")


def on_gpus_of_their_own(work, options: argparse.Namespace) -> None:
    """Call `work` with each model and the GPUs that are its own. Models wait if there are too few."""
    gpus = visible_gpus(options)
    groups = [gpus[first : first + options.gpus] for first in range(0, len(gpus), options.gpus)]
    groups = [group for group in groups if len(group) == options.gpus]
    if gpus and not groups:
        raise SystemExit(f"--gpus {options.gpus}, but there are {len(gpus)}. Give fewer.")
    free: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
    for group in groups or [[]]:
        free.put(group)

    def with_group(model: str) -> None:
        group = free.get()
        try:
            work(model, group, options)
        finally:
            free.put(group)

    with ThreadPoolExecutor(len(groups) or 1) as pool:
        done = [pool.submit(with_group, model) for model in options.models]
        failed = [error for error in (future.exception() for future in done) if error]
    if failed:
        raise RuntimeError("\n\n".join(map(str, failed)))


WORK = {"align": align, "rates": rates, "train": train, "measure": measure}  # what is done for each model


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("answers", *WORK, "report"))
    parser.add_argument("models", nargs="*", help=f"of all but answers: {', '.join(MODELS)} (default: all)")
    parser.add_argument("--teacher", required=True, help="folder, GGUF file or hub id")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default="runs/data", help="folder of token files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of each model: 1, 2 or 4 (default: 1)")
    parser.add_argument("--tokens", type=float, default=75, help="millions of tokens of each model (default: 75)")
    parser.add_argument(
        "--batch-tokens",
        type=int,
        help="tokens of a training step, and at least one sequence of a GPU (default: those of the recipe)",
    )
    parser.add_argument(
        "--validations",
        type=int,
        default=3,
        help="validations in the longest stage; the best so far is saved; 0: none but at its end (default: 3)",
    )
    parser.add_argument(
        "--rate-tokens", type=float, default=3, help="millions of tokens of each run of rates (default: 3)"
    )
    parser.add_argument("--max-minutes", type=float, help="minutes after which train saves and stops")
    parser.add_argument(
        "--answers",
        nargs="*",
        choices=list(ANSWERS),
        default=list(ANSWERS),
        help="kinds of answers of the teacher that are made and trained on (default: all)",
    )
    parser.add_argument("--questions", type=int, default=7500, help="questions of each kind (default: 7500)")
    parser.add_argument("--batch", type=int, default=256, help="answers generated at a time (default: 256)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="parts of measure (default: all)")
    parser.add_argument(
        "--unfinished", action="store_true", help="measure models that are not trained to their end, too"
    )
    parser.add_argument("--limit", type=int, help="items of each benchmark (default: see CHOICES)")
    parser.add_argument("--book-tokens", type=int, default=65536, help="tokens read of each of four books")
    parser.add_argument("--smoke", action="store_true", help="try the script in small on the CPU")
    options = parser.parse_args(arguments)
    known = [model for model in MODELS if options.what not in ("align", "rates") or "align" in MODELS[model][1]]
    if options.what in WORK:
        options.models = options.models or known
    if unknown := [model for model in options.models if model not in known]:
        parser.error(f"unknown models {unknown}; choose from {', '.join(known)}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.what == "answers":
        answers(options)
    elif options.what == "report":
        report_all(options)
    else:
        on_gpus_of_their_own(WORK[options.what], options)


if __name__ == "__main__":
    main()

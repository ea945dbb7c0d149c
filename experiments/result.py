"""Make the tables of docs/log/results.md: SmolLM2-135M-Instruct to KDA-only and hybrid students, and Arcee's recipe.

    python experiments/result.py --text TEXT --out runs/result train kda-only-46M hybrid-46M arcee
    python experiments/result.py --text TEXT --out runs/result long kda-only hybrid
    python experiments/result.py --text TEXT --out runs/result measure kda-only-46M arcee hybrid kda-only
    python experiments/result.py --text TEXT --out runs/result report

TEXT is a folder with train/ and eval/. Needs a GPU.

- `train`: 46M tokens in sequences of 2,048, by experiments/recipe.py, and 60M tokens of Arcee's recipe.
- `long`: Continue these runs with 10M tokens in sequences of 8,192, then 4M in sequences of 16,384. The last are longer
  than the teacher's context window, and have cross-entropy in the loss.
- `measure`: Evaluate runs of OUT, these or others.
- `report`: Write one report of all evaluations in OUT.

A quarter of the training tokens are synthetic recall text (deltify.data.recall). Finished work is not repeated, and
stopped work is resumed. Each model, and each part of `measure`, can have a process of its own.
"""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

from recipe import RECALL, with_recall

from deltify import BenchmarkSpec, DecodeSpec, EvaluationSpec, NeedleSpec, PositionSpec, evaluate, report
from deltify.config import load_recipe
from deltify.evaluation.needles import TASKS as NEEDLES
from deltify.evaluation.report import combine
from deltify.training.runner import distill
from deltify.utils.files import read_jsonl

ROOT = Path(__file__).parent.parent
TRAIN = ("openstax", "changelog", "gutenberg-0")
SHARES = (0.35, 0.25, 0.4)  # weights of the texts
LONG_SHARES = (0.2, 0.3, 0.5)  # weights in long sequences, which are mostly from books
# variant of experiments/recipe.py and millions of tokens of each model
SHORT = {
    "kda-only-46M": ("default-recall-quarter-batch-4", 46),
    "hybrid-46M": ("hybrid-recall-quarter-batch-4", 46),
    "arcee": ("arcee-recall-quarter-batch-4", 60),
}
# the model that each long model continues, and its recipe
LONG = {"kda-only": ("kda-only-46M", "smollm2-135m-kda"), "hybrid": ("hybrid-46M", "smollm2-135m-hybrid")}
# stages after sequences of 2,048: suffix of the run, millions of tokens, sequence length, batch size, learning rates of
# mixers and of other parameters, weight of cross-entropy
STAGES = (("-mid", 10, 8192, 2, 3e-4, 1e-4, 0.0), ("", 4, 16384, 1, 2e-4, 6e-5, 0.2))
CHOICES = {
    "hellaswag": (("hellaswag",), None),
    "arc": (("arc_easy", "arc_challenge", "piqa"), None),
    "mmlu": (("mmlu_continuation",), 2000),
    "gsm8k": (("gsm8k",), 32),
}
# tasks, lengths, and samples of each task and length
HAYSTACKS = {
    "needles": (tuple(NEEDLES)[:6], (1024, 2048, 4096, 8192), 16),
    "needles-long": (("niah_single_1", "niah_single_2", "niah_multikey_1"), (16384, 32768, 65536), 8),
}
PARTS = (*CHOICES, *HAYSTACKS, "positions")


def texts(options: argparse.Namespace) -> list[str]:
    """Return the training texts."""
    return [str(options.text / "train" / f"{name}.jsonl.zst") for name in TRAIN]


def heldout(options: argparse.Namespace) -> str:
    """Return the validation text."""
    return str(options.text / "eval" / "heldout_dev.jsonl")


def train(model: str, options: argparse.Namespace) -> None:
    """Train a model of `SHORT`."""
    command = [
        sys.executable,
        str(ROOT / "experiments" / "recipe.py"),
        "--train",
        *texts(options),
        "--weights",
        *map(str, SHARES),
    ]
    command += ["--heldout", heldout(options), "--data", options.data]
    variant, millions = SHORT[model]
    command += ["--tokens", str(millions * options.million), "--every", "1500", "--out", str(options.out)]
    subprocess.run([*command, "--results", str(options.out / f"{model}.json"), variant], check=True)
    folder = options.out / model
    if not folder.exists():
        folder.symlink_to(f"{variant}-{millions * options.million}-seed0")


def long(model: str, options: argparse.Namespace) -> None:
    """Train a model of `LONG`."""
    start, recipe = LONG[model]
    weights = with_recall(dict(zip(texts(options), LONG_SHARES)), RECALL["recall-quarter"])
    for suffix, millions, length, batch, lr_mixers, lr_other, ce_weight in STAGES:
        fields = {
            "run.heldout_tokens": 131_072, "run.eval_every": 200, "match.tokens": 0,
            "extend.tokens": millions * options.million, "extend.sequence_length": length, "extend.batch_size": batch,
            "extend.lr_mixers": lr_mixers, "extend.lr_other": lr_other, "extend.ce_weight": ce_weight,
        }  # fmt: skip
        start = continue_run(recipe, model + suffix, options.out / start, weights, fields, options).name


def continue_run(
    recipe: str, name: str, start: str | Path, weights: dict[str, float], fields: dict, options: argparse.Namespace
) -> Path:
    """Train a run that starts from another one, with these texts and changed fields, and return its folder."""
    fields = {
        "name": name, "output": options.out, "student.init": start, "data.train": json.dumps(weights),
        "data.folder": options.data, "data.max_tokens": "null", "data.heldout": heldout(options),
        "run.save_every_minutes": 60, "align.tokens": 0,
    } | fields  # fmt: skip
    made = load_recipe(recipe, [f"--{field}={value}" for field, value in fields.items()])
    return distill(made, resume=(made.folder / "recipe.yaml").exists())


def measure(model: str, options: argparse.Namespace) -> None:
    """Evaluate a model part by part."""
    books = str(options.text / "eval" / "heldout_books.jsonl")
    for part in options.parts or PARTS:
        output = options.out / "parts" / f"{model}-{part}"
        copy_teacher_answers(options.out / "parts", output, part)
        spec = EvaluationSpec(
            heldout=str(options.text / "eval" / "heldout_test.jsonl"),
            controls=part == "positions",
            stages=False,
            samples=part == "positions",
        )
        if part in CHOICES:
            tasks, limit = CHOICES[part]
            spec = dataclasses.replace(spec, benchmarks=BenchmarkSpec(tasks, limit, options.text / "eval"))
        elif part in HAYSTACKS:
            tasks, lengths, samples = HAYSTACKS[part]
            samples = options.samples or samples
            spec = dataclasses.replace(spec, needles=NeedleSpec(tasks, lengths, samples, books))
        else:
            contexts = DecodeSpec((1024, 8192, options.book_tokens))
            spec = dataclasses.replace(spec, positions=PositionSpec(books, options.book_tokens), decode=contexts)
        evaluate(options.out / model, spec, output=output)


def copy_teacher_answers(parts: Path, output: Path, part: str) -> None:
    """Copy the teacher's answers from the evaluation of another model, if there is one, to save their time."""
    other = next((folder for folder in parts.glob(f"*-{part}") if (folder / "results.json").is_file()), None)
    if other is None or output.exists():
        return
    output.mkdir(parents=True)
    if (other / "needles.jsonl").is_file():  # a process may still write to it
        rows = [row for row in read_jsonl(other / "needles.jsonl") if row["model"] == "teacher"]
        (output / "needles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if (other / "items" / "teacher").is_dir():
        shutil.copytree(other / "items" / "teacher", output / "items" / "teacher")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "long", "measure", "report"))
    parser.add_argument("models", nargs="*")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default="runs/data", help="folder of token files")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="parts of measure (default: all)")
    parser.add_argument("--samples", type=int, help="needles of each task and length (default: see HAYSTACKS)")
    parser.add_argument("--million", type=int, default=1_000_000, help="tokens per million; fewer for a trial")
    parser.add_argument("--book-tokens", type=int, default=65536, help="tokens read of each of four books")
    options = parser.parse_args()
    if options.what == "report":
        models = dict.fromkeys((*LONG, *SHORT, *options.models))
        folders = [options.out / "parts" / f"{model}-{part}" for part in PARTS for model in models]
        done = [folder for folder in folders if (folder / "results.json").is_file()]
        if missing := [m for m in options.models if not any(folder.name.startswith(f"{m}-") for folder in done)]:
            parser.error(f"{missing} are not measured. Run: measure {' '.join(missing)}")
        if not done:
            parser.error(f"nothing of {', '.join(models)} is measured in {options.out / 'parts'}; name other models")
        report(combine(done, options.out / "smollm2-135m"))
        return
    for model in options.models:
        {"train": train, "long": long, "measure": measure}[options.what](model, options)


if __name__ == "__main__":
    main()

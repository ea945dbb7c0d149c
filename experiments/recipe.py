"""Comparison of recipes: variants of one conversion with equal tokens, by held-out KL overall and by position.

    python experiments/recipe.py --train openstax.jsonl.zst changelog.jsonl.zst --heldout heldout_dev.jsonl \\
        --tokens 4000000 base align-none default

Every run trains on the same sequences in the same order. It differs from the others only in what its name says. Each
result is added to experiments/results/recipe.json at once, and runs with a result there are skipped. Needs a GPU with
80 GB.
"""

import argparse
import dataclasses
import gc
import json
import sys
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from deltify.config import STAGES, Recipe, load_recipe
from deltify.conversion.student import sliding_control
from deltify.conversion.teacher import Teacher
from deltify.data.token_files import open_data
from deltify.evaluation.controls import equal_window
from deltify.evaluation.plots import COLORS, open_figure, save
from deltify.evaluation.positions import by_position
from deltify.inference.loading import load_model
from deltify.training.metrics import read_stages
from deltify.training.runner import distill
from deltify.training.teachers import open_teacher
from deltify.utils.devices import device_name, pick_device

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results" / "recipe.json"
LENGTH, HELDOUT = 2048, 131_072  # tokens of a held-out sequence, and of all held-out text
OURS, HYBRID, ARCEE, RADLADS = "smollm2-135m-kda", "smollm2-135m-hybrid", "baselines/arcee", "baselines/radlads"
# variants: recipe, fraction of the tokens in each stage, overrides
MATCH_ALL, WITH_ALIGN, WITH_EXTEND = {"match": 1.0}, {"align": 0.125, "match": 0.875}, {"match": 0.875, "extend": 0.125}
# overrides that variants of our recipe start from; those named "default" or "hybrid" start from the second, a later one
BASE: dict[str, object] = {"match.batch_size": 8, "match.lr_other": 1e-4}
BETTER = BASE | {"match.batch_size": 2, "match.lr_other": 3e-4}
MUON: dict[str, object] = {"match.optimizer": "muon"}
DOUBLE: dict[str, object] = {"match.lr_mixers": 2e-3, "match.lr_other": 6e-4}
LONG: dict[str, object] = {
    "match.sequence_length": 8192,
    "match.batch_size": 1,
}  # as many tokens a step as 4 rows of 2,048
ALIGN_2048: dict[str, object] = {
    "align.sequence_length": 2048,
    "align.batch_size": 8,
    "student.calibration_sequence_length": 2048,
}
RETRIEVAL: dict[str, object] = {"student.retrieval_heads": 20, "student.center": "retrieval"}
VARIANTS: dict[str, tuple[str, dict[str, float], dict[str, object]]] = {
    "base": (OURS, WITH_ALIGN, {}),
    "default": (OURS, WITH_ALIGN, {}),
    "arcee": (ARCEE, WITH_EXTEND, {}),
    "arcee-lr-2e-3": (ARCEE, WITH_EXTEND, {"match.lr_mixers": 2e-3}),
    "arcee-batch-2": (ARCEE, WITH_EXTEND, {"match.batch_size": 2, "extend.batch_size": 2}),
    "radlads": (RADLADS, {"align": 1 / 6, "match": 5 / 6}, {}),
    "radlads-lr-1e-4": (RADLADS, {"align": 1 / 6, "match": 5 / 6}, {"match.lr_mixers": 1e-4, "match.lr_other": 1e-4}),
    "start-library": (OURS, WITH_ALIGN, {"student.init": "library"}),
    "start-arcee": (OURS, WITH_ALIGN, {"student.init": "arcee"}),
    "align-none": (OURS, MATCH_ALL, {}),
    "align-quarter": (OURS, {"align": 0.25, "match": 0.75}, {}),
    "lr-mixers-2e-3": (OURS, WITH_ALIGN, {"match.lr_mixers": 2e-3}),
    "lr-mixers-5e-4": (OURS, WITH_ALIGN, {"match.lr_mixers": 5e-4}),
    "lr-rest-3e-4": (OURS, WITH_ALIGN, {"match.lr_other": 3e-4}),
    "lr-rest-1e-3": (OURS, WITH_ALIGN, {"match.lr_other": 1e-3}),
    "lr-both": (OURS, WITH_ALIGN, {"match.lr_mixers": 2e-3, "match.lr_other": 3e-4}),
    "lr-rest-3e-4-batch-4": (OURS, WITH_ALIGN, {"match.lr_other": 3e-4, "match.batch_size": 4}),
    "rest-frozen": (OURS, WITH_ALIGN, {"match.lr_other": 0.0}),
    "batch-4": (OURS, WITH_ALIGN, {"match.batch_size": 4}),
    "batch-16": (OURS, WITH_ALIGN, {"match.batch_size": 16, "align.batch_size": 64}),
    "temperature-2": (OURS, WITH_ALIGN, {"match.temperature": 2.0}),
    "ce-0.2": (OURS, WITH_ALIGN, {"match.ce_weight": 0.2}),
    "hidden-0.3": (OURS, WITH_ALIGN, {"match.hidden_state_weight": 0.3}),
    "length-1024": (OURS, WITH_ALIGN, {"match.sequence_length": 1024, "match.batch_size": 16}),
    "default-batch-1": (OURS, WITH_ALIGN, {"match.batch_size": 1}),
    "default-batch-4": (OURS, WITH_ALIGN, {"match.batch_size": 4}),
    "default-align-half": (OURS, {"align": 0.5, "match": 0.5}, {}),
    "default-temperature-2": (OURS, WITH_ALIGN, {"match.temperature": 2.0}),
    "default-ce-0.2": (OURS, WITH_ALIGN, {"match.ce_weight": 0.2}),
    "default-rest-frozen": (OURS, WITH_ALIGN, {"match.lr_other": 0.0}),
    "default-double": (OURS, WITH_ALIGN, DOUBLE),
    "default-muon": (OURS, WITH_ALIGN, MUON),
    "default-muon-double": (OURS, WITH_ALIGN, MUON | DOUBLE),
    "default-muon-batch-4": (OURS, WITH_ALIGN, MUON | {"match.batch_size": 4}),
    "default-muon-double-batch-4": (OURS, WITH_ALIGN, MUON | DOUBLE | {"match.batch_size": 4}),
    "default-muon-half-batch-4": (
        OURS,
        WITH_ALIGN,
        MUON | {"match.batch_size": 4, "match.lr_mixers": 5e-4, "match.lr_other": 1.5e-4},
    ),
    "default-start-library": (OURS, WITH_ALIGN, {"student.init": "library"}),
    "default-constant": (OURS, WITH_ALIGN, {"student.init": "calibrated-constant"}),
    "default-recall-quarter": (OURS, WITH_ALIGN, {}),
    "default-recall-quarter-gate-bias": (OURS, WITH_ALIGN, {"student.gate_bias": True}),
    "default-muon-double-recall-quarter": (OURS, WITH_ALIGN, MUON | DOUBLE),
    "default-sparse-quarter": (OURS, WITH_ALIGN, ALIGN_2048),
    "default-sparse-quarter-center": (OURS, WITH_ALIGN, ALIGN_2048 | {"student.center": "all"}),
    "default-sparse-quarter-retrieval": (OURS, WITH_ALIGN, ALIGN_2048 | RETRIEVAL),
    "default-sparse-quarter-center-retrieval": (OURS, WITH_ALIGN, ALIGN_2048 | RETRIEVAL | {"student.center": "all"}),
    "default-recall-quarter-batch-4": (OURS, WITH_ALIGN, {"match.batch_size": 4}),
    "default-recall-quarter-batch-4-calibration-2048": (
        OURS,
        WITH_ALIGN,
        {"match.batch_size": 4, "student.calibration_sequence_length": 2048},
    ),
    "default-recall-quarter-long": (OURS, WITH_ALIGN, LONG),
    "default-recall-half-long": (OURS, WITH_ALIGN, LONG),
    "default-double-recall-quarter-long": (OURS, WITH_ALIGN, DOUBLE | LONG),
    "hybrid": (HYBRID, WITH_ALIGN, {}),
    "hybrid-recall-quarter-batch-4": (HYBRID, WITH_ALIGN, {"match.batch_size": 4}),
    "arcee-recall-quarter-batch-4": (ARCEE, WITH_EXTEND, {"match.batch_size": 4, "extend.batch_size": 4}),
}

# kind and fraction of synthetic recall text, by a part of the variant's name
RECALL = {"recall-quarter": ("recall", 0.25), "recall-half": ("recall", 0.5), "sparse-quarter": ("sparse-recall", 0.25)}


def make_recipe(name: str, options: argparse.Namespace) -> Recipe:
    """Return the recipe of a variant with the texts and tokens of the command line."""
    file, shares, changes = VARIANTS[name]
    if file in (OURS, HYBRID):
        changes = (BETTER if name.startswith(("default", "hybrid")) else BASE) | changes
    recipe = load_recipe(file, [f"--{key}={value}" for key, value in changes.items()])
    stages = {
        stage: dataclasses.replace(recipe.stage(stage), tokens=int(options.tokens * shares.get(stage, 0)))
        for stage in STAGES
    }
    weights = dict(zip(options.train, options.weights or [1.0] * len(options.train)))
    for part, (source, share) in RECALL.items():
        if part in name:
            weights = with_recall(weights, source, share)
    data = dataclasses.replace(
        recipe.data, train=weights, heldout=options.heldout, folder=options.data, max_tokens=None
    )
    validation = {"heldout_tokens": HELDOUT, "heldout_sequence_length": LENGTH, "eval_every": options.every}
    run = dataclasses.replace(recipe.run, save_every_minutes=60.0, **validation)
    folder = f"{name}-{options.tokens}-seed{options.seed}"
    return dataclasses.replace(recipe, name=folder, output=options.out, seed=options.seed, data=data, run=run, **stages)


def with_recall(weights: dict[str, float], source: str, share: float) -> dict[str, float]:
    """Return the weights of texts, scaled to 1 - `share`, and `share` for recall text within the first text."""
    total = sum(weights.values())
    scaled = {text: weight * (1 - share) / total for text, weight in weights.items()}
    return scaled | {f"{source}:{next(iter(weights))}": share}


def windows(recipe: Recipe, tokenizer) -> list[torch.Tensor]:
    """Return held-out text in sequences of LENGTH tokens, which are read as documents of their own."""
    _, held = open_data(recipe.data, recipe.teacher.model, tokenizer, HELDOUT, LENGTH)
    sequences = []
    for file in held:
        for start, end in zip(file.bounds[:-1], file.bounds[1:]):
            sequences += [
                torch.from_numpy(file.tokens[a : a + LENGTH].astype("int64"))
                for a in range(start, end - LENGTH + 1, LENGTH)
            ]
    return sequences


def summary(rows: list[dict], name: str) -> dict[str, float]:
    """Return KL in nats per token, overall and by position."""
    of_model = [row for row in rows if row["model"] == name]
    total = sum(row["tokens"] for row in of_model)
    overall = {"all": sum(row["kl"] * row["tokens"] for row in of_model) / total}
    return overall | {f"{row['start']}-{row['end']}": row["kl"] for row in of_model}


def open_models(recipe: Recipe, folder: Path) -> tuple[Teacher, PreTrainedModel]:
    """Return the teacher and the student of a run's last stage in bfloat16."""
    device = pick_device("auto")
    teacher = open_teacher(recipe, device, torch.bfloat16)
    return teacher, load_model(folder, device=device, dtype=torch.bfloat16)


def run(name: str, options: argparse.Namespace) -> dict:
    """Train a variant and return its result."""
    recipe = make_recipe(name, options)
    started = time.monotonic()
    folder = distill(recipe, resume=(recipe.folder / "recipe.yaml").exists())
    seconds = time.monotonic() - started
    lines = [line for _, stage in read_stages(folder) for line in stage]
    curve = [(line["tokens"], line["heldout_kl"]) for line in lines if "heldout_kl" in line]
    teacher, student = open_models(recipe, folder)
    models = {"student": student}
    for window in () if options.window is None else (equal_window(teacher, student), *options.window):
        models[f"teacher, window {window}"] = sliding_control(teacher, window=window, sinks=4)
    rows = by_position(models, teacher.model, windows(recipe, teacher.tokenizer), max_tokens=LENGTH)
    return {
        "variant": name, "tokens": options.tokens, "seed": options.seed, "seconds": seconds, "curve": curve,
        "kl": {model: summary(rows, model) for model in models},
    }  # fmt: skip


def table(results: list[dict]) -> str:
    """Return a table of results, best first."""
    buckets = list(next(iter(results[0]["kl"].values())))
    lines = [f"{'variant':24} {'tokens':>12} {'seed':>4} " + "".join(f"{bucket:>12}" for bucket in buckets)]
    for result in sorted(results, key=lambda r: (-r["tokens"], r["kl"]["student"]["all"])):
        for model, kl in result["kl"].items():
            name = result["variant"] if model == "student" else model
            lines.append(
                f"{name:24} {result['tokens']:12,} {result['seed']:4} " + "".join(f"{kl[b]:12.4f}" for b in buckets)
            )
    return "\n".join(lines)


def draw(curves: list[dict], stem: Path) -> None:
    """Draw KL over tokens. A larger mark is the end of a complete run."""
    figure, ((axis,),) = open_figure(1, 1, 8, 4.5)
    for color, run in zip(COLORS, curves):
        points = [(tokens / 1e6, kl) for tokens, kl in run["curve"]]
        device = run["device"].split()[1]
        cut = " (cut)" if "cut_at" in run else ""
        axis.plot(*zip(*points), "o-", color=color, markersize=3, label=f"{run['variant']}, {device}{cut}")
        if not cut:
            axis.plot(*points[-1], "o", color=color, markersize=8)
    axis.set(ylim=(0, 1.6), xlabel="training tokens, millions", ylabel="KL to teacher on held-out text, nats per token")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, stem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "variants", nargs="*", help=f"variants to run: {', '.join(VARIANTS)}; without any, draw curves of the results"
    )
    parser.add_argument("--train", nargs="+", default=[], help="training texts, as in data.train")
    parser.add_argument("--weights", nargs="+", type=float, help="weights of the texts (default: equal)")
    parser.add_argument("--heldout", help="validation text")
    parser.add_argument("--tokens", type=int, default=16_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=100, help="validate every N steps")
    parser.add_argument(
        "--window",
        nargs="*",
        type=int,
        help="add teachers with these windows, and one with the states' bytes",
    )
    parser.add_argument("--out", default="runs/recipe", help="folder of the runs")
    parser.add_argument("--data", default="runs/data", help="folder of token files")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = json.loads(options.results.read_text()) if options.results.exists() else []
    if unknown := [name for name in options.variants if name not in VARIANTS]:
        parser.error(f"unknown variants {unknown}; known are {', '.join(VARIANTS)}")
    if options.variants and not (options.train and options.heldout):
        parser.error("variants need --train and --heldout")
    if not options.variants:
        cut = json.loads(RESULTS.with_name("recipe-16m-cut.json").read_text())
        whole = [run for run in results if run["tokens"] == options.tokens]
        draw(sorted(whole + cut, key=lambda run: -run["curve"][-1][1]), ROOT / "docs" / "assets" / "recipe-curves")
    for name in options.variants:
        if any((r["variant"], r["tokens"], r["seed"]) == (name, options.tokens, options.seed) for r in results):
            continue
        results.append(run(name, options) | {"device": device_name(pick_device("auto")), "torch": torch.__version__})
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps(results[-1]["kl"]), file=sys.stderr)
        gc.collect()
        torch.cuda.empty_cache()
    print(table(results))


if __name__ == "__main__":
    main()

"""Where a student loses what it read, and what makes it remember: runs of SmolLM2-135M-Instruct.

    python experiments/retrieval_layers.py --train openstax.jsonl.zst changelog.jsonl.zst gutenberg-2.jsonl.zst \\
        --heldout heldout_dev.jsonl --seed 0 others retrieving

Each run is a recipe of its own in --out, and its metrics.jsonl has the recall curve of each validation. Runs that are
finished are not repeated. "halves" begins with a model that joins two others, named in JOINED. Runs whose name ends in
"-4k" or "-16k" continue another run in longer sequences. Needs a GPU.
"""

import argparse
import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deltify.config import Recipe, Stage, load_recipe
from deltify.training.metrics import read_stages
from deltify.training.recall import curve_of
from deltify.training.runner import distill

RETRIEVING = list(range(17, 25))  # layers of SmolLM2-135M-Instruct with 15 of its 20 best retrieval heads
OTHERS = [layer for layer in range(30) if layer not in RETRIEVING]
CENTRED = {"retrieval_heads": 20, "center": "all"}
LONG_MEMORY = CENTRED | {"center": "retrieval"}
TEXT = (0.4, 0.3, 0.3)  # weights of the three texts


@dataclass(frozen=True)
class Run:
    """One run: which layers stay attention, and what differs from the recipe.

    Attributes:
        attention: full_attention_layers of the student.
        align: Tokens of align.
        match: Tokens of match, or of extend.
        student: Fields of the student.
        in_match: Fields of match, or of extend.
        sparse: Fraction of sparse recall text.
        dense: Fraction of recall text that is not sparse.
        every: Steps between validations.
        stage: match, or extend, which may train beyond the teacher's context window.
    """

    attention: str | list[int]
    align: int
    match: int
    student: dict = field(default_factory=dict)
    in_match: dict = field(default_factory=dict)
    sparse: float = 0.5
    every: int = 244
    stage: str = "match"
    dense: float = 0.0


M = 1_000_000
IN_4K = {"sequence_length": 4096, "batch_size": 2}
# twice the teacher's context window: half of the positions have cross-entropy only
IN_16K = {"sequence_length": 16_384, "batch_size": 1, "lr_mixers": 2e-4, "lr_other": 6e-5, "ce_weight": 0.2}
WIDE = LONG_MEMORY | {"head_dim": 128}
NOPE = {"keep_rope": False}
LOWER = {"lr_mixers": 3e-4, "lr_other": 1e-4}
MUON = {"optimizer": "muon", "lr_mixers": 2e-3, "lr_other": 6e-4}
RUNS = {
    "align": Run("none", 4 * M, 0),
    "align-retrieval": Run("none", 4 * M, 0, LONG_MEMORY),
    "align-centred": Run("none", 4 * M, 0, CENTRED),
    "others": Run(RETRIEVING, 1 * M, 3 * M),
    "retrieving": Run(OTHERS, 1 * M, 3 * M),
    "retrieving-batch-1": Run(OTHERS, 1 * M, 2 * M, {}, {"batch_size": 1}),
    "retrieving-centred": Run(OTHERS, 1 * M, 2 * M, CENTRED),
    "retrieving-40": Run(OTHERS, 1 * M, 2 * M, CENTRED | {"retrieval_heads": 40}),
    "retrieving-72": Run(OTHERS, 1 * M, 2 * M, CENTRED | {"retrieval_heads": 72}),
    "retrieving-lr-3e-3": Run(OTHERS, 1 * M, 2 * M, {}, {"lr_mixers": 3e-3}),
    "retrieving-muon": Run(OTHERS, 1 * M, 2 * M, CENTRED, MUON),
    "retrieving-long": Run(
        OTHERS, 0, 8 * M, {"init": "retrieving-centred"}, {"sequence_length": 4096, "batch_size": 1}
    ),
    # 10M tokens each: all layers at once, or two halves that are trained apart, joined and trained together
    "direct": Run("none", 2 * M, 8 * M, LONG_MEMORY),
    "direct-wide": Run("none", 2 * M, 8 * M, WIDE),
    "direct-wide-both": Run("none", 2 * M, 8 * M, WIDE, sparse=0.25, dense=0.25),
    "direct-wide-lower": Run("none", 2 * M, 8 * M, WIDE, LOWER),
    "direct-wide-lower-4k": Run(
        "none", 0, 24 * M, {"init": "direct-wide-lower", "head_dim": 128}, IN_4K | LOWER, 0.25, 1000, dense=0.25
    ),
    "dense-lower": Run("none", 4 * M, 32 * M, {}, LOWER | {"batch_size": 4}, 0.0, 980, dense=0.25),
    "half-others": Run(RETRIEVING, 1 * M, 1 * M, LONG_MEMORY),
    "half-retrieving": Run(OTHERS, 1 * M, 3 * M, LONG_MEMORY),
    "halves": Run("none", 0, 4 * M, {"init": "halves"}),
    "direct-long": Run("none", 0, 28 * M, {"init": "direct"}, {"sequence_length": 4096, "batch_size": 1}),
    "direct-wide-4k": Run("none", 0, 40 * M, {"init": "direct-wide", "head_dim": 128}, IN_4K, every=1000),
    "direct-wide-16k": Run("none", 0, 6 * M, {"init": "direct-wide-4k", "head_dim": 128}, IN_16K, 0.5, 183, "extend"),
    "measured": Run("measured:4", 2 * M, 8 * M, sparse=0.25),
    "measured-4k": Run("measured:4", 0, 24 * M, {"init": "measured"}, IN_4K, 0.25, every=500),
    "measured-nope": Run("measured:4", 2 * M, 8 * M, NOPE, sparse=0.25, every=488),
    "measured-nope-4k": Run("measured:4", 0, 24 * M, NOPE | {"init": "measured-nope"}, IN_4K, 0.25, every=1000),
    "measured-nope-16k": Run("measured:4", 0, 4 * M, NOPE | {"init": "measured-nope-4k"}, IN_16K, 0.25, 122, "extend"),
    # continues a run of experiments/hybrid_layers.py --tokens 4000000 --keep-rope, in the same folder
    "one-4k": Run("measured:1", 0, 14 * M, {"init": "measured-1-4000000"}, IN_4K, 0.25, every=500),
    # converts the attention layers of "half-others", whose other layers are KDA and trained
    "last-eight": Run(
        "none", 0, 10 * M, LONG_MEMORY | {"init": "half-others", "convert_further": True, "retrieval_heads": 15}
    ),
}
WHOLE = "direct"  # run whose configuration the joined model has
# name: run that gives the layers RETRIEVING, and run that gives all other weights
JOINED = {"halves": ("half-retrieving", "half-others")}


def make_recipe(name: str, options: argparse.Namespace) -> Recipe:
    """Return the recipe of a run with the texts and the folder of the command line."""
    run = RUNS[name]
    recipe = load_recipe("smollm2-135m-kda")
    length = {"calibration_tokens": 32_768, "calibration_sequence_length": 2048}
    spec = dataclasses.replace(
        recipe.student, full_attention_layers=run.attention, **{"keep_rope": True} | length | run.student
    )
    if (start := run.student.get("init")) is not None:
        folder = joined_folder(options, start) if start in JOINED else run_folder(options, start) / "match"
        spec = dataclasses.replace(spec, init=str(folder))
    weights = {text: (1 - run.sparse - run.dense) * weight for text, weight in zip(options.train, TEXT)}
    for kind, weight in (("sparse-recall", run.sparse), ("recall", run.dense)):
        weights |= {f"{kind}:{text}": weight / 2 for text in (options.train[0], options.train[2]) if weight}
    stage = Stage(sequence_length=2048, batch_size=2, lr_mixers=1e-3, lr_other=3e-4)
    trained = dataclasses.replace(stage, tokens=run.match, **run.in_match)
    return dataclasses.replace(
        recipe,
        name=run_folder(options, name).name,
        output=options.out,
        seed=options.seed,
        student=spec,
        data=dataclasses.replace(
            recipe.data, train=weights, heldout=options.heldout, folder=options.data, max_tokens=48_000_000
        ),
        align=dataclasses.replace(stage, tokens=run.align),
        **({"match": Stage(), "extend": Stage()} | {run.stage: trained}),
        run=dataclasses.replace(
            recipe.run,
            heldout_tokens=98_304,
            heldout_sequence_length=2048,
            eval_every=run.every,
            save_every_minutes=60.0,
        ),
    )


def run_folder(options: argparse.Namespace, name: str) -> Path:
    return Path(options.out) / f"{name}-seed{options.seed}"


def joined_folder(options: argparse.Namespace, name: str) -> Path:
    return Path(options.out) / f"{name}-start-seed{options.seed}"


def join(retrieving: Path, others: Path, whole: Path, out: Path) -> None:
    """Write a model with KDA in all layers.

    Args:
        retrieving: Model whose layers RETRIEVING are KDA and are kept.
        others: Model that gives all other weights.
        whole: Model with KDA in all layers, whose configuration is kept.
        out: Folder to write.
    """
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (retrieving, others))
    layers = tuple(f"model.layers.{layer}." for layer in RETRIEVING)
    shutil.copytree(whole, out, dirs_exist_ok=True)
    with safe_open(whole / "model.safetensors", "pt") as model:
        joined = {name: (ours if name.startswith(layers) else theirs)[name] for name in model.keys()}  # noqa: SIM118
    save_file(joined, out / "model.safetensors", metadata={"format": "pt"})


def validations(folder: Path) -> list[dict]:
    """Return KL and recall of each validation of a run."""
    found = []
    for stage, lines in read_stages(folder):
        for line in (line for line in lines if "heldout_kl" in line):
            curve = curve_of(line).values()
            right = [value for key, value in line.items() if key.startswith("recall_right")]
            found.append(
                {"stage": stage, "tokens": line["tokens"], "kl": round(line["heldout_kl"], 4)}
                | {"recall": round(line.get("recall", float("nan")), 3)}
                | {"recall_logprob": [round(v, 3) for v in curve], "recall_right": [round(v, 3) for v in right]}
            )
    return found


def add_results(path: Path, folder: Path) -> None:
    """Add the validations of a run to a JSON file of runs by name."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known[folder.name] = validations(folder)
    rows = {name: ",\n".join(f"  {json.dumps(row)}" for row in run) for name, run in known.items()}
    path.write_text("{\n" + ",\n".join(f' "{name}": [\n{text}\n ]' for name, text in rows.items()) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", choices=list(RUNS), metavar="RUN", help=f"one of {', '.join(RUNS)}")
    parser.add_argument("--train", nargs=3, required=True, metavar="TEXT", help="textbooks, podcasts and books")
    parser.add_argument("--heldout", required=True, help="validation text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/retrieval-layers", help="folder of the runs")
    parser.add_argument("--data", default="runs/data", help="folder of token files")
    parser.add_argument("--results", type=Path, help="JSON file that the validations are added to")
    options = parser.parse_args()
    for name in options.runs:
        if name in JOINED:
            retrieving, others = (run_folder(options, run) / "match" for run in JOINED[name])
            join(retrieving, others, run_folder(options, WHOLE) / "converted", joined_folder(options, name))
        recipe = make_recipe(name, options)
        folder = distill(recipe, resume=(recipe.folder / "recipe.yaml").exists())
        for line in validations(folder):
            curve = " / ".join(f"{value:.2f}" for value in line["recall_logprob"])
            at = f"{name} {line['stage']} {line['tokens']:>11,} tokens"
            print(f"{at}: KL {line['kl']:.4f}, recall {line['recall']:.2f}: {curve}")
        if options.results:
            add_results(options.results, folder)


if __name__ == "__main__":
    main()

"""Where a KDA-only student loses what it read: runs that convert only some layers of SmolLM2-135M-Instruct.

    python experiments/retrieval_layers.py --train openstax.jsonl.zst changelog.jsonl.zst gutenberg-2.jsonl.zst \\
        --heldout heldout_dev.jsonl --seed 0 others retrieving

Each run is a recipe of its own in --out, and its metrics.jsonl has the recall curve of each validation. Runs that are
finished are not repeated. "staged" and "halves" begin with a model that joins two others, named in JOINED. Needs a GPU.
"""

import argparse
import dataclasses
import shutil
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
TEXT, SPARSE = (0.4, 0.3, 0.3), 0.5  # weights of the three texts, and the fraction of sparse recall text
# name: layers that stay attention, overrides of the student, tokens of align and match, overrides of match
RUNS: dict[str, tuple[str | list[int], dict, int, int, dict]] = {
    "align": ("none", {}, 4_000_000, 0, {}),
    "align-retrieval": ("none", CENTRED | {"center": "retrieval"}, 4_000_000, 0, {}),
    "align-centred": ("none", CENTRED, 4_000_000, 0, {}),
    "others": (RETRIEVING, {}, 1_000_000, 3_000_000, {}),
    "retrieving": (OTHERS, {}, 1_000_000, 3_000_000, {}),
    "retrieving-centred": (OTHERS, CENTRED, 1_000_000, 2_000_000, {}),
    "retrieving-40": (OTHERS, CENTRED | {"retrieval_heads": 40}, 1_000_000, 2_000_000, {}),
    "retrieving-72": (OTHERS, CENTRED | {"retrieval_heads": 72}, 1_000_000, 2_000_000, {}),
    "retrieving-lr-3e-3": (OTHERS, {}, 1_000_000, 2_000_000, {"lr_mixers": 3e-3}),
    "retrieving-muon": (
        OTHERS,
        CENTRED,
        1_000_000,
        2_000_000,
        {"optimizer": "muon", "lr_mixers": 2e-3, "lr_other": 6e-4},
    ),
    "retrieving-long": (
        OTHERS,
        {"init": "retrieving-centred"},
        0,
        8_000_000,
        {"sequence_length": 4096, "batch_size": 1},
    ),
    "direct": ("none", {"init": "align-centred"}, 0, 28_000_000, {}),
    "staged": ("none", {"init": "staged"}, 0, 28_000_000, {}),
    "halves": ("none", {"init": "halves"}, 0, 28_000_000, {}),
}
STAGE = {"align-centred": "align"}  # stage whose model another run begins with, if it is not match
# name: run that gives the layers RETRIEVING, run that gives the mixers of the other layers, and whether it gives all
# other weights outside RETRIEVING, too
JOINED = {"staged": ("retrieving-long", "align-centred", False), "halves": ("retrieving-long", "others", True)}


def make_recipe(name: str, options: argparse.Namespace) -> Recipe:
    """Return the recipe of a run with the texts and the folder of the command line."""
    layers, student, align, match, changes = RUNS[name]
    recipe = load_recipe("smollm2-135m-kda")
    length = {"calibration_tokens": 32_768, "calibration_sequence_length": 2048}
    spec = dataclasses.replace(recipe.student, full_attention_layers=layers, keep_rope=True, **length | student)
    if (start := student.get("init")) is not None:
        folder = joined_folder(options, start) if start in JOINED else finished(options, start)
        spec = dataclasses.replace(spec, init=str(folder))
    weights = {text: (1 - SPARSE) * weight for text, weight in zip(options.train, TEXT)}
    sparse = {f"sparse-recall:{text}": SPARSE / 2 for text in (options.train[0], options.train[2])}
    stage = Stage(sequence_length=2048, batch_size=2, lr_mixers=1e-3, lr_other=3e-4)
    return dataclasses.replace(
        recipe,
        name=run_folder(options, name).name,
        output=options.out,
        seed=options.seed,
        student=spec,
        data=dataclasses.replace(
            recipe.data, train=weights | sparse, heldout=options.heldout, folder=options.data, max_tokens=48_000_000
        ),
        align=dataclasses.replace(stage, tokens=align),
        match=dataclasses.replace(stage, tokens=match, **changes),
        extend=Stage(),
        run=dataclasses.replace(
            recipe.run, heldout_tokens=98_304, heldout_sequence_length=2048, eval_every=244, save_every_minutes=60.0
        ),
    )


def run_folder(options: argparse.Namespace, name: str) -> Path:
    return Path(options.out) / f"{name}-seed{options.seed}"


def finished(options: argparse.Namespace, name: str) -> Path:
    """Return the folder of a run's last model."""
    return run_folder(options, name) / STAGE.get(name, "match")


def joined_folder(options: argparse.Namespace, name: str) -> Path:
    return Path(options.out) / f"{name}-start-seed{options.seed}"


def join(retrieving: Path, others: Path, whole: Path, out: Path, all_weights: bool) -> None:
    """Write a model with KDA in all layers.

    Args:
        retrieving: Model whose layers RETRIEVING are KDA. It gives all weights that `others` does not.
        others: Model that gives the mixers of OTHERS.
        whole: Model with KDA in all layers, whose configuration is kept.
        out: Folder to write.
        all_weights: Whether `others` gives all weights outside the layers RETRIEVING.
    """
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (retrieving, others))
    layers = tuple(f"model.layers.{layer}." for layer in RETRIEVING)
    mixers = tuple(f"model.layers.{layer}.self_attn." for layer in OTHERS)

    def is_theirs(name: str) -> bool:
        return not name.startswith(layers) if all_weights else name.startswith(mixers)

    shutil.copytree(whole, out, dirs_exist_ok=True)
    with safe_open(whole / "model.safetensors", "pt") as model:
        joined = {name: (theirs if is_theirs(name) else ours)[name] for name in model.keys()}  # noqa: SIM118
    save_file(joined, out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", choices=list(RUNS), metavar="RUN", help=f"one of {', '.join(RUNS)}")
    parser.add_argument("--train", nargs=3, required=True, metavar="TEXT", help="textbooks, podcasts and books")
    parser.add_argument("--heldout", required=True, help="validation text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/retrieval-layers", help="folder of the runs")
    parser.add_argument("--data", default="runs/data", help="folder of token files")
    options = parser.parse_args()
    for name in options.runs:
        if name in JOINED:
            retrieving, others, all_weights = JOINED[name]
            models = [finished(options, run) for run in (retrieving, others, "align-centred")]
            join(*models, joined_folder(options, name), all_weights)
        recipe = make_recipe(name, options)
        folder = distill(recipe, resume=(recipe.folder / "recipe.yaml").exists())
        for stage, lines in read_stages(folder):
            for line in lines:
                if "heldout_kl" in line:
                    curve = " / ".join(f"{value:.2f}" for value in curve_of(line).values())
                    kl, recall = line["heldout_kl"], line.get("recall", float("nan"))
                    print(f"{name} {stage} {line['tokens']:>11,} tokens: KL {kl:.4f}, recall {recall:.2f}: {curve}")


if __name__ == "__main__":
    main()

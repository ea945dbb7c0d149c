"""Which layers of a hybrid stay attention: those that are measured to retrieve, or evenly spaced ones.

    python experiments/hybrid_layers.py --train TEXT --heldout TEXT --layers 1 2 4 7 10
    python experiments/hybrid_layers.py --train TEXT --heldout TEXT --layers 1 2 4 7 10 --tokens 4000000   # on a GPU

Prints KL and the recall curve of each hybrid of SmolLM2-135M-Instruct, before training or after `--tokens` tokens, an
eighth of them in align. Finished runs are not repeated. Without training, a hybrid takes minutes on a CPU.
"""

import argparse
import dataclasses
from pathlib import Path

from deltify.config import STAGES, Stage, load_recipe
from deltify.training.metrics import read_stages
from deltify.training.recall import curve_of
from deltify.training.runner import distill

LAYERS = 30  # of SmolLM2-135M-Instruct


def evenly_spaced(number: int) -> list[int]:
    """Return `number` of the layers, each in the middle of an equal part of all layers."""
    return [int((index + 0.5) * LAYERS / number) for index in range(number)]


def run(name: str, layers: str | list[int], options: argparse.Namespace) -> Path:
    """Convert, and train if there are tokens, and return the run's folder."""
    recipe = load_recipe("smollm2-135m-kda")
    stage = Stage(sequence_length=2048, batch_size=2, lr_mixers=1e-3, lr_other=3e-4)
    align, match = options.tokens // 8, options.tokens * 7 // 8
    if not options.tokens:  # nothing trains, but a recipe needs a stage
        match = stage.batch_size * stage.sequence_length
    student = dataclasses.replace(
        recipe.student,
        full_attention_layers=layers,
        keep_rope=options.keep_rope,
        calibration_tokens=options.calibration_tokens,
        calibration_sequence_length=2048,
    )
    weights = dict.fromkeys(options.train, 0.75 / len(options.train)) | {f"sparse-recall:{options.train[0]}": 0.25}
    recipe = dataclasses.replace(
        recipe,
        name=f"{name}-{options.tokens}-seed{options.seed}",
        output=options.out,
        seed=options.seed,
        student=student,
        data=dataclasses.replace(
            recipe.data,
            train=weights,
            heldout=options.heldout,
            folder=options.data,
            max_tokens=max(options.tokens, 2_000_000),
        ),
        run=dataclasses.replace(
            recipe.run, heldout_tokens=options.heldout_tokens, heldout_sequence_length=2048, eval_every=500
        ),
        align=dataclasses.replace(stage, tokens=align),
        match=dataclasses.replace(stage, tokens=match),
        extend=Stage(),
    )
    wanted = STAGES if options.tokens else ()
    return distill(recipe, resume=(recipe.folder / "recipe.yaml").exists(), stages=wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", required=True, metavar="TEXT", help="training texts")
    parser.add_argument("--heldout", required=True, help="validation text")
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 2, 4, 7, 10], help="numbers of attention layers")
    parser.add_argument("--tokens", type=int, default=0, help="tokens to train on (default: none)")
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--heldout-tokens", type=int, default=65_536, help="validation tokens")
    parser.add_argument("--keep-rope", action="store_true", help="whether attention layers keep their rotary positions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/hybrid-layers", help="folder of the runs")
    parser.add_argument("--data", default="runs/data", help="folder of token files")
    options = parser.parse_args()
    rows = []
    for number in options.layers:
        for name, layers in ((f"measured-{number}", f"measured:{number}"), (f"even-{number}", evenly_spaced(number))):
            folder = run(name, layers, options)
            line = [line for _, lines in read_stages(folder) for line in lines if "heldout_kl" in line][-1]
            curve = " / ".join(f"{value:.2f}" for value in curve_of(line).values())
            right = " / ".join(f"{100 * value:.0f}" for key, value in line.items() if key.startswith("recall_right"))
            rows.append(
                f"| {name} | {line['heldout_kl']:.3f} | {line.get('recall', float('nan')):.2f} | {curve} | {right} |"
            )
            print(rows[-1], flush=True)
    print("\n".join(["| attention layers | KL | recall | by distance | right, % |", "|---|---|---|---|---|", *rows]))


if __name__ == "__main__":
    main()

"""Draw docs/assets/recall-curves.png: recall over training tokens, for students that convert different layers.

    python experiments/draw_recall.py

Reads experiments/results/retrieval-layers.json, the validations of experiments/retrieval_layers.py and
experiments/hybrid_layers.py.
"""

import json
from pathlib import Path

from deltify.evaluation.plots import COLORS, open_figure

ROOT = Path(__file__).resolve().parent.parent
RUNS = {
    "half-others": "KDA in all layers but 17-24",
    "measured": "KDA in all layers but 14, 17, 18, 23 (measured:4)",
    "measured-1": "KDA in all layers but 18 (measured:1)",
    "even-7": "KDA in 23 layers, 7 evenly spaced ones stay attention",
    "even-1": "KDA in all layers but 15",
    "half-retrieving": "KDA in layers 17-24",
    "direct-wide": "KDA in all layers, heads of 128 channels",
    "direct": "KDA in all layers, heads of 64 channels",
}


def main() -> None:
    runs = json.loads((ROOT / "experiments/results/retrieval-layers.json").read_text())
    figure, ((axes,),) = open_figure(1, 1, 8, 4.2)
    for color, (name, label) in zip((*COLORS, "black"), RUNS.items(), strict=True):
        for seed, line in ((0, "-"), (1, "--")):
            rows = runs.get(f"{name}-seed{seed}", [])
            million = [row["tokens"] / 1e6 for row in rows]
            style = {"color": color, "linestyle": line, "marker": "o", "markersize": 3}
            axes.plot(million, [row["recall"] for row in rows], label=None if seed else label, **style)
    axes.set(xlabel="training tokens, millions", ylabel="recall, nats per token")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(ROOT / "docs/assets/recall-curves.png", dpi=140)


if __name__ == "__main__":
    main()

"""Draw docs/assets/decoding.png, the figure of the README, from results/smollm2-135m/results.json."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
MODELS = {
    "teacher": "teacher: attention",
    "hybrid": "hybrid: 3 KDA to 1 attention",
    "kda-only-88M": "KDA only",
}  # of the same sizes as kda-only


def main() -> None:
    """Draw the bytes of the cache and the milliseconds per token over the length of the context."""
    rows = json.loads((ROOT / "results/smollm2-135m/results.json").read_text())["decode"]
    figure, (cache, speed) = plt.subplots(1, 2, figsize=(9, 3.2))
    for model, label in MODELS.items():
        mine = [row for row in rows if row["model"] == model]
        contexts = [row["context"] for row in mine]
        cache.plot(contexts, [row["cache_bytes"] / 2**20 for row in mine], marker="o", label=label)
        speed.plot(contexts, [row["ms_per_token"] for row in mine], marker="o", label=label)
    cache.set(ylabel="cache, MiB", title="Memory")
    speed.set(ylabel="ms per token", title="Decoding")
    contexts = sorted({row["context"] for row in rows})
    for axes in (cache, speed):
        axes.set(xscale="log", yscale="log", xlabel="context, tokens")
        axes.set_xticks(contexts, [f"{context // 1024}k" for context in contexts])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    cache.set_yticks([5, 20, 100, 500], ["5", "20", "100", "500"])
    speed.set_yticks([1, 3, 10, 60], ["1", "3", "10", "60"])
    cache.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs/assets/decoding.png", dpi=140)


if __name__ == "__main__":
    main()

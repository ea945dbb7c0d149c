"""Results as a table in the terminal, and as a picture."""

import json
from pathlib import Path

from rich.table import Table

from .distill import console


def report(run: Path) -> list[Path]:
    """Prints the table and the samples of a run, and draws its training curves; returns the pictures' paths.

    Raises:
        FileNotFoundError: if the run was not evaluated.
    """
    if not (run / "results.json").is_file():
        raise FileNotFoundError(f"{run} has no results.json; run: deltify evaluate {run}")
    results = json.loads((run / "results.json").read_text())
    console.print(score_table(results))
    for name, texts in results["samples"].items():
        console.print(f"\n[bold]{name}[/] writes")
        for text in texts:
            console.print(f"  {' '.join(text.split())!r}", highlight=False, markup=False)
    pictures = draw_curves(run, results)
    console.print(f"\ntraining curves: {', '.join(str(path) for path in pictures)}")
    return pictures


def score_table(results: dict) -> Table:
    title = f"{results['teacher']}: {results['heldout_tokens']:,} held-out tokens, rows of {results['heldout_length']}"
    table = Table(title=title)
    table.add_column("model")
    for column in ("trained on, tokens", "perplexity", "KL to teacher, nats/token", "top-1 agreement"):
        table.add_column(column, justify="right")
    for score in results["scores"]:
        table.add_row(
            score["name"],
            f"{score['tokens']:,}" if score["tokens"] else "-",
            f"{score['perplexity']:,.1f}",
            "-" if score["kl"] is None else f"{score['kl']:.3f}",
            "-" if score["top1"] is None else f"{100 * score['top1']:.1f}%",
        )
    return table


def draw_curves(run: Path, results: dict) -> list[Path]:
    """Held-out KL and training loss over tokens, one colour a stage, as PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    before, last = 0, None
    for color, stage in zip(
        ("tab:gray", "tab:blue", "tab:orange", "tab:green"), ("converted", "align", "match", "extend")
    ):
        mine = [r for r in records if r["stage"] == stage]
        judged = [(before + r["tokens"], r["heldout_kl"]) for r in mine if "heldout_kl" in r]
        if not judged:
            continue
        line = ([last] if last else []) + judged
        left.plot(*zip(*line), "o-", color=color, label=f"{stage}: {judged[-1][1]:.2f}", markersize=3)
        last = judged[-1]
        losses = [(before + r["tokens"], r["loss"]) for r in mine if "loss" in r]
        if losses:
            unit = "relative error of mixers" if stage == "align" else "KL to teacher"
            right.plot(*zip(*losses), color=color, label=f"{stage}: {unit}", linewidth=1)
        before += mine[-1]["tokens"]
    for score in results["scores"]:
        if score["name"] == "unigram model":
            teacher = results["scores"][0]["perplexity"]
            left.set_title(f"perplexity: teacher {teacher:.1f}, unigram model {score['perplexity']:,.0f}", fontsize=9)
    left.set_ylabel("held-out KL to teacher, nats per token")
    right.set_ylabel("training loss")
    for axis in (left, right):
        axis.set_xlabel("tokens trained on")
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"{run.name}: {results['teacher']} to KDA")
    paths = [run / f"curves.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths

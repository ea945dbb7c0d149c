"""Figures of training, needles, recall, positions and decoding, each as PNG and SVG with all models side by side."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..training.metrics import read_stages
from ..utils.formats import short
from .training_charts import recall_points

if TYPE_CHECKING:  # matplotlib is imported when a figure is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# colours that colour-blind readers can tell apart
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c510a")
MARKERS = "osD^vPX"


def style(names: Sequence[str]) -> dict[str, dict]:
    """Return line styles by model. The teacher's line is black and wide, lines of controls are dashed."""
    others = [name for name in names if name != "teacher"]
    looks = {"teacher": {"color": "black", "marker": "o", "linewidth": 3.5, "alpha": 0.6}} if "teacher" in names else {}
    for number, name in enumerate(others):
        control = name.startswith("teacher,") or "zeroed" in name
        looks[name] = {
            "color": COLORS[number % len(COLORS)],
            "marker": MARKERS[(number + 1) % len(MARKERS)],
            "linestyle": "--" if control else "-",
        }
    return {name: {"markersize": 4, "linewidth": 1.5, **looks[name]} for name in names}


def open_figure(rows: int, columns: int, width: float, height: float) -> tuple["Figure", np.ndarray]:
    """Return a figure and its axes [rows, columns], without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)


def save(figure: "Figure", stem: str | Path) -> list[Path]:
    """Write stem.png and stem.svg, and return their paths."""
    import matplotlib.pyplot as plt

    paths = [Path(f"{stem}.{kind}") for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths


def token_axis(axis: "Axes", ticks: Sequence[int], label: str) -> None:
    """Make x a logarithmic axis of tokens with a tick at each of `ticks`."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [short(tick) for tick in ticks], rotation=45 if len(ticks) > 9 else 0)
    axis.minorticks_off()
    axis.set_xlabel(label)
    axis.grid(alpha=0.3)


def mark_trained(axis: "Axes", trained: int | None) -> None:
    """Draw a dotted line at the training length."""
    if trained is not None:
        axis.axvline(trained, color="gray", linestyle=":", linewidth=1.5)


def finish(figure: "Figure", axis: "Axes", title: str, trained: int | None) -> None:
    """Add a title, the meaning of the dotted line, and one legend for all panels."""
    line = "" if trained is None else f". Dotted line: training length, {short(trained)}"
    figure.suptitle(textwrap.fill(f"{title}{line}", int(13 * figure.get_figwidth())), fontsize=10)
    columns = max(1, int(figure.get_figwidth() / 3.4))
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, handlelength=3)


def ordered(rows: list[dict], field: str) -> list:
    """Return the distinct values of a field in their order."""
    return list(dict.fromkeys(row[field] for row in rows))


# ---- training --------------------------------------------------------------------------------------------------------


def draw_training(run: Path, results: dict) -> list[Path]:
    """Draw held-out KL and training loss over tokens from a run's metrics.jsonl, with a colour for each stage.

    A third panel has the recall curve, if the run measured it.
    """
    from matplotlib.ticker import EngFormatter

    stages = list(read_stages(run))
    recalls = [record for _, records in stages for record in records if "recall" in record]
    figure, ((left, right, *more),) = open_figure(1, 2 + bool(recalls), 11 + 5 * bool(recalls), 4)
    last = None
    for color, (stage, records) in zip(("gray", *COLORS), stages):
        validated = [(r["tokens"], r["heldout_kl"]) for r in records if "heldout_kl" in r]
        if not validated:
            continue
        line = ([last] if last else []) + validated
        left.plot(*zip(*line), "o-", color=color, label=f"{stage}: {validated[-1][1]:.2f}", markersize=3)
        last = validated[-1]
        losses = [(r["tokens"], r["loss"]) for r in records if "loss" in r]
        if losses:
            unit = "relative error of mixers" if stage == "align" else "KL to teacher"
            right.plot(*zip(*losses), color=color, label=f"{stage}: {unit}", linewidth=1)
    scores = {score["name"]: score["perplexity"] for score in results.get("scores", [])}
    if "unigram model" in scores:
        text = f"Perplexity: teacher {scores['teacher']:.1f}, unigram model {scores['unigram model']:,.0f}"
        left.set_title(text, fontsize=9)
    left.set_ylabel("KL to teacher on held-out text, nats per token")
    right.set_ylabel("training loss")
    for axis in more:
        draw_recall_over_tokens(axis, recalls)
    for axis in (left, right):
        axis.set_ylim(bottom=0)
    for axis in (left, right, *more):
        axis.set_xlabel("training tokens")
        axis.xaxis.set_major_formatter(EngFormatter())
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"Training of {run.name}, a student of {results['teacher']}", fontsize=10)
    return save(figure, run / "curves")


def draw_recall_over_tokens(axis: "Axes", records: list[dict]) -> None:
    """Draw the recall curve of each validation over tokens, with a line for each distance."""
    mean, *distances = recall_points(records).items()
    axis.plot(*zip(*mean[1]), "k-", label=mean[0], linewidth=2)
    for number, (name, points) in enumerate(distances):
        axis.plot(*zip(*points), color=COLORS[number % len(COLORS)], label=name, linewidth=1)
    axis.set_ylabel("log-probability of answer tokens, nats")


# ---- needles ---------------------------------------------------------------------------------------------------------


def draw_heat_map(
    rows: list[dict], stem: str | Path, *, tasks: Sequence[str] | None = None, trained: int | None = None
) -> list[Path]:
    """Draw the fraction of values found by length and depth, with a panel for each model.

    Each value counts at its own depth.

    Args:
        rows: Rows of `needles.ask_needles`.
        stem: Path of the figure without its suffix.
        tasks: Tasks that are drawn together. Defaults to all.
        trained: Training length in tokens. A red line separates lengths up to it from those beyond.
    """
    tasks = list(tasks or ordered(rows, "task"))
    rows = [row for row in rows if row["task"] in tasks]
    if not rows:
        raise ValueError(f"There are no rows of {', '.join(tasks)}.")
    models, lengths = ordered(rows, "model"), sorted(set(ordered(rows, "length")))
    depths = sorted({depth for row in rows for depth in row["depths"]})
    within = 0 if trained is None else sum(length <= trained for length in lengths)
    marked = 0 < within < len(lengths)
    columns = min(3, len(models))
    lines = -(-len(models) // columns)
    width, height = max(1.6 + 0.55 * len(lengths), 2.4), max(1.2 + 0.3 * len(depths), 1.9)
    figure, axes = open_figure(lines, columns, max(columns * width, 5), max(lines * height, 3))
    image, counts, has_gaps = None, set(), False
    for number, axis in enumerate(axes.flat):
        if number >= len(models):
            axis.set_axis_off()
            continue
        found, asked = count_hits([row for row in rows if row["model"] == models[number]], depths, lengths)
        counts |= {int(count) for count in asked.flat if count}
        has_gaps |= bool((asked == 0).any())
        image = draw_heat_panel(axis, np.divide(found, asked, out=np.full_like(found, np.nan), where=asked > 0))
        if marked:
            axis.axvline(within - 0.5, color="red", linewidth=1.5)
        axis.set_title(textwrap.fill(models[number], max(22, int(12 * width))), fontsize=9)
        axis.set_xticks(range(len(lengths)), [short(length) for length in lengths], fontsize=8)
        axis.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=8)
    figure.supylabel("depth of the needle, %", fontsize=9)
    figure.supxlabel("length, tokens", fontsize=9)
    values = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    notes = f". Red line: training length, {short(trained)}" if trained is not None and marked else ""
    notes += ". -: not measured" if has_gaps else ""
    title = f"Values found, %: {', '.join(tasks)}\n{values} value{'s' * (counts != {1})} per cell{notes}"
    figure.suptitle(title, fontsize=10)
    assert image is not None  # there are rows, so there is a model
    figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02, format=lambda value, _: f"{100 * value:.0f}%")
    return save(figure, stem)


def draw_heat_panel(axis: "Axes", fraction: np.ndarray) -> "AxesImage":
    """Draw fractions [depths, lengths] as colours and as percentages. NaN is drawn as a dash."""
    image = axis.imshow(fraction, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (y, x), value in np.ndenumerate(fraction):
        text, color = ("-", "gray")
        if not np.isnan(value):
            text, color = f"{100 * value:.0f}", "white" if value < 0.6 else "black"
        axis.text(x, y, text, ha="center", va="center", fontsize=7, color=color)
    return image


def count_hits(rows: list[dict], depths: list[float], lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of values found and of values asked for, [depths, lengths] each."""
    found, asked = np.zeros((2, len(depths), len(lengths)))
    for row in rows:
        for depth, hit in zip(row["depths"], row["hits"]):
            cell = depths.index(depth), lengths.index(row["length"])
            found[cell] += hit
            asked[cell] += 1
    return found, asked


def draw_by_length(summary: list[dict], stem: str | Path, *, trained: int | None = None) -> list[Path]:
    """Draw needle scores by length, with a panel for each task and a line for each model.

    Args:
        summary: Rows of `needles.summarise`.
        stem: Path of the figure without its suffix.
        trained: Training length in tokens, which a dotted line marks.
    """
    if not summary:
        raise ValueError("There are no needle results to draw.")
    tasks, models = ordered(summary, "task"), ordered(summary, "model")
    looks, columns = style(models), min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    figure, axes = open_figure(lines, columns, max(3.2 * columns, 6), 2.6 * lines + 0.8 + 0.5 * (lines == 1))
    for number, axis in enumerate(axes.flat):
        if number >= len(tasks):
            axis.set_axis_off()
            continue
        of_task = [row for row in summary if row["task"] == tasks[number]]
        for model in models:
            line = sorted((r["length"], r["score"], r["stderr"] or 0.0) for r in of_task if r["model"] == model)
            if line:
                x, y, error = (np.array(part) for part in zip(*line))
                bars = np.array([np.minimum(error, y), np.minimum(error, 1 - y)]) * 100
                axis.errorbar(x, 100 * y, bars, label=model, capsize=2, elinewidth=0.8, **looks[model])
        token_axis(
            axis, sorted({row["length"] for row in of_task}), "length, tokens" if number + columns >= len(tasks) else ""
        )
        mark_trained(axis, trained)
        axis.set_ylim(-4, 104)
        axis.set_title(tasks[number], fontsize=9)
        if number % columns == 0:
            axis.set_ylabel("values found, %")
    items = sorted({row["items"] for row in summary})
    number = f"{items[0]}" if len(items) == 1 else f"{items[0]} to {items[-1]}"
    title = f"Needles by length. {number} samples per point, bars: ± one standard error"
    finish(figure, axes[0, 0], title, trained)
    return save(figure, stem)


# ---- recall, positions and decoding ----------------------------------------------------------------------------------


def draw_recall(rows: list[dict], stem: str | Path, *, trained: int | None = None) -> list[Path]:
    """Draw the recall curve, with a panel for each task and a line for each model.

    Args:
        rows: Rows of `recall_curve.measure_recall`.
        stem: Path of the figure without its suffix.
        trained: Training length in tokens, which a dotted line marks.
    """
    if not rows:
        raise ValueError("There are no rows of the recall curve to draw.")
    tasks, models = ordered(rows, "task"), ordered(rows, "model")
    looks, distances = style(models), sorted(set(ordered(rows, "distance")))
    figure, (axes,) = open_figure(1, len(tasks), max(3.4 * len(tasks), 6), 4.2)
    for axis, task in zip(axes, tasks):
        for model in models:
            line = [row for row in rows if (row["task"], row["model"]) == (task, model)]
            x, y = ([row[field] for row in line] for field in ("distance", "log_prob"))
            bars = [row["log_prob_stderr"] or 0.0 for row in line]
            axis.errorbar(x, y, bars, label=model, capsize=2, elinewidth=0.8, **looks[model])
        token_axis(axis, distances, "smallest distance, tokens")
        mark_trained(axis, trained)
        axis.set_title(task, fontsize=9)
    axes[0].set_ylabel("log-probability of answer tokens, nats")
    title = "Recall by distance. Points: means from one tick to the next, bars: ± one standard error"
    finish(figure, axes[0], title, trained)
    return save(figure, stem)


def draw_by_position(rows: list[dict], stem: str | Path, *, trained: int | None = None) -> list[Path]:
    """Draw KL to the teacher and perplexity by position, with a line for each model.

    Args:
        rows: Rows of `positions.by_position`.
        stem: Path of the figure without its suffix.
        trained: Training length in tokens, which a dotted line marks.
    """
    if not rows:
        raise ValueError("There are no rows of positions to draw.")
    models = ordered(rows, "model")
    looks = style(models)
    figure, ((left, right),) = open_figure(1, 2, 11, 4.6)
    edges = sorted({row["end"] for row in rows})
    for model in models:
        of_model = sorted((row for row in rows if row["model"] == model), key=lambda row: row["start"])
        for axis, field, error in ((left, "kl", "kl_stderr"), (right, "perplexity", "loss_stderr")):
            known = [row for row in of_model if row[field] is not None]
            if not known or (model == "teacher" and field == "kl"):
                continue
            x = [np.sqrt(max(row["start"], row["end"] / 4) * row["end"]) for row in known]
            y = np.array([row[field] for row in known])
            spread = np.array([row[error] or 0.0 for row in known])
            if field == "perplexity":
                spread = y * np.expm1(spread)
            axis.errorbar(x, y, spread, label=model, capsize=2, elinewidth=0.8, **looks[model])
    for axis in (left, right):
        axis.set_yscale("log")
        token_axis(axis, edges, "position in the document, tokens")
        mark_trained(axis, trained)
        plain_log_ticks(axis)
    left.set_ylabel("KL to teacher, nats per token")
    right.set_ylabel("perplexity")
    documents = max(row["documents"] for row in rows)
    limit = max((row["end"] for row in rows if row["model"] == "teacher"), default=0)
    beyond = f". Context window of the teacher: {short(limit)}" if limit < edges[-1] else ""
    bars = ", bars: ± one standard error" if documents > 1 else ""
    number = f"{documents} document{'s' * (documents > 1)}"
    title = f"KL and perplexity by position in {number}. Points: means between two ticks{bars}{beyond}"
    finish(figure, right, title, trained)
    return save(figure, stem)


def plain_log_ticks(axis: "Axes") -> None:
    """Label a logarithmic y axis with plain numbers at 1, 2 and 5 of each decade, and widen a narrow one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_ylim()
    if high < 4 * low:
        axis.set_ylim(low / 1.5, high * 1.5)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def draw_decode_cost(rows: list[dict], stem: str | Path) -> list[Path]:
    """Draw memory and milliseconds per token by context, with a line for each model.

    Args:
        rows: Rows of `decode_cost.decode_cost`.
        stem: Path of the figure without its suffix.
    """
    if not rows:
        raise ValueError("There are no rows of decoding to draw.")
    models, contexts = ordered(rows, "model"), sorted({row["context"] for row in rows})
    looks = style(models)
    figure, ((left, right),) = open_figure(1, 2, 11, 4.4)
    for model in models:
        of_model = sorted((row for row in rows if row["model"] == model), key=lambda row: row["context"])
        x = [row["context"] for row in of_model]
        left.plot(x, [row["cache_bytes"] / 2**20 for row in of_model], label=model, **looks[model])
        right.plot(x, [row["ms_per_token"] for row in of_model], label=model, **looks[model])
    for axis in (left, right):
        token_axis(axis, contexts, "context, tokens")
    left.set_yscale("log")
    plain_log_ticks(left)
    left.set_ylabel("cache, MiB")
    right.set_ylabel("time per token, ms")
    right.set_ylim(bottom=0)
    devices = ", ".join(
        f"{device} ({dtype})" for device, dtype in dict.fromkeys((r["device"], r["dtype"]) for r in rows)
    )
    finish(figure, left, f"Decoding with batch size 1 on {devices}", None)
    return save(figure, stem)

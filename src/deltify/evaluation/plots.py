"""All pictures, models side by side, each as PNG and SVG: training, needles, positions, decoding."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..training.metrics import read_stages

COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
    "#8c510a",
)  # apart for colour-blind eyes, too
MARKERS = "osD^vPX"


def style(names: Sequence[str]) -> dict[str, dict]:
    """Line styles by model: the teacher black and broad, so that it shows behind others, controls dashed."""
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


def short(tokens: float) -> str:
    """512, 4k, 1.5k, 1M."""
    for unit, letter in ((2**20, "M"), (2**10, "k")):
        if tokens >= unit:
            return f"{tokens / unit:.3g}{letter}"
    return f"{tokens:g}"


def open_figure(rows: int, columns: int, width: float, height: float):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)


def save(figure, stem: str | Path) -> list[Path]:
    """Writes stem.png and stem.svg."""
    import matplotlib.pyplot as plt

    paths = [Path(f"{stem}.{kind}") for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths


def token_axis(axis, ticks: Sequence[int], label: str) -> None:
    """A log2 axis of tokens, with a tick at each of `ticks`."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [short(tick) for tick in ticks], rotation=45 if len(ticks) > 9 else 0)
    axis.minorticks_off()
    axis.set_xlabel(label)
    axis.grid(alpha=0.3)


def mark_trained(axis, trained: int | None) -> None:
    if trained is not None:
        axis.axvline(trained, color="gray", linestyle=":", linewidth=1.5)


def finish(figure, axis, title: str, trained: int | None) -> None:
    """A title, what the dotted line means, and one legend below all panels."""
    line = "" if trained is None else f"; dotted line: trained to {short(trained)}"
    figure.suptitle(textwrap.fill(f"{title}{line}", int(13 * figure.get_figwidth())), fontsize=10)
    columns = max(1, int(figure.get_figwidth() / 3.4))
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, handlelength=3)


def ordered(rows: list[dict], field: str) -> list:
    return list(dict.fromkeys(row[field] for row in rows))


# ---- training --------------------------------------------------------------------------------------------------------


def draw_training(run: Path, results: dict) -> list[Path]:
    """Held-out KL and training loss over tokens, one colour a stage, from a run's metrics.jsonl."""
    from matplotlib.ticker import EngFormatter

    figure, ((left, right),) = open_figure(1, 2, 11, 4)
    last = None
    for color, (stage, mine) in zip(("gray", *COLORS), read_stages(run)):
        judged = [(r["tokens"], r["heldout_kl"]) for r in mine if "heldout_kl" in r]
        if not judged:
            continue
        line = ([last] if last else []) + judged
        left.plot(*zip(*line), "o-", color=color, label=f"{stage}: {judged[-1][1]:.2f}", markersize=3)
        last = judged[-1]
        losses = [(r["tokens"], r["loss"]) for r in mine if "loss" in r]
        if losses:
            unit = "relative error of mixers" if stage == "align" else "KL to teacher"
            right.plot(*zip(*losses), color=color, label=f"{stage}: {unit}", linewidth=1)
    scores = {score["name"]: score["perplexity"] for score in results.get("scores", [])}
    if "unigram model" in scores:
        text = f"perplexity: teacher {scores['teacher']:.1f}, unigram model {scores['unigram model']:,.0f}"
        left.set_title(text, fontsize=9)
    left.set_ylabel("held-out KL to teacher, nats per token")
    right.set_ylabel("training loss")
    for axis in (left, right):
        axis.set_xlabel("tokens trained on")
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_formatter(EngFormatter())
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"{run.name}: {results['teacher']} to KDA", fontsize=10)
    return save(figure, run / "curves")


# ---- needles ---------------------------------------------------------------------------------------------------------


def draw_heat_map(
    rows: list[dict], stem: str | Path, *, tasks: Sequence[str] | None = None, trained: int | None = None
) -> list[Path]:
    """Share of values found by length and depth, one panel per model; `rows` from `needle.ask_needles`.

    Each value counts at its own depth. `tasks`: those to draw, together; all if absent. `trained`: tokens of the
    longest training rows; a line stands between the lengths within and those beyond.
    """
    tasks = list(tasks or ordered(rows, "task"))
    rows = [row for row in rows if row["task"] in tasks]
    if not rows:
        raise ValueError(f"there are no rows of {', '.join(tasks)}")
    models, lengths = ordered(rows, "model"), sorted(set(ordered(rows, "length")))
    depths = sorted({depth for row in rows for depth in row["depths"]})
    within = 0 if trained is None else sum(length <= trained for length in lengths)
    marked = 0 < within < len(lengths)
    columns = min(3, len(models))
    lines = -(-len(models) // columns)
    width, height = 1.6 + 0.55 * len(lengths), 1.2 + 0.3 * len(depths)
    width, height = max(width, 2.4), max(height, 1.9)
    figure, axes = open_figure(lines, columns, max(columns * width, 5), max(lines * height, 3))
    image, counts, unasked = None, set(), False
    for number, axis in enumerate(axes.flat):
        if number >= len(models):
            axis.set_axis_off()
            continue
        found, asked = count_hits([row for row in rows if row["model"] == models[number]], depths, lengths)
        counts |= {int(count) for count in asked.flat if count}
        unasked |= bool((asked == 0).any())
        share = np.divide(found, asked, out=np.full_like(found, np.nan), where=asked > 0)
        image = axis.imshow(share, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for (y, x), value in np.ndenumerate(share):
            text, color = (
                ("-", "gray") if np.isnan(value) else (f"{100 * value:.0f}", "white" if value < 0.6 else "black")
            )
            axis.text(x, y, text, ha="center", va="center", fontsize=7, color=color)
        if marked:
            axis.axvline(within - 0.5, color="red", linewidth=1.5)
        axis.set_title(textwrap.fill(models[number], max(22, int(12 * width))), fontsize=9)
        axis.set_xticks(range(len(lengths)), [short(length) for length in lengths], fontsize=8)
        axis.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=8)
    figure.supylabel("depth of the needle, %", fontsize=9)
    figure.supxlabel("length, tokens", fontsize=9)
    items = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    line = f"; red line: trained to {short(trained)}" if trained is not None and marked else ""
    line += "; -: not asked" if unasked else ""
    figure.suptitle(
        f"{', '.join(tasks)}: values found, %\n{items} value{'s' * (counts != {1})} a cell{line}", fontsize=10
    )
    figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02, format=lambda value, _: f"{100 * value:.0f}%")
    return save(figure, stem)


def count_hits(rows: list[dict], depths: list[float], lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Values found and values asked for, [depths, lengths] each."""
    found, asked = np.zeros((2, len(depths), len(lengths)))
    for row in rows:
        for depth, hit in zip(row["depths"], row["hits"]):
            place = depths.index(depth), lengths.index(row["length"])
            found[place] += hit
            asked[place] += 1
    return found, asked


def draw_by_length(summary: list[dict], stem: str | Path, *, trained: int | None = None) -> list[Path]:
    """Score by length, one panel per task and one line per model; `summary` from `needle.summarise`."""
    if not summary:
        raise ValueError("there are no needle results to draw")
    tasks, models = ordered(summary, "task"), ordered(summary, "model")
    looks, columns = style(models), min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    figure, axes = open_figure(lines, columns, max(3.2 * columns, 6), 2.6 * lines + 0.8 + 0.5 * (lines == 1))
    for number, axis in enumerate(axes.flat):
        if number >= len(tasks):
            axis.set_axis_off()
            continue
        mine = [row for row in summary if row["task"] == tasks[number]]
        for model in models:
            line = sorted((r["length"], r["score"], r["stderr"] or 0.0) for r in mine if r["model"] == model)
            if line:
                x, y, error = (np.array(part) for part in zip(*line))
                bars = np.array([np.minimum(error, y), np.minimum(error, 1 - y)]) * 100
                axis.errorbar(x, 100 * y, bars, label=model, capsize=2, elinewidth=0.8, **looks[model])
        token_axis(
            axis, sorted({row["length"] for row in mine}), "length, tokens" if number + columns >= len(tasks) else ""
        )
        mark_trained(axis, trained)
        axis.set_ylim(-4, 104)
        axis.set_title(tasks[number], fontsize=9)
        if number % columns == 0:
            axis.set_ylabel("values found, %")
    items = sorted({row["items"] for row in summary})
    number = f"{items[0]}" if len(items) == 1 else f"{items[0]} to {items[-1]}"
    title = f"needles by length; {number} samples a point, bars: ± one standard error"
    finish(figure, axes[0, 0], title, trained)
    return save(figure, stem)


# ---- positions and decoding ------------------------------------------------------------------------------------------


def draw_by_position(rows: list[dict], stem: str | Path, *, trained: int | None = None) -> list[Path]:
    """KL to the teacher and perplexity by position, one line per model; `rows` from `longcontext.by_position`."""
    if not rows:
        raise ValueError("there are no rows of positions to draw")
    models = ordered(rows, "model")
    looks = style(models)
    figure, ((left, right),) = open_figure(1, 2, 11, 4.6)
    edges = sorted({row["end"] for row in rows})
    for model in models:
        mine = sorted((row for row in rows if row["model"] == model), key=lambda row: row["start"])
        for axis, field, error in ((left, "kl", "kl_stderr"), (right, "perplexity", "loss_stderr")):
            known = [row for row in mine if row[field] is not None]
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
    left.set_ylabel("KL from the teacher, nats per token")
    right.set_ylabel("perplexity")
    documents = max(row["documents"] for row in rows)
    limit = max((row["end"] for row in rows if row["model"] == "teacher"), default=0)
    beyond = f"; the teacher reads to {short(limit)}" if limit < edges[-1] else ""
    bars = ", bars: ± one standard error" if documents > 1 else ""
    title = f"{documents} document{'s' * (documents > 1)}; each point: the tokens between two ticks{bars}{beyond}"
    finish(figure, right, title, trained)
    return save(figure, stem)


def plain_log_ticks(axis) -> None:
    """Numbers, not powers of ten, at 1, 2 and 5 of each decade; a decade at least is shown."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_ylim()
    if high < 4 * low:
        axis.set_ylim(low / 1.5, high * 1.5)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def draw_decode_cost(rows: list[dict], stem: str | Path) -> list[Path]:
    """Memory and milliseconds per token by context, one line per model; `rows` from `longcontext.decode_cost`."""
    if not rows:
        raise ValueError("there are no rows of decoding to draw")
    models, contexts = ordered(rows, "model"), sorted({row["context"] for row in rows})
    looks = style(models)
    figure, ((left, right),) = open_figure(1, 2, 11, 4.4)
    for model in models:
        mine = sorted((row for row in rows if row["model"] == model), key=lambda row: row["context"])
        x = [row["context"] for row in mine]
        left.plot(x, [row["cache_bytes"] / 2**20 for row in mine], label=model, **looks[model])
        right.plot(x, [row["ms_per_token"] for row in mine], label=model, **looks[model])
    for axis in (left, right):
        token_axis(axis, contexts, "tokens read before")
    left.set_yscale("log")
    plain_log_ticks(left)
    left.set_ylabel("memory of one text, MiB")
    right.set_ylabel("time of one token, ms")
    right.set_ylim(bottom=0)
    where = ", ".join(f"{device} ({dtype})" for device, dtype in dict.fromkeys((r["device"], r["dtype"]) for r in rows))
    finish(figure, left, f"decoding, one text at a time, on {where}", None)
    return save(figure, stem)

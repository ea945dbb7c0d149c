"""Charts of report.html, made from rows of results.json."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup

from ..training.metrics import read_stages
from ..utils.formats import short
from .comparison import FOUND, Kept, Recall
from .plots import count_hits, ordered
from .svg import COLOURS, Axis, Line, Look, bar_chart, line_chart, log_ticks, ticks
from .tables import amount
from .training_charts import MOST_POINTS, training_curves

PERCENT = Axis("needles found, %", (0, 20, 40, 60, 80, 100), limits=(0, 100))


@dataclass(frozen=True)
class HeatMap:
    """Fractions by row and column. None where nothing was measured."""

    name: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float | None]]]


@dataclass(frozen=True)
class Charts:
    """Charts that share a legend.

    Args:
        charts: Heading and SVG of each chart.
        looks: Look of each line, for the legend.
        note: Sentences below the legend.
        heat_maps: Heat maps, folded.
        heat_title: What they show.
    """

    charts: Sequence[tuple[str, Markup]]
    looks: dict[str, Look]
    note: str = ""
    heat_maps: Sequence[HeatMap] = field(default_factory=list)
    heat_title: str = ""


def looks_of(results: dict) -> dict[str, Look]:
    """Return the look of each model in results.json. Lines of controls are dashed."""
    students = [student["name"] for student in results.get("students", [])]
    rows = (row for key in ("needles", "recall", "positions", "decode") for row in results.get(key, []))
    others = [name for name in dict.fromkeys(row["model"] for row in rows) if name not in ("teacher", *students)]
    names = dict.fromkeys([*students, *others])
    return {"teacher": Look(0)} | {
        name: Look(1 + number % COLOURS, dashed=name not in students) for number, name in enumerate(names)
    }


def used(looks: dict[str, Look], rows: Sequence[dict]) -> dict[str, Look]:
    """Return the looks of the models that have rows."""
    models = {row["model"] for row in rows}
    return {name: look for name, look in looks.items() if name in models}


def tokens_axis(label: str, values: Sequence[int]) -> Axis:
    """Return a logarithmic axis of tokens with a tick at each value."""
    return Axis(label, sorted(set(values)), log=True, show=short)


def model_lines(rows: Sequence[dict], x: str, point: Callable[[dict], tuple[float, float, str]]) -> list[Line]:
    """Return a line for each model.

    Args:
        rows: Rows with a model.
        x: Field of the rows that is drawn to the right.
        point: Function that returns height, error and value of the tooltip of a row.
    """
    points: dict[str, list] = {}
    for row in sorted(rows, key=lambda row: row[x]):
        height, error, shown = point(row)
        points.setdefault(row["model"], []).append((row[x], height, error, f"{row['model']}, {short(row[x])}: {shown}"))
    return [Line(model, points[model]) for model in ordered(list(rows), "model")]


# ---- the first screen ------------------------------------------------------------------------------------------------


def kept_chart(kept: Kept) -> Markup:
    """Return the share kept in each task that counts."""
    bars = [(task, ratio, (low, high), f"{100 * ratio:.0f} %") for task, (ratio, low, high) in kept.ratios.items()]
    return bar_chart("score above chance, in percent of the teacher's", bars)


def cost_chart(results: dict, student: str, looks: dict[str, Look]) -> Markup:
    """Return the memory of the context of a student and its teacher."""
    rows = [row for row in results["decode"] if row["model"] in ("teacher", student)]
    return memory_chart(rows, looks)


def recall_chart(recall: Recall, student: str, looks: dict[str, Look]) -> Markup:
    """Return the fraction of needles found by length, in the tasks that count, with a line at `FOUND`."""
    curves = {"teacher": recall.teacher_curve, student: recall.curve}
    lines = [
        Line(name, [(length, 100 * y, 0, f"{name}, {short(length)}: {100 * y:.0f} %") for length, y in curve.items()])
        for name, curve in curves.items()
        if curve
    ]
    lengths = [length for curve in curves.values() for length in curve]
    x = tokens_axis("length of the text, tokens", lengths)
    return line_chart("Needles found by length", lines, looks, x, PERCENT, rule=100 * FOUND)


# ---- the sections ----------------------------------------------------------------------------------------------------


def memory_chart(rows: Sequence[dict], looks: dict[str, Look]) -> Markup:
    """Return the memory of the context by its length."""
    lines = model_lines(rows, "context", lambda row: (mib := row["cache_bytes"] / 2**20, 0, f"{amount(mib)} MiB"))
    values = [y for line in lines for _, y, _, _ in line.points]
    y_axis = Axis("memory of the context, MiB", log_ticks(min(values), max(values)), log=True)
    x_axis = tokens_axis("context, tokens", [row["context"] for row in rows])
    return line_chart("Memory of the context by its length", lines, looks, x_axis, y_axis)


def time_chart(rows: Sequence[dict], looks: dict[str, Look]) -> Markup:
    """Return the time per token by context."""
    lines = model_lines(rows, "context", lambda row: (ms := row["ms_per_token"], 0, f"{amount(ms)} ms"))
    y_axis = Axis("time per token, ms", ticks(0, max(row["ms_per_token"] for row in rows)))
    x_axis = tokens_axis("context, tokens", [row["context"] for row in rows])
    return line_chart("Time per token by context", lines, looks, x_axis, y_axis)


def decode_charts(rows: list[dict], looks: dict[str, Look]) -> Charts:
    """Return memory and time of decoding."""
    charts = [("Memory", memory_chart(rows, looks)), ("Time", time_chart(rows, looks))]
    return Charts(charts, used(looks, rows))


def needle_charts(results: dict, looks: dict[str, Look], trained: int | None) -> Charts:
    """Return the needles found by length, a chart for each task, and heat maps by depth."""
    rows, charts, nothing = results["needles"], [], []
    for task in ordered(rows, "task"):
        of_task = [row for row in rows if row["task"] == task]
        if not any(row["score"] for row in of_task):
            nothing.append(task)
            continue
        lines = model_lines(of_task, "length", needle_point)
        x = tokens_axis("length of the text, tokens", [row["length"] for row in of_task])
        charts.append((task, line_chart(f"{task}: needles found", lines, looks, x, PERCENT, trained=trained)))
    note = f"No model finds anything in {', '.join(nothing)}." if nothing else ""
    if charts:
        note = with_trained(f"Error bars: one standard error. {note}".strip(), trained)
    maps = heat_maps(results.get("needle_rows", []))
    tasks = ", ".join(ordered(results.get("needle_rows", []), "task"))
    title = f"By depth of the needle in percent of the text: values found in all tasks together ({tasks}), %"
    return Charts(charts, used(looks, rows) if charts else {}, note, maps, title)


def needle_point(row: dict) -> tuple[float, float, str]:
    """Return height, error and tooltip of a score of needles."""
    return 100 * row["score"], 100 * (row["stderr"] or 0), f"{100 * row['score']:.0f} % of {row['items']} samples"


def heat_maps(rows: list[dict]) -> list[HeatMap]:
    """Return the fraction of values found by depth and length, for each model that finds any."""
    depths, lengths = sorted({depth for row in rows for depth in row["depths"]}), sorted(set(ordered(rows, "length")))
    maps = []
    for model in ordered(rows, "model"):
        found, asked = count_hits([row for row in rows if row["model"] == model], depths, lengths)
        if found.any():
            cells = [[x / n if n else None for x, n in zip(*line)] for line in zip(found.tolist(), asked.tolist())]
            maps.append(HeatMap(model, [short(n) for n in lengths], [(f"{d:g}", c) for d, c in zip(depths, cells)]))
    return maps


def recall_charts(rows: list[dict], looks: dict[str, Look], trained: int | None) -> Charts:
    """Return the recall curve, a chart for each kind of document."""
    charts = []
    y = Axis("log-probability of answers, nats", ticks(min(row["log_prob"] for row in rows), 0))
    for task in ordered(rows, "task"):
        of_task = [row for row in rows if row["task"] == task]
        lines = model_lines(of_task, "distance", recall_point)
        x = tokens_axis("smallest distance, tokens", [row["distance"] for row in of_task])
        charts.append((task, line_chart(f"{task}: recall by distance", lines, looks, x, y, trained=trained)))
    return Charts(charts, used(looks, rows), with_trained("Error bars: one standard error.", trained))


def recall_point(row: dict) -> tuple[float, float, str]:
    """Return height, error and tooltip of a point of the recall curve."""
    shown = f"{row['log_prob']:.2f} nats, {100 * row['right']:.0f} % right"
    return row["log_prob"], row["log_prob_stderr"] or 0, shown


def position_charts(rows: list[dict], looks: dict[str, Look], trained: int | None) -> Charts:
    """Return KL to the teacher and perplexity by position."""
    charts = []
    edges = sorted({row["end"] for row in rows})
    for key, label, unit in (("kl", "KL to teacher", "nats per token"), ("perplexity", "Perplexity", "")):
        known = [r for r in rows if r[key] is not None and (key, r["model"]) != ("kl", "teacher")]
        known.sort(key=lambda row: row["start"])
        if not known or not all(row[key] > 0 for row in known):
            continue
        lines = [
            Line(model, [position_point(row, key) for row in known if row["model"] == model])
            for model in ordered(known, "model")
        ]
        values = [row[key] for row in known]
        y = Axis(unit, log_ticks(min(values), max(values)), log=True)
        limits = min(point[0] for line in lines for point in line.points), edges[-1]
        x = Axis("position in the document, tokens", edges, log=True, show=short, limits=limits)
        charts.append((label, line_chart(f"{label}, by position", lines, looks, x, y, trained=trained)))
    return Charts(charts, used(looks, rows), with_trained("Each point is the mean of a range of positions.", trained))


def position_point(row: dict, key: str) -> tuple[float, float, float, str]:
    """Return a point in the middle of a range of positions on a logarithmic axis."""
    middle = math.sqrt(max(row["start"], row["end"] / 4) * row["end"])
    return middle, row[key], 0, f"{row['model']}, {short(row['start'])} to {short(row['end'])}: {row[key]:.3g}"


def training_charts(run: Path) -> Charts:
    """Return held-out KL, training loss and recall over tokens from metrics.jsonl.

    KL and loss have a line for each stage. Recall has one for each distance, and one for their mean.
    """
    curves = training_curves(dict(read_stages(run)))
    looks = {name: look for chart in curves for name, look in chart.looks.items()}
    note = f"Lines of more than {MOST_POINTS} points are drawn as means of neighbours."
    return Charts([(chart.title, chart.svg) for chart in curves], looks, note)


def with_trained(note: str, trained: int | None) -> str:
    """Return a note with the meaning of the dotted line."""
    return note if trained is None else f"{note} Dotted line: training length, {short(trained)} tokens."

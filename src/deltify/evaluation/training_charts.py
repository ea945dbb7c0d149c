"""Charts of a run's training, made from its metrics.jsonl: for report.html and the page of `deltify watch`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ..config import STAGES
from ..training.recall import curve_of
from ..utils.formats import rounded, short
from .svg import COLOURS, Axis, Line, Look, line_chart, log_ticks, ticks

MOST_POINTS = 150  # a line with more of them is drawn as means
MOST_MARKERS = 30  # a chart with a line of more points has no markers
LOG_RATIO = 10  # positive values that differ by more get a logarithmic axis
RECALL = "log-probability of far answers, nats"
LOOKS = {stage: Look(number) for number, stage in enumerate(("converted", *STAGES))}

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curves:
    """A chart with a legend of its own.

    Args:
        title: What it shows.
        svg: The chart.
        looks: Look of each line.
        last: Last value of each line, if the lines grow during training.
    """

    title: str
    svg: Markup
    looks: dict[str, Look]
    last: dict[str, str]


def training_curves(stages: dict[str, list[dict]]) -> list[Curves]:
    """Return held-out KL, training loss and recall over training tokens, as far as they were measured.

    Args:
        stages: Lines of metrics.jsonl of each stage, see `training.metrics.by_stage`.
    """
    later = {stage: records for stage, records in stages.items() if stage != "align"}
    align = {stage: records for stage, records in stages.items() if stage == "align"}
    recalls = recall_points([record for records in stages.values() for record in records if "recall" in record])
    looks = {name: Look((len(LOOKS) + n) % (COLOURS + 1)) for n, name in enumerate(recalls)}
    charts = (
        draw_curves(
            "KL to the teacher on held-out text", "nats per token", of_stages(stages, "heldout_kl"), joined=True
        ),
        draw_curves("Training loss", "nats per token", of_stages(later, "loss")),
        draw_curves("Training loss of align", "relative error", of_stages(align, "loss")),
        draw_curves("Recall over training", RECALL, recalls, looks),
    )
    return [chart for chart in charts if chart is not None]


def of_stages(stages: dict[str, list[dict]], key: str) -> Mapping[str, Points]:
    """Return the values of a figure over training tokens, for each stage."""
    return {stage: [(r["tokens"], r[key]) for r in records if key in r] for stage, records in stages.items()}


def recall_points(records: list[dict]) -> Mapping[str, Points]:
    """Return the recall curve over training tokens: the mean over distances, and each distance."""
    if not records:
        return {}
    by_distance = {
        f"from {short(distance)} tokens": [
            (r["tokens"], curve_of(r)[distance]) for r in records if distance in curve_of(r)
        ]
        for distance in curve_of(records[-1])
    }
    return {"mean of distances": [(r["tokens"], r["recall"]) for r in records]} | by_distance


def draw_curves(
    title: str,
    unit: str,
    data: Mapping[str, Points],
    looks: dict[str, Look] = LOOKS,
    *,
    x: Axis | None = None,
    joined: bool = False,
) -> Curves | None:
    """Return a chart of lines, or None without points.

    Args:
        title: What it shows.
        unit: Label of the vertical axis.
        data: Points of each line. Values that are not finite, and lines without points, are left out.
        looks: Look of each line.
        x: Horizontal axis. Defaults to training tokens.
        joined: Whether each line begins at the end of the one before.
    """
    finite = {name: [(at, y) for at, y in points if math.isfinite(y)] for name, points in data.items()}
    data = {name: points for name, points in finite.items() if points}
    if not data:
        return None
    last = {} if x else {name: rounded(points[-1][1]) for name, points in data.items()}
    x = x or token_axis(max(points[-1][0] for points in data.values()))
    marked = max(map(len, data.values())) <= MOST_MARKERS
    lines, before = [], []
    for name, points in data.items():
        drawn = [(at, y, 0, f"{name}, {x.show(at)}: {y:.3g}" if marked else "") for at, y in means(points)]
        lines.append(Line(name, before + drawn))
        before = [(*points[-1], 0, "")] if joined else []
    y = value_axis(unit, [value for line in lines for _, value, _, _ in line.points])
    svg = line_chart(title, lines, looks, x, y)
    return Curves(title, svg, {name: looks[name] for name in data}, last)


def means(points: Points) -> Points:
    """Return the means of equally many neighbours each, if there are more than MOST_POINTS points."""
    size = -(-len(points) // MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def token_axis(high: float) -> Axis:
    """Return an axis of training tokens from 0 to `high`."""
    return Axis("training tokens", [x for x in ticks(0, high) if x <= high], show=rounded, limits=(0, high))


def value_axis(unit: str, values: Sequence[float]) -> Axis:
    """Return an axis of values. It begins at 0 if no value is negative, unless it is logarithmic."""
    low, high = min(values), max(values)
    if low > 0 and high > LOG_RATIO * low:
        return Axis(f"{unit}, logarithmic", log_ticks(low, high), log=True, show=rounded)
    return Axis(unit, ticks(low if low < 0 else 0.0, high), show=rounded)

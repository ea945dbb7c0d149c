"""Line charts as SVG for pages that change: small, in the page's own colours, and readable on a phone.

Figures of reports are made by `plots`. templates/charts.html draws what `layout` returns.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

from .plots import short

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 48, 18, 10, 40  # margins for the labels
MAX_POINTS = 150  # a line with more of them is drawn as means
MAX_DOTS = 30  # a line with more points is drawn without dots
LOG_RATIO = 10  # positive values that differ by more get a logarithmic axis

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Args:
        name: Its name in the legend.
        points: Its points (x, y), by ascending x.
        color: Number of its colour.
        opacity: From 0, invisible, to 1.
        dots: Whether to draw the points, if there are at most MAX_DOTS.
        before: A point before the first one that the line begins at, if any.
    """

    name: str
    points: Points
    color: int
    opacity: float = 1.0
    dots: bool = False
    before: tuple[float, float] | None = None


@dataclass(frozen=True)
class Chart:
    """A chart.

    Args:
        title: What y is, and its unit.
        x_label: What x is.
        lines: Its lines. Those without points are left out.
        doubling: Whether x is a distance in tokens, with a logarithmic axis.
        from_zero: Whether y is positive and its axis begins at 0, unless it is logarithmic.
    """

    title: str
    x_label: str
    lines: list[Line]
    doubling: bool = False
    from_zero: bool = True


def layout(chart: Chart) -> dict:
    """Return the parts of a chart with their places in the picture, for the template."""
    lines = [line for line in chart.lines if line.points]
    drawn = [[*([line.before] if line.before else []), *means(line.points)] for line in lines]
    xs, ys = ([point[axis] for points in drawn for point in points] for axis in (0, 1))
    logarithmic = chart.from_zero and min(ys) > 0 and max(ys) > LOG_RATIO * min(ys)
    x_ticks = distance_ticks(xs) if chart.doubling else token_ticks(max(xs))
    low, high = 0.0 if chart.from_zero and not logarithmic else min(ys), max(ys)
    if high == low:  # a single validation
        low, high = (0.0, 1.0) if chart.from_zero else (low - 0.5, high + 0.5)
    y_ticks = value_ticks(low, high, logarithmic)
    x_place = scale(min(xs) if chart.doubling else 0.0, max(xs), LEFT, WIDTH - RIGHT, chart.doubling)
    y_place = scale(min(y_ticks[0][0], *ys), max(y_ticks[-1][0], *ys), HEIGHT - BOTTOM, TOP, logarithmic)
    placed = [[(x_place(x), y_place(y), x, y) for x, y in points] for points in drawn]
    return {
        "title": chart.title + (", logarithmic" if logarithmic else ""),
        "x_label": chart.x_label,
        "x_ticks": [(x_place(x), text) for x, text in x_ticks],
        "y_ticks": [(y_place(y), text) for y, text in y_ticks],
        "lines": [
            {
                "name": line.name,
                "color": line.color,
                "opacity": line.opacity,
                "path": "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _, _ in places),
                "dots": [
                    (x, y, f"{line.name}: {value:.4g} at {si(at)}")
                    for x, y, at, value in places
                    if line.dots and len(line.points) <= MAX_DOTS and (at, value) != line.before
                ],
                "last": "" if chart.doubling else si(line.points[-1][1]),
            }
            for line, places in zip(lines, placed)
        ],
    }


def means(points: Points) -> Points:
    """Return the means of equally many neighbours each, if there are more than MAX_POINTS points."""
    size = -(-len(points) // MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def scale(low: float, high: float, start: float, end: float, logarithmic: bool) -> Callable[[float], float]:
    """Return the function that maps values from `low` to `high` to places from `start` to `end`."""
    of = math.log if logarithmic else float
    if low == high:
        return lambda value: (start + end) / 2
    return lambda value: start + (of(value) - of(low)) / (of(high) - of(low)) * (end - start)


def token_ticks(high: float) -> list[tuple[float, str]]:
    """Return round numbers of tokens from 0 to `high`, and their texts, such as 500k."""
    ticks = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(0, high) if high else [0.0]
    text = EngFormatter(sep="")
    return [(float(tick), text(tick)) for tick in ticks if 0 <= tick <= high]


def distance_ticks(distances: Sequence[float]) -> list[tuple[float, str]]:
    """Return each distance in tokens and its text, such as 4k."""
    return [(distance, short(distance)) for distance in sorted(set(distances))]


def value_ticks(low: float, high: float, logarithmic: bool) -> list[tuple[float, str]]:
    """Return round values around `low` to `high`, and their texts."""
    if not logarithmic:
        text = EngFormatter(sep="") if high >= 1000 else "{:g}".format
        return [(float(tick), text(tick)) for tick in MaxNLocator(5).tick_values(low, high)]
    ticks = LogLocator(subs=(1, 2, 5)).tick_values(low, high)
    inside = [float(tick) for tick in ticks if low <= tick <= high]
    return [(tick, f"{tick:g}") for tick in (inside if len(inside) < 8 else inside[::3])]


def si(number: float) -> str:
    """Return a number with three digits and an SI prefix from 1000 on, such as 16.4k."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= unit:
            return f"{number / unit:.3g}{letter}"
    return f"{number:.3g}"

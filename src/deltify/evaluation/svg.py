"""Charts as inline SVG for pages that need no network. Colours are CSS variables, so charts follow light and dark.

The page includes templates/charts.css, which defines the classes and variables. Points have their values as tooltips,
and every drawn line has an attribute data-model, by which templates/report.js hides and shows models.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 26, 40
CHARACTER = 6.5  # about the width of a character of a label
COLOURS = 7  # CSS variables --line-1 to --line-7; --line-0 is the teacher's


@dataclass(frozen=True)
class Look:
    """Appearance of a model in all charts of a page.

    Args:
        number: Number of its colour. 0 is the teacher's.
        dashed: Whether its lines are dashed.
        opacity: From 0, invisible, to 1.
    """

    number: int
    dashed: bool = False
    opacity: float = 1.0

    @property
    def attributes(self) -> dict[str, str]:
        """Attributes of an element with this look."""
        kind = f"model line-{self.number}{' dashed' if self.dashed else ''}"
        return {"class": kind} | ({} if self.opacity == 1 else {"opacity": f"{self.opacity:g}"})


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Args:
        name: Model.
        points: x, y, half of the error bar (or 0) and tooltip of each point. Those with a tooltip are marked.
    """

    name: str
    points: Sequence[tuple[float, float, float, str]]


@dataclass(frozen=True)
class Axis:
    """An axis of a chart.

    Args:
        label: What it shows, and its unit.
        ticks: Values with a label.
        log: Whether it is logarithmic.
        show: Function that returns the label of a tick.
        limits: Smallest and largest value. Defaults to those of the ticks.
    """

    label: str
    ticks: Sequence[float]
    log: bool = False
    show: Callable[[float], str] = lambda value: f"{value:g}"
    limits: tuple[float, float] | None = None

    def place(self, value: float, start: float, end: float) -> float:
        """Return where a value is drawn on an axis from `start` to `end`."""
        low, high = self.limits or (min(self.ticks), max(self.ticks))
        if self.log:
            low, high, value = (math.log(max(x, 1e-300)) for x in (low, high, value))
        part = (value - low) / (high - low) if high > low else 0.5
        return round(start + min(max(part, -0.05), 1.05) * (end - start), 1)


def line_chart(
    title: str,
    lines: Sequence[Line],
    looks: dict[str, Look],
    x: Axis,
    y: Axis,
    *,
    trained: float | None = None,
    rule: float | None = None,
) -> Markup:
    """Return a chart of lines.

    Args:
        title: Text for readers that do not see it.
        lines: Lines, drawn in this order.
        looks: Look of each line by its name.
        x: Horizontal axis.
        y: Vertical axis.
        trained: Value of x with a dotted vertical line.
        rule: Value of y with a dashed horizontal line.
    """
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
    chart = ElementTree.Element("svg", {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": title})
    text(chart, 4, 13, y.label, "label", "start")
    text(chart, (left + right) / 2, HEIGHT - 4, x.label, "label", "middle")
    for tick in y.ticks:
        at = y.place(tick, bottom, top)
        draw(chart, "line", "grid", x1=left, x2=right, y1=at, y2=at)
        text(chart, left - 6, at + 4, y.show(tick), "tick", "end")
    free = left - 30.0  # where the last label ended: labels that would overlap are left out
    for tick in x.ticks:
        at, shown = x.place(tick, left + 8, right - 8), x.show(tick)
        draw(chart, "line", "grid", x1=at, x2=at, y1=top, y2=bottom)
        if at - len(shown) * CHARACTER / 2 > free:
            text(chart, at, bottom + 15, shown, "tick", "middle")
            free = at + len(shown) * CHARACTER / 2 + 2
    if rule is not None:
        at = y.place(rule, bottom, top)
        draw(chart, "line", "rule", x1=left, x2=right, y1=at, y2=at)
    if trained is not None and min(x.ticks) <= trained <= max(x.ticks):
        at = x.place(trained, left + 8, right - 8)
        draw(chart, "line", "trained", x1=at, x2=at, y1=top, y2=bottom)
    for line in lines:
        draw_line(chart, line, looks[line.name], x, y)
    return markup(chart)


def draw_line(chart: ElementTree.Element, line: Line, look: Look, x: Axis, y: Axis) -> None:
    """Draw a line with its error bars, and a marker at each point with a tooltip."""
    group = ElementTree.SubElement(chart, "g", {**look.attributes, "data-model": line.name})
    bottom, places = HEIGHT - BOTTOM, []
    for value, height, error, _ in line.points:
        at, over = x.place(value, LEFT + 8, WIDTH - RIGHT - 8), y.place(height, bottom, TOP)
        places.append((at, over))
        if error:
            y1, y2 = (min(max(y.place(height + e, bottom, TOP), TOP), bottom) for e in (-error, error))
            draw(group, "line", "error", x1=at, x2=at, y1=y1, y2=y2)
    draw(group, "polyline", "curve", points=" ".join(f"{at:g},{over:g}" for at, over in places))
    for (at, over), (*_, tip) in zip(places, line.points):
        if tip:
            draw(group, "path", "mark", d=marker(look.number, at, over))
            hit = draw(group, "circle", "hit", cx=at, cy=over, r=9)
            ElementTree.SubElement(hit, "title").text = tip


def swatch(look: Look) -> Markup:
    """Return a piece of a line for a legend."""
    picture = ElementTree.Element("svg", {**look.attributes, "viewBox": "0 0 30 10", "aria-hidden": "true"})
    draw(picture, "path", "curve", d="M1 5h28")
    draw(picture, "path", "mark", d=marker(look.number, 15, 5))
    return markup(picture)


def marker(number: int, x: float, y: float) -> str:
    """Return the path of a marker: a circle, square, diamond or triangle."""
    shapes = (
        f"M{x - 3.5:g} {y:g}a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z",
        f"M{x - 3.2:g} {y - 3.2:g}h6.4v6.4h-6.4z",
        f"M{x:g} {y - 4.4:g}l4.4 4.4l-4.4 4.4l-4.4-4.4z",
        f"M{x:g} {y - 4.4:g}l4.2 7.4h-8.4z",
    )
    return shapes[number % len(shapes)]


def bar_chart(title: str, bars: Sequence[tuple[str, float, tuple[float, float], str]], *, rule: float = 1.0) -> Markup:
    """Return a chart of horizontal bars, each with its name above it.

    Args:
        title: What the bars show.
        bars: Name, value, interval and shown value of each bar. All are fractions.
        rule: Value with a dashed vertical line.
    """
    step, top = 34, 28
    height = top + step * len(bars) + 20
    right = WIDTH - 52
    axis = Axis("", (0.0, max(rule, *(value for _, value, _, _ in bars), *(ends[1] for _, _, ends, _ in bars))))
    chart = ElementTree.Element("svg", {"viewBox": f"0 0 {WIDTH} {height}", "role": "img", "aria-label": title})
    text(chart, 4, 13, title, "label", "start")
    for number, (name, value, (low, high), shown) in enumerate(bars):
        at = top + step * number
        text(chart, 4, at + 11, name, "tick", "start")
        start, end = (axis.place(max(x, 0.0), 4, right) for x in (0.0, value))
        bar = draw(chart, "rect", "bar", x=start, y=at + 16, width=max(round(end - start, 1), 1), height=11)
        ElementTree.SubElement(bar, "title").text = f"{name}: {shown}, 95 % interval {low:.0%} to {high:.0%}"
        x1, x2 = (axis.place(max(x, 0.0), 4, right) for x in (low, high))
        draw(chart, "line", "error", x1=x1, x2=x2, y1=at + 21.5, y2=at + 21.5)
        text(chart, WIDTH - 4, at + 26, shown, "value", "end")
    at, bottom = axis.place(rule, 4, right), height - 18
    draw(chart, "line", "rule", x1=at, x2=at, y1=top + 12, y2=bottom)
    text(chart, at, height - 4, "teacher", "tick", "middle")
    return markup(chart)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round values from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * count >= span)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * n, 12) for n in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten around `low` to `high`, or powers of ten alone if these are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        values = [factor * 10.0**power for power in powers for factor in factors]
        first = max((n for n, value in enumerate(values) if value <= low * 1.0001), default=0)
        last = next((n for n, value in enumerate(values) if value >= high * 0.9999), len(values) - 1)
        if len(chosen := values[first : max(last, first + 1) + 1]) <= 7:
            break
    return chosen


def draw(parent: ElementTree.Element, tag: str, kind: str, **attributes: float | str) -> ElementTree.Element:
    """Add an element of a CSS class and return it."""
    shown = {name: value if isinstance(value, str) else f"{value:g}" for name, value in attributes.items()}
    return ElementTree.SubElement(parent, tag, {"class": kind, **shown})


def text(parent: ElementTree.Element, x: float, y: float, content: str, kind: str, anchor: str) -> None:
    """Add a text."""
    draw(parent, "text", kind, **{"x": x, "y": y, "text-anchor": anchor}).text = content


def markup(chart: ElementTree.Element) -> Markup:
    """Return a chart as HTML."""
    return Markup(ElementTree.tostring(chart, encoding="unicode"))

"""Helpers of tests of figures: what was drawn, not how large its file is."""

from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deltify.evaluation import plots


def drawn_by(function: Callable, *args, **options) -> tuple[list[Path], Figure]:
    """Return what a drawing function of `plots` returns, and the figure that it saved."""
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        save = plots.save
        patch.setattr(plots, "save", lambda figure, stem: figures.append(figure) or save(figure, stem))
        paths = function(*args, **options)
    (figure,) = figures
    return paths, figure


def lines_of(axis: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """Return the data of each labelled line of an axis, error bars included."""
    lines = {line.get_label(): line for line in axis.get_lines()}
    lines |= {bars.get_label(): bars[0] for bars in axis.containers}
    return {name: (list(line.get_xdata()), list(line.get_ydata())) for name, line in lines.items() if name[0] != "_"}

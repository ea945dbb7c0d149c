"""Trackers: trackio, wandb and tensorboard get the figures of a run and, at validations, a picture and a table."""

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ..config import Recipe
from ..utils.files import write_text
from ..utils.formats import flat
from ..utils.statistics import spread
from .recall import curve_of
from .run_folder import holds_run

TRACKERS = {"trackio": "trackio", "wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}
IDENTITY = {"trackio": "name", "wandb": "id"}  # attribute of a tracker's run by which it is resumed
CURVES = 6  # validations in the picture of the recall curve


@dataclass(frozen=True)
class Table:
    """A table for a tracker."""

    columns: tuple[str, ...]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Return the table in Markdown."""
        rows = [self.columns, ["---"] * len(self.columns), *self.rows]
        cells = [[flat(cell).replace("|", "\\|") for cell in row] for row in rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in cells)


class Tracker(NamedTuple):
    """What a run needs of a tracker.

    Attributes:
        send: Function that sends figures, pictures [height, width, 3] and tables, by name, with their step.
        close: Function that ends the tracker's run.
    """

    send: Callable[[dict[str, float | np.ndarray | Table], int], None]
    close: Callable[[], None]


def tracker_module(name: str | None) -> ModuleType | None:
    """Return the module of the tracker that `run.report_to` names.

    Raises:
        ValueError: If it is unknown or not installed.
    """
    if name is None:
        return None
    if name not in TRACKERS:
        raise ValueError(f"run.report_to={name!r} is unknown; choose trackio, wandb or tensorboard, or leave it out")
    try:
        return importlib.import_module(TRACKERS[name])
    except ImportError as error:
        raise ValueError(
            f"run.report_to={name!r} needs a package that is not installed ({error}). Run: pip install {name}, or "
            "leave it out"
        ) from None


def open_tracker(recipe: Recipe, sent: int) -> Tracker | None:
    """Open the tracker that `run.report_to` names, if any. A resumed run continues the tracker's run.

    Args:
        sent: Last step that an earlier run sent. Steps up to it are not sent again, except to tensorboard, where they
            replace the old ones.
    """
    name, tracker = recipe.run.report_to, tracker_module(recipe.run.report_to)
    if name is None or tracker is None:
        return None
    if name == "tensorboard":
        return open_tensorboard(tracker, recipe)
    path, identity = recipe.folder / "tracker.json", IDENTITY[name]
    known = json.loads(path.read_text()) if path.is_file() and holds_run(recipe.folder) else {}
    resumed = {identity: known[name], "resume": "allow"} if name in known else {}
    run = tracker.init(**{"project": "deltify", "name": recipe.name, "config": asdict(recipe), **resumed})
    write_text(path, json.dumps(known | {name: getattr(run, identity)}))

    def own_type(value: Any) -> Any:
        if isinstance(value, Table):
            return tracker.Table(columns=list(value.columns), data=value.rows)
        return tracker.Image(value) if isinstance(value, np.ndarray) else value

    def send(figures: dict, step: int) -> None:
        if step > sent or not resumed:
            tracker.log({key: own_type(value) for key, value in figures.items()}, step=step)

    return Tracker(send, tracker.finish)


def open_tensorboard(tracker: ModuleType, recipe: Recipe) -> Tracker:
    """Return the tracker that writes to a folder of the run."""
    writers = []  # opened at the first step; purge_step hides that and later steps of older files

    def send(figures: dict, step: int) -> None:
        if not writers:
            writers.append(tracker.SummaryWriter(str(recipe.folder / "tensorboard"), purge_step=step))
        for key, value in figures.items():
            if isinstance(value, Table):
                writers[0].add_text(key, value.markdown(), step)
            elif isinstance(value, np.ndarray):
                writers[0].add_image(key, value, step, dataformats="HWC")
            else:
                writers[0].add_scalar(key, value, step)

    def close() -> None:
        for writer in writers:
            writer.close()

    return Tracker(send, close)


def picture_of_recall(records: Sequence[dict]) -> np.ndarray:
    """Return a picture of the recall curves of validations, from the first in light to the last in dark colour.

    Its shape is [height, width, 3], its dtype uint8.

    Args:
        records: Lines of metrics.jsonl that have a recall curve. At most CURVES of them are drawn.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(curve_of(records[-1])), [f"{distance:,}" for distance in curve_of(records[-1])])
    chosen = spread(records, CURVES)
    for number, record in enumerate(chosen, 1):
        color = matplotlib.colormaps["viridis_r"](number / len(chosen))
        label = f"{record['stage']}, {record['tokens']:,} tokens"
        axis.plot(*zip(*curve_of(record).items()), "o-", color=color, label=label, markersize=4)
    axis.set_xlabel("smallest distance, tokens")
    axis.set_ylabel("log-probability of answer tokens, nats")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()

"""Progress of a run: the terminal, metrics.jsonl, and the tracker that the recipe names, if any."""

import importlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

from rich.progress import Progress, TextColumn, TimeRemainingColumn

from ..config import STAGES, Recipe
from ..utils.console import console
from ..utils.files import write_text
from . import distributed
from .run_folder import holds_run

TRACKERS = {"trackio": "trackio", "wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}
IDENTITY = {"trackio": "name", "wandb": "id"}  # attribute of a tracker's run by which it is resumed


def read_stages(folder: Path) -> Iterator[tuple[str, list[dict]]]:
    """Yield each stage of a run with its lines of metrics.jsonl. Their tokens count from the start of the run."""
    lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1]  # a last line without a newline is incomplete
    records, before = [json.loads(line) for line in lines], 0
    for stage in ("converted", *STAGES):
        if mine := [r | {"tokens": before + r["tokens"]} for r in records if r["stage"] == stage]:
            yield stage, mine
            before = mine[-1]["tokens"]


class Metrics:
    """Writes metrics.jsonl, one line per step, and sends the same figures to the tracker as `stage/key`."""

    def __init__(self, recipe: Recipe):
        self.path = recipe.folder / "metrics.jsonl"
        self.steps_before, total = {"converted": 0}, 0
        for stage in STAGES:
            self.steps_before[stage] = total
            total += recipe.stage(stage).steps
        self.silent = distributed.rank() > 0  # only the first rank writes
        self.log, self.close = lambda figures, step: None, lambda: None
        if not self.silent:
            sent = max((self.step_of_run(record) for _, record in self.lines()), default=-1)
            self.log, self.close = open_tracker(recipe, sent)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def write(self, stage: str, step: int, **record) -> None:
        """Write the line of a step."""
        if self.silent:
            return
        with self.path.open("a") as out:
            out.write(json.dumps({"stage": stage, "step": step, **record}) + "\n")
        figures = {f"{stage}/{key}": value for key, value in record.items()}
        self.log(figures, self.step_of_run({"stage": stage, "step": step}))

    def step_of_run(self, record: dict) -> int:
        """Return the step of a line, counted over all stages."""
        return self.steps_before[record["stage"]] + record["step"]

    def lines(self) -> Iterator[tuple[str, dict]]:
        """Yield each line and the record in it. Skip an incomplete last line, which a killed run leaves.

        Raises:
            ValueError: If another line is damaged.
        """
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        for number, line in enumerate(lines, 1):
            try:
                yield line, json.loads(line)
            except json.JSONDecodeError:
                if number < len(lines):
                    raise ValueError(
                        f"{self.path}, line {number}: {line[:60]!r} is not a JSON object. Delete the line and --resume"
                    ) from None

    def truncate(self, stage: str, step: int) -> None:
        """Drop the lines of a stage's later steps, which will be made again, and an incomplete last line."""
        if not self.silent:
            kept = [line + "\n" for line, record in self.lines() if record["stage"] != stage or record["step"] <= step]
            write_text(self.path, "".join(kept))


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


def open_tracker(recipe: Recipe, sent: int) -> tuple[Callable[[dict[str, float], int], None], Callable[[], None]]:
    """Open the tracker that `run.report_to` names. A resumed run continues the tracker's run.

    Args:
        sent: Last step that an earlier run sent. Steps up to it are not sent again, except to tensorboard, where they
            replace the old ones.

    Returns:
        Two functions: one sends figures with their step, one ends the tracker's run.
    """
    name, tracker = recipe.run.report_to, tracker_module(recipe.run.report_to)
    if name is None or tracker is None:
        return lambda figures, step: None, lambda: None
    if name == "tensorboard":
        writers = []  # opened at the first step; purge_step hides that and later steps of older files

        def write(figures: dict[str, float], step: int) -> None:
            if not writers:
                writers.append(tracker.SummaryWriter(str(recipe.folder / "tensorboard"), purge_step=step))
            for key, value in figures.items():
                writers[0].add_scalar(key, value, step)

        def close() -> None:
            for writer in writers:
                writer.close()

        return write, close
    path, identity = recipe.folder / "tracker.json", IDENTITY[name]
    known = json.loads(path.read_text()) if path.is_file() and holds_run(recipe.folder) else {}
    resumed = {identity: known[name], "resume": "allow"} if name in known else {}
    run = tracker.init(**{"project": "deltify", "name": recipe.name, "config": asdict(recipe), **resumed})
    write_text(path, json.dumps(known | {name: getattr(run, identity)}))

    def send(figures: dict[str, float], step: int) -> None:
        if step > sent or not resumed:
            tracker.log(figures, step=step)

    return send, tracker.finish


class ProgressBar:
    """A bar with loss, tokens/s and time left, which shows only on a terminal.

    Entering it returns the function that updates it: `show(steps done, loss, tokens per second)`.
    """

    def __init__(self, name: str, steps: int):
        text = TextColumn("{task.description} {task.completed}/{task.total}  loss {task.fields[loss]:.3f}")
        speed = TextColumn("{task.fields[speed]:,.0f} tokens/s")
        self.bar = Progress(text, speed, TimeRemainingColumn(), console=console, transient=True)
        self.task = self.bar.add_task(name, total=steps, loss=math.nan, speed=0.0)

    def __enter__(self):
        self.bar.start()
        return lambda done, loss, speed: self.bar.update(self.task, completed=done, loss=loss, speed=speed)

    def __exit__(self, *error):
        self.bar.stop()

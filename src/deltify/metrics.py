"""What a run says while it goes: the terminal, metrics.jsonl, and a tracker besides if the recipe names one."""

import importlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.progress import Progress as ProgressBar
from rich.progress import TextColumn, TimeRemainingColumn

from . import parallel
from .config import STAGES, Recipe
from .files import write_text

TRACKERS = {"trackio": "trackio", "wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}
console = Console()


def read_stages(folder: Path) -> Iterator[tuple[str, list[dict]]]:
    """A run's stages in their order with their lines of metrics.jsonl, whose tokens count from the run's beginning."""
    lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1]  # a last line without its end was cut
    records, before = [json.loads(line) for line in lines], 0
    for stage in ("converted", *STAGES):
        if mine := [r | {"tokens": before + r["tokens"]} for r in records if r["stage"] == stage]:
            yield stage, mine
            before = mine[-1]["tokens"]


class Metrics:
    """metrics.jsonl, one line per step, and the run's one tracker, which sees `stage/key` over the steps of the run."""

    def __init__(self, recipe: Recipe):
        self.path = recipe.folder / "metrics.jsonl"
        self.steps_before, total = {"converted": 0}, 0
        for stage in STAGES:
            self.steps_before[stage] = total
            total += recipe.stage(stage).steps
        self.silent = parallel.rank() > 0  # the first rank speaks for all
        self.log, self.close = (lambda figures, step: None, lambda: None) if self.silent else open_tracker(recipe)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def write(self, stage: str, step: int, **record) -> None:
        if self.silent:
            return
        with self.path.open("a") as out:
            out.write(json.dumps({"stage": stage, "step": step, **record}) + "\n")
        self.log({f"{stage}/{key}": value for key, value in record.items()}, self.steps_before[stage] + step)

    def cut(self, stage: str, step: int) -> None:
        """Drops lines of steps that a stage is about to make again, and a last line that a kill left half-written.

        Raises:
            ValueError: if another line is damaged; says which.
        """
        if self.silent:
            return
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        kept = []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                if number == len(lines):
                    continue
                raise ValueError(
                    f"{self.path}, line {number}: {line[:60]!r} is not a JSON object; delete the line and --resume"
                ) from None
            if record["stage"] != stage or record["step"] <= step:
                kept.append(line + "\n")
        write_text(self.path, "".join(kept))


def tracker_module(name: str | None) -> ModuleType | None:
    """The module of the tracker that `run.log_to` names.

    Raises:
        ValueError: if it is unknown or not installed.
    """
    if name is None:
        return None
    if name not in TRACKERS:
        raise ValueError(f"run.log_to={name!r}; choose trackio, wandb or tensorboard, or leave it out")
    try:
        return importlib.import_module(TRACKERS[name])
    except ImportError as error:
        raise ValueError(
            f"run.log_to={name!r} needs a package that is not installed ({error}); run: pip install {name}, or leave "
            "it out"
        ) from None


def open_tracker(recipe: Recipe) -> tuple[Callable[[dict[str, float], int], None], Callable[[], None]]:
    """Two functions: one sends figures and their step to the tracker that `run.log_to` names, one ends it."""
    tracker = tracker_module(recipe.run.log_to)
    if tracker is None:
        return lambda figures, step: None, lambda: None
    if recipe.run.log_to == "tensorboard":
        writer = tracker.SummaryWriter(str(recipe.folder / "tensorboard"))

        def send(figures: dict[str, float], step: int) -> None:
            for key, value in figures.items():
                writer.add_scalar(key, value, step)

        return send, writer.close
    tracker.init(project="deltify", name=recipe.name, config=asdict(recipe))
    return lambda figures, step: tracker.log(figures, step=step), tracker.finish


class progress_bar:
    """A bar with loss, tokens/s and the time left; silent where there is no terminal."""

    def __init__(self, name: str, steps: int):
        text = TextColumn("{task.description} {task.completed}/{task.total}  loss {task.fields[loss]:.3f}")
        speed = TextColumn("{task.fields[speed]:,.0f} tokens/s")
        self.bar = ProgressBar(text, speed, TimeRemainingColumn(), console=console, transient=True)
        self.task = self.bar.add_task(name, total=steps, loss=math.nan, speed=0.0)

    def __enter__(self):
        self.bar.start()
        return lambda done, loss, speed: self.bar.update(self.task, completed=done, loss=loss, speed=speed)

    def __exit__(self, *error):
        self.bar.stop()

"""Progress of a run: the terminal, metrics.jsonl, samples.jsonl, and the tracker that the recipe names, if any."""

import json
import math
import time
from collections.abc import ItemsView, Iterator, Sequence
from pathlib import Path

from rich.progress import Progress, TextColumn, TimeRemainingColumn

from ..config import STAGES, Recipe
from ..utils.console import console
from ..utils.files import append_jsonl, write_text
from . import distributed
from .trackers import Table, open_tracker, picture_of_recall


def read_stages(folder: Path) -> ItemsView[str, list[dict]]:
    """Return each stage of a run with its lines of metrics.jsonl, see `by_stage`.

    Raises:
        FileNotFoundError: If the folder has none.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no metrics.jsonl. Give the folder of a run that has begun")
    return by_stage([record for _, record in lines(path)]).items()


def by_stage(records: list[dict]) -> dict[str, list[dict]]:
    """Return the lines of each stage that has any, in the order of stages. Tokens count from the start of the run."""
    stages, before = {}, 0
    for stage in ("converted", *STAGES):
        if mine := [r | {"tokens": before + r["tokens"]} for r in records if r["stage"] == stage]:
            stages[stage], before = mine, mine[-1]["tokens"]
    return stages


class Metrics:
    """Writes metrics.jsonl, one line per step, and samples.jsonl, one line per validation.

    The tracker gets the same: the figures as `stage/key`, the samples as a table, the recall curve as a picture.
    """

    def __init__(self, recipe: Recipe):
        self.path, self.samples_path = recipe.folder / "metrics.jsonl", recipe.folder / "samples.jsonl"
        self.steps_before, total = {"converted": 0}, 0
        for stage in STAGES:
            self.steps_before[stage] = total
            total += recipe.stage(stage).steps
        self.silent = distributed.rank() > 0  # only the first rank writes
        self.tracker = None
        if not self.silent:
            sent = max((self.step_of_run(record) for _, record in lines(self.path)), default=-1)
            self.tracker = open_tracker(recipe, sent)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error) -> None:
        if self.tracker is not None:
            self.tracker.close()

    def write(self, stage: str, step: int, samples: Sequence[dict[str, str]] = (), **record) -> None:
        """Write the line of a step, with the time in seconds since 1970, and that of its samples, if any."""
        if self.silent:
            return
        place = {"stage": stage, "step": step}
        append_jsonl(self.path, [place | record | {"time": round(time.time(), 1)}])
        if samples:
            self.write_samples(stage, step, record["tokens"], samples)
        if self.tracker is None:
            return
        sent: dict = {f"{stage}/{key}": value for key, value in record.items()}
        if samples:
            sent["samples"] = Table(("stage", *samples[0]), [[stage, *sample.values()] for sample in samples])
        if "recall" in record:
            sent["recall_curve"] = picture_of_recall([r for _, r in lines(self.path) if "recall" in r])
        self.tracker.send(sent, self.step_of_run(place))

    def write_samples(self, stage: str, step: int, tokens: int, samples: Sequence[dict[str, str]]) -> None:
        """Write the line of a validation's samples. The stage "teacher" has those of the teacher."""
        if not self.silent:
            line = {"stage": stage, "step": step, "tokens": tokens, "samples": samples}
            append_jsonl(self.samples_path, [line])

    def step_of_run(self, record: dict) -> int:
        """Return the step of a line, counted over all stages."""
        return self.steps_before[record["stage"]] + record["step"]

    def truncate(self, stage: str, step: int) -> None:
        """Drop the lines of a stage's later steps, which will be made again, and an incomplete last line."""
        for path in () if self.silent else (self.path, self.samples_path):
            kept = [line + "\n" for line, record in lines(path) if record["stage"] != stage or record["step"] <= step]
            if path.is_file():
                write_text(path, "".join(kept))


def lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield each line and the record in it. Skip an incomplete last line, which a killed run leaves.

    Raises:
        ValueError: If another line is damaged.
    """
    texts = path.read_text().splitlines() if path.is_file() else []
    for number, text in enumerate(texts, 1):
        try:
            yield text, json.loads(text)
        except json.JSONDecodeError:
            if number < len(texts):
                raise ValueError(
                    f"{path}, line {number}: {text[:60]!r} is not a JSON object. Delete the line and --resume"
                ) from None


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

"""Progress of a run, from the files in its folder alone: what it measured so far, and how long it will take."""

import functools
import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from ..config import STAGES, Recipe, load_recipe
from ..training.metrics import by_stage, lines
from ..training.run_folder import read_run

RECENT = 20  # latest steps whose median is the speed
# Time per token relative to align. A stage that has not begun is taken to be as fast as the one before, times the ratio
# of these. Measured were 1.5 and 2.6 (docs/log/benchmarks.md).
RELATIVE_TIME = {"align": 1.0, "match": 2.0, "extend": 2.0}
# A run is quiet if it has written nothing for this many times its usual step and validation.
QUIET_STEPS, QUIET_VALIDATIONS, QUIET_SECONDS = 20, 3, 120


@dataclass(frozen=True)
class StageProgress:
    """Progress of one stage.

    Attributes:
        steps: Number of its steps.
        done: Number of steps that are done.
        tokens: Number of tokens trained on.
        seconds: Seconds of training and validation so far.
        tokens_per_second: Median of the latest steps, or an estimate if `measured` is false, or None if nothing was
            measured in this run.
        measured: Whether the stage has begun.
        seconds_left: Estimated seconds to its last step, or None.
        peak_memory_bytes: Largest memory of tensors on the GPU, or None.
    """

    name: str
    steps: int
    done: int
    tokens: int
    seconds: float
    tokens_per_second: float | None
    measured: bool
    seconds_left: float | None
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class RunProgress:
    """Progress of a run.

    Attributes:
        about: Contents of run.json.
        records: Lines of metrics.jsonl in the order of stages. Their tokens count from the start of the run.
        stage_records: The same lines by stage.
        samples: Lines of samples.jsonl.
        stages: Progress of the stages that have tokens in the recipe.
        stopped_early: Whether --max-minutes ended the run after its last line.
        quiet_seconds: Seconds since the last line if that is unusually long, else None.
    """

    folder: Path
    recipe: Recipe
    about: dict
    records: list[dict]
    stage_records: dict[str, list[dict]]
    samples: list[dict]
    stages: list[StageProgress]
    stopped_early: bool
    quiet_seconds: float | None

    @property
    def finished(self) -> bool:
        return all(stage.done >= stage.steps for stage in self.stages)

    @property
    def current(self) -> StageProgress:
        """The stage that is training, or the last one that did."""
        return next((stage for stage in self.stages if stage.done < stage.steps), self.stages[-1])

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds to the end of the run, or None if no step was measured."""
        left = [stage.seconds_left for stage in self.stages]
        return None if None in left else sum(seconds for seconds in left if seconds is not None)

    @property
    def fraction(self) -> float:
        """Fraction of the run that is done, by time where the speeds are known, else by tokens."""
        if (left := self.seconds_left) is not None:
            done = sum(stage.seconds for stage in self.stages)
            return done / (done + left) if done + left else 1.0
        tokens = sum(self.recipe.stage(stage.name).tokens for stage in self.stages)
        return sum(stage.tokens for stage in self.stages) / tokens


def read_progress(folder: Path, recipe: Recipe | None = None) -> RunProgress:
    """Return the progress of the run in a folder.

    Args:
        folder: Folder of the run. It may be a copy.
        recipe: Recipe of the run. Defaults to recipe.yaml in the folder.

    Raises:
        FileNotFoundError: If the folder holds no run.
        ValueError: If a file of the run is damaged.
    """
    recipe = recipe or load_recipe(recipe_path(folder))
    stage_records = by_stage(read_lines(folder / "metrics.jsonl"))
    stages = stage_progress(recipe, stage_records)
    records = [record for of_stage in stage_records.values() for record in of_stage]
    return RunProgress(
        folder,
        recipe,
        read_run(folder),
        records,
        stage_records,
        read_lines(folder / "samples.jsonl"),
        stages,
        stopped_early(folder, records),
        quiet_seconds(records, stages),
    )


def recipe_path(folder: Path) -> Path:
    """Return the path of a run's recipe.

    Raises:
        FileNotFoundError: If the folder holds no run. The message names runs nearby.
    """
    path = folder / "recipe.yaml"
    if path.is_file():
        return path
    problem = f"{folder} has no recipe.yaml" if folder.is_dir() else f"there is no folder {folder}"
    runs = sorted(str(found.parent) for found in folder.glob("*/recipe.yaml"))
    advice = (
        f"Choose one of the runs in it: {', '.join(runs)}"
        if runs
        else "Give the folder of a run, runs/NAME, once training has begun"
    )
    raise FileNotFoundError(f"{problem}, so it is no run. {advice}")


def read_lines(path: Path) -> list[dict]:
    """Return the lines of a JSON lines file without an incomplete last one. It is read again only if it has changed."""
    if not path.is_file():
        return []
    status = path.stat()
    return parse_lines(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=4)
def parse_lines(path: Path, changed: int, size: int) -> list[dict]:
    return [record for _, record in lines(path)]


def stage_progress(recipe: Recipe, stage_records: dict[str, list[dict]]) -> list[StageProgress]:
    """Return the progress of each stage that has tokens.

    Args:
        stage_records: Result of `by_stage`.
    """
    durations = validation_times([record for records in stage_records.values() for record in records])
    validation_seconds = statistics.median(durations[-RECENT:]) if durations else 0.0
    known: tuple[str, float] | None = None  # the latest stage with a measured speed, and its seconds per token
    stages, before = [], 0
    for name in STAGES:
        stage, records = recipe.stage(name), stage_records.get(name, [])
        if not stage.tokens:
            continue
        done, speed = records[-1]["step"] if records else 0, None
        if records:
            known = name, 1 / statistics.median(record["tokens_per_second"] for record in records[-RECENT:])
        if known is not None:
            speed = 1 / (known[1] * RELATIVE_TIME[name] / RELATIVE_TIME[known[0]])
        left = None
        if done >= stage.steps:
            left = 0.0
        elif speed is not None:
            every = recipe.run.eval_every
            validations = math.ceil(stage.steps / every) - done // every
            left = (stage.steps - done) * stage.batch_size * stage.sequence_length / speed
            left += validations * validation_seconds
        spent = sum(record.get("validation_seconds", 0.0) for record in records)
        peaks = [record["peak_memory_bytes"] for record in records if "peak_memory_bytes" in record]
        stages.append(
            StageProgress(
                name=name,
                steps=stage.steps,
                done=done,
                tokens=records[-1]["tokens"] - before if records else 0,
                seconds=spent + (records[-1]["seconds"] if records else 0.0),
                tokens_per_second=speed,
                measured=bool(records),
                seconds_left=left,
                peak_memory_bytes=max(peaks, default=None),
            )
        )
        before = records[-1]["tokens"] if records else before
    return stages


def validation_times(records: list[dict]) -> list[float]:
    """Return the seconds of each validation."""
    return [record["validation_seconds"] for record in records if "validation_seconds" in record]


def stopped_early(folder: Path, records: list[dict]) -> bool:
    """Return whether --max-minutes ended the run after its last line."""
    path = folder / str(records[-1]["stage"] if records else "") / "unfinished.json"
    return path.is_file() and json.loads(path.read_text())["step"] == records[-1]["step"]


def quiet_seconds(records: list[dict], stages: list[StageProgress]) -> float | None:
    """Return the seconds since the last line if they are unusually many, else None."""
    last = records[-1] if records else {}
    current = next((stage for stage in stages if stage.name == last.get("stage")), None)
    if current is None or "time" not in last:  # the conversion, and what precedes training, have no usual time
        return None
    durations = validation_times(records)
    seconds = last["seconds"] / max(1, last["step"])
    usual = QUIET_STEPS * seconds + QUIET_VALIDATIONS * max(durations, default=0.0)
    quiet = time.time() - last["time"]
    return quiet if quiet > max(QUIET_SECONDS, usual) else None

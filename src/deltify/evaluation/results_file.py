"""results.json: what an evaluation has measured so far, and on what machine."""

import json
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..config import STAGES, Recipe
from ..conversion.teacher import Teacher
from ..training.distributed import rank
from ..utils.devices import device_name
from ..utils.files import write_text
from ..utils.folders import saved_stages


class Results:
    """results.json, which is written anew after each measure and is complete at any time."""

    def __init__(
        self,
        path: Path,
        teacher: Teacher | None,
        runs: Mapping[str, Recipe],
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.path, self.started = path, time.time()
        lengths = [
            recipe.stage(stage).sequence_length
            for folder, recipe in runs.items()
            for stage in STAGES
            if recipe.stage(stage).tokens and stage in saved_stages(Path(folder))
        ]
        recipes = list(runs.values())
        self.content: dict = {
            "teacher": recipes[0].teacher.model if recipes else teacher and teacher.model.name_or_path,
            "runs": list(runs),
            "trained_length": max(lengths, default=None),
            "device": device_name(device),
            "dtype": str(dtype).removeprefix("torch."),
            "versions": versions(),
            "command": command_line(),
            "date": time.strftime("%Y-%m-%d"),
        }

    def add(self, **measured) -> None:
        """Add entries and write the file, which only the first process does."""
        self.content |= measured
        self.content["seconds"] = round(time.time() - self.started, 1)
        if rank() == 0:
            write_text(self.path, json.dumps(self.content, indent=1))


def command_line() -> str:
    """Return the command that started this process, or the script that called `evaluate`."""
    script = Path(sys.argv[0]).name
    program = ["deltify"] if script in ("deltify", "cli.py") else ["python", script]
    return shlex.join([*program, *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide results."""
    numbers = {"python": platform.python_version()}
    for name in ("deltify", "torch", "transformers", "lm_eval"):
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            continue
    return numbers

"""results.json: what an evaluation has measured so far, and on what machine."""

import json
import platform
import shlex
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..training.distributed import rank
from ..utils.devices import device_name
from ..utils.files import write_text


class Results:
    """results.json, which is written anew after each measure and is complete at any time."""

    def __init__(
        self,
        path: Path,
        teacher: str | Path | None,
        runs: list[str],
        trained_length: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.path, self.started = path, time.time()
        self.content: dict = {
            "teacher": None if teacher is None else str(teacher),
            "runs": runs,
            "trained_length": trained_length or None,
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

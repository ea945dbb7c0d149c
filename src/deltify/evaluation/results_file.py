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
from ..utils.console import log
from ..utils.devices import device_name
from ..utils.files import write_text

# entries of results.json that a later evaluation keeps, if all of SAME are equal; and the settings of each, if any
MEASURES = {
    "samples": None,
    "benchmarks": None,
    "needles": "needles",
    "needle_rows": "needles",
    "recall": "recall",
    "positions": "positions",
    "decode": None,
}
SAME = ("teacher", "weights", "device", "dtype", "versions")


class Results:
    """results.json, which is written anew after each measure and is complete at any time.

    If the file is there already, and is of the same models, machine and versions, it keeps those of its measures that
    are not repeated.

    Args:
        path: File.
        teacher: Name of the teacher, if there is one.
        runs: Folders of the runs.
        trained_length: Tokens of the longest training sequence, or 0.
        weights: Fingerprints of teacher and students by name.
        device: Device of the evaluation.
        dtype: Type of the weights.
    """

    def __init__(
        self,
        path: Path,
        teacher: str | Path | None,
        runs: list[str],
        trained_length: int,
        weights: dict[str, str],
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.path, self.started = path, time.time()
        self.content: dict = {
            "teacher": None if teacher is None else str(teacher),
            "runs": runs,
            "trained_length": trained_length or None,
            "weights": weights,
            "device": device_name(device),
            "dtype": str(dtype).removeprefix("torch."),
            "versions": versions(),
            "command": command_line(),
            "date": time.strftime("%Y-%m-%d"),
        }
        self.earlier = self.read_earlier() if rank() == 0 and path.is_file() else {}

    def read_earlier(self) -> dict:
        """Return the content of the file if its measures can stand beside new ones, else an empty dictionary."""
        earlier = json.loads(self.path.read_text())
        measures = [measure for measure in MEASURES if measure in earlier]
        if other := [key for key in SAME if earlier.get(key) != self.content[key]]:
            if measures:
                log(f"{self.path}: earlier {', '.join(measures)} are not kept, as {', '.join(other)} differ")
            return {}
        return earlier

    def add(self, **measured) -> None:
        """Add entries and write the file, which only the first process does."""
        self.content |= measured
        self.content["seconds"] = round(time.time() - self.started, 1)
        if rank() == 0:
            write_text(self.path, json.dumps(with_earlier(self.content, self.earlier), indent=1))


def with_earlier(new: dict, earlier: dict) -> dict:
    """Return the content of a results.json, and what an earlier one of the same models has and the new one has not.

    What both have measured is taken from the new one: a task of benchmarks or of the recall curve, a needle task at one
    length, and any other measure as a whole. Measures with other settings are left out.
    """
    settings, before = new.get("settings", {}), earlier.get("settings", {})
    kept: dict = {}
    for measure, name in MEASURES.items():
        same = name not in settings or settings[name] == before.get(name)
        if measure in earlier and measure not in new and same:
            kept[measure] = earlier[measure]
        elif measure in earlier and measure != "samples" and same:
            done = {(row.get("task"), row.get("length")) for row in new[measure]}
            rows = [row for row in earlier[measure] if (row.get("task"), row.get("length")) not in done]
            if rows:
                kept[measure] = new[measure] + rows
    if not kept:
        return new
    commands = dict.fromkeys([*earlier["command"].splitlines(), new["command"]])
    kept |= {"command": "\n".join(commands), "seconds": round(earlier["seconds"] + new["seconds"], 1)}
    return new | kept | {"settings": before | settings}


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

"""results.json: what an evaluation has measured so far, and on what machine."""

import itertools
import json
import platform
import shlex
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..training.distributed import from_first, rank
from ..utils.console import log
from ..utils.devices import device_name
from ..utils.files import write_text

# entries that a later evaluation of the same models keeps, and the name of each one's settings, if it has any
MEASURES = {
    "samples": None,
    "benchmarks": None,
    "needles": "needles",
    "needle_rows": "needles",
    "recall": "recall",
    "positions": "positions",
    "decode": None,
}
HELDOUT = ("scores", "heldout_source", "heldout_digest", "heldout_tokens", "heldout_sequence_length")


class Results:
    """results.json, which is written anew after each measure and is complete at any time.

    If the file is there already, and is of the same models, machine and versions, it keeps those of its measures that
    are not repeated. If it is of others, it is renamed.

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
        self.reason: str | None = None  # why the file is to be renamed before a new one is written
        self.earlier = from_first(self.read_earlier)

    def read_earlier(self) -> dict:
        """Return the content of the file if new measures can stand beside its own. Else keep the reason."""
        try:
            earlier = json.loads(self.path.read_text()) if self.path.is_file() else {}
        except ValueError as error:
            self.reason = f"cannot be read ({error})"
            return {}
        if not {*MEASURES, "scores"} & set(earlier):
            return {}
        self.reason = difference(earlier, self.content)
        return {} if self.reason else earlier

    def rename(self) -> None:
        """Give the earlier file a free name, if new measures cannot stand beside its own."""
        if self.reason is None:
            return
        names = (self.path.with_name(f"{self.path.name}.old{number or ''}") for number in itertools.count())
        old = next(path for path in names if not path.exists())
        self.path.replace(old)
        log(f"{self.path} {self.reason}. It is {old.name} now")
        self.reason = None

    def add(self, **measured) -> None:
        """Add entries and write the file, which only the first process does."""
        self.content |= measured
        self.content["seconds"] = round(time.time() - self.started, 1)
        if rank() == 0:
            self.rename()
            write_text(self.path, json.dumps(with_earlier(self.content, self.earlier), indent=1))


def difference(earlier: dict, new: dict) -> str | None:
    """Return why the measures of two evaluations must not stand beside each other, or None."""
    then, now = earlier.get("weights"), new["weights"]
    if then is None:
        return "does not say which weights were measured"
    if sorted(then.values()) != sorted(now.values()):
        return "was measured with other weights"
    if then != now:
        return f"has other names of the models ({', '.join(then)}; now {', '.join(now)})"
    if other := [key for key in ("teacher", "device", "dtype") if earlier.get(key) != new[key]]:
        return f"was measured with another {' and '.join(other)}"
    packages = [name for name in new["versions"] if name != "lm_eval" and not same_version(earlier, new, name)]
    return f"was measured with other versions of {' and '.join(packages)}" if packages else None


def same_version(earlier: dict, new: dict, package: str) -> bool:
    return earlier.get("versions", {}).get(package) == new["versions"].get(package)


def with_earlier(new: dict, earlier: dict) -> dict:
    """Return the content of a results.json, and what an earlier one of the same models has and the new one has not.

    A row is kept unless it is repeated, or belongs to a task of which the new rows have another number of items. Where
    a measure is repeated with other settings, or benchmarks with another version of lm_eval, all its rows are replaced.
    """
    if not earlier:
        return new
    settings, before = new.get("settings", {}), earlier.get("settings", {})
    kept = {} if "scores" in new else {key: earlier[key] for key in HELDOUT if key in earlier}
    for measure, name in MEASURES.items():
        alike = settings.get(name) == before.get(name)
        if measure == "benchmarks":
            alike = same_version(earlier, new, "lm_eval")
        if measure in earlier and measure not in new:
            kept[measure] = earlier[measure]
        elif measure in earlier and measure != "samples" and alike:
            kept[measure] = new[measure] + not_repeated(earlier[measure], new[measure])
    if {"needles", "needle_rows"} <= set(kept):
        cells = set(map(identity, kept["needles"]))
        kept["needle_rows"] = [row for row in kept["needle_rows"] if identity(row) in cells]
    commands = dict.fromkeys([*earlier["command"].splitlines(), new["command"]])
    kept |= {"command": "\n".join(commands), "seconds": round(earlier["seconds"] + new["seconds"], 1)}
    own = {name for measure, name in MEASURES.items() if measure in new}  # a measure that has just begun has no rows
    settings = before | {name: values for name, values in settings.items() if name in own}
    return new | kept | ({"settings": settings} if settings else {})


def not_repeated(earlier: list[dict], new: list[dict]) -> list[dict]:
    """Return the earlier rows that the new ones do not replace."""
    done, items = set(map(identity, new)), {identity(row)[1:]: row.get("items") for row in new}
    return [
        row
        for row in earlier
        if identity(row) not in done and items.get(identity(row)[1:], row.get("items")) == row.get("items")
    ]


def identity(row: dict) -> tuple:
    """Return what a row is about: model, task, length of the text, and context. Equal rows are the same measure."""
    return tuple(row.get(key) for key in ("model", "task", "length", "context"))


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

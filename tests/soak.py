"""Kill a tiny run at random moments, resume it, and compare the results with an unbroken run, bit for bit.

    make soak    # or: python tests/soak.py [moments] [seed]

Every other kill waits until a checkpoint or model is being written. Runs are processes of their own, forked from a
server that has imported deltify, and die by SIGKILL.
"""

import json
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

PROCESSES = multiprocessing.get_context("forkserver")
STEPS, ROW, EVERY = 12, 32, 3
CLOCK = ("seconds", "tokens_per_second", "validation_seconds", "time")


def recipe_of(folder: Path):
    """Return the tiny recipe whose run is `folder`/run. It saves a checkpoint every 2 steps."""
    from deltify.config import DataSpec, Recipe, RunSpec, Stage, StudentSpec, TeacherSpec

    stage = Stage(tokens=STEPS * 2 * ROW, sequence_length=ROW, batch_size=2)
    return Recipe(
        name="run",
        output=str(folder),
        teacher=TeacherSpec(model="random:llama"),
        student=StudentSpec(calibration_tokens=256, calibration_sequence_length=ROW),
        data=DataSpec(folder=str(folder.parent / "data"), max_tokens=5000),
        align=stage,
        match=stage,
        run=RunSpec("cpu", "fp32", heldout_tokens=128, heldout_sequence_length=ROW, eval_every=EVERY, save_every=2),
    )


def train(folder: Path) -> None:
    from transformers.utils.logging import disable_progress_bar

    from deltify import distill
    from deltify.training import samples
    from deltify.utils.console import console

    samples.NEW_TOKENS = 4
    torch.set_num_threads(1)
    console.quiet = True
    disable_progress_bar()
    distill(recipe_of(folder), resume=True)


def start(folder: Path):
    PROCESSES.set_forkserver_preload(["deltify.training.runner", "transformers.models.llama.modeling_llama"])
    process = PROCESSES.Process(target=train, args=(folder,))
    process.start()
    return process


def finish(folder: Path) -> float:
    """Run to the end and return the seconds that it took."""
    begun, process = time.monotonic(), start(folder)
    process.join()
    assert process.exitcode == 0, f"the run in {folder} ended with {process.exitcode}"
    return time.monotonic() - begun


def kill(folder: Path, after_seconds: float, while_saving: bool = False) -> str:
    """Start or resume the run, and kill it after a time, or while it writes its next folder after that.

    Returns:
        The name of what was being written, or the last line of metrics before the kill.
    """
    process, begun = start(folder), time.monotonic()

    def writing() -> list[str]:
        return [path.name for path in (folder / "run").rglob("*.unfinished") if path.is_dir()]

    while process.is_alive() and (time.monotonic() - begun < after_seconds or (while_saving and not writing())):
        time.sleep(0.0005)
    process.kill()
    process.join()
    if process.exitcode == 0:
        return "at its end"
    assert process.exitcode == -signal.SIGKILL, f"the run in {folder} ended by itself, with {process.exitcode}"
    metrics = folder / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    return f"writing {', '.join(writing())}" if writing() else f"after {lines[-1][:30] if lines else 'nothing'}"


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Return every stage's weights and every line of metrics and samples, without the times."""
    weights = {
        f"{stage}.{name}": tensor
        for stage in ("converted", "align", "match")
        for name, tensor in load_file(folder / "run" / stage / "model.safetensors").items()
    }
    texts = [(folder / "run" / f"{name}.jsonl").read_text() for name in ("metrics", "samples")]
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    return weights, [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def assert_same(folder: Path, unbroken: Path) -> None:
    (got, got_lines), (want, want_lines) = outcome(folder), outcome(unbroken)
    assert got.keys() == want.keys()
    different = [name for name in want if not torch.equal(got[name], want[name])]
    assert not different, f"{folder}: {len(different)} tensors differ, the first is {different[0]}"
    assert got_lines == want_lines, f"{folder}: metrics differ"
    validations = 1 + 2 * (STEPS // EVERY)
    assert len(got_lines) == 1 + 2 * STEPS + 1 + validations  # metrics, and samples of the teacher and the student


def soak(folder: Path, moments: int, seed: int) -> Iterator[str]:
    """Kill `moments` runs once each, resume them, compare the results, and yield where each was killed.

    Raises:
        AssertionError: If a resumed run has other weights or metrics.
    """
    finish(folder / "warm")  # writes the token files, which the other runs read
    seconds = finish(folder / "unbroken")
    chance = random.Random(seed)
    for moment in range(moments):
        broken = folder / f"killed-{moment}"
        place = kill(broken, chance.uniform(0, seconds), while_saving=moment % 2 == 0)
        finish(broken)
        assert_same(broken, folder / "unbroken")
        yield place


if __name__ == "__main__":
    given = [int(text) for text in sys.argv[1:]]
    moments, seed = (*given, *(20, time.time_ns() % 10**6)[len(given) :])
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        for moment, place in enumerate(soak(Path(folder), moments, seed), 1):
            print(f"{moment:3}  killed {place}; resumed to the same weights and metrics", flush=True)
        print(f"{moments} moments, seed {seed}, {time.monotonic() - begun:.0f} s: all equal to an unbroken run")

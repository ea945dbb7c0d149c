"""Run a function or a program in several processes on a CPU that form a process group."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_under_torchrun(program: str, *arguments: object, restarts: int = 0) -> str:
    """Run a program of this folder in two processes, and return what they print.

    Args:
        restarts: How often torchrun may start the processes again after one has failed.
    """
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    start.append(f"--max-restarts={restarts}")
    command = [*start, str(Path(__file__).parent / program), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_in_processes(function: Callable, ranks: int, folder: Path, *arguments: Any) -> list[Any]:
    """Return `function(*arguments)` of each rank.

    The processes are forked from a server that has imported torch and deltify once for all tests.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deltify", function.__module__])
    jobs = [(function, rank, ranks, folder / f"{function.__name__}-store", arguments) for rank in range(ranks)]
    with context.Pool(ranks) as pool:
        return pool.starmap(join_and_call, jobs, chunksize=1)


def join_and_call(function: Callable, rank: int, ranks: int, store: Path, arguments: tuple) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()

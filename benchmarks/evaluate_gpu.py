"""An evaluation on several GPUs of one host, beside one process: held-out text, needles and the recall curve of a run.

The run is SmolLM2-135M-Instruct as it was converted, without training. Seconds are those of results.json, without the
start of the processes and the loading of the teacher; wall seconds are those of the whole command.
Run: python benchmarks/evaluate_gpu.py [--processes 2 4] [--run RUN] [options of `deltify evaluate`, not MEASURES]
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import keep, row, torchrun, write

RECIPE = "smollm2-135m-kda"
NEEDLES = "niah_single_1,niah_single_2,niah_multikey_1"
MEASURES = ["--needles", NEEDLES, "--lengths", "1024,4096,16384", "--needle-samples", "32", "--recall", "--no-samples"]
CHANGING = ("seconds", "command", "date")  # entries of results.json that differ from run to run


def run(*arguments: object, processes: int = 1) -> float:
    """Run a command of deltify and return its wall seconds."""
    started = time.perf_counter()
    torchrun(processes, "-m", "deltify.cli", *arguments)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", nargs="+", type=int, help="2, 4 and 8, as far as there are GPUs")
    parser.add_argument("--run", type=Path, help="run to evaluate (default: a new one, without training)")
    options, extra = parser.parse_known_args()
    numbers = options.processes or [n for n in (2, 4, 8) if n <= torch.cuda.device_count()]
    rows, results, walls = [], {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        source = options.run or Path(temporary) / "converted"
        if options.run is None:
            run("convert", RECIPE, "--output", temporary, "--name", "converted")
        for processes in (1, *numbers):
            folder = Path(temporary) / f"by-{processes}"
            walls[processes] = run("evaluate", source, "-o", folder, *(extra or MEASURES), processes=processes)
            results[processes] = json.loads((folder / "results.json").read_text())
            if processes == 1:
                continue
            case, seconds = f"evaluate/{source.name}/{processes}-gpus", {n: r["seconds"] for n, r in results.items()}
            rows.append(row(case, "seconds", seconds[processes], seconds[1], "one process"))
            rows.append(row(case, "wall seconds", walls[processes], walls[1], "one process"))
            keep("evaluate_gpu", rows)
            different = [k for k, v in results[processes].items() if k not in CHANGING and results[1][k] != v]
            print(f"{case}: {seconds} s, wall {walls} s; results that differ: {different or 'none'}", flush=True)
    write("evaluate_gpu", rows)


if __name__ == "__main__":
    main()

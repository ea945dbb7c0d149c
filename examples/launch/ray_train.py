"""Train on a Ray cluster whose nodes share a file system, with one GPU per worker.

    python examples/launch/ray_train.py WORKERS RECIPE [--field value ...]

If a worker fails, Ray starts all of them again, and the run continues from its last checkpoint. Ray handles signals, so
deltify does not save a checkpoint on SIGTERM; `run.save_every_minutes` decides how much is lost.
"""

import os
import sys
from pathlib import Path

import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train(config: dict) -> None:
    """Run the recipe in one worker. Ray has joined the workers to a process group, which deltify uses."""
    import deltify

    os.chdir(config["folder"])
    deltify.distill(deltify.load_recipe(config["recipe"], config["overrides"]), resume=True)


if __name__ == "__main__":
    workers, recipe, *overrides = sys.argv[1:]
    folder = Path.cwd()
    TorchTrainer(
        train,
        train_loop_config={"recipe": recipe, "overrides": overrides, "folder": str(folder)},
        scaling_config=ScalingConfig(num_workers=int(workers), use_gpu=torch.cuda.is_available()),
        run_config=RunConfig(storage_path=str(folder / "runs" / ".ray"), failure_config=FailureConfig(max_failures=20)),
    ).fit()

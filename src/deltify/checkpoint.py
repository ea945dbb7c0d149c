"""What a run leaves on disk: resume state, and Hugging Face folders. Everything appears whole or not at all."""

import json
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Progress:
    """Where a stage stands after `step` optimizer steps."""

    stage: str
    step: int
    tokens: int
    seconds: float
    best_kl: float | None = None  # lowest held-out KL so far, and the step it was seen at
    best_step: int | None = None


def publish(unfinished: Path, folder: Path) -> None:
    """Moves a finished folder to its place; an older one there goes away."""
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)


def save_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer, progress: Progress) -> None:
    """Writes weights, optimizer and progress; if that fails, what was there before is untouched.

    torch.distributed.checkpoint is used because it reads a checkpoint back on any number of ranks.

    Raises:
        OSError: if the disk is full or not writable; says how to go on.
    """
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        weights, optimizer_state = get_state_dict(model, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no process group is set up, which is so on purpose
            dcp.save({"model": weights, "optimizer": optimizer_state}, checkpoint_id=unfinished)
        (unfinished / "progress.json").write_text(json.dumps(asdict(progress)))
        publish(unfinished, folder)
    except Exception as error:  # torch wraps a full disk into its own exception types
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(
            f"could not save {folder}: {error}. Checkpoints written before are untouched; free some space and go on "
            "with --resume"
        ) from error


def load_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer) -> Progress:
    """Puts a checkpoint's weights and optimizer state into `model` and `optimizer`."""
    weights, optimizer_state = get_state_dict(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load({"model": weights, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=optimizer_state)
    return read_progress(folder)


def read_progress(folder: Path) -> Progress:
    return Progress(**json.loads((folder / "progress.json").read_text()))


def checkpoints(run: Path, stage: str) -> list[Path]:
    """Finished checkpoints of a stage, oldest first."""
    found = (run / "checkpoints").glob(f"{stage}-[0-9]*")
    return sorted(path for path in found if (path / "progress.json").is_file())


def prune(run: Path, stage: str, keep: int, best_step: int | None) -> None:
    """Removes all but the last `keep` checkpoints of a stage and the best one."""
    for path in checkpoints(run, stage)[:-keep]:
        if read_progress(path).step != best_step:
            shutil.rmtree(path)


def checkpoint_folder(run: Path, progress: Progress) -> Path:
    return run / "checkpoints" / f"{progress.stage}-{progress.step:07d}"


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes a folder that `AutoModelForCausalLM.from_pretrained` loads; safetensors, in the model's dtypes.

    The folder carries the model's code: where deltify is not installed, `trust_remote_code=True` loads it.
    """
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        publish(unfinished, folder)
    except Exception as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"could not save {folder}: {error}; free some space and go on with --resume") from error

"""What a run leaves on disk: resume state, and Hugging Face folders. Everything appears whole or not at all.

A checkpoint ends with manifest.json, the size and checksum of each of its files; one that does not match is not used.
"""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..utils.files import check_manifest, replace_folder, write_manifest, write_text
from . import distributed


@dataclass(frozen=True)
class Progress:
    """Where a stage stands after `step` optimizer steps."""

    stage: str
    step: int
    tokens: int
    seconds: float
    best_kl: float | None = None  # lowest held-out KL so far, and the step it was seen at
    best_step: int | None = None


def cause_of(error: BaseException) -> BaseException:
    """What went wrong inside torch.distributed.checkpoint, whose CheckpointException wraps even Ctrl-C."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def save_checkpoint(folder: Path, model: nn.Module, optimizers: list[Optimizer], progress: Progress) -> None:
    """Writes weights, optimizer and progress; if that fails, what was there before is untouched.

    torch.distributed.checkpoint is used because it reads a checkpoint back on any number of ranks.

    Raises:
        OSError: if the disk is full or not writable; says how to go on.
    """
    unfinished, first = folder.with_name(folder.name + ".unfinished"), distributed.rank() == 0
    if first:
        shutil.rmtree(unfinished, ignore_errors=True)
    try:
        if first:
            unfinished.mkdir(parents=True)
        distributed.barrier()
        weights, optimizer_state = get_state_dict(model, optimizers)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no process group is set up, which is so on purpose
            dcp.save({"model": weights, "optimizer": optimizer_state}, checkpoint_id=unfinished)
        if first:
            write_text(unfinished / "progress.json", json.dumps(asdict(progress)))
            write_manifest(unfinished)
            replace_folder(unfinished, folder)
        distributed.barrier()
    except (Exception, CheckpointException) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        cause = cause_of(error)
        if not isinstance(cause, Exception):
            raise cause from None
        raise OSError(
            f"could not save {folder}: {cause}. Checkpoints written before are untouched; free some space and go on "
            "with --resume"
        ) from error


def load_checkpoint(folder: Path, model: nn.Module, optimizers: list[Optimizer]) -> Progress:
    """Puts a checkpoint's weights and optimizer state into `model` and `optimizers`.

    Raises:
        ValueError: if the checkpoint is damaged; says which file.
    """
    weights, optimizer_state = get_state_dict(model, optimizers)
    try:
        check_manifest(folder)
        progress = Progress(**json.loads((folder / "progress.json").read_text()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load({"model": weights, "optimizer": optimizer_state}, checkpoint_id=folder)
    except (Exception, CheckpointException) as error:
        cause = cause_of(error)
        if not isinstance(cause, Exception):
            raise cause from None
        reason = next(iter(str(cause).splitlines()), "") or type(cause).__name__
        raise ValueError(f"checkpoint {folder} cannot be read ({reason})") from error
    set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=optimizer_state)
    return progress


def load_last(
    run: Path, stage: str, model: nn.Module, optimizers: list[Optimizer], report: Callable[[str], None]
) -> Progress | None:
    """Loads the newest checkpoint of a stage that can be read; None if the stage has none at all.

    Newer ones that cannot be read are told to `report` and moved aside, so that `prune` does not count them.

    Raises:
        ValueError: if there are checkpoints, and none can be read.
    """
    damaged: list[Path] = []
    for folder in reversed(checkpoints(run, stage)):
        try:
            progress = load_checkpoint(folder, model, optimizers)
        except ValueError as error:
            report(f"{stage}: {error}; trying the one before")
            damaged.append(folder)
            continue
        for newer in damaged if distributed.rank() == 0 else ():
            replace_folder(newer, newer.with_name(newer.name + ".damaged"))
        return progress
    if damaged:
        raise ValueError(
            f"no checkpoint of {stage} in {run / 'checkpoints'} can be read ({', '.join(p.name for p in damaged)}); "
            f"delete them and --resume to train {stage} from its start"
        )
    return None


def checkpoints(run: Path, stage: str) -> list[Path]:
    """Finished checkpoints of a stage, oldest first."""
    found = (run / "checkpoints").glob(f"{stage}-*")
    return sorted((path for path in found if step_of(path).isdecimal()), key=lambda path: int(step_of(path)))


def step_of(checkpoint: Path) -> str:
    """The step in a checkpoint's name; that of one not finished, or moved aside, is no number."""
    return checkpoint.name.rpartition("-")[2]


def prune(run: Path, stage: str, keep: int, best_step: int | None) -> None:
    """Removes all but the last `keep` checkpoints of a stage and the best one."""
    if distributed.rank() > 0:
        return
    for path in checkpoints(run, stage)[:-keep]:
        if int(step_of(path)) != best_step:
            shutil.rmtree(path)


def checkpoint_folder(run: Path, progress: Progress) -> Path:
    return run / "checkpoints" / f"{progress.stage}-{progress.step:07d}"


def save_model(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, stopped_at: Progress | None = None
) -> None:
    """Writes a folder that `AutoModelForCausalLM.from_pretrained` loads; safetensors, in the model's dtypes.

    The folder carries the model's code: where deltify is not installed, `trust_remote_code=True` loads it.

    Args:
        stopped_at: of a stage that was stopped early; written to unfinished.json, so that the stage is not taken for
            done.
    """
    unfinished = folder.with_name(folder.name + ".unfinished")
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on the first rank; nothing on the others
    weights = get_model_state_dict(model, options=whole) if distributed.count() > 1 else None
    if distributed.rank() > 0:
        distributed.barrier()
        return
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        model.save_pretrained(unfinished, state_dict=weights)
        tokenizer.save_pretrained(unfinished)
        if stopped_at is not None:
            write_text(unfinished / "unfinished.json", json.dumps(asdict(stopped_at)))
        replace_folder(unfinished, folder)
    except Exception as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"could not save {folder}: {error}; free some space and go on with --resume") from error
    distributed.barrier()


def is_finished(folder: Path) -> bool:
    """Whether `folder` holds a model that was trained to its last step."""
    return (folder / "config.json").is_file() and not (folder / "unfinished.json").is_file()

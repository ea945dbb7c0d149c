"""Checkpoints to resume from, and Hugging Face folders. An interrupted write leaves neither.

A checkpoint's manifest.json holds the size and checksum of each of its files. A checkpoint that does not match is not
used.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..model.shards import is_sharded, save_shards
from ..utils.files import check_manifest, replace_folder, write_manifest, write_text
from ..utils.formats import gib
from . import distributed


@dataclass(frozen=True)
class Progress:
    """The progress of a stage after `step` optimizer steps."""

    stage: str
    step: int
    tokens: int
    seconds: float
    best_kl: float | None = None  # lowest held-out KL so far, and its step
    best_step: int | None = None
    judge: str | None = None  # number and length of the validation sequences that best_kl is about


def cause_of(error: BaseException) -> BaseException:
    """Return the error inside a CheckpointException, in which torch wraps even a KeyboardInterrupt."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizers: list[Optimizer],
    progress: Progress,
    group: dist.ProcessGroup | None = None,
) -> Future[None] | None:
    """Write weights, optimizer states and progress. If that fails, earlier files are untouched.

    torch.distributed.checkpoint can read a checkpoint on another number of ranks.

    Args:
        group: Process group on the CPU that nothing else uses. With it, the state is copied to the CPU, and a thread
            writes it. The checkpoint is there when the returned future is done. The future raises the same error.

    Raises:
        OSError: If the disk is full or not writable.
    """
    unfinished, first = folder.with_name(folder.name + ".unfinished"), distributed.rank() == 0
    with explain_failure(folder, unfinished):
        if first:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        distributed.barrier()
        weights, optimizer_state = get_state_dict(model, optimizers)
        state = {"model": weights, "optimizer": optimizer_state}
        if group is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # no process group is set up, on purpose
                dcp.save(state, checkpoint_id=unfinished)
            if first:
                publish(unfinished, folder, progress)
            distributed.barrier()
            return None
        written = dcp.async_save(state, checkpoint_id=unfinished, process_group=group)
    assert isinstance(written, Future)  # other results are those of other stagers

    def complete() -> None:
        with explain_failure(folder, unfinished):
            written.result()  # on the first rank: of all ranks
            if first:
                publish(unfinished, folder, progress)

    pool = ThreadPoolExecutor(1)
    completed = pool.submit(complete)
    pool.shutdown(wait=False)
    return completed


def publish(unfinished: Path, folder: Path, progress: Progress) -> None:
    """Add progress and manifest to a checkpoint that is otherwise complete, and move it to its place."""
    write_text(unfinished / "progress.json", json.dumps(asdict(progress)))
    write_manifest(unfinished)
    replace_folder(unfinished, folder)


@contextmanager
def explain_failure(folder: Path, unfinished: Path) -> Generator[None]:
    """Replace an error while a checkpoint is written by one that says what to do.

    Raises:
        OSError: In place of any other error, except KeyboardInterrupt and the like.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        cause = cause_of(error)
        if not isinstance(cause, Exception):
            raise cause from None
        raise OSError(
            f"could not save {folder}: {cause}. Earlier checkpoints are untouched. Free some space and continue with "
            "--resume"
        ) from error


def load_checkpoint(folder: Path, model: nn.Module, optimizers: list[Optimizer]) -> Progress:
    """Load a checkpoint's weights and optimizer states into `model` and `optimizers`, and return its progress.

    Raises:
        ValueError: If the checkpoint is damaged. The message names the file.
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
    run: Path, stage: str, model: nn.Module, optimizers: list[Optimizer], log: Callable[[str], None]
) -> Progress | None:
    """Load the newest readable checkpoint of a stage. Return its progress, or None if the stage has no checkpoint.

    Newer, damaged checkpoints are logged and renamed, so that `prune` does not count them. Unfinished ones, which a
    killed run leaves, are deleted.

    Raises:
        ValueError: If the stage has checkpoints, but none can be read.
    """
    delete_partial(run, stage, ".unfinished")
    damaged: list[Path] = []
    for folder in reversed(checkpoints(run, stage)):
        try:
            progress = load_checkpoint(folder, model, optimizers)
        except ValueError as error:
            log(f"{stage}: {error}; trying the previous one")
            damaged.append(folder)
            continue
        for newer in damaged if distributed.rank() == 0 else ():
            replace_folder(newer, newer.with_name(newer.name + ".damaged"))
        return progress
    if damaged:
        raise ValueError(
            f"no checkpoint of {stage} in {run / 'checkpoints'} can be read ({', '.join(p.name for p in damaged)}). "
            "Sharded runs cannot read adamw8bit's states of replicated ones, or the reverse: then restore "
            f"run.data_parallel. To train {stage} from its first step, delete them and --resume"
        )
    return None


def checkpoints(run: Path, stage: str) -> list[Path]:
    """Return the finished checkpoints of a stage, oldest first."""
    paths = (run / "checkpoints").glob(f"{stage}-*")
    return sorted((path for path in paths if step_of(path).isdecimal()), key=lambda path: int(step_of(path)))


def step_of(checkpoint: Path) -> str:
    """Return the step in a checkpoint's name. It is not a number if the checkpoint is unfinished or damaged."""
    return checkpoint.name.rpartition("-")[2]


def prune(run: Path, stage: str, keep: int, best_step: int | None) -> None:
    """Delete all checkpoints of a stage except the last `keep` and the best one."""
    if distributed.rank() > 0:
        return
    saved = checkpoints(run, stage)
    for path in saved[: max(0, len(saved) - keep)]:
        if int(step_of(path)) != best_step:
            shutil.rmtree(path)


def delete_partial(run: Path, stage: str, *endings: str) -> None:
    """Delete the folders of a stage's checkpoints whose names have one of these endings."""
    for path in (run / "checkpoints").glob(f"{stage}-*") if distributed.rank() == 0 else ():
        if path.name.endswith(endings):
            shutil.rmtree(path)


def checkpoint_folder(run: Path, progress: Progress) -> Path:
    """Return the folder of the checkpoint at this progress."""
    return run / "checkpoints" / f"{progress.stage}-{progress.step:07d}"


def save_model(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, stopped_at: Progress | None = None
) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads: safetensors, in the model's dtypes.

    All ranks must call it. The first one writes. If the model is sharded, no rank ever holds the whole of it.

    The folder contains the model's code. Where deltify is not installed, `trust_remote_code=True` loads it.

    Args:
        stopped_at: Progress of a stage that stopped early. It is written to unfinished.json, which marks the stage as
            not done.
    """
    unfinished = folder.with_name(folder.name + ".unfinished")
    if distributed.rank() > 0:
        if is_sharded(model):
            save_shards(model, unfinished)
        distributed.barrier()
        return
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        if is_sharded(model):
            unfinished.mkdir(parents=True)
            save_shards(model, unfinished)
        else:
            model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        if stopped_at is not None:
            write_text(unfinished / "unfinished.json", json.dumps(asdict(stopped_at)))
        replace_folder(unfinished, folder)
    except Exception as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"could not save {folder}: {error}. Free some space and continue with --resume") from error
    distributed.barrier()


def check_space(folder: Path, model: nn.Module) -> None:
    """Raise OSError if the first rank's disk cannot hold the model in `folder`, whose parent exists."""
    needed = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))
    free = distributed.from_first(lambda: shutil.disk_usage(folder.parent).free)
    if free < needed:
        raise OSError(
            f"{folder.name} would not be saved: {folder.parent} has {gib(free)} of free space, and the model takes "
            f"{gib(needed)}. Free some space and continue with --resume"
        )


def is_finished(folder: Path) -> bool:
    """Return whether `folder` holds a model that was trained to its last step."""
    return (folder / "config.json").is_file() and not (folder / "unfinished.json").is_file()

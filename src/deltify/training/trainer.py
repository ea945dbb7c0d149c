"""The training loop of one stage: align, match or extend."""

import functools
import math
import time
from collections.abc import Generator
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import Recipe, Stage
from ..data.batches import Batch, MixedBatches
from ..data.probes import Probe
from ..data.token_files import TokenFile
from ..model import DeltifyForCausalLM
from ..model.shards import full_tensor, is_sharded
from ..utils.console import console, log
from . import checkpoint, distributed
from .checkpoint import Progress
from .cuda_graphs import GraphedStep
from .metrics import Metrics, ProgressBar
from .optimizers import (
    choose_trained,
    groups,
    make_optimizers,
    recomputes,
    set_learning_rates,
    trained,
)
from .recall import evaluate_recall, recall_text
from .samples import write_samples
from .signals import Stopped, Stopper
from .steps import StageTeacher, align_step, divide_by_variance, evaluate_heldout, match_step


@dataclass(frozen=True)
class RunContext:
    """What all stages of a run share.

    Attributes:
        precision: bf16 or fp32.
        train: Token files of the training sources.
        mixes: Training batches of each stage that is to run.
        heldout: Validation batches.
        probes: Documents of the recall curve.
        prompts: Tokens of the held-out prompts that samples continue, [prompts, tokens].
        deadline: Time of `time.monotonic()` after which training stops.
        row_group: Ranks that share this one's rows in match and extend, if rows are cut over several.
        sharded: Whether teacher and student are sharded over the ranks.
        save_group: All ranks, for the thread that writes checkpoints, if models are sharded.
    """

    recipe: Recipe
    device: torch.device
    precision: str
    train: list[TokenFile]
    mixes: dict[str, MixedBatches]
    heldout: list[Batch]
    probes: list[Probe]
    prompts: Tensor
    metrics: Metrics
    stopper: Stopper
    deadline: float = math.inf
    row_group: dist.ProcessGroup | None = None
    sharded: bool = False
    save_group: dist.ProcessGroup | None = None

    def autocast(self) -> AbstractContextManager:
        """Return the context of a forward pass. It must not keep copies of weights that are gathered for a while."""
        enabled, kept = self.precision == "bf16", not self.sharded
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=kept)

    def validate(
        self, teacher: StageTeacher, student: DeltifyForCausalLM
    ) -> tuple[dict[str, float], list[dict[str, str]]]:
        """Return the figures of a student on held-out text, and samples unless it is sharded.

        The student must be in eval mode.
        """
        started = time.monotonic()
        figures = evaluate_heldout(teacher, student, self.heldout, self.autocast)
        figures |= evaluate_recall(student, self.probes, self.autocast)
        samples = [] if is_sharded(student) or self.metrics.silent else self.samples(student, teacher.tokenizer)
        return figures | {"validation_seconds": time.monotonic() - started}, samples

    def samples(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
        """Return the prompts and the model's greedy continuations."""
        with self.autocast():
            return write_samples(model, self.prompts, tokenizer)


class StageTrainer:
    """Trains a student through one stage, from the stage's last checkpoint, if any, to its last step.

    Args:
        context: What all stages of the run share.
        name: Name of the stage.
        teacher: Teacher. It is sharded over the ranks if the student is.
        student: Student. If it is sharded, the parameters that the stage trains were chosen before that.
    """

    def __init__(self, context: RunContext, name: str, teacher: StageTeacher, student: DeltifyForCausalLM):
        self.context, self.name, self.recipe, self.stage = context, name, context.recipe, context.recipe.stage(name)
        self.teacher, self.student, self.sharded = teacher, student, is_sharded(student)
        self.ranks_per_row = self.recipe.ranks_per_row(name)
        choose_trained(student, self.stage, name)
        if name == "align" and not self.sharded:
            share_frozen_weights(student, teacher.named_parameters())
        self.optimizers = make_optimizers(student, self.stage, name, self.sharded)
        run = self.recipe.run
        judge = f"{run.heldout_tokens} tokens in sequences of {run.heldout_sequence_length}"
        self.progress = Progress(name, 0, 0, 0.0, judge=judge)
        self.graphed: GraphedStep | None = None
        self.signal, self.stopped_early = 0, False
        self.last_save = self.last_clock = time.monotonic()
        self.saving: tuple[Future[None], Progress] | None = None  # the checkpoint that a thread writes
        # the previous stage may have set it; transformers 5.23 has another name for it than 5.16
        what = "activation" if hasattr(student, "activation_checkpointing_enable") else "gradient"
        getattr(student, f"{what}_checkpointing_{'enable' if recomputes(self.stage, name) else 'disable'}")()

    @property
    def is_last_step(self) -> bool:
        return self.progress.step == self.stage.steps

    def run(self) -> None:
        """Train to the last step, the deadline or a signal. A signal saves a checkpoint first.

        Raises:
            Stopped: If a signal came.
        """
        self.resume()
        self.student.train()
        if self.context.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.context.device)
        self.last_save = self.last_clock = time.monotonic()
        try:
            self.run_steps()
        finally:  # after an error, too, so that no checkpoint stays unfinished
            if self.saving is not None:
                wait([self.saving[0]])

    def run_steps(self) -> None:
        with ProgressBar(self.name, self.stage.steps) as show:
            for step in range(self.progress.step, self.stage.steps):
                figures, samples = self.train_step(step), []
                if self.saving is not None and self.saving[0].done():
                    self.finish_saving()
                speed = self.count_step()
                self.check_for_stop()
                finished_at = self.last_clock
                if self.progress.step % self.recipe.run.eval_every == 0 or self.is_last_step or self.stopped_early:
                    scores, samples = self.evaluate()
                    figures |= scores
                    self.last_clock = time.monotonic()
                self.log_step(figures, speed, samples)
                show(self.progress.step, figures["loss"], speed)
                self.save_if_due(finished_at)
                if self.signal or self.stopped_early or self.is_last_step:
                    self.finish_saving()
                if self.signal:
                    saved = checkpoint.checkpoint_folder(self.recipe.folder, self.progress)
                    raise Stopped(self.signal, f"saved {saved}; --resume continues from it")
                if self.stopped_early:
                    return

    def resume(self) -> None:
        """Load the stage's last checkpoint, if any, and drop the metrics of later steps."""
        saved = checkpoint.load_last(self.recipe.folder, self.name, self.student, self.optimizers, log)
        if saved is not None:
            console.print(f"{self.name}: resuming from step {saved.step}")
            judge = self.progress.judge
            if saved.judge not in (None, judge):
                changed = f"{self.name}: validation text changed from {saved.judge} to {judge}"
                console.print(f"{changed}; the best checkpoint is chosen anew")
                saved = replace(saved, best_kl=None, best_step=None)
            self.progress = replace(saved, judge=judge)
        self.context.metrics.truncate(self.name, self.progress.step)  # a killed run may have logged more than it saved

    def train_step(self, step: int) -> dict[str, float]:
        """Make one optimizer step and return the mean losses and the gradient norm."""
        set_learning_rates(self.optimizers, self.stage, step)
        with explain_out_of_memory(self.name, self.stage, self.sharded, self.ranks_per_row):
            losses = self.accumulate_gradients(self.batch(step))
            norm = nn.utils.clip_grad_norm_(trained(self.optimizers), self.stage.max_grad_norm)
            norm = float(full_tensor(norm))
            self.check_finite(step, losses, norm)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=self.graphed is None)
        return losses | {"grad_norm": norm}

    def batch(self, step: int) -> Batch:
        """Return the rows of a step that this rank trains on, alone or together with the others of its row group."""
        shares = distributed.world_size() // self.ranks_per_row
        return self.context.mixes[self.name].batch(step, distributed.rank() // self.ranks_per_row, shares)

    def count_step(self) -> float:
        """Advance the progress by one step and return its tokens per second."""
        now = time.monotonic()
        tokens, seconds = self.stage.batch_size * self.stage.sequence_length, now - self.last_clock
        self.last_clock = now
        self.progress = replace(
            self.progress,
            step=self.progress.step + 1,
            tokens=self.progress.tokens + tokens,
            seconds=self.progress.seconds + seconds,
        )
        return tokens / seconds

    def check_for_stop(self) -> None:
        """Set `signal` and `stopped_early`, equally on all ranks."""
        device = self.student.device
        self.signal = int(distributed.all_reduce_max(self.context.stopper.signal, device))
        late = not self.is_last_step and self.last_clock > self.context.deadline
        self.stopped_early = bool(distributed.all_reduce_max(late, device))

    def log_step(self, figures: dict[str, float], speed: float, samples: list[dict[str, str]]) -> None:
        """Write the line of a step to metrics.jsonl and the tracker, and the samples of a validation."""
        device = self.context.device
        if device.type == "cuda":
            figures = figures | {"peak_memory_bytes": torch.cuda.max_memory_allocated(device)}
        self.context.metrics.write(
            stage=self.name,
            step=self.progress.step,
            tokens=self.progress.tokens,
            samples=samples,
            **figures,
            **{f"lr_{group['name']}": group["lr"] for group in groups(self.optimizers)},
            tokens_per_second=speed,
            seconds=self.progress.seconds,
        )

    def save_if_due(self, now: float) -> None:
        """Save a checkpoint if its time or step has come, if the step is the best so far, or if training stops."""
        run, step = self.recipe.run, self.progress.step
        due = now - self.last_save > 60 * run.save_every_minutes
        due = due or bool(run.save_every and step % run.save_every == 0) or self.progress.best_step == step
        due = bool(distributed.all_reduce_max(due, self.student.device))
        if (due and not self.is_last_step) or self.stopped_early or self.signal:
            self.save()
            self.last_save = self.last_clock = time.monotonic()

    def save(self) -> None:
        """Save a checkpoint. If the models are sharded, a thread writes it while training goes on."""
        self.finish_saving()
        folder = checkpoint.checkpoint_folder(self.recipe.folder, self.progress)
        state = (self.student, self.optimizers, self.progress)
        written = checkpoint.save_checkpoint(folder, *state, self.context.save_group)
        self.saving = None if written is None else (written, self.progress)
        if written is None:
            self.prune(self.progress)

    def finish_saving(self) -> None:
        """Wait for the checkpoint that a thread writes, if any, and delete old ones.

        Raises:
            OSError: If it could not be written.
        """
        if self.saving is not None:
            (written, progress), self.saving = self.saving, None
            written.result()
            self.prune(progress)

    def prune(self, saved: Progress) -> None:
        """Delete old checkpoints. The best one up to the checkpoint `saved` is kept: a better one is not saved yet."""
        checkpoint.prune(self.recipe.folder, self.name, self.recipe.run.keep_checkpoints, saved.best_step)

    def accumulate_gradients(self, batch: Batch) -> dict[str, float]:
        """Add the gradients of a batch, one micro-batch at a time, and return the mean losses of all ranks."""
        parts = batch.split(self.stage.micro_batch_size or len(batch.input_ids))
        # The graph must not refer to this object: both, and the optimizer's state, would outlive the stage.
        step = functools.partial(micro_step, self.context, self.name, self.teacher, self.student, 1 / len(parts))
        if self.graphed is None and self.can_be_graphed():
            self.graphed = GraphedStep(step, trained(self.optimizers), log)
        device = self.student.device
        run = (lambda part: self.graphed(part, device)) if self.graphed else lambda part: step(part.to(device))
        losses = [run(part) for part in parts]
        if distributed.world_size() > 1 and not self.sharded:  # FSDP2 has done so already
            distributed.all_reduce_mean_([p.grad for p in trained(self.optimizers) if p.grad is not None])
        if self.name == "align":
            losses = [divide_by_variance(self.student, losses)]
        means = torch.stack([torch.stack([loss[key].float() for key in loss]) for loss in losses]).mean(0)
        return dict(zip(losses[0], distributed.all_reduce_mean(means).tolist()))

    def can_be_graphed(self) -> bool:
        """Return whether a CUDA graph can capture a step.

        It can if the step neither waits for other ranks nor reads data on the host. Recomputed layers and cached
        teachers do the latter.
        """
        waits = self.sharded or self.ranks_per_row > 1
        on_gpu = self.student.device.type == "cuda"
        possible = on_gpu and self.teacher.can_be_graphed and not waits and not recomputes(self.stage, self.name)
        return self.recipe.run.cuda_graphs and possible

    def check_finite(self, step: int, losses: dict[str, float], norm: float) -> None:
        """Raise FloatingPointError if the loss or the gradient norm is not finite."""
        if math.isfinite(losses["loss"]) and math.isfinite(norm):
            return
        self.finish_saving()
        saved = checkpoint.checkpoints(self.recipe.folder, self.name)
        raise FloatingPointError(
            f"{self.name}, step {step}: the loss is {losses['loss']} and the gradient norm {norm}. No update was made. "
            f"The last good checkpoint is {saved[-1] if saved else 'the folder of the previous stage'}. Resume with a "
            f"lower learning rate: --resume --{self.name}.lr_mixers {self.stage.lr_mixers / 2:g}"
        )

    def evaluate(self) -> tuple[dict[str, float], list[dict[str, str]]]:
        """Evaluate on held-out text, write samples, and note the step if it is the best so far."""
        self.student.eval()
        scores, samples = self.context.validate(self.teacher, self.student)
        self.student.train()
        kl, best = scores["heldout_kl"], self.progress.best_kl
        if math.isfinite(kl) and (best is None or kl < best):
            self.progress = replace(self.progress, best_kl=kl, best_step=self.progress.step)
        console.print(
            f"{self.name}: {self.progress.tokens:>12,} tokens, held-out KL {scores['heldout_kl']:.3f}, "
            f"perplexity {scores['heldout_perplexity']:.1f}{recall_text(scores)}",
            highlight=False,
        )
        return scores, samples


def micro_step(
    context: RunContext,
    name: str,
    teacher: StageTeacher,
    student: DeltifyForCausalLM,
    scale: float,
    batch: Batch,
    max_documents: int | None = None,
) -> dict[str, Tensor]:
    """Add the gradients of a micro-batch of the stage `name`, times `scale`, and return its losses."""
    arguments = (teacher, student, batch, context.recipe.stage(name), scale, max_documents)
    with context.autocast():
        return align_step(*arguments) if name == "align" else match_step(*arguments, context.row_group)


def share_frozen_weights(student: DeltifyForCausalLM, teacher_parameters: dict[str, nn.Parameter]) -> None:
    """Replace the student's frozen parameters that equal the teacher's by the teacher's own, to save memory."""
    for name, parameter in student.named_parameters():
        other = teacher_parameters.get(name)
        if other is None or parameter.requires_grad or parameter.shape != other.shape:
            continue
        if torch.equal(parameter, other.to(parameter.dtype)):
            parameter.data = other.data


def unshare_weights(student: DeltifyForCausalLM, teacher_parameters: dict[str, nn.Parameter]) -> None:
    """Undo `share_frozen_weights`: copy shared parameters in float32, so that the next stage can train them."""
    shared = {p.data_ptr() for p in teacher_parameters.values()}
    for parameter in student.parameters():
        if parameter.data_ptr() in shared:
            parameter.data = parameter.data.to(torch.float32, copy=True)


@contextmanager
def explain_out_of_memory(name: str, stage: Stage, sharded: bool = False, ranks_per_row: int = 1) -> Generator[None]:
    """Replace torch.OutOfMemoryError by an error that names the settings of the stage to change.

    Args:
        ranks_per_row: Number of ranks that each row is cut over.

    Raises:
        MemoryError: If a GPU runs out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        share = stage.batch_size * ranks_per_row // distributed.world_size()
        sequences = stage.micro_batch_size or share
        suggestions = []
        if sequences > 1:
            fewer = max(number for number in range(1, sequences) if share % number == 0)
            suggestions.append(f"--resume --{name}.micro_batch_size {fewer}")
        if not sharded and distributed.world_size() > 1 and stage.optimizer == "adamw":
            suggestions.append("--resume --run.data_parallel shard")
        if name != "align" and not stage.activation_checkpointing:
            suggestions.append(f"--resume --{name}.activation_checkpointing true")
        suggestions.append(f"--{name}.sequence_length {stage.sequence_length // 2} and another --name")
        raise MemoryError(
            f"{name} does not fit in the GPU's memory: micro_batch_size={stage.micro_batch_size} ({sequences} at a "
            f"time), sequence_length={stage.sequence_length}, activation_checkpointing={stage.activation_checkpointing}"
            f". Continue with {', or with '.join(suggestions)} ({str(error).splitlines()[0]})"
        ) from error

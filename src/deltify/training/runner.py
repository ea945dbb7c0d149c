"""The stages and the one training loop.

    teacher ─▶ converted ─▶ align ─▶ match ─▶ extend

align:  each layer that replaces attention gets the teacher's input of that layer and learns the teacher's output.
        Layers are independent, so each has its own backward and only one layer's graph is alive.
match:  the whole student learns the teacher's next-token distribution (forward KL, unless the stage says otherwise).
extend: the same, on longer rows.

Legend: B batch, T tokens, N = B * T, D model width.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ..config import STAGES, Recipe, Stage, check
from ..conversion.student import INITS, convert, layer_kinds
from ..conversion.teacher import Teacher, load_teacher, random_teacher
from ..data.batches import Batch, MixedBatches, heldout_batches
from ..data.token_files import TokenFile, open_data
from ..model import DeltifyForCausalLM
from ..model.modeling import find_packing
from ..utils.console import console, log
from ..utils.devices import pick_device, pick_precision
from ..utils.fingerprint import fingerprint
from ..utils.folders import model_folder
from . import checkpoint, distributed
from .checkpoint import Progress
from .cuda_graphs import GraphedStep
from .losses import hidden_loss, linear_kl, mixer_loss
from .metrics import Metrics, progress_bar, tracker_module
from .optimizers import (
    choose_trained,
    groups,
    make_optimizers,
    recomputes,
    set_learning_rates,
    trained,
    training_bytes,
    waits_for_ranks,
)
from .run_folder import check_data, check_run, check_weights, write_run
from .signals import Stopped, Stopper
from .teacher_cache import capture, open_targets, read_about

# ---- the whole run ---------------------------------------------------------------------------------------------------


def distill(
    recipe: Recipe, *, resume: bool = False, max_minutes: float | None = None, stages: tuple[str, ...] = STAGES
) -> Path:
    """Runs a recipe and returns its folder, which holds a loadable model for each stage, metrics.jsonl and checkpoints.

    Args:
        resume: go on where an earlier run of the same recipe stopped; the numbers are those of an unbroken run.
        max_minutes: stop training after this time; the stage that was going on is saved as it is then, and a later
            resume takes it up again.
        stages: the stages to run; none of them to convert only.

    Raises:
        FileExistsError: if the folder holds a run and `resume` was not asked for.
        ValueError: if a value of the recipe does not fit, or the run there was made from another recipe; names it.
        FloatingPointError: if the loss or a gradient is not finite; says at which step.
        MemoryError: if the GPU's memory is too small; names the settings to change.
        Stopped: at SIGTERM or Ctrl-C, a KeyboardInterrupt. Between two steps a checkpoint is saved first.
    """
    started = time.monotonic()
    deadline = math.inf if max_minutes is None else started + 60 * max_minutes
    check(recipe)
    if recipe.student.init not in INITS and not Path(recipe.student.init).expanduser().is_dir():
        raise ValueError(
            f"student.init={recipe.student.init!r}; choose one of {', '.join(INITS)}, or the folder of a student"
        )
    tracker_module(recipe.run.report_to)
    with distributed.process_group(pick_device(recipe.run.device)) as device:
        console.quiet = distributed.rank() > 0
        check_ranks(recipe)
        precision = pick_precision(recipe.run.precision, device)
        changes = check_run(recipe, resume, device, precision)
        distributed.barrier()  # nobody writes while another still looks
        shared = f" of {distributed.count()}" if distributed.count() > 1 else ""
        console.print(f"[bold]{recipe.name}[/]: {recipe.teacher.model} on {device}{shared}, {precision}")
        for line in changes:
            log(line)
        with Stopper() as stopper:
            run_stages(recipe, device, precision, stages, deadline, stopper)
        console.print(f"models, metrics and checkpoints are in {recipe.folder}")
    return recipe.folder


def check_ranks(recipe: Recipe) -> None:
    """Raises ValueError if a stage's batch cannot be shared by all ranks in equal micro-batches."""
    for name in STAGES:
        stage = recipe.stage(name)
        share, rest = divmod(stage.batch_size, distributed.count())
        if stage.tokens and (rest or (stage.micro_batch_size and share % stage.micro_batch_size)):
            raise ValueError(
                f"{name}.batch_size={stage.batch_size} cannot be shared by {distributed.count()} processes in "
                f"micro-batches of {stage.micro_batch_size or 'any size'}; make it a multiple of their product"
            )


def run_stages(
    recipe: Recipe, device: torch.device, precision: str, stages: tuple[str, ...], deadline: float, stopper: Stopper
) -> None:
    """Opens teacher and text, and makes every model of the run that is not there yet, each from the one before."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    stored = Path(recipe.teacher.cache).expanduser() if recipe.teacher.cache else None
    early = [recipe.folder / name for name in ("converted", "align") if name != "align" or recipe.align.tokens]
    targets = read_about(stored).get("weights", "") if stored else None
    if stored and all(map(checkpoint.is_finished, early)):
        teacher, weights, stored = open_targets(stored, device, dtype), targets, None
    else:
        teacher = open_teacher(recipe, device, dtype)
        weights = fingerprint(teacher.model)
    check_weights(recipe, weights, f"the teacher {recipe.teacher.model}")
    if targets not in (None, weights):
        raise ValueError(
            f"{recipe.teacher.cache} holds targets of other weights (fingerprint {targets}) than the teacher "
            f"{recipe.teacher.model} has ({weights}); run deltify capture with this recipe, into another folder"
        )
    train, heldout, heldout_rows = open_text(recipe, teacher)  # one process makes the token files
    mixes = {name: stage_mix(recipe, name, train) for name in stages if recipe.stage(name).tokens}
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")  # noqa: E731

    data = data_digests(recipe, train, heldout)
    check_data(recipe, data)
    distributed.barrier()
    if distributed.rank() == 0:
        write_run(recipe, device, precision, data, weights)
    student, sharded, teacher_is_whole = None, None, isinstance(teacher.model, nn.Module)
    with Metrics(recipe) as metrics:
        for name in ("converted", *mixes):
            folder = recipe.folder / name
            if checkpoint.is_finished(folder):
                console.print(f"{name}: done already, in {folder}")
                student = load_student(folder, device)
                continue
            if name == "converted":
                student = convert_with(recipe, teacher, train).eval()
                judged = judge(teacher, student, heldout_rows, autocast)
                metrics.cut(name, -1)
                metrics.write(stage=name, step=0, tokens=0, **judged)
                checkpoint.save_model(folder, student, teacher.tokenizer)
                console.print(f"converted: held-out KL {judged['heldout_kl']:.3f}, before any training")
                if distributed.count() > 1:  # all go on from the first one's, to the bit
                    student = load_student(folder, device)
                continue
            if stored and name != "align":
                teacher, stored, teacher_is_whole = open_targets(stored, device, dtype), None, False
            if sharded is None:
                sharded = choose_sharding(recipe, teacher, student, device)
            if sharded and teacher_is_whole:  # the conversion looks into it
                distributed.shard_teacher(teacher.model)
                teacher_is_whole = False
            loop = Loop(name, recipe, teacher, student, mixes[name], heldout_rows, autocast, deadline, metrics, sharded)
            with stopper.held():
                loop.run(stopper)
            student.eval()
            if not sharded:
                own_weights(student, teacher.model)
            stopped_at = loop.progress if loop.stopped_early else None
            checkpoint.save_model(folder, student, teacher.tokenizer, stopped_at=stopped_at)
            if stopped_at is not None:
                console.print(f"{name}: stopped by --max-minutes after {stopped_at.tokens:,} tokens; --resume goes on")
                break
            if sharded:  # what is trained must be decided before a model is cut up
                student = load_student(folder, device)


def choose_sharding(recipe: Recipe, teacher: Teacher, student: DeltifyForCausalLM, device: torch.device) -> bool:
    """Whether the ranks cut teacher and student up; the same on all of them."""
    if distributed.count() == 1:
        return False
    size = training_bytes(student, teacher.model if isinstance(teacher.model, nn.Module) else None)
    chosen = distributed.shards(recipe.run.data_parallel, size, distributed.memory_of(device))
    chosen = bool(distributed.largest(chosen, device))
    share = "a piece of the models" if chosen else "the whole models"
    log(f"{distributed.count()} processes: each has {share}")
    return chosen


def capture_recipe(recipe: Recipe, folder: Path, format: str) -> dict[str, float]:
    """Captures what a recipe's match and extend will ask of the teacher; see `deltify.targets.capture`."""
    check(recipe)
    device = pick_device(recipe.run.device)
    precision = pick_precision(recipe.run.precision, device)
    teacher = open_teacher(recipe, device, torch.bfloat16 if precision == "bf16" else torch.float32)
    train, _, heldout_rows = open_text(recipe, teacher)
    stages = {name: recipe.stage(name) for name in ("match", "extend") if recipe.stage(name).tokens}
    mixes = {name: (stage, stage_mix(recipe, name, train)) for name, stage in stages.items()}
    return capture(recipe.teacher.model, teacher, folder, format, heldout_rows, mixes)


def open_text(recipe: Recipe, teacher: Teacher) -> tuple[list[TokenFile], list[TokenFile], list[Batch]]:
    """Training sources, held-out texts, and the batches of these that judge."""
    run = recipe.run
    train, heldout = open_data(
        recipe.data, recipe.teacher.model, teacher.tokenizer, run.heldout_tokens, run.heldout_sequence_length
    )
    return train, heldout, heldout_batches(heldout, run.heldout_sequence_length, 8, run.heldout_tokens)


def load_student(folder: Path, device: torch.device) -> DeltifyForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)


def data_digests(recipe: Recipe, train: list[TokenFile], heldout: list[TokenFile]) -> dict[str, str]:
    """A checksum of the tokens of every training source, and of those held out."""
    digests = {source: file.digest for source, file in zip(recipe.data.train, train)}
    return digests | {f"held-out text {number}": file.digest for number, file in enumerate(heldout, 1)}


def stage_mix(recipe: Recipe, name: str, train: list[TokenFile]) -> MixedBatches:
    stage = recipe.stage(name)
    return MixedBatches(
        train,
        list(recipe.data.train.values()),
        stage.sequence_length,
        stage.batch_size,
        recipe.seed + STAGES.index(name),
    )


def open_teacher(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Teacher:
    spec = recipe.teacher
    if spec.model.startswith("random:"):
        return random_teacher(spec.model.removeprefix("random:"))
    teacher = load_teacher(
        spec.model, dtype=dtype, device=device, trust_remote_code=spec.trust_remote_code, revision=spec.revision
    )
    longest = teacher.config.max_position_embeddings
    for name in STAGES:
        stage = recipe.stage(name)
        if stage.tokens and stage.sequence_length > longest and (name != "extend" or stage.ce_weight == 0):
            raise ValueError(
                f"{name}.sequence_length={stage.sequence_length} is longer than the teacher can read ({longest}); make "
                "it shorter, or give extend a ce_weight above 0"
            )
    return teacher


def convert_with(recipe: Recipe, teacher: Teacher, train: list[TokenFile]) -> DeltifyForCausalLM:
    spec = recipe.student
    if spec.init not in INITS:
        return trained_before(model_folder(spec.init), spec.full_attention_layers, teacher)
    rows = max(1, spec.calibration_tokens // spec.calibration_sequence_length)
    mix = MixedBatches(train, list(recipe.data.train.values()), spec.calibration_sequence_length, rows, recipe.seed)
    return convert(
        teacher,
        full_attention_layers=spec.full_attention_layers,
        keep_rope=spec.keep_rope,
        sliding_window=spec.sliding_window,
        sink_tokens=spec.sink_tokens,
        init=spec.init,
        calibration=mix.batch(0),
        long_memory_heads=spec.long_memory_heads,
        seed=recipe.seed,
        log=log,
    )


def trained_before(folder: str, layers: str | list[int], teacher: Teacher) -> DeltifyForCausalLM:
    """A student to train on.

    Raises:
        ValueError: if it has other layers than the recipe says.
    """
    student = load_student(Path(folder), next(teacher.model.parameters()).device)
    kinds = layer_kinds(layers, student.config.num_hidden_layers)
    if not isinstance(student, DeltifyForCausalLM) or list(student.config.layer_types) != kinds:
        raise ValueError(
            f"student.init={folder}: its layers are {student.config.layer_types}, the recipe's "
            f"full_attention_layers={layers!r} are {kinds}; let both be the same"
        )
    return student


# ---- one stage -------------------------------------------------------------------------------------------------------


class Loop:
    """One stage of training: from its last checkpoint, if there is one, to its last step."""

    def __init__(self, name, recipe, teacher, student, mix, heldout, autocast, deadline, metrics, sharded):
        self.name, self.recipe, self.stage = name, recipe, recipe.stage(name)
        self.teacher, self.student, self.mix, self.heldout = teacher, student, mix, heldout
        self.autocast, self.metrics, self.sharded = autocast, metrics, sharded
        self.deadline, self.stopped_early = deadline, False
        choose_trained(student, self.stage, name)
        if sharded:
            distributed.shard_student(student)
        elif name == "align":
            share_frozen(teacher.model, student)
        self.optimizers = make_optimizers(student, self.stage, name, sharded)
        self.progress = Progress(name, 0, 0, 0.0)
        self.graphed: GraphedStep | None = None
        # the stage before may have recomputed; transformers 5.23 has another name for it than 5.16
        what = "activation" if hasattr(student, "activation_checkpointing_enable") else "gradient"
        getattr(student, f"{what}_checkpointing_{'enable' if recomputes(self.stage, name) else 'disable'}")()

    def run(self, stopper: Stopper) -> None:
        """Trains; leaves the student with the last step's weights. A signal ends it after the step, with a checkpoint.

        Raises:
            Stopped: if `stopper` was told to.
        """
        run, stage = self.recipe.run, self.stage
        saved = checkpoint.load_last(self.recipe.folder, self.name, self.student, self.optimizers, log)
        if saved is not None:
            self.progress = saved
            console.print(f"{self.name}: going on from step {self.progress.step}")
        self.metrics.cut(self.name, self.progress.step)  # a run that died may have written more than it saved
        device = self.student.device
        self.student.train()
        last_save = last_clock = time.monotonic()
        with progress_bar(self.name, stage.steps) as show:
            for step in range(self.progress.step, stage.steps):
                set_learning_rates(self.optimizers, stage, step)
                with naming_memory(self.name, stage, self.sharded):
                    losses = self.accumulate(self.mix.batch(step, distributed.rank(), distributed.count()))
                    norm = distributed.whole(nn.utils.clip_grad_norm_(trained(self.optimizers), stage.max_grad_norm))
                    self.check_finite(step, losses, norm)
                    for optimizer in self.optimizers:
                        optimizer.step()
                        optimizer.zero_grad(set_to_none=self.graphed is None)

                now = time.monotonic()
                tokens = self.progress.tokens + stage.batch_size * stage.sequence_length
                spent, last_clock = now - last_clock, now
                self.progress = replace(
                    self.progress, step=step + 1, tokens=tokens, seconds=self.progress.seconds + spent
                )
                record = {"stage": self.name, "step": step + 1, "tokens": tokens, **losses, "grad_norm": float(norm)}
                rates = {f"lr_{group['name']}": group["lr"] for group in groups(self.optimizers)}
                speed = stage.batch_size * stage.sequence_length / spent
                last_step = step + 1 == stage.steps
                signal = int(distributed.largest(stopper.signal, device))
                self.stopped_early = bool(distributed.largest(not last_step and now > self.deadline, device))
                if (step + 1) % run.eval_every == 0 or last_step or self.stopped_early:
                    record |= self.judge()
                    last_clock = time.monotonic()
                self.metrics.write(**record, **rates, tokens_per_second=speed, seconds=self.progress.seconds)
                show(step + 1, losses["loss"], speed)
                due = now - last_save > 60 * run.save_every_minutes
                due = due or (run.save_every and (step + 1) % run.save_every == 0)
                due = due or self.progress.best_step == step + 1  # the best weights stay, whatever comes after
                due = bool(distributed.largest(bool(due), device))
                if (due and not last_step) or self.stopped_early or signal:
                    self.save()
                    last_save = last_clock = time.monotonic()
                if signal:
                    saved = checkpoint.checkpoint_folder(self.recipe.folder, self.progress)
                    raise Stopped(signal, f"saved {saved}; --resume goes on")
                if self.stopped_early:
                    return

    def accumulate(self, batch: Batch) -> dict[str, float]:
        """Adds the gradients of a batch, micro-batch by micro-batch; returns the mean losses."""
        rows = self.stage.micro_batch_size or len(batch.input_ids)
        parts = batch.split(rows)
        scale = 1 / len(parts)
        if self.graphed is None and self.can_be_graphed():
            step = functools.partial(self.step, scale=scale)
            self.graphed = GraphedStep(step, trained(self.optimizers), log)
        device = self.student.device
        losses = [self.graphed(p, device) if self.graphed else self.step(p.to(device), scale) for p in parts]
        if distributed.count() > 1 and not self.sharded:  # FSDP2 has done so already
            distributed.average([p.grad for p in trained(self.optimizers) if p.grad is not None])
        means = distributed.mean(
            torch.stack([torch.stack([loss[key].float() for key in loss]) for loss in losses]).mean(0)
        )
        return dict(zip(losses[0], means.tolist()))

    def step(self, batch: Batch, scale: float) -> dict[str, Tensor]:
        """Losses of a micro-batch, whose gradients, times `scale`, are added."""
        compute = align_step if self.name == "align" else match_step
        with self.autocast():
            return compute(self.teacher, self.student, batch, self.stage, scale)

    def can_be_graphed(self) -> bool:
        """Whether nothing in a step waits for other ranks, or looks at data from the host, as recomputed layers and
        stored targets do."""
        waits = waits_for_ranks(self.name, distributed.count(), self.sharded) or recomputes(self.stage, self.name)
        on_gpu = self.student.device.type == "cuda" and isinstance(self.teacher.model, nn.Module)
        return self.recipe.run.cuda_graphs and on_gpu and not waits

    def check_finite(self, step: int, losses: dict[str, float], norm: Tensor) -> None:
        if math.isfinite(losses["loss"]) and math.isfinite(float(norm)):
            return
        saved = checkpoint.checkpoints(self.recipe.folder, self.name)
        raise FloatingPointError(
            f"{self.name}, step {step}: loss {losses['loss']}, gradient norm {float(norm)}; no update was made. "
            f"The last good checkpoint is {saved[-1] if saved else 'the folder of the stage before'}; go "
            f"on with a lower learning rate: --resume --{self.name}.lr_mixers {self.stage.lr_mixers / 2:g}"
        )

    def judge(self) -> dict[str, float]:
        self.student.eval()
        judged = judge(self.teacher, self.student, self.heldout, self.autocast)
        self.student.train()
        if self.progress.best_kl is None or judged["heldout_kl"] < self.progress.best_kl:
            self.progress = replace(self.progress, best_kl=judged["heldout_kl"], best_step=self.progress.step)
        console.print(
            f"{self.name}: {self.progress.tokens:>12,} tokens, held-out KL {judged['heldout_kl']:.3f}, "
            f"perplexity {judged['heldout_perplexity']:.1f}",
            highlight=False,
        )
        return judged

    def save(self) -> None:
        folder = self.recipe.folder
        checkpoint.save_checkpoint(
            checkpoint.checkpoint_folder(folder, self.progress), self.student, self.optimizers, self.progress
        )
        checkpoint.prune(folder, self.name, self.recipe.run.keep_checkpoints, self.progress.best_step)


def share_frozen(teacher: nn.Module, student: DeltifyForCausalLM) -> None:
    """Lets the student's frozen tensors that equal the teacher's be the teacher's own: one copy in memory, not two."""
    theirs = dict(teacher.named_parameters())
    for name, mine in student.named_parameters():
        other = theirs.get(name)
        if other is None or mine.requires_grad or mine.shape != other.shape:
            continue
        if torch.equal(mine, other.to(mine.dtype)):
            mine.data = other.data


def own_weights(student: DeltifyForCausalLM, teacher: nn.Module) -> None:
    """Undoes `share_frozen`: what the student shares becomes a float32 copy, which the next stage may train."""
    theirs = {p.data_ptr() for p in teacher.parameters()} if isinstance(teacher, nn.Module) else set()
    for mine in student.parameters():
        if mine.data_ptr() in theirs:
            mine.data = mine.data.to(torch.float32, copy=True)


@contextmanager
def naming_memory(name: str, stage: Stage, sharded: bool = False) -> Iterator[None]:
    """Turns a GPU's lack of memory into an error that says which of the stage's settings to change.

    Raises:
        MemoryError: in place of torch.OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        share = stage.batch_size // distributed.count()
        rows = stage.micro_batch_size or share
        ways = []
        if rows > 1:
            fewer = max(count for count in range(1, rows) if share % count == 0)
            ways.append(f"--resume --{name}.micro_batch_size {fewer}")
        if not sharded and distributed.count() > 1 and stage.optimizer == "adamw":
            ways.append("--resume --run.data_parallel shard")
        if name != "align" and not stage.activation_checkpointing:
            ways.append(f"--resume --{name}.activation_checkpointing true")
        ways.append(f"--{name}.sequence_length {stage.sequence_length // 2} and another --name")
        raise MemoryError(
            f"{name} does not fit in the GPU's memory: micro_batch_size={stage.micro_batch_size} ({rows} at a time), "
            f"sequence_length={stage.sequence_length}, activation_checkpointing={stage.activation_checkpointing}; go "
            f"on with {', or with '.join(ways)} ({str(error).splitlines()[0]})"
        ) from error


def align_step(teacher: Teacher, student: DeltifyForCausalLM, batch: Batch, stage: Stage, scale: float):
    """Runs the teacher; behind each of its attention layers, the student's mixer there learns its output."""
    losses: list[Tensor] = []

    def learn(module, args, kwargs, output):
        layer = student.model.layers[module.layer_idx]
        if not any(p.requires_grad for p in layer.self_attn.parameters()):
            return  # attention that keeps its positions has nothing to learn yet
        hidden = kwargs["hidden_states"].detach()
        with torch.enable_grad():
            if layer.linear:
                out = layer.self_attn(hidden, None, packing)
            else:
                out, _ = layer.self_attn(hidden, kwargs["position_embeddings"], kwargs["attention_mask"], None)
            loss = mixer_loss(out, output[0])
            with torch.autocast(hidden.device.type, enabled=False):
                (loss * scale).backward()
        losses.append(loss.detach())

    packing = find_packing(None, batch.position_ids, batch.input_ids.shape[1], cached=False)

    def read(student: DeltifyForCausalLM) -> Tensor:
        hooks = [layer.self_attn.register_forward_hook(learn, with_kwargs=True) for layer in teacher.model.model.layers]
        try:
            with torch.no_grad():
                teacher.model.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(losses).mean()

    return {"loss": student.whole(read)}


def match_step(teacher: Teacher, student: DeltifyForCausalLM, batch: Batch, stage: Stage, scale: float):
    """The whole student's divergence, with shares of cross-entropy and of the hidden states' loss if the stage asks.

    On rows longer than the teacher can read, the divergence counts where it can.
    """
    layers = {"output_hidden_states": True} if stage.hidden_state_weight else {}
    with torch.no_grad():
        wanted, *inner = layer_states(teacher.model, batch, **layers)
    head = distributed.whole(teacher.model.lm_head.weight)
    labels = next_tokens(batch).flatten() if stage.ce_weight else None
    share = stage.ce_weight / (1 - stage.hidden_state_weight)
    options: dict[str, Any] = {"divergence": stage.divergence, "temperature": stage.temperature}
    longest = teacher.config.max_position_embeddings
    if batch.input_ids.shape[1] > longest:  # behind the teacher's reach the text alone teaches
        options["mask"] = (batch.position_ids < longest).flatten()

    def read(student: DeltifyForCausalLM) -> tuple[Tensor, ...]:
        hidden, *mine = layer_states(student, batch, **layers)
        heads = hidden, student.lm_head.weight, wanted, head
        loss, kl, ce = linear_kl(*heads, labels=labels, ce_weight=share, **options)
        if not layers:
            return loss, kl, ce
        inside = hidden_loss(mine, inner)
        return (1 - stage.hidden_state_weight) * loss + stage.hidden_state_weight * inside, kl, ce, inside.detach()

    loss, kl, ce, *apart = student.whole(read)
    with torch.autocast(loss.device.type, enabled=False):
        (loss * scale).backward()
    found = {"loss": loss.detach(), "kl": kl} | ({"ce": ce} if stage.ce_weight else {})
    return found | ({"hidden": apart[0]} if layers else {})


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """Last hidden states [N, D] of a language model, documents kept apart."""
    return layer_states(model, batch)[0]


def layer_states(model: nn.Module, batch: Batch, **options) -> list[Tensor]:
    """The same, and behind them, with `output_hidden_states`, each layer's; not the embeddings, which no one trains."""
    output = model.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **options)
    inner = output.hidden_states[1:] if options.get("output_hidden_states") else ()
    return [x.flatten(0, 1) for x in (output.last_hidden_state, *inner)]


def next_tokens(batch: Batch) -> Tensor:
    """[B, T] the token after each, -100 at the end of a document or row."""
    labels = F.pad(batch.input_ids[:, 1:], (0, 1), value=-100)
    return labels.masked_fill(F.pad(~batch.same_document, (0, 1), value=True), -100)


@torch.no_grad()
def judge(teacher: Teacher, student: DeltifyForCausalLM, heldout: list[Batch], autocast: Callable) -> dict[str, float]:
    """Token KL and perplexity on held-out text."""
    kl = ce = tokens = labelled = 0.0
    for batch in heldout:
        batch = batch.to(student.device)
        labels = next_tokens(batch).flatten()
        with autocast():
            wanted, head = hidden_states(teacher.model, batch), distributed.whole(teacher.model.lm_head.weight)
            parts = student.whole(
                lambda s: linear_kl(hidden_states(s, batch), s.lm_head.weight, wanted, head, labels=labels)  # noqa: B023
            )
        kl += float(parts[1]) * labels.numel()
        ce += float(parts[2]) * labels.numel()
        tokens += labels.numel()
        labelled += int((labels >= 0).sum())
    return {"heldout_kl": kl / tokens, "heldout_perplexity": math.exp(min(ce / labelled, 700.0))}

"""A whole run: open everything, convert the teacher, and train the student stage by stage.

    teacher ─▶ converted ─▶ align ─▶ match ─▶ extend

align:  Each layer that replaces attention gets the input of the teacher's layer and learns its output. The layers are
        independent, so each has its own backward pass and only one layer's graph is alive.
match:  The whole student learns the teacher's next-token distribution (forward KL, unless the stage names another).
extend: The same as match, on longer sequences.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..config import INITS, STAGES, Recipe, StudentSpec, check, check_shares
from ..conversion.student import convert, convert_further, layer_kinds, measured_layers, model_class
from ..conversion.teacher import Teacher, head_width
from ..data.batches import CYCLE, Batch, MixedBatches, heldout_batches
from ..data.token_files import TokenFile, open_data
from ..model import DeltifyConfig, DeltifyForCausalLM
from ..model.loading import checkpoint_tensors, plain_shapes
from ..model.shards import is_sharded, load_shards, read_generation_config
from ..utils.console import console, log
from ..utils.devices import pick_device, pick_precision
from ..utils.folders import model_folder
from . import checkpoint, distributed
from .estimate import count, skeletons
from .history import trained_model
from .metrics import Metrics
from .optimizers import check_optimizer, choose_trained, training_bytes
from .recall import heldout_probes, recall_text
from .run_folder import IN_USE, LOCK, check_data, check_run, check_weights, holds_run, read_run, write_run
from .samples import heldout_prompts
from .signals import Stopper
from .steps import StageTeacher
from .teacher_cache import CachedTeacher, capture, check_cache, read_about
from .teachers import LiveTeacher, open_teacher
from .trackers import tracker_module
from .trainer import RunContext, StageTrainer, unshare_weights


def distill(
    recipe: Recipe, *, resume: bool = False, max_minutes: float | None = None, stages: tuple[str, ...] = STAGES
) -> Path:
    """Run a recipe and return its folder, which holds a loadable model for each stage, metrics.jsonl and checkpoints.

    Args:
        resume: Whether to continue an earlier run of the same recipe. The results equal those of an unbroken run.
        max_minutes: Time after which training stops. The current stage is saved, and a later resume continues it.
        stages: Stages to train; the others are left as they are. An empty tuple converts only.

    Raises:
        FileExistsError: If the folder holds a run and `resume` is false.
        ValueError: If a value of the recipe does not fit, or the folder holds a run of another recipe.
        FloatingPointError: If the loss or the gradient norm is not finite.
        MemoryError: If a GPU runs out of memory. The message names the settings to change.
        Stopped: If SIGTERM or Ctrl-C ends the run. It is a KeyboardInterrupt. During training, a checkpoint is saved
            after the current step.
    """
    started = time.monotonic()
    deadline = math.inf if max_minutes is None else started + 60 * max_minutes
    check(recipe)
    if skipped := skipped_stages(recipe, stages):
        raise ValueError(f"stages={stages} leaves out {', '.join(skipped)}, which comes before and is not finished")
    begins = not checkpoint.is_finished(recipe.folder / "converted")
    if begins and recipe.student.init not in INITS and not Path(recipe.student.init).expanduser().is_dir():
        raise ValueError(
            f"student.init={recipe.student.init!r}; choose one of {', '.join(INITS)}, or the folder of a student"
        )
    tracker_module(recipe.run.report_to)
    with distributed.process_group(pick_device(recipe.run.device)) as device:
        check_shares(recipe, distributed.world_size())
        precision = pick_precision(recipe.run.precision, device)
        with distributed.sole_writer(recipe.folder / LOCK, IN_USE.format(recipe.folder)):
            changes = check_run(recipe, resume, device, precision)
            distributed.barrier()  # no rank writes while another still reads
            ranks = f" of {distributed.world_size()}" if distributed.world_size() > 1 else ""
            console.print(f"[bold]{recipe.name}[/]: {recipe.teacher.model} on {device}{ranks}, {precision}")
            for line in changes:
                log(line)
            with Stopper() as stopper:
                run_stages(recipe, device, precision, stages, deadline, stopper)
        console.print(f"models, metrics and checkpoints are in {recipe.folder}")
    return recipe.folder


def skipped_stages(recipe: Recipe, stages: tuple[str, ...]) -> list[str]:
    """Return the unfinished stages of a recipe that come before one of `stages` and are not among them.

    Raises:
        ValueError: If a stage is unknown.
    """
    if unknown := [name for name in stages if name not in STAGES]:
        raise ValueError(f"stages={stages} has {', '.join(unknown)}; the stages are {', '.join(STAGES)}")
    earlier = STAGES[: max(map(STAGES.index, stages), default=0)]
    left = [name for name in earlier if name not in stages and recipe.stage(name).tokens]
    return [name for name in left if not checkpoint.is_finished(recipe.folder / name)]


# ---- teacher and text ------------------------------------------------------------------------------------------------


def open_everything(
    recipe: Recipe, device: torch.device, precision: str, stages: tuple[str, ...], deadline: float, stopper: Stopper
) -> tuple[StageTeacher, RunContext]:
    """Open the teacher and the text, compare both with those of an earlier run, and write the run's files.

    Raises:
        ValueError: If the teacher's weights or the text differ from those that the run or the teacher cache has.
    """
    sharded = choose_sharding(recipe, device, dtype_of(precision))
    for name in stages:
        if recipe.stage(name).tokens and not checkpoint.is_finished(recipe.folder / name):
            check_optimizer(recipe.stage(name), name, sharded)
    teacher = open_first_teacher(recipe, device, dtype_of(precision), sharded)
    train, heldout, batches = open_text(recipe, teacher)  # one process writes the token files
    window = teacher.config.max_position_embeddings
    mixes = {name: stage_mix(recipe, name, train, window) for name in stages if recipe.stage(name).tokens}
    digests = data_digests(recipe, train, heldout)
    check_data(recipe, digests)
    if cache := cache_folder(recipe):  # before anything is computed
        read = [(mix, recipe.stage(name).steps) for name, mix in mixes.items() if name != "align"]
        check_cache(cache, [*(mix.batch(step) for mix, steps in read for step in (0, steps - 1)), *batches])
    distributed.barrier()
    if distributed.rank() == 0:
        # a failed attempt may have left a run.json that is about another model
        start = read_run(recipe.folder).get("start") if holds_run(recipe.folder) else None
        start = start or asdict(trained_model(recipe.student.init))
        write_run(recipe, device, precision, digests, teacher.fingerprint, start)
    longest = max(recipe.stage(name).sequence_length for name in STAGES if recipe.stage(name).tokens)
    probes = heldout_probes(heldout, longest, recipe.run.heldout_tokens, teacher.tokenizer)
    if not probes:
        log("recall is not measured: it needs longer validation text, run.heldout_tokens, and a fast tokenizer")
    prompts = heldout_prompts(heldout)
    if not len(prompts):
        log("samples are not written: no validation document is long enough for a prompt")
    metrics = Metrics(recipe)
    row_group = distributed.row_group(recipe.run.context_parallel)
    return teacher, RunContext(
        recipe=recipe,
        device=device,
        precision=precision,
        train=train,
        mixes=mixes,
        heldout=batches,
        probes=probes,
        prompts=prompts,
        metrics=metrics,
        stopper=stopper,
        deadline=deadline,
        row_group=row_group,
        sharded=sharded,
        save_group=distributed.save_group() if sharded else None,
    )


def dtype_of(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def cache_folder(recipe: Recipe) -> Path | None:
    return Path(recipe.teacher.cache).expanduser() if recipe.teacher.cache else None


def open_first_teacher(recipe: Recipe, device: torch.device, dtype: torch.dtype, sharded: bool) -> StageTeacher:
    """Open the teacher that the run starts with: the cached one if conversion and align are done.

    Args:
        sharded: Whether to shard it over the ranks.

    Raises:
        ValueError: If its weights differ from those of the run or of the teacher cache.
    """
    cache = cache_folder(recipe)
    cached = read_about(cache).get("weights", "") if cache else None
    stages_needing_model = ["converted", "align"] if recipe.align.tokens else ["converted"]
    if cache and all(checkpoint.is_finished(recipe.folder / name) for name in stages_needing_model):
        teacher = CachedTeacher(cache, device, dtype)
    else:
        per_node = recipe.run.data_parallel == "hybrid"
        shard = partial(distributed.shard_teacher, device=device, per_node=per_node) if sharded else None
        teacher = LiveTeacher(open_teacher(recipe, device, dtype, shard))
        if sharded and not is_sharded(teacher.model):  # it could only be loaded whole
            distributed.shard_teacher(teacher.model, device, per_node)
    weights = teacher.fingerprint
    check_weights(recipe, weights, f"the teacher {recipe.teacher.model}")
    if cached not in (None, weights):
        raise ValueError(
            f"{recipe.teacher.cache} was captured from other weights (fingerprint {cached}) than those of the teacher "
            f"{recipe.teacher.model} ({weights}). Run deltify capture with this recipe, into another folder"
        )
    return teacher


def teacher_for_stage(context: RunContext, name: str, teacher: StageTeacher) -> StageTeacher:
    """Return the current teacher or, after align, the cached one if the recipe has one."""
    cache = cache_folder(context.recipe)
    if cache is None or name == "align" or isinstance(teacher, CachedTeacher):
        return teacher
    return CachedTeacher(cache, context.device, dtype_of(context.precision))


def open_text(recipe: Recipe, teacher: Teacher | StageTeacher) -> tuple[list[TokenFile], list[TokenFile], list[Batch]]:
    """Return the training sources, the validation texts, and the validation batches."""
    run = recipe.run
    train, heldout = open_data(
        recipe.data, recipe.teacher.model, teacher.tokenizer, run.heldout_tokens, run.heldout_sequence_length
    )
    return train, heldout, heldout_batches(heldout, run.heldout_sequence_length, 8, run.heldout_tokens)


def data_digests(recipe: Recipe, train: list[TokenFile], heldout: list[TokenFile]) -> dict[str, str]:
    """Return a checksum of the tokens of every training source and validation text."""
    digests = {source: file.digest for source, file in zip(recipe.data.train, train)}
    return digests | {f"held-out text {number}": file.digest for number, file in enumerate(heldout, 1)}


def stage_mix(recipe: Recipe, name: str, train: list[TokenFile], context_window: int) -> MixedBatches:
    """Return the training batches of a stage, for a teacher with this context window in tokens."""
    stage, files = recipe.stage(name), dict(zip(recipe.data.train, train))
    weights = stage.data_weights or recipe.data.train
    for source, weight in weights.items():
        if weight * 2 * CYCLE < sum(weights.values()):
            log(f"{name}: {source} is drawn in one of {CYCLE:,} sequences, more often than its weight says")
    return MixedBatches(
        [files[source] for source in weights],
        list(weights.values()),
        stage.sequence_length,
        stage.batch_size,
        recipe.seed + STAGES.index(name),
        context_window,
        list(weights),
        f"{name}.sequence_length",
    )


def capture_recipe(recipe: Recipe, folder: Path, format: str) -> dict[str, float]:
    """Capture the teacher outputs that the match and extend stages of a recipe need.

    The arguments, results and errors are those of `teacher_cache.capture`.
    """
    check(recipe)
    device = pick_device(recipe.run.device)
    dtype = dtype_of(pick_precision(recipe.run.precision, device))
    teacher = LiveTeacher(open_teacher(recipe, device, dtype))
    train, _, heldout = open_text(recipe, teacher)
    stages = {name: recipe.stage(name) for name in ("match", "extend") if recipe.stage(name).tokens}
    window = teacher.config.max_position_embeddings
    mixes = {name: (stage, stage_mix(recipe, name, train, window)) for name, stage in stages.items()}
    return capture(recipe.teacher.model, teacher, folder, format, heldout, mixes)


# ---- the stages ------------------------------------------------------------------------------------------------------


def run_stages(
    recipe: Recipe, device: torch.device, precision: str, stages: tuple[str, ...], deadline: float, stopper: Stopper
) -> None:
    """Open teacher and text, and make every model of the run that is not finished yet, each from the one before."""
    # opened here, so that no caller keeps a live teacher in memory after a cached one has replaced it
    teacher, context = open_everything(recipe, device, precision, stages, deadline, stopper)
    with context.metrics:
        student = None if is_done(context, "converted") else convert_stage(context, teacher)
        latest = "converted"  # its model is `student`, or still to be loaded
        for name in (name for name in STAGES if recipe.stage(name).tokens):
            if name not in stages and not checkpoint.is_finished(recipe.folder / name):
                break  # none of `stages` comes after it
            if is_done(context, name):
                student = None
            else:
                teacher = teacher_for_stage(context, name, teacher)
                if student is None:
                    student = load_start(context, latest, name)
                if not train_stage(context, name, teacher, student):
                    break
                if context.sharded:  # which parameters train must be decided before a model is sharded
                    student = None
            latest = name


def is_done(context: RunContext, name: str) -> bool:
    """Return whether an earlier run has finished a stage, and print it."""
    folder = context.recipe.folder / name
    if finished := checkpoint.is_finished(folder):
        console.print(f"{name}: done already, in {folder}")
    return finished


def load_start(context: RunContext, start: str, name: str) -> DeltifyForCausalLM:
    """Load the model of the stage `start` for training in the stage `name`, sharded if models are."""
    folder = context.recipe.folder / start
    if not context.sharded:
        return load_student(folder, context.device)
    stage = context.recipe.stage(name)
    return load_student_shards(context, folder, lambda student: choose_trained(student, stage, name))


def convert_stage(context: RunContext, teacher: StageTeacher) -> DeltifyForCausalLM | None:
    """Convert the teacher, evaluate and save the result. Return it if there is one rank, to train it further."""
    assert isinstance(teacher, LiveTeacher)  # the cached one opens after the conversion
    name, folder = "converted", context.recipe.folder / "converted"
    student = create_student(context, teacher.pretrained).eval()
    checkpoint.check_space(folder, student)
    scores, samples = context.validate(teacher, student)
    context.metrics.truncate("teacher", -1)
    context.metrics.truncate(name, -1)
    if samples:
        context.metrics.write_samples("teacher", 0, 0, context.samples(teacher.pretrained.model, teacher.tokenizer))
    context.metrics.write(stage=name, step=0, tokens=0, samples=samples, **scores)
    checkpoint.save_model(folder, student, teacher.tokenizer)
    console.print(f"converted: held-out KL {scores['heldout_kl']:.3f}{recall_text(scores)}, before any training")
    # several ranks load it, so that all continue from the first one's weights, bit for bit
    return student if distributed.world_size() == 1 else None


def train_stage(context: RunContext, name: str, teacher: StageTeacher, student: DeltifyForCausalLM) -> bool:
    """Train and save one stage. Return whether it reached its last step."""
    checkpoint.check_space(context.recipe.folder / name, student)
    trainer = StageTrainer(context, name, teacher, student)
    with context.stopper.held():  # a signal during the last validation, or while the model is saved, waits for it
        trainer.run()
        student.eval()
        if not context.sharded:
            unshare_weights(student, teacher.named_parameters())
        progress = trainer.progress
        stopped_at = progress if trainer.stopped_early else None
        checkpoint.save_model(context.recipe.folder / name, student, teacher.tokenizer, stopped_at=stopped_at)
        if stopped_at is None:
            best = None if progress.best_step == progress.step else progress.best_step
            checkpoint.prune(context.recipe.folder, name, 0, best)
            checkpoint.delete_partial(context.recipe.folder, name, ".unfinished", ".damaged", ".old")
    if stopped_at is not None:
        console.print(f"{name}: stopped by --max-minutes after {stopped_at.tokens:,} tokens; --resume continues")
    return stopped_at is None


def choose_sharding(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether to shard teacher and student over the ranks. All ranks return the same.

    Args:
        dtype: Data type of the teacher's parameters.
    """
    if distributed.world_size() == 1 or recipe.student.convert_further:  # it needs whole models
        return False
    memory, size = distributed.memory_of(device), 0
    if recipe.run.data_parallel == "auto" and memory is not None:
        teacher, student = skeletons(recipe, unpack=True)  # it is unpacked next, anyway
        size = training_bytes(student) + dtype.itemsize * count(teacher.model)
    chosen = distributed.should_shard(recipe.run.data_parallel, size, memory)
    chosen = bool(distributed.all_reduce_max(chosen, device))
    share = "a shard of the models" if chosen else "the whole models"
    log(f"{distributed.world_size()} processes: each has {share}")
    if chosen:
        log("samples are not written while the models are sharded")
    return chosen


# ---- students --------------------------------------------------------------------------------------------------------


def create_student(context: RunContext, teacher: Teacher) -> DeltifyForCausalLM:
    """Return the student that training starts with: a converted teacher, or the model that student.init names."""
    recipe, spec = context.recipe, context.recipe.student
    if spec.init not in INITS:
        return load_starting_student(context, model_folder(spec.init), teacher)
    return convert(
        teacher,
        full_attention_layers=spec.full_attention_layers,
        keep_rope=spec.keep_rope,
        sliding_window=spec.sliding_window,
        sink_tokens=spec.sink_tokens,
        init=spec.init,
        calibration=calibration_text(context),
        retrieval_heads=spec.retrieval_heads,
        center=spec.center,
        head_dim=spec.head_dim,
        gate_bias=spec.gate_bias,
        seed=recipe.seed,
        log=log,
        shard=partial(shard_student, context) if context.sharded else None,
    )


def calibration_text(context: RunContext) -> Batch:
    """Return training text for the calibration."""
    recipe, spec = context.recipe, context.recipe.student
    length = spec.calibration_sequence_length
    mix = MixedBatches(
        context.train,
        list(recipe.data.train.values()),
        length,
        max(1, spec.calibration_tokens // length),
        recipe.seed,
        names=list(recipe.data.train),
        field="student.calibration_sequence_length",
    )
    return mix.batch(0)


def load_starting_student(context: RunContext, folder: str, teacher: Teacher) -> DeltifyForCausalLM:
    """Load a trained student to train further, and convert further layers of it if the recipe says so.

    Raises:
        ValueError: If the folder has no student, or its layers do not fit the recipe.
    """
    recipe, spec = context.recipe, context.recipe.student
    path = Path(folder)
    student = load_student_shards(context, path) if context.sharded else load_student(path, context.device)
    if not isinstance(student, DeltifyForCausalLM):
        raise ValueError(f"student.init={folder} is not a student. Name the folder of a run, or of a model of deltify")
    width, wanted = student.config.head_dim, spec.head_dim or head_width(teacher.config)
    if width != wanted:
        raise ValueError(
            f"student.init={folder} has heads of {width} channels, but the recipe means {wanted}. Set "
            f"student.head_dim: {width}"
        )
    layers, own = spec.full_attention_layers, list(student.config.layer_types)
    kinds = layer_kinds(layers, len(own))
    if own.count("full_attention") == measured_layers(layers):
        kinds = own  # the student's own choice
    reject_other_settings(folder, student.config, kinds, spec, teacher.config.vocab_size)
    differing = {new for new, old in zip(kinds, own) if new != old}
    if not differing:
        return student
    described = f"student.init={folder} has the layers {own}, but full_attention_layers={layers!r} means {kinds}"
    if differing != {"linear_attention"} or measured_layers(layers):
        raise ValueError(f"{described}. Make both the same")
    if not spec.convert_further:
        raise ValueError(f"{described}. Make both the same, or set student.convert_further: true")
    options = {"retrieval_heads": spec.retrieval_heads, "center": spec.center, "seed": recipe.seed, "log": log}
    return convert_further(student.eval(), kinds, teacher, calibration_text(context), **options)


def reject_other_settings(
    folder: str, config: DeltifyConfig, kinds: list[str], spec: StudentSpec, vocabulary: int
) -> None:
    """Raise ValueError if a student to train further differs from what the recipe says of students.

    Args:
        folder: Folder of the student.
        config: Its config.
        kinds: Kinds of layers that the recipe means.
        spec: The recipe's fields of the student.
        vocabulary: Size of the teacher's vocabulary.
    """
    stay = [kind if kind == own_kind else "" for kind, own_kind in zip(kinds, config.layer_types)]
    ropes = {rope for rope, kind in zip(config.use_rope, stay) if kind == "full_attention"}
    own: dict[str, object] = {"gate_bias": config.gate_bias}
    if len(ropes) == 1:
        own["keep_rope"] = ropes.pop()
    if "sliding_attention" in stay:
        own |= {"sliding_window": config.sliding_window, "sink_tokens": config.sink_tokens}
    for name, value in own.items():
        if value != getattr(spec, name):
            raise ValueError(
                f"student.init={folder} was converted with {name}: {value}, but the recipe has {getattr(spec, name)}. "
                f"Set student.{name}: {value}"
            )
    if config.vocab_size != vocabulary:
        raise ValueError(
            f"student.init={folder} has a vocabulary of {config.vocab_size:,} tokens, but the teacher has "
            f"{vocabulary:,}. Name a student of this teacher"
        )


def load_student(folder: Path, device: torch.device) -> DeltifyForCausalLM:
    """Load the model of a finished stage in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)


def load_student_shards(
    context: RunContext, folder: Path, prepare: Callable[[DeltifyForCausalLM], object] = lambda student: None
) -> DeltifyForCausalLM:
    """Load the model of a finished stage in float32, sharded over the ranks. Each rank reads its own rows.

    Args:
        prepare: Function that is called with the model before it is sharded, on the meta device.

    Raises:
        ValueError: If the folder has no safetensors weights of a student, or they do not fit.
    """
    config, tensors = AutoConfig.from_pretrained(folder), checkpoint_tensors(str(folder), {})
    if not isinstance(config, DeltifyConfig) or tensors is None:
        raise ValueError(f"{folder} is not the folder of a student. Name one that deltify distill has written")
    student = model_class(config).skeleton(config, plain_shapes(tensors, str(folder))).float()
    read_generation_config(student, str(folder))
    prepare(student)
    load_shards(student, tensors, partial(shard_student, context), context.device)
    return student.eval()


def shard_student(context: RunContext, student: DeltifyForCausalLM) -> None:
    autocast = torch.bfloat16 if context.precision == "bf16" else None
    distributed.shard_student(student, context.device, context.recipe.run.data_parallel == "hybrid", autocast)

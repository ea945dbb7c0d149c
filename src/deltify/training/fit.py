"""Fit a recipe to a time: measure the speed of this machine, then choose numbers of tokens so that all stages train."""

import math
import os
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..config import INITS, STAGES, Recipe, Stage, StudentSpec, check, load_recipe
from ..conversion.calibration import CHOICE_TOKENS
from ..conversion.student import KIND_BY_LETTER, convert, layer_kinds
from ..conversion.teacher import Teacher
from ..model import DeltifyForCausalLM
from ..utils.console import console, log
from ..utils.devices import pick_device, pick_precision
from ..utils.folders import model_folder
from .metrics import Metrics
from .run_folder import holds_run
from .runner import dtype_of, load_student, open_text, stage_mix
from .signals import Stopper
from .steps import StageTeacher, evaluate_heldout
from .teachers import LiveTeacher, open_teacher
from .trainer import RunContext, StageTrainer, unshare_weights

# Time of the conversion, in validation tokens: per calibration token, and more per token of the first CHOICE_TOKENS.
# Measured on a CPU with SmolLM2-135M.
CONVERSION_COST, CHOICE_COST = 0.6, 1.5
CONVERSION_SHARE, VALIDATION_SHARE = 0.5, 0.15  # largest fractions of the time
# Tokens, where the recipe has as many. With 1,024 calibration tokens, SmolLM2-135M starts at a KL of 6.9, not 2.2.
LEAST_CALIBRATION, LEAST_VALIDATION = 4096, 512
FEWEST_STEPS = 6  # of a stage, if smaller batches allow it
STAGE_NUMBERS = (
    "tokens",
    "batch_size",
    "micro_batch_size",
    "lr_mixers",
    "lr_other",
)  # fields of a stage that may change
RUN_NUMBERS = ("heldout_tokens", "eval_every")  # fields of `run` that may change
MOST_GROWTH = 32  # largest factor of a stage's tokens on a fast machine
LITTLE = 5.0  # seconds in which a CPU should do the work on a batch, or else a single sequence is measured
REPETITIONS = 4  # of work on a batch; a CUDA graph is first replayed by the third


@dataclass(frozen=True)
class Speed:
    """The time that a run's parts take on this machine.

    Attributes:
        opening: Seconds in which teacher and text are opened.
        validation: Seconds per validation token, which teacher and student read.
        training: Seconds per training token of each stage.
    """

    opening: float
    validation: float
    training: dict[str, float]


def fit_to_time(recipe: Recipe, minutes: float, given: Collection[str] = ()) -> Recipe:
    """Return the recipe with numbers of tokens for which its run takes about `minutes`, and say so in a line.

    Fields in `given` keep their values. If the recipe's folder holds a run, the numbers are those of that run, so that
    it can be resumed.

    Raises:
        ValueError: If `minutes` is not above 0, a launcher has started several processes, the recipe cuts rows over
            processes, or teacher or text do not fit it.
        FileNotFoundError: If there is no such teacher or text.
    """
    if not minutes > 0:
        raise ValueError(f"--fit-minutes {minutes:g} must be above 0")
    check(recipe)
    if holds_run(recipe.folder):
        return take_numbers(recipe, load_recipe(recipe.folder / "recipe.yaml"), given)
    if recipe.run.context_parallel > 1:
        raise ValueError(
            f"--fit-minutes measures the speed of one process, which run.context_parallel={recipe.run.context_parallel}"
            " does not allow. Leave out --fit-minutes, or set run.context_parallel to 1"
        )
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(
            f"--fit-minutes measures the speed of one process, but there are {processes}. Leave it out and set the "
            "numbers of tokens, or start one process"
        )
    started = time.monotonic()
    log("measuring the speed of this machine")
    speed = measure_speed(recipe)
    seconds = 60 * minutes - (time.monotonic() - started)
    fitted = fit(recipe, speed, seconds, given)
    estimate = time.monotonic() - started + run_seconds(fitted, speed)
    console.print(describe_fit(recipe, fitted, speed, estimate / 60), highlight=False, soft_wrap=True)
    return fitted


# ---- numbers of tokens -----------------------------------------------------------------------------------------------


def fit(recipe: Recipe, speed: Speed, seconds: float, given: Collection[str] = ()) -> Recipe:
    """Return the recipe with numbers of tokens for which a run takes about `seconds`. Fields in `given` stay.

    Calibration and validation text never grow. All stages grow or shrink by one factor, up to MOST_GROWTH. A stage with
    too few steps gets smaller batches. Every stage makes two steps at least, so a slow machine may take longer.
    """
    spec, run = recipe.student, recipe.run
    budget = CONVERSION_SHARE * seconds / speed.validation
    calibration = spec.calibration_tokens
    may_shrink = "student.calibration_tokens" not in given
    while may_shrink and conversion_cost(calibration) > budget and calibration > LEAST_CALIBRATION:
        calibration = max(LEAST_CALIBRATION, calibration - spec.calibration_sequence_length)
    sequences = VALIDATION_SHARE * seconds / speed.validation / validations(recipe) // run.heldout_sequence_length
    fewest = math.ceil(LEAST_VALIDATION / run.heldout_sequence_length)
    heldout = min(run.heldout_tokens, int(max(fewest, sequences)) * run.heldout_sequence_length)
    heldout = run.heldout_tokens if "run.heldout_tokens" in given else heldout
    fitted = replace(
        recipe,
        student=replace(spec, calibration_tokens=calibration),
        run=replace(run, heldout_tokens=heldout),
    )
    free = [name for name in STAGES if recipe.stage(name).tokens and f"{name}.tokens" not in given]
    trained = training_seconds(recipe, speed, free)
    left = max(0.0, seconds - (run_seconds(fitted, speed) - trained))
    factor = min(MOST_GROWTH, left / trained) if free else 1.0
    stages = {
        name: resize(recipe.stage(name), factor, {f"{name}.batch_size", f"{name}.micro_batch_size"}.isdisjoint(given))
        for name in free
    }
    every = math.ceil(run.eval_every * max(1, factor))
    fitted = with_stages(replace(fitted, run=replace(fitted.run, eval_every=every)), stages)
    return check(take_numbers(recipe, fitted, given))


def with_stages(recipe: Recipe, stages: dict[str, Stage]) -> Recipe:
    """Return the recipe with other stages of these names."""
    align, match, extend = (stages.get(name, recipe.stage(name)) for name in STAGES)
    return replace(recipe, align=align, match=match, extend=extend)


def conversion_cost(tokens: int) -> float:
    """Return the time of a conversion on this number of calibration tokens, in validation tokens."""
    return CONVERSION_COST * tokens + CHOICE_COST * min(tokens, CHOICE_TOKENS)


def resize(stage: Stage, factor: float, may_shrink: bool = True) -> Stage:
    """Return a stage with `factor` times the tokens, and with smaller batches if it would make too few steps and may.

    Learning rates are scaled by the square root of the batch size, as the noise of gradients is.
    """
    sequences, batch = factor * stage.steps * stage.batch_size, stage.batch_size
    while may_shrink and batch % 2 == 0 and sequences < FEWEST_STEPS * batch:
        batch //= 2
    steps = max(2, int(sequences // batch))
    micro = math.gcd(stage.micro_batch_size, batch) if stage.micro_batch_size else 0
    scale = math.sqrt(batch / stage.batch_size)
    return replace(
        stage,
        tokens=steps * batch * stage.sequence_length,
        batch_size=batch,
        micro_batch_size=micro,
        lr_mixers=scale * stage.lr_mixers,
        lr_other=scale * stage.lr_other,
    )


def validations(recipe: Recipe) -> int:
    """Return how often a run is validated: after the conversion, every `eval_every` steps, and after each stage."""
    return 1 + sum(math.ceil(recipe.stage(name).steps / recipe.run.eval_every) for name in STAGES)


def run_seconds(recipe: Recipe, speed: Speed) -> float:
    """Return the estimated seconds of a run."""
    calibration = recipe.student.calibration_tokens if recipe.student.init in INITS else 0
    tokens = conversion_cost(calibration) + validations(recipe) * recipe.run.heldout_tokens
    return speed.opening + tokens * speed.validation + training_seconds(recipe, speed)


def training_seconds(recipe: Recipe, speed: Speed, stages: Collection[str] = STAGES) -> float:
    """Return the estimated seconds of the training steps of some stages."""
    return sum(seconds * recipe.stage(name).tokens for name, seconds in speed.training.items() if name in stages)


def take_numbers(recipe: Recipe, stored: Recipe, given: Collection[str] = ()) -> Recipe:
    """Return the recipe with the numbers that the run of `stored` was fitted to, except for the fields in `given`."""

    def take(part: str, names: Iterable[str]) -> Any:
        old, new = (getattr(whole, part) for whole in (stored, recipe))
        return replace(new, **{name: getattr(old, name) for name in names if f"{part}.{name}" not in given})

    same = replace(recipe, student=take("student", ["calibration_tokens"]), run=take("run", RUN_NUMBERS))
    return with_stages(same, {name: take(name, STAGE_NUMBERS) for name in STAGES})


def describe_fit(recipe: Recipe, fitted: Recipe, speed: Speed, minutes: float) -> str:
    """Return a line with the speed of each stage and what the fit has changed."""
    speeds = " and ".join(f"{1 / seconds:,.0f} tokens/s in {name}" for name, seconds in speed.training.items())
    changes = []
    for name in speed.training:
        old, new = recipe.stage(name), fitted.stage(name)
        batches = (
            f" with batches of {new.batch_size} instead of {old.batch_size}" if new.batch_size != old.batch_size else ""
        )
        changes.append(f"{name} {old.steps:,} steps -> {new.steps:,}{batches}")
    changes.append(f"calibration {recipe.student.calibration_tokens:,} tokens -> {fitted.student.calibration_tokens:,}")
    changes.append(f"validation {recipe.run.heldout_tokens:,} tokens -> {fitted.run.heldout_tokens:,}")
    return f"This machine trains {speeds}: {', '.join(changes)}, so that the run takes about {minutes:.0f} minutes"


# ---- the speed of this machine ---------------------------------------------------------------------------------------


def measure_speed(recipe: Recipe) -> Speed:
    """Time a validation and a training step of each stage with the real teacher and an uncalibrated student."""
    device = pick_device(recipe.run.device)
    precision = pick_precision(recipe.run.precision, device)
    started = time.monotonic()
    teacher = LiveTeacher(open_teacher(recipe, device, dtype_of(precision)))
    train, _, heldout = open_text(recipe, teacher)
    opening = time.monotonic() - started
    student = rough_student(recipe.student, teacher.pretrained, device)
    silent = Metrics(replace(recipe, run=replace(recipe.run, report_to=None)))
    context = RunContext(
        recipe,
        device,
        precision,
        train,
        mixes={},
        heldout=heldout,
        probes=[],
        prompts=torch.empty(0, 0, dtype=torch.int64),
        metrics=silent,
        stopper=Stopper(),
    )
    training = {name: time_stage(context, name, teacher, student) for name in STAGES if recipe.stage(name).tokens}
    return Speed(opening, time_validation(context, teacher, student), training)


def rough_student(spec: StudentSpec, teacher: Teacher, device: torch.device) -> DeltifyForCausalLM:
    """Return a student with the layers of the recipe's. It takes no time to calibrate, and trains at the same speed."""
    if spec.init not in INITS:
        return load_student(Path(model_folder(spec.init)), device)
    kinds = layer_kinds(spec.full_attention_layers, teacher.config.num_hidden_layers)
    letters = {kind: letter for letter, kind in KIND_BY_LETTER.items()}
    return convert(
        teacher,
        full_attention_layers="".join(letters[kind] for kind in kinds),
        keep_rope=spec.keep_rope,
        sliding_window=spec.sliding_window,
        sink_tokens=spec.sink_tokens,
        init="library",
        head_dim=spec.head_dim,
        gate_bias=spec.gate_bias,
    )


def time_stage(context: RunContext, name: str, teacher: StageTeacher, student: DeltifyForCausalLM) -> float:
    """Return the seconds per token of a stage's training step."""
    stage = context.recipe.stage(name)

    def trainer(sequences: int) -> Callable[[int], object]:
        micro = min(stage.micro_batch_size, sequences)
        part = replace(stage, batch_size=sequences, micro_batch_size=micro)
        recipe = with_stages(context.recipe, {name: part})
        mixes = {name: stage_mix(recipe, name, context.train, teacher.config.max_position_embeddings)}
        return StageTrainer(replace(context, recipe=recipe, mixes=mixes), name, teacher, student).train_step

    student.train()
    seconds = per_sequence(trainer, stage.batch_size, context.device) / stage.sequence_length
    unshare_weights(student, dict(teacher.named_parameters()))  # align shares the weights that it freezes
    return seconds


def time_validation(context: RunContext, teacher: StageTeacher, student: DeltifyForCausalLM) -> float:
    """Return the seconds per token of a validation."""
    batch = context.heldout[0]

    def validate(sequences: int) -> Callable[[int], object]:
        part = batch.split(sequences)[0]
        return lambda _: evaluate_heldout(teacher, student, [part], context.autocast)

    student.eval()
    rows, length = batch.input_ids.shape
    return per_sequence(validate, rows, context.device) / length


def per_sequence(make: Callable[[int], Callable[[int], object]], sequences: int, device: torch.device) -> float:
    """Return the seconds per sequence of some work: of one sequence, or of a batch if that takes little time.

    The first call also sets up threads, and on a GPU it compiles kernels. So on a GPU, a batch is always timed, and the
    fastest of a few repetitions counts.

    Args:
        make: Function that returns the work on a number of sequences. The work is called with 0, 1 ...
        sequences: Number of sequences of a batch.
        device: Device of the work.
    """
    seconds = timed(make(1), 0)
    if device.type == "cpu" and seconds * sequences > LITTLE:
        return seconds
    work = make(sequences)
    return min(timed(work, step) for step in range(REPETITIONS)) / sequences


def timed(work: Callable[[int], object], step: int) -> float:
    started = time.monotonic()
    work(step)
    return time.monotonic() - started

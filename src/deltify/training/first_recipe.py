"""Write a first recipe for a teacher: one that fits the memory of a GPU or of this machine, and a time."""

import functools
import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedConfig

from ..config import STAGES, DataSpec, Recipe, RunSpec, Stage, StudentSpec, TeacherSpec, check, load_recipe
from ..conversion.student import FAST_WIDTHS
from ..conversion.teacher import Teacher, head_width
from ..data.sources import PYTHON_DOCS
from ..model import DeltifyForCausalLM
from ..recipes import write_new
from ..utils.devices import machine_memory
from .estimate import (
    GPUS,
    MATMUL_EFFICIENCY,
    MEASURED,
    MEMORY,
    StagePlan,
    attention_flops,
    count,
    gib,
    plan_stage,
    product_flops,
    read_config,
    skeletons,
)

# number of parameters, and the recipe that is the pattern for teachers of so many or more
PATTERNS = ((2_000_000_000, "afm-4.5b-kda"), (1_000_000_000, "qwen2.5-1.5b-kda"), (0, "smollm2-135m-kda"))
FULL = 0.9  # fraction of the memory that a stage may fill
TRAINING_SHARE = 0.75  # fraction of the time for conversion on a CPU and for training steps
VALIDATION_SHARE = 0.1  # largest fraction of the time of training steps that validations take
FEWEST_STEPS = 10  # of each stage
BATCH_CUTS = (1, 2, 4)  # divisors of the batch size to try, so that a slow machine makes enough steps
# Measured on one core with SmolLM2-135M: what a step reaches of the rate of one product of two float32 matrices
CPU_EFFICIENCY = 0.6
# ... and what conversion takes at that rate, per calibration token and parameter of the teacher's layers
CALIBRATION_FLOPS = 14
MICRO: dict[str, Any] = {"micro_batch_size": 1}
RECOMPUTED = MICRO | {"activation_checkpointing": True}
# Changes of a stage that save memory, in the order in which they cost time
SAVINGS = ({}, MICRO, RECOMPUTED, RECOMPUTED | {"optimizer": "adamw8bit"})
Pair = tuple[Teacher, DeltifyForCausalLM]


@dataclass(frozen=True)
class Machine:
    """What a recipe must fit into.

    Args:
        name: Name of the GPU, or cpu.
        memory: Bytes of memory.
        flops: FLOP/s that validation reaches.
        plan: Function that estimates a stage from its name, settings, teacher and student.
        calibration_seconds: Seconds of conversion per calibration token and parameter of the teacher's layers.
        savings: Changes of a stage to try until it fits.
    """

    name: str
    memory: float
    flops: float
    plan: Callable[[str, Stage, Teacher, DeltifyForCausalLM], StagePlan]
    calibration_seconds: float
    savings: tuple[dict[str, Any], ...] = SAVINGS


def gpu_machine(name: str) -> Machine:
    """Return a GPU of this kind.

    Raises:
        ValueError: If its speed is unknown.
    """
    if name not in GPUS:
        raise ValueError(f"gpu={name!r} is unknown; choose one of {', '.join(GPUS)}, or --cpu")
    plan = functools.partial(plan_stage, gpu=name, gpus=1)
    return Machine(name, MEMORY[name], MATMUL_EFFICIENCY * GPUS[name], plan, calibration_seconds=0.0)


def cpu_machine() -> Machine:
    """Return this machine without its GPUs. Its speed is measured."""
    rate = product_rate()
    reached = CPU_EFFICIENCY * rate

    def plan(name: str, stage: Stage, teacher: Teacher, student: DeltifyForCausalLM) -> StagePlan:
        like_gpu = plan_stage(name, stage, teacher, student, "h100", 1, graphs=False)
        attention = attention_flops(teacher, student, stage.sequence_length, name)
        flops = product_flops(name, stage, teacher, student) + attention
        # the estimate is for bfloat16 products, a CPU computes in float32
        doubled = {purpose: 2 * size for purpose, size in like_gpu.bytes.items()}
        seconds = stage.batch_size * stage.sequence_length * flops / reached
        return replace(like_gpu, bytes=doubled, seconds=seconds)

    return Machine("cpu", machine_memory(), reached, plan, CALIBRATION_FLOPS / rate, SAVINGS[:3])


def product_rate(width: int = 1024, seconds: float = 0.5) -> float:
    """Return the FLOP/s of products of two float32 matrices on this machine's CPU, as busy as it is now."""
    a_DD, b_DD = torch.randn(2, width, width).unbind()
    a_DD @ b_DD  # the first one sets up threads
    started, products = time.perf_counter(), 0
    while (spent := time.perf_counter() - started) < seconds:
        a_DD @ b_DD
        products += 1
    return products * 2 * width**3 / spent


def pick_machine(gpu: str | None, cpu: bool) -> Machine:
    """Return the GPU of this name, or the CPU. If neither is given, return what this machine has.

    Raises:
        ValueError: If the speed of the GPU is unknown.
    """
    if cpu or (gpu is None and not torch.cuda.is_available()):
        return cpu_machine()
    if gpu is not None:
        return gpu_machine(gpu.lower())
    name = torch.cuda.get_device_name(0)
    known = [key for key in GPUS if key in re.sub("[^a-z0-9]", "", name.lower())]
    if not known:
        raise ValueError(f"the speed of this GPU ({name}) is unknown. Give the most similar of --gpu {', '.join(GPUS)}")
    return replace(gpu_machine(known[0]), memory=torch.cuda.get_device_properties(0).total_memory)


def first_recipe(teacher: str, *, gpu: str | None = None, cpu: bool = False, hours: float = 1.0) -> tuple[Recipe, str]:
    """Return a recipe for a teacher, and its text with comments.

    Args:
        teacher: Hub id, folder or GGUF file of the teacher, or smollm2-135m-instruct.
        gpu: Name of the GPU to train on. Defaults to that of this machine.
        cpu: Whether to train on this machine's CPU.
        hours: Time of the whole run.

    Raises:
        ValueError: If the teacher's family is not supported, or no recipe fits the memory or the time. The message says
            what would.
        FileNotFoundError: If there is no such teacher.
    """
    if not hours > 0:
        raise ValueError(f"hours={hours:g} must be above 0")
    named = Recipe(name=recipe_name(teacher), teacher=TeacherSpec(model=teacher))
    config = read_config(named)
    machine = pick_machine(gpu, cpu)
    pair = skeletons(named)
    size = count(pair[0].model)
    by_size = next(name for parameters, name in PATTERNS if size >= parameters)
    name = "smollm2-135m-demo" if machine.name == "cpu" else by_size
    pattern = load_recipe(name)
    context = config.max_position_embeddings
    calibration = min(pattern.student.calibration_sequence_length, context)
    recipe = replace(
        pattern,
        name=named.name,
        teacher=replace(named.teacher, architecture=config.model_type),
        student=replace(pattern.student, gate_bias=False, calibration_sequence_length=calibration),
    )
    stages = {name: cut_to_context(name, recipe, context) for name in STAGES}
    plans = fit_memory(stages, pair, machine, teacher)
    fixed = Fixed(
        machine.calibration_seconds * count(pair[0].model.model.layers) * recipe.student.calibration_tokens,
        2 * recipe.run.heldout_tokens * (count(pair[0].model) + count(pair[1])) / machine.flops,
    )
    plans = fit_time(plans, pair, machine, fixed, hours)
    stages |= {plan.name: plan.stage for plan in plans}
    steps = sum(plan.stage.steps for plan in plans)
    seconds = sum(plan.seconds * plan.stage.steps for plan in plans)
    every = math.ceil(fixed.validation * steps / (VALIDATION_SHARE * seconds))
    data = pattern.data
    if PYTHON_DOCS not in data.train:
        data = replace(data, max_tokens=sum(plan.stage.tokens for plan in plans))
    recipe = replace(
        recipe,
        data=data,
        run=replace(
            pattern.run,
            eval_every=max(pattern.run.eval_every, every),
            heldout_sequence_length=min(pattern.run.heldout_sequence_length, context),
        ),
        align=stages["align"],
        match=stages["match"],
        extend=stages["extend"],
    )
    return check(recipe), recipe_text(recipe, plans, fixed, pair, machine, hours, name)


def recipe_name(teacher: str) -> str:
    """Return a name for the run, from that of the teacher."""
    stem = re.sub(r"\.gguf$", "", teacher.rstrip("/").rpartition("/")[2].lower())
    return re.sub("[^a-z0-9._-]+", "-", stem).strip("-.") + "-kda"


def cut_to_context(name: str, recipe: Recipe, context: int) -> Stage:
    """Return a stage with sequences that fit the teacher's context window; extend is left out if it has none longer."""
    stage = recipe.stage(name)
    length = min(stage.sequence_length, context)
    if name == "extend" and length <= min(recipe.match.sequence_length, context):
        return Stage()
    return replace(stage, sequence_length=length)


def fit_memory(stages: dict[str, Stage], pair: Pair, machine: Machine, teacher: str) -> list[StagePlan]:
    """Return the plans of the stages, each changed until it fits the machine's memory.

    Raises:
        ValueError: If one does not fit. The message says what would.
    """
    tries = [
        [machine.plan(name, replace(stage, **saving), *pair) for saving in machine.savings]
        for name, stage in stages.items()
        if stage.tokens
    ]
    fitting = [[plan for plan in plans if plan.total < FULL * machine.memory] for plans in tries]
    if all(fitting):
        return [plans[0] for plans in fitting]
    largest = max((min(plans, key=lambda plan: plan.total) for plans in tries), key=lambda plan: plan.total)
    larger = [gpu for gpu in GPUS if largest.total < FULL * MEMORY[gpu] and gpu != machine.name]
    advice = f"Choose --gpu {' or '.join(larger)}" if larger else several_gpus(largest, pair)
    raise ValueError(
        f"{teacher} does not fit {machine.name}: with everything that saves memory, {largest.name} needs "
        f"{gib(largest.total)}. {gib(int(FULL * machine.memory))} of {gib(int(machine.memory))} may be used. "
        f"{advice}, or a smaller teacher"
    )


def several_gpus(plan: StagePlan, pair: Pair) -> str:
    """Return the advice to shard a stage over the smallest number of GPUs that hold it."""
    largest = max(MEMORY, key=lambda gpu: MEMORY[gpu])
    for gpus in (2, 4, 8):
        batch = gpus * math.ceil(plan.stage.batch_size / gpus)
        stage = replace(plan.stage, batch_size=batch, optimizer="adamw", **RECOMPUTED)  # sharded models need adamw
        if plan_stage(plan.name, stage, *pair, largest, gpus, sharded=True).total < FULL * MEMORY[largest]:
            return f"Shard it over {gpus} x {largest} (run.data_parallel: shard)"
    return f"Not even 8 x {largest} hold it"


@dataclass(frozen=True)
class Fixed:
    """Seconds of what a run does however short it is.

    Args:
        conversion: Seconds of the conversion, if they are known.
        validation: Seconds of one validation.
    """

    conversion: float
    validation: float


def fit_time(plans: list[StagePlan], pair: Pair, machine: Machine, fixed: Fixed, hours: float) -> list[StagePlan]:
    """Return the plans with as many tokens as the time allows, in the pattern's ratio.

    Raises:
        ValueError: If that is too few steps. The message says how many hours are enough.
    """
    first = fixed.conversion + (1 + len(plans)) * fixed.validation  # after the conversion and after each stage
    budget = 3600 * hours * TRAINING_SHARE - first
    needed = 0.0
    for cut in BATCH_CUTS:
        smaller = [with_batch(plan, plan.stage.batch_size // cut, pair, machine) for plan in plans]
        training = sum(plan.seconds * plan.stage.steps for plan in smaller)
        share = max(FEWEST_STEPS / plan.stage.steps for plan in smaller)
        if budget >= share * training:
            return [with_steps(plan, int(plan.stage.steps * budget / training)) for plan in smaller]
        needed = share * training
    enough = rounded_up((first + needed) / TRAINING_SHARE / 3600)
    raise ValueError(
        f"--hours {hours:g} is too short on {machine.name}. Conversion and first validations take {first / 3600:.2f} "
        f"hours, {FEWEST_STEPS} steps or more of each stage take {needed / 3600:.2f}, and a quarter of the time is for "
        f"all else. Give --hours {enough}, a faster GPU, or a smaller teacher"
    )


def with_batch(plan: StagePlan, batch_size: int, pair: Pair, machine: Machine) -> StagePlan:
    """Return the plan of a stage with another batch size."""
    batch = max(1, batch_size)
    micro = math.gcd(plan.stage.micro_batch_size, batch) if plan.stage.micro_batch_size else 0
    return machine.plan(plan.name, replace(plan.stage, batch_size=batch, micro_batch_size=micro), *pair)


def rounded_up(hours: float) -> str:
    """Return a number of hours as text, with one more in the second digit."""
    digits = 2 if hours < 1 else 1
    return f"{hours + 0.5 * 10**-digits:.{digits}f}"


def with_steps(plan: StagePlan, steps: int) -> StagePlan:
    """Return the plan of a stage with this number of steps."""
    stage = plan.stage
    return replace(plan, stage=replace(stage, tokens=steps * stage.batch_size * stage.sequence_length))


# ---- the text --------------------------------------------------------------------------------------------------------

COMMENTS = {
    "teacher.architecture": "model family; --smoke makes a tiny random model of it",
    "student.full_attention_layers": 'KDA in all layers; "3:1" keeps every fourth attention layer and recalls far more',
    "student.calibration_tokens": "training tokens that the new tensors are fitted to",
    "data.train": "sources and their weights. For your own text: {my.jsonl: 0.75, recall:my.jsonl: 0.25}",
    "data.max_tokens": "of each source; as many as the stages read together",
    "align.tokens": "align trains each KDA layer alone, on the output of the teacher's layer",
    "match.tokens": "match trains the whole student on the teacher's next-token distribution",
    "extend.tokens": "extend does the same on longer sequences",
    "micro_batch_size": "sequences in memory at a time; saves memory",
    "activation_checkpointing": "recomputes activations; saves memory",
    "optimizer": "saves memory; needs, in a clone of deltify: pip install -e '.[adam8bit]'",
    "run.eval_every": "steps between validations",
}
STAGE_FIELDS = ("tokens", "sequence_length", "batch_size", "lr_mixers")  # written even where they are the default
STUDENT_FIELDS = ("full_attention_layers", "init")


def recipe_text(
    recipe: Recipe,
    plans: list[StagePlan],
    fixed: Fixed,
    pair: Pair,
    machine: Machine,
    hours: float,
    pattern: str,
) -> str:
    """Return a recipe as YAML with comments. The first ones describe teacher, machine and estimate."""
    where = "this machine's CPU" if machine.name == "cpu" else f"one {machine.name}"
    lines = [
        f"{recipe.teacher.model} to KDA in all layers, in {hours:g} {'hour' if hours == 1 else 'hours'} on {where}.",
        f"The teacher: {describe(pair[0].config, count(pair[0].model))}.",
        f"Made by `deltify init`. Learning rates and batches are those of the recipe {pattern}.",
        "",
        f"{'stage':8} {'steps':>9} {'tokens':>15} {'GiB':>6} {'hours':>7}",
    ]
    if fixed.conversion:
        tokens = recipe.student.calibration_tokens
        lines.append(f"{'convert':8} {'':9} {tokens:15,} {'':6} {fixed.conversion / 3600:7.2f}")
    for plan in plans:
        seconds = plan.seconds * plan.stage.steps
        sizes = f"{plan.stage.steps:9,} {plan.stage.tokens:15,} {plan.total / 2**30:6.1f} {seconds / 3600:7.2f}"
        lines.append(f"{plan.name:8} {sizes}")
    lines += ["", "The remaining time is for validation, saving and compilation. Downloads are not counted."]
    lines += notes(recipe, pair[0].config, machine)
    text = "".join(f"# {line}".rstrip() + "\n" for line in lines) + field_line("", "name", recipe.name, "")
    sections = {
        "teacher": (recipe.teacher, TeacherSpec(), ("model", "architecture")),
        "student": (recipe.student, StudentSpec(), STUDENT_FIELDS),
        "data": (recipe.data, DataSpec(), ("train",)),
        **{plan.name: (plan.stage, Stage(), STAGE_FIELDS) for plan in plans},
        "run": (recipe.run, RunSpec(), ("heldout_tokens",)),
    }
    for name, (section, default, always) in sections.items():
        usual = asdict(default)
        text += f"{name}:\n"
        for field, value in asdict(section).items():
            if field in always or value != usual[field]:
                text += field_line("  ", field, value, COMMENTS.get(f"{name}.{field}") or COMMENTS.get(field, ""))
    return text


def describe(config: PreTrainedConfig, parameters: int) -> str:
    """Return family, size and context window of a teacher as text."""
    return (
        f"{config.model_type}, {parameters:,} parameters, {config.num_hidden_layers} layers, "
        f"{config.num_attention_heads} heads of width {head_width(config)}, context window of "
        f"{config.max_position_embeddings:,} tokens"
    )


def notes(recipe: Recipe, config: PreTrainedConfig, machine: Machine) -> list[str]:
    """Return what else to know: what the estimate rests on, and what to install."""
    found = []
    if machine.name == "cpu":
        found.append("The hours come from the speed of this machine when the recipe was made.")
    elif machine.name not in MEASURED:
        found.append(f"The hours come from the data sheet of {machine.name} and were not measured.")
    if machine.name != "cpu" and (width := head_width(config)) not in FAST_WIDTHS:
        found.append(f"The GPU kernels need heads of width 64 or 128, not {width}: expect several times these hours.")
    if any("hf:" in source for source in recipe.data.train):
        found.append("Text from the hub needs, in a clone of deltify: pip install -e '.[hub]'")
    return found


def field_line(indent: str, field: str, value: object, comment: str) -> str:
    """Return a field of a recipe as YAML, with a comment."""
    comment = f"  # {comment}" if comment else ""
    if isinstance(value, dict):
        inner = "".join(field_line(f"{indent}  ", key, item, "") for key, item in value.items())
        return f"{indent}{field}:{comment}\n{inner}"
    scalar = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
    return f"{indent}{field}: {scalar}{comment}\n"


def write_first_recipe(teacher: str, path: Path | None, **settings) -> Path:
    """Write the recipe of `first_recipe` to a new file, its name's by default, and return the file."""
    recipe, text = first_recipe(teacher, **settings)
    path = Path(f"{recipe.name}.yaml") if path is None else path
    write_new(path, text)
    return path

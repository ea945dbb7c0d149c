"""Recipes: all settings of a run as frozen dataclasses, read from YAML and the command line."""

import difflib
import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from .recipes import find_recipe

STAGES = ("align", "match", "extend")
INITS = ("calibrated", "calibrated-constant", "library", "arcee")
DATA_PARALLEL = ("auto", "replicate", "shard", "hybrid")
OPTIMIZERS = ("adamw", "adamw8bit", "muon")
DIVERGENCES = ("forward", "reverse", "jensen-shannon")
PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class TeacherSpec:
    """The pretrained model to convert.

    Args:
        model: Hub id, folder or GGUF file of the teacher, or smollm2-135m-instruct (from PyPI).
        architecture: Model type of the random stand-in that --smoke uses instead of the teacher.
        trust_remote_code: Whether to run code that comes with the teacher.
        revision: Commit or branch on the hub. Defaults to the main branch.
        cache: Folder that `deltify capture` wrote. match and extend then run without the teacher in memory.
    """

    model: str = "smollm2-135m-instruct"
    architecture: str = "llama"
    trust_remote_code: bool = False
    revision: str | None = None
    cache: str | None = None


@dataclass(frozen=True)
class StudentSpec:
    """The model to convert the teacher to.

    Args:
        full_attention_layers: Layers that stay attention: none, all, a ratio like "3:1", a list of indices,
            "measured:N" for the N layers that attend most to an earlier occurrence of the current tokens, or a pattern
            that repeats over the layers: K for KDA, F for full attention, S for a sliding window with sinks.
        keep_rope: Whether full attention layers keep their rotary positions (RoPE). Otherwise they have none (NoPE).
        sliding_window: Number of tokens that sliding layers see, the current one included.
        sink_tokens: Number of first tokens of a document that sliding layers always see.
        init: Initialisation of gates and convolutions: calibrated, calibrated-constant, library or arcee. Or the folder
            of a student or run whose weights the new run starts with.
        convert_further: Whether attention layers of the student that init names become KDA, with the calibrated
            initialisation, if full_attention_layers does not name them. Otherwise the layers must be the same.
        calibration_tokens: Number of training tokens that the calibrated initialisation is fitted to.
        calibration_sequence_length: Tokens per sequence of the calibration text.
        retrieval_heads: Number of heads that the calibrated initialisation gives a long memory: the heads of all layers
            that attend most to an earlier occurrence of the current tokens in the teacher.
        center: Heads for which the calibrated initialisation subtracts the mean over tokens from queries and keys:
            none, retrieval (those of retrieval_heads) or all.
        head_dim: Width of the heads. Defaults to the teacher's. Heads of twice the width have four times the state, and
            about twice the weights in KDA layers. Only the teacher's width if layers stay attention. GPU kernels
            support 64 and 128.
        gate_bias: Whether the output gate has a bias. Without it, the student runs in other runtimes.
    """

    full_attention_layers: str | list[int] = "none"
    keep_rope: bool = False
    sliding_window: int = 64
    sink_tokens: int = 4
    init: str = "calibrated"
    convert_further: bool = False
    calibration_tokens: int = 8192
    calibration_sequence_length: int = 512
    retrieval_heads: int = 0
    center: str = "none"
    head_dim: int | None = None
    gate_bias: bool = False


@dataclass(frozen=True)
class DataSpec:
    """Training and validation text.

    Args:
        train: Sources and their weights. A source is a file, a folder, python-docs, recall, recall:SOURCE or
            sparse-recall:SOURCE (synthetic text that trains memory), chat:SOURCE (chats, with a loss on the answers
            only), or `hf:NAME[:CONFIG][:SPLIT]`.
        heldout: Source of validation text. Defaults to one document in twenty of the training sources.
        folder: Folder for tokenized text, which is written at the first use.
        max_tokens: Largest number of training tokens of each source. Defaults to all.
    """

    train: dict[str, float] = field(default_factory=lambda: {"python-docs": 1.0})
    heldout: str | None = None
    folder: str = "runs/data"
    max_tokens: int | None = None


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Args:
        tokens: Number of tokens to train on; 0 leaves the stage out.
        sequence_length: Tokens per sequence.
        batch_size: Sequences per optimizer step, over all processes.
        micro_batch_size: Sequences in memory at a time; 0 for all sequences of a process.
        lr_mixers: Peak learning rate of the layers that replace attention.
        lr_other: Peak learning rate of all other parameters; 0 freezes them. align does not use it.
        warmup_ratio: Fraction of the steps over which the learning rate rises.
        min_lr_ratio: Final learning rate as a fraction of the peak (cosine schedule).
        ce_weight: Weight of cross-entropy in the loss. The divergence has the remaining weight.
        hidden_state_weight: Weight of the hidden-state loss: 1 - cosine similarity with the teacher's hidden states,
            averaged over layers and tokens.
        divergence: Divergence between the two next-token distributions: forward (KL of the student from the teacher),
            reverse or jensen-shannon.
        temperature: Softmax temperature of teacher and student in the divergence.
        optimizer: adamw; adamw8bit (bitsandbytes: moments of 2 bytes a parameter instead of 8); or muon (4
            bytes a parameter), which uses AdamW for embeddings, head and vectors. muon cannot be sharded.
        weight_decay: Weight decay of matrices.
        max_grad_norm: Largest norm of the gradient; a larger one is scaled down.
        activation_checkpointing: Whether to recompute activations layer by layer, which saves memory.
        data_weights: Sources of data.train that the stage trains on, and their weights. Defaults to data.train.
    """

    tokens: int = 0
    sequence_length: int = 2048
    batch_size: int = 8
    micro_batch_size: int = 0
    lr_mixers: float = 1e-3
    lr_other: float = 1e-4
    warmup_ratio: float = 0.05
    min_lr_ratio: float = 0.05
    ce_weight: float = 0.0
    hidden_state_weight: float = 0.0
    divergence: str = "forward"
    temperature: float = 1.0
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    activation_checkpointing: bool = False
    data_weights: dict[str, float] | None = None

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch_size * self.sequence_length)


@dataclass(frozen=True)
class RunSpec:
    """Device, validation, checkpoints and tracking of a run.

    Args:
        device: auto, cpu, cuda or mps.
        precision: Precision of matrix products: fp32, bf16, or auto (bf16 where it is faster). Weights and optimizer
            states are float32.
        heldout_tokens: Number of validation tokens.
        heldout_sequence_length: Tokens per validation sequence.
        eval_every: Validate every N steps, and write samples.
        save_every_minutes: Save a checkpoint every N minutes.
        save_every: Save a checkpoint every N steps; 0 to save by time only.
        keep_checkpoints: Number of latest checkpoints to keep during a stage. The best one is kept, too. After a stage,
            only its best one is kept, and only if it is better than the stage's model.
        cuda_graphs: Whether to replay training steps as CUDA graphs on a GPU, where they can be captured.
        data_parallel: How several processes hold weights, gradients and optimizer states. replicate: each process holds
            all of them. shard: each holds a part (FSDP2). hybrid: those of a node hold parts, and all nodes hold the
            same (HSDP). auto: sharded if they would fill more than half of a GPU.
        context_parallel: Number of processes that each row is cut over in match and extend. Each of them has an equal
            segment of the row. The number of processes must be a multiple of it.
        report_to: Tracker besides metrics.jsonl: trackio, wandb or tensorboard. A resumed run continues its tracker's
            run.
    """

    device: str = "auto"
    precision: str = "auto"
    heldout_tokens: int = 16384
    heldout_sequence_length: int = 512
    eval_every: int = 50
    save_every_minutes: float = 10.0
    save_every: int = 0
    keep_checkpoints: int = 2
    cuda_graphs: bool = True
    data_parallel: str = "auto"
    context_parallel: int = 1
    report_to: str | None = None


# Fields that were renamed before version 0.1.
RENAMED = {
    "teacher.targets": "teacher.cache",
    "student.start": "student.init",
    "student.long_heads": "student.retrieval_heads",
    "student.long_memory_heads": "student.retrieval_heads",
    "student.calibration_length": "student.calibration_sequence_length",
    **{
        f"{stage}.{old}": f"{stage}.{new}"
        for stage in STAGES
        for old, new in {
            "length": "sequence_length",
            "batch": "batch_size",
            "micro_batch": "micro_batch_size",
            "lr_rest": "lr_other",
            "warmup": "warmup_ratio",
            "lr_end": "min_lr_ratio",
            "hidden_weight": "hidden_state_weight",
            "clip": "max_grad_norm",
            "checkpoint_layers": "activation_checkpointing",
        }.items()
    },
    "run.heldout_length": "run.heldout_sequence_length",
    "run.heldout_steps": "run.eval_every",
    "run.checkpoint_minutes": "run.save_every_minutes",
    "run.checkpoint_steps": "run.save_every",
    "run.keep": "run.keep_checkpoints",
    "run.log_to": "run.report_to",
}


@dataclass(frozen=True)
class Recipe:
    """A whole conversion: teacher, student, text, and the stages align, match and extend.

    Args:
        name: Name of the run and of its folder under `output`.
        output: Folder of all runs.
        seed: Random seed for data order, initialisation and sampling.
    """

    name: str
    output: str = "runs"
    seed: int = 0
    teacher: TeacherSpec = field(default_factory=TeacherSpec)
    student: StudentSpec = field(default_factory=StudentSpec)
    data: DataSpec = field(default_factory=DataSpec)
    align: Stage = field(default_factory=Stage)
    match: Stage = field(default_factory=Stage)
    extend: Stage = field(default_factory=Stage)
    run: RunSpec = field(default_factory=RunSpec)

    @property
    def folder(self) -> Path:
        return Path(self.output).expanduser() / self.name

    def stage(self, name: str) -> Stage:
        return getattr(self, name)

    def ranks_per_row(self, name: str) -> int:
        """Return the number of processes that a stage cuts each row over. align trains on whole rows."""
        return 1 if name == "align" else self.run.context_parallel


def recipe_parser() -> ArgumentParser:
    """Return a parser of recipe files and of `--field value` for each of their fields."""
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_argument("--recipe", action="config")
    parser.add_class_arguments(Recipe)
    return parser


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe; fields can be overridden as on the command line, `["--match.tokens", "1000"]`.

    Args:
        path: YAML file, or name of a recipe that comes with deltify, such as smollm2-135m-kda.
        overrides: Flags of fields, and their values.

    Raises:
        FileNotFoundError: If there is no such recipe.
        ValueError: If a field or value does not fit. The message names the nearest known field.
    """
    path = find_recipe(path)
    reject_unknown(read_mapping(path), str(path))
    for name in (item[2:].split("=")[0] for item in overrides or [] if item.startswith("--")):
        nested: dict = {}
        target = nested
        *parents, last = name.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = None
        reject_unknown(nested, "the command line")
    parser = recipe_parser()
    try:
        config = parser.parse_args(["--recipe", str(path), *(overrides or [])])
    except ArgumentError as error:
        raise ValueError(f"{path}: {error}") from None
    for section in fields(Recipe):
        if is_dataclass(section.type) and not isinstance(value := config[section.name], Namespace):
            known = ", ".join(f.name for f in fields(section.type))
            raise ValueError(f"{path}: {section.name}={value!r} is not a section; give it fields, which are: {known}")
    recipe = parser.instantiate(config)
    return check(Recipe(**{f.name: getattr(recipe, f.name) for f in fields(Recipe)}))


def read_mapping(path: Path) -> dict:
    """Return the fields of a YAML file. Raise ValueError if it is no YAML, or no mapping of fields."""
    try:
        text = path.read_text(encoding="utf-8")
        content, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"{path} is not YAML: {problem}; `deltify recipes` lists examples") from None
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}, {str(content)[:40]!r}"
        raise ValueError(
            f"{path} holds {found}; a recipe is fields and their values, such as name: my-run; `deltify recipes` lists "
            "examples"
        )
    if again := doubled_key(tree):
        raise ValueError(
            f"{path}: line {again.start_mark.line + 1} has {again.value} a second time. Remove one of them"
        )
    return content


def doubled_key(node: yaml.Node) -> yaml.Node | None:
    """Return the second one of two equal keys of a mapping, or None. YAML would take its value without a word."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                return key
            seen.add(key.value)
            if again := doubled_key(value):
                return again
    return None


def reject_unknown(content: dict, where: str, cls: type = Recipe, prefix: str = "") -> None:
    """Raise ValueError for a key that is no field. The message has the field's new name, or the nearest field's."""
    known = {f.name: f.type for f in fields(cls)}
    for key, value in content.items():
        if new := RENAMED.get(f"{prefix}{key}"):
            raise ValueError(f"{where}: {prefix}{key} is now called {new}")
        if key not in known:
            names = {name: f"{prefix}{name}" for name in known}
            names |= {old.rpartition(".")[2]: new for old, new in RENAMED.items() if old.startswith(prefix or "-")}
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {names[near[0]]}?" if near else f"known are: {', '.join(known)}"
            raise ValueError(f"{where}: unknown field {prefix}{key}; {hint}")
        if isinstance(value, dict) and isinstance(kind := known[key], type) and is_dataclass(kind):
            reject_unknown(value, where, kind, f"{prefix}{key}.")


def are_weights(weights: Any) -> bool:
    return bool(weights) and all(0 < weight < math.inf for weight in weights.values())


CENTER = ("none", "retrieval", "all")
AT_LEAST_0 = (lambda x: x >= 0, "must be at least 0")
AT_LEAST_1 = (lambda x: x >= 1, "must be at least 1")
AT_LEAST_2 = (lambda x: x >= 2, "must be at least 2")
ABOVE_0 = (lambda x: x > 0, "must be above 0")
FRACTION = (lambda x: 0 <= x <= 1, "must be in [0, 1]")


def one_of(choices: tuple[str, ...]) -> tuple[Callable[[object], bool], str]:
    return lambda x: x in choices, f"is not one of {', '.join(choices)}"


# Rules of single fields, by dotted name; those of stages by the field's name.
RULES = {
    "seed": AT_LEAST_0,
    "student.full_attention_layers": (lambda x: x is not None, "must be none, all, a ratio, measured:N, or a list"),
    "student.retrieval_heads": AT_LEAST_0,
    "student.calibration_tokens": AT_LEAST_1,
    "student.calibration_sequence_length": AT_LEAST_2,
    "student.center": one_of(CENTER),
    "student.head_dim": (lambda x: x is None or x >= 1, "must be at least 1, or null"),
    "data.train": (are_weights, "must name sources with positive weights"),
    "data.max_tokens": (lambda x: x is None or x >= 1, "must be at least 1, or null"),
    "run.precision": one_of(PRECISIONS),
    "run.data_parallel": one_of(DATA_PARALLEL),
    "run.context_parallel": AT_LEAST_1,
    "run.keep_checkpoints": AT_LEAST_1,
    "run.eval_every": AT_LEAST_1,
    "run.heldout_sequence_length": AT_LEAST_2,
    "run.save_every": AT_LEAST_0,
    "run.save_every_minutes": ABOVE_0,
}
STAGE_RULES = {
    "sequence_length": AT_LEAST_2,
    "tokens": AT_LEAST_0,
    "batch_size": AT_LEAST_1,
    "micro_batch_size": AT_LEAST_0,
    "weight_decay": AT_LEAST_0,
    "lr_mixers": AT_LEAST_0,
    "lr_other": AT_LEAST_0,
    "min_lr_ratio": FRACTION,
    "warmup_ratio": FRACTION,
    "max_grad_norm": ABOVE_0,
    "ce_weight": FRACTION,
    "hidden_state_weight": (lambda x: 0 <= x < 1, "must be in [0, 1)"),
    "divergence": one_of(DIVERGENCES),
    "optimizer": one_of(OPTIMIZERS),
    "temperature": ABOVE_0,
    "data_weights": (lambda x: x is None or are_weights(x), "must name sources with positive weights, or be null"),
}


def check(recipe: Recipe) -> Recipe:
    """Return the recipe if its values make sense, each and together.

    Raises:
        ValueError: If one does not. The message names the field, its value and what is allowed.
    """
    rules = RULES | {f"{stage}.{name}": rule for stage in STAGES for name, rule in STAGE_RULES.items()}
    checks = [(good(value_of(recipe, name)), name, what) for name, (good, what) in rules.items()]
    run, stages = recipe.run, {name: recipe.stage(name) for name in STAGES}
    checks += [
        (
            run.heldout_tokens >= run.heldout_sequence_length,
            "run.heldout_tokens",
            f"must be at least run.heldout_sequence_length={run.heldout_sequence_length}",
        ),
        (any(stage.tokens for stage in stages.values()), "align.tokens", "or another stage's must be above 0"),
        (
            run.context_parallel == 1 or "S" not in str(recipe.student.full_attention_layers),
            "run.context_parallel",
            "must be 1 for a student with sliding-window layers, S in student.full_attention_layers",
        ),
        (
            not recipe.student.convert_further or run.data_parallel in ("auto", "replicate"),
            "run.data_parallel",
            "must be auto or replicate with student.convert_further",
        ),
    ]
    for name, stage in stages.items():
        micro, weight = stage.micro_batch_size, stage.hidden_state_weight
        checks += [
            (weight + stage.ce_weight <= 1, f"{name}.hidden_state_weight", "and ce_weight must not exceed 1"),
            (not (weight and recipe.teacher.cache), f"{name}.hidden_state_weight", "needs teacher.cache null"),
            (not micro or stage.batch_size % micro == 0, f"{name}.micro_batch_size", "must divide batch_size"),
            (not stage.tokens or stage.steps, f"{name}.tokens", "is less than one step"),
            (
                not stage.tokens or stage.sequence_length % recipe.ranks_per_row(name) == 0,
                f"{name}.sequence_length",
                f"must be a multiple of run.context_parallel={run.context_parallel}",
            ),
            (
                set(stage.data_weights or ()) <= set(recipe.data.train),
                f"{name}.data_weights",
                f"names a source that data.train lacks. Its sources are {', '.join(recipe.data.train)}",
            ),
        ]
    for good, name, what in checks:
        if not good:
            raise ValueError(f"recipe {recipe.name!r}: {name}={value_of(recipe, name)!r} {what}")
    return recipe


def value_of(recipe: Recipe, name: str) -> object:
    """Return the value of a field by its dotted name."""
    return functools.reduce(getattr, name.split("."), recipe)


def write_recipe(recipe: Recipe, path: Path) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(yaml.safe_dump(asdict(recipe), sort_keys=False), encoding="utf-8")
    unfinished.replace(path)


def smoke(recipe: Recipe) -> Recipe:
    """Return the recipe with two tiny steps a stage and a random teacher of the same architecture."""

    def tiny(stage: Stage) -> Stage:
        if not stage.tokens:
            return stage
        return replace(
            stage, tokens=2 * 2 * 32, sequence_length=32, batch_size=2, micro_batch_size=0, data_weights=None
        )

    student = recipe.student
    layers, init = student.full_attention_layers, student.init  # the random teacher has four layers
    if str(layers).startswith("measured:"):
        layers = "measured:1"
    elif isinstance(layers, list):
        layers = sorted({layer % 4 for layer in layers})[:3]  # at least one becomes KDA
    return replace(
        recipe,
        name=f"{recipe.name}-smoke",
        teacher=replace(recipe.teacher, model=f"random:{recipe.teacher.architecture}", cache=None),
        student=replace(
            student,
            full_attention_layers=layers,
            init=init if init in INITS else "calibrated",  # a trained student does not fit a random teacher
            convert_further=False,
            retrieval_heads=min(student.retrieval_heads, 16),
            calibration_tokens=256,
            calibration_sequence_length=32,
        ),
        data=replace(recipe.data, train={"python-docs": 1.0}, heldout=None, max_tokens=20_000),
        run=replace(
            recipe.run,
            device="cpu",
            precision="fp32",
            heldout_tokens=64,
            heldout_sequence_length=32,
            eval_every=1,
            context_parallel=1,
        ),
        align=tiny(recipe.align),
        match=tiny(recipe.match),
        extend=tiny(recipe.extend),
    )


def check_shares(recipe: Recipe, ranks: int) -> None:
    """Raise ValueError if the ranks cannot share rows, or a stage's batch in equal micro-batches."""
    per_row = recipe.run.context_parallel
    if ranks % per_row:
        raise ValueError(
            f"run.context_parallel={per_row} needs a number of processes that is a multiple of it, not {ranks}. Start "
            f"as many on this machine, such as torchrun --standalone --nproc-per-node={per_row} -m deltify.cli distill "
            "..., or set it to 1"
        )
    for name in STAGES:
        stage = recipe.stage(name)
        shares = ranks // recipe.ranks_per_row(name)
        share, rest = divmod(stage.batch_size, shares)
        if stage.tokens and (rest or (stage.micro_batch_size and share % stage.micro_batch_size)):
            who = f"{ranks} processes" if shares == ranks else f"{shares} groups of {per_row} processes"
            raise ValueError(
                f"{who} cannot share {name}.batch_size={stage.batch_size} in micro-batches of "
                f"{stage.micro_batch_size or 'any size'}. Make it a multiple of their product"
            )

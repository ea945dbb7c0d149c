"""Recipes: everything a run needs to know, in YAML, behind frozen dataclasses."""

import difflib
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

STAGES = ("align", "match", "extend")
DATA_PARALLEL = ("auto", "replicate", "shard")
OPTIMIZERS = ("adamw", "adamw8bit", "muon")
DIVERGENCES = ("forward", "reverse", "jensen-shannon")


@dataclass(frozen=True)
class TeacherSpec:
    """The pretrained model that is converted.

    Args:
        model: hub id, folder, GGUF file, or smollm2-135m-instruct (the embedded one).
        architecture: its model_type, for --smoke, which must not need the model.
        trust_remote_code: whether code that comes with the model may run.
        revision: commit or branch on the hub.
        targets: folder that `deltify capture` wrote; match and extend then run without the teacher.
    """

    model: str = "smollm2-135m-instruct"
    architecture: str = "llama"
    trust_remote_code: bool = False
    revision: str | None = None
    targets: str | None = None


@dataclass(frozen=True)
class StudentSpec:
    """What the teacher is converted to.

    Args:
        full_attention_layers: layers that stay attention: none, all, a ratio like "3:1", a list of indices, or a
            pattern that repeats over the layers: K for KDA, F for full attention, S for a sliding window with sinks.
        keep_rope: whether full attention keeps rotary positions; without, it is NoPE.
        sliding_window: tokens that sliding layers look back to, the current one included.
        sink_tokens: first tokens of a document that sliding layers always see.
        start: of gates and convolutions: calibrated, calibrated-constant, library or arcee; or the folder of a student
            or run, to train on.
        calibration_tokens: training tokens that the calibrated start looks at.
        calibration_length: tokens in a row of them.
        long_heads: heads of each KDA layer that a calibrated start gives a half-life of 4,096 tokens.
    """

    full_attention_layers: str | list[int] = "none"
    keep_rope: bool = False
    sliding_window: int = 64
    sink_tokens: int = 4
    start: str = "calibrated"
    calibration_tokens: int = 8192
    calibration_length: int = 512
    long_heads: int = 0


@dataclass(frozen=True)
class DataSpec:
    """Text.

    Args:
        train: sources and their weights. A source is a file, a folder, python-docs, recall or recall:SOURCE
            (synthetic, see recall.py), or hf:NAME[:CONFIG][:SPLIT].
        heldout: source that judges; if absent, one in twenty documents of the training sources is held out.
        folder: where token files are kept, made at the first use.
        max_tokens: of each training source.
    """

    train: dict[str, float] = field(default_factory=lambda: {"python-docs": 1.0})
    heldout: str | None = None
    folder: str = "runs/data"
    max_tokens: int | None = None


@dataclass(frozen=True)
class Stage:
    """One stage of training; with tokens: 0 it is left out.

    Args:
        tokens: to train on.
        length: tokens in a row.
        batch: rows in an optimizer step.
        micro_batch: rows in memory at a time; 0 for all of them.
        lr_mixers: peak learning rate of the layers that replace attention.
        lr_rest: of everything else; 0 freezes it. Has no meaning in align.
        warmup: share of the steps in which the rate rises.
        lr_end: last learning rate, as a share of the peak (cosine).
        ce_weight: share of cross-entropy in the loss. The rest is the divergence.
        hidden_weight: share of the hidden states' loss: 1 - cosine with the teacher's, the mean over layers and tokens.
        divergence: of the two distributions of the next token: forward (KL of the student from the teacher), reverse
            or jensen-shannon.
        temperature: that both models' logits are divided by before it.
        optimizer: adamw; adamw8bit, whose moments take 2 bytes a number instead of 8 (bitsandbytes); or muon, for
            matrices other than embeddings and head, which stay AdamW's (4 bytes a number). Sharded models need adamw.
        weight_decay: of matrices.
        clip: largest norm of the gradient.
        checkpoint_layers: recompute activations layer by layer to save memory.
    """

    tokens: int = 0
    length: int = 2048
    batch: int = 8
    micro_batch: int = 0
    lr_mixers: float = 1e-3
    lr_rest: float = 1e-4
    warmup: float = 0.05
    lr_end: float = 0.05
    ce_weight: float = 0.0
    hidden_weight: float = 0.0
    divergence: str = "forward"
    temperature: float = 1.0
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    clip: float = 1.0
    checkpoint_layers: bool = False

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch * self.length)


@dataclass(frozen=True)
class RunSpec:
    """How a run goes.

    Args:
        device: auto, cpu, cuda or mps.
        precision: of the matrix products: fp32, bf16, or auto (bf16 where it is fast). Weights and optimizer are fp32.
        heldout_tokens: tokens of held-out text that judge during training.
        heldout_length: tokens in a row of them.
        heldout_steps: steps between two judgements.
        checkpoint_minutes: time between two checkpoints.
        checkpoint_steps: steps between two checkpoints; 0 for by time alone.
        keep: how many of the last checkpoints stay; the best one stays besides.
        cuda_graphs: replay training steps as CUDA graphs on a GPU, where they can be captured.
        data_parallel: what several processes do with weights, gradients and optimizer: replicate, each has them all;
            shard, each has a piece (FSDP2); auto, shard what would fill more than half of a GPU.
        log_to: trackio, wandb or tensorboard, besides metrics.jsonl; a resumed run goes on in the tracker's run.
    """

    device: str = "auto"
    precision: str = "auto"
    heldout_tokens: int = 16384
    heldout_length: int = 512
    heldout_steps: int = 50
    checkpoint_minutes: float = 10.0
    checkpoint_steps: int = 0
    keep: int = 2
    cuda_graphs: bool = True
    data_parallel: str = "auto"
    log_to: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole conversion: teacher, student, text, and the stages align, match and extend.

    Args:
        name: of the folder under `output` that everything is written to.
        output: folder of all runs.
        seed: of everything random.
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
        return Path(self.output) / self.name

    def stage(self, name: str) -> Stage:
        return getattr(self, name)


def recipe_parser() -> ArgumentParser:
    """A parser of recipe files and of `--field value` for each of their fields."""
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_argument("--recipe", action="config")
    parser.add_class_arguments(Recipe)
    return parser


def read_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in a YAML file, with fields overridden as on the command line, `["--match.tokens", "1000"]`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a field or value that does not fit; the message names the nearest known field.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no recipe {path}; recipes ship in the folder recipes/")
    reject_unknown(read_mapping(Path(path)), str(path))
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
    """A YAML file's fields; ValueError if it is not YAML, or no mapping of fields."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}; recipes/ has examples") from None
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}, {str(content)[:40]!r}"
        raise ValueError(
            f"{path} holds {found}; a recipe is fields and their values, such as name: my-run; recipes/ has examples"
        )
    return content


def reject_unknown(content: dict, where: str, cls: type = Recipe, prefix: str = "") -> None:
    """Raises ValueError for a key that is no field, with the nearest field's name."""
    known = {f.name: f.type for f in fields(cls)}
    for key, value in content.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known are: {', '.join(known)}"
            raise ValueError(f"{where}: unknown field {prefix}{key}; {hint}")
        if isinstance(value, dict) and is_dataclass(known[key]):
            reject_unknown(value, where, known[key], f"{prefix}{key}.")


def check(recipe: Recipe) -> Recipe:
    """The recipe, if its values make sense together; else ValueError with the field, the value and what is allowed."""
    rules = [
        (recipe.student.long_heads >= 0, "student.long_heads", "must be at least 0"),
        (recipe.data.train, "data.train", "must name at least one source"),
        (all(w > 0 for w in recipe.data.train.values()), "data.train", "weights must be positive"),
        (recipe.run.precision in ("auto", "fp32", "bf16"), "run.precision", "is one of auto, fp32, bf16"),
        (
            recipe.run.data_parallel in DATA_PARALLEL,
            "run.data_parallel",
            f"is one of {', '.join(DATA_PARALLEL)}",
        ),
        (recipe.run.keep >= 1, "run.keep", "must be at least 1"),
        (recipe.run.heldout_steps >= 1, "run.heldout_steps", "must be at least 1"),
        (recipe.run.heldout_length >= 2, "run.heldout_length", "must be at least 2"),
        (
            recipe.run.heldout_tokens >= recipe.run.heldout_length,
            "run.heldout_tokens",
            f"must be at least run.heldout_length={recipe.run.heldout_length}",
        ),
        (recipe.run.checkpoint_steps >= 0, "run.checkpoint_steps", "must be at least 0; 0 is for by time alone"),
        (recipe.run.checkpoint_minutes > 0, "run.checkpoint_minutes", "must be above 0"),
        (any(recipe.stage(s).tokens for s in STAGES), "align.tokens", "or another stage's must be above 0"),
    ]
    for name in STAGES:
        stage = recipe.stage(name)
        rules += [
            (stage.length >= 2, f"{name}.length", "must be at least 2"),
            (stage.batch >= 1, f"{name}.batch", "must be at least 1"),
            (stage.lr_mixers >= 0, f"{name}.lr_mixers", "must be at least 0"),
            (stage.lr_rest >= 0, f"{name}.lr_rest", "must be at least 0"),
            (0 <= stage.lr_end <= 1, f"{name}.lr_end", "must be in [0, 1]"),
            (0 <= stage.warmup <= 1, f"{name}.warmup", "must be in [0, 1]"),
            (stage.clip > 0, f"{name}.clip", "must be above 0"),
            (0 <= stage.ce_weight <= 1, f"{name}.ce_weight", "must be in [0, 1]"),
            (0 <= stage.hidden_weight < 1, f"{name}.hidden_weight", "must be in [0, 1)"),
            (stage.hidden_weight + stage.ce_weight <= 1, f"{name}.hidden_weight", "and ce_weight must not exceed 1"),
            (
                not (stage.hidden_weight and recipe.teacher.targets),
                f"{name}.hidden_weight",
                "needs teacher.targets null",
            ),
            (stage.divergence in DIVERGENCES, f"{name}.divergence", f"is one of {', '.join(DIVERGENCES)}"),
            (stage.optimizer in OPTIMIZERS, f"{name}.optimizer", f"is one of {', '.join(OPTIMIZERS)}"),
            (stage.temperature > 0, f"{name}.temperature", "must be above 0"),
            (not stage.micro_batch or stage.batch % stage.micro_batch == 0, f"{name}.micro_batch", "must divide batch"),
            (
                stage.tokens == 0 or stage.tokens >= stage.length * stage.batch,
                f"{name}.tokens",
                "is less than one step",
            ),
        ]
    for good, name, what in rules:
        if not good:
            value = recipe
            for part in name.split("."):
                value = getattr(value, part)
            raise ValueError(f"recipe {recipe.name!r}: {name}={value!r} {what}")
    return recipe


def write_recipe(recipe: Recipe, path: Path) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(yaml.safe_dump(asdict(recipe), sort_keys=False))
    unfinished.replace(path)


def smoke(recipe: Recipe) -> Recipe:
    """The same recipe, two tiny steps a stage; the teacher becomes a random one of its architecture."""
    tiny = {"tokens": 2 * 2 * 32, "length": 32, "batch": 2, "micro_batch": 0}
    stages = {name: replace(recipe.stage(name), **tiny) for name in STAGES if recipe.stage(name).tokens}
    return replace(
        recipe,
        name=f"{recipe.name}-smoke",
        teacher=replace(recipe.teacher, model=f"random:{recipe.teacher.architecture}"),
        student=replace(recipe.student, calibration_tokens=256, calibration_length=32),
        data=replace(recipe.data, train={"python-docs": 1.0}, heldout=None, max_tokens=20_000),
        run=replace(recipe.run, device="cpu", precision="fp32", heldout_tokens=64, heldout_length=32, heldout_steps=1),
        **stages,
    )

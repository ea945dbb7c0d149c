"""What a recipe will take, before anything is loaded: parameters, memory of each stage, hours, disk, files.

Estimates, by counting tensors; tests/test_plan.py holds them against what was measured.

Legend: B batch, T tokens, D model width, H heads, K head width, W vocabulary.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ..config import STAGES, Recipe, Stage, check
from ..conversion.student import layer_kinds, model_class, student_config
from ..conversion.teacher import EMBEDDED, Teacher, embedded_gguf, family_of, freeze, locate, random_teacher
from ..utils.console import console
from . import distributed
from .losses import CHUNK_BYTES
from .optimizers import choose_trained, recomputes, training_bytes, waits_for_ranks

# bfloat16 matrix products per second of an 8192^3 product, measured on random data
GPUS = {"h100": 780e12, "h200": 717e12}
MEMORY = {"h100": 79.2 * 2**30, "h200": 139.8 * 2**30}  # as torch says
# share of that rate which a step's products reach, at SmolLM2-135M's width, beside what a layer takes for any number of
# rows; it grows with the width. All three fitted to eleven kinds of steps there, within a fifth, and to three at 2,560
SHARE, SHARE_WIDTH, SHARE_POWER = 0.23, 576, 0.5
ATTENTION = 1.3  # how much longer than others the products inside attention take
LAYER_SECONDS = 1.15e-3  # of a layer and micro-batch, whose small kernels do not fill the chip
HOST_SECONDS = 8.5e-3  # of Python and launches for the same, where it is not replayed as a CUDA graph
PART = 2**18  # token-heads that the operator's backward works on at a time


@dataclass(frozen=True)
class StagePlan:
    """Of one stage: bytes on each GPU by what they are for, and seconds of a step.

    Gradients that take the place of activations, as each layer's backward leaves them, are not counted twice.
    """

    name: str
    stage: Stage
    bytes: dict[str, int]
    seconds: float

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


def plan(recipe: Recipe, *, gpu: str = "h100", gpus: int = 1) -> list[StagePlan]:
    """Prints what a recipe will take; returns the stages' figures.

    Args:
        gpu: h100 or h200, whose measured rates the hours come from.
        gpus: processes that share the work, as run.data_parallel says.

    Raises:
        ValueError: for a GPU that is not known, or a recipe that does not fit.
    """
    if gpu not in GPUS:
        raise ValueError(f"gpu={gpu!r} is unknown; choose one of {', '.join(GPUS)}")
    check(recipe)
    teacher, student = skeletons(recipe)
    size = training_bytes(student, None) + 2 * count(teacher.model)
    sharded = gpus > 1 and distributed.shards(recipe.run.data_parallel, size, MEMORY[gpu])
    plans = [
        plan_stage(name, recipe.stage(name), teacher, student, gpu, gpus, sharded, recipe.run.cuda_graphs)
        for name in STAGES
        if recipe.stage(name).tokens
    ]
    mixers = sum(p.numel() for layer in student.model.layers if layer.linear for p in layer.self_attn.parameters())
    kinds = [layer.kind for layer in student.model.layers]
    console.print(
        f"{recipe.name}: {recipe.teacher.model}, {count(teacher.model):,} parameters, to {count(student):,}, of which "
        f"{mixers:,} in {kinds.count('linear_attention')} KDA layers of {len(kinds)}",
        highlight=False,
        soft_wrap=True,
    )
    shared = "" if gpus == 1 else ", sharded" if sharded else ", replicated"
    table = Table(f"on {gpus} x {gpu}{shared}", *(p.name for p in plans))
    table.add_row("tokens", *(f"{p.stage.tokens:,}" for p in plans))
    table.add_row("steps", *(f"{p.stage.steps:,}" for p in plans))
    for what in plans[0].bytes:
        table.add_row(f"{what}, GiB a GPU", *(f"{p.bytes[what] / 2**30:.1f}" for p in plans))
    table.add_row("in all, GiB a GPU", *(f"{p.total / 2**30:.1f}" for p in plans))
    table.add_row("hours", *(f"{p.seconds * p.stage.steps / 3600:.2f}" for p in plans))
    console.print(table)
    for path, size in files(recipe, student, plans).items():
        console.print(f"{path:36} {size}", highlight=False, soft_wrap=True)
    return plans


def skeletons(recipe: Recipe) -> tuple[Teacher, nn.Module]:
    """Teacher and student without weights."""
    spec = recipe.student
    teacher = skeleton(read_config(recipe))
    kinds = layer_kinds(spec.full_attention_layers, teacher.config.num_hidden_layers)
    sizes = {"keep_rope": spec.keep_rope, "window": spec.sliding_window, "sinks": spec.sink_tokens}
    config = student_config(teacher, kinds, **sizes)
    with torch.device("meta"):
        return teacher, model_class(config)(config)


def skeleton(config: PreTrainedConfig) -> Teacher:
    family = family_of(config)
    with torch.device("meta"):
        return Teacher(freeze(AutoModelForCausalLM.from_config(config)), None, family)


def read_config(recipe: Recipe) -> PreTrainedConfig:
    """The teacher's configuration; of a GGUF file from its header, so that its weights stay where they are."""
    source = recipe.teacher.model
    if source.startswith("random:"):
        return random_teacher(source.removeprefix("random:")).config
    path = embedded_gguf() if source == EMBEDDED else Path(source).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    options = {"trust_remote_code": recipe.teacher.trust_remote_code, "revision": recipe.teacher.revision}
    return AutoConfig.from_pretrained(locate(source), **options)


def plan_stage(
    name: str,
    stage: Stage,
    teacher: Teacher,
    student: nn.Module,
    gpu: str,
    gpus: int,
    sharded: bool = False,
    graphs: bool = True,
) -> StagePlan:
    """One stage's figures; the student's weights are float32, products bfloat16, as `run.precision: bf16` has it."""
    pieces = gpus if sharded else 1
    trained = sum(p.numel() for group in choose_trained(student, stage, name).values() for p in group)
    weights, config = count(student), student.config
    words = 0 if trained < weights else weights - count(student.model.layers)
    share = max(1, stage.batch_size // gpus)
    rows = stage.micro_batch_size or share
    tokens = rows * stage.sequence_length
    cast = trained if name == "align" else weights  # autocast keeps a bfloat16 copy of what it has multiplied with
    own = trained if name == "align" and not sharded else weights  # align shares what is frozen with the teacher
    sizes = {
        "teacher": 2 * count(teacher.model) // pieces,
        "student": 4 * own // pieces + 2 * cast,
        "moments": moment_bytes(stage, trained, words) // pieces,
        "activations": tokens * activation_bytes(name, stage, student) + workspace_bytes(student, tokens),
        "loss": 0 if name == "align" else loss_bytes(config.vocab_size, config.hidden_size, tokens),
        "gradients besides": 4 * trained // pieces,
    }
    flops = product_flops(name, stage, teacher, student) + attention_flops(student, stage.sequence_length, name)
    eager = waits_for_ranks(name, gpus, sharded) or recomputes(stage, name) or not graphs
    if eager and rows == share and name != "align":  # gradients come as activations go; what is more than these counts
        gone = (sizes["activations"] + sizes["loss"]) * (config.num_hidden_layers - 1) // config.num_hidden_layers
        sizes["gradients besides"] = max(0, sizes["gradients besides"] - gone)
    layers = config.num_hidden_layers * (share // rows)
    reached = GPUS[gpu] * min(0.5, SHARE * (config.hidden_size / SHARE_WIDTH) ** SHARE_POWER)
    seconds = LAYER_SECONDS * layers + share * stage.sequence_length * flops / reached
    return StagePlan(name, stage, sizes, max(seconds, HOST_SECONDS * layers if eager else 0.0))


def product_flops(name: str, stage: Stage, teacher: Teacher, student: nn.Module) -> int:
    """Of the products with weights, for a token, both models and what is computed again included."""
    groups = choose_trained(student, stage, name)
    if name == "align":  # the teacher's layers alone, and the mixers beside them
        return 2 * count(teacher.model.model.layers) + 6 * sum(p.numel() for p in groups["mixers"])
    trained = {id(p) for group in groups.values() for p in group}
    weights = multiplied(student)
    forward, learnt = sum(p.numel() for p in weights), sum(p.numel() for p in weights if id(p) in trained)
    passes = 3 if recomputes(stage, name) else 2  # forward, backward through all, and forward again
    return 2 * (sum(p.numel() for p in multiplied(teacher.model)) + passes * forward + learnt)


def multiplied(model: nn.Module) -> list[nn.Parameter]:
    """The weights of layers and head: embeddings are looked up, not multiplied with."""
    return [p for part in (model.model.layers, model.lm_head) for p in part.parameters()]


def attention_flops(student: nn.Module, length: int, name: str) -> float:
    """Of scores and sums of values, for a token in a row of `length`, as if they ran at the rate of other products: the
    teacher's, under a mask that skips nothing, and three times half as many for each layer that the student keeps.
    """
    config = student.config  # whose layers and heads are as many and as wide as the teacher's
    layer = ATTENTION * 4 * length * config.num_attention_heads * config.head_dim
    kept = sum(layer.kind == "full_attention" for layer in student.model.layers) if name != "align" else 0
    return layer * (config.num_hidden_layers + 1.5 * kept)


def moment_bytes(stage: Stage, trained: int, words: int) -> int:
    """Of the optimizer's moments: Adam's two, in 4 or 1 bytes, or Muon's one; embeddings and head stay Adam's."""
    return {"adamw": 8 * trained, "adamw8bit": 2 * trained, "muon": 4 * (trained + words)}[stage.optimizer]


def activation_bytes(name: str, stage: Stage, student: nn.Module) -> int:
    """Bytes that a token leaves for the backward, over all layers that are alive at once."""
    config = student.config
    D, inner = config.hidden_size, config.num_attention_heads * config.head_dim
    mlp = 2 * (4 if config.mlp_gated else 3) * config.intermediate_size
    mixers = [(21 if layer.linear else 12) * inner for layer in student.model.layers]
    if name == "align":  # one layer's graph, and the teacher's forward beside it
        return max(mixers) + mlp + 8 * D
    layers = [mixer + mlp + 16 * D for mixer in mixers]  # two norms of the float32 stream: it and what comes out
    return 4 * D * len(layers) + max(layers) if stage.activation_checkpointing else sum(layers)


def workspace_bytes(student: nn.Module, tokens: int) -> int:
    """What the operator's backward makes of a part of a layer, and drops."""
    K = student.config.head_dim
    per_token_head = 2 * 3 * K + 2 * 2 * 64 + 2 * 2 * K * K // 64 + 2 * 4 * 64 + 4 * K + 2 * K
    return min(PART, tokens * student.config.num_attention_heads) * per_token_head


def loss_bytes(W: int, D: int, tokens: int) -> int:
    """Two chunks of float32 logits, one of gradients, and the gradients of head and hidden states."""
    rows = min(tokens, max(1, CHUNK_BYTES["cuda"] // (4 * W)))
    return rows * W * (4 + 4 + 2) + 4 * W * D + 12 * tokens * D


def files(recipe: Recipe, student: nn.Module, plans: list[StagePlan]) -> dict[str, str]:
    """What will be written, and how large it is."""
    model = 4 * count(student)
    width = 2 if student.config.vocab_size <= 2**16 else 4
    limit = recipe.data.max_tokens
    text = "of each source's tokens" if limit is None else f"of {limit:,} tokens a source, {gib(width * limit)} each"
    table = {f"{recipe.data.folder}/": f"{width} bytes {text}"}
    for name in ("converted", *(p.name for p in plans)):
        table[f"{recipe.folder / name}/"] = f"{gib(model)}, a Hugging Face folder"
    largest = max(p.bytes["moments"] for p in plans)
    kept = recipe.run.keep_checkpoints + 1
    table[f"{recipe.folder}/checkpoints/"] = f"up to {gib(kept * (model + largest))}: {kept} of a stage"
    table[f"{recipe.folder}/"] = "recipe.yaml, run.json, metrics.jsonl; results.json and report.html later"
    return table


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size > 2**30 else f"{size / 2**20:.0f} MiB"


def count(model: nn.Module) -> int:
    """Parameters; tied ones once."""
    with contextlib.suppress(AttributeError):
        model.tie_weights()
    return sum(p.numel() for p in model.parameters())

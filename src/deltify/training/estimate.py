"""Estimates of what a recipe needs, without loading anything: parameters, memory, hours, and files.

The estimates count tensors. tests/training/test_plan.py compares them with measurements.

Legend: B batch, T tokens, D model width, H heads, K head width, W vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..config import STAGES, Recipe, Stage, check, check_shares
from ..conversion.student import layer_kinds, model_class, student_config
from ..conversion.teacher import (
    EMBEDDED,
    Teacher,
    byte_tokenizer,
    embedded_gguf,
    family_of,
    freeze,
    head_width,
    load_config,
    locate,
    random_teacher,
)
from ..model import DeltifyForCausalLM
from ..utils.console import console
from ..utils.formats import gib
from . import distributed
from .losses import CHUNK_BYTES
from .optimizers import check_shardable, choose_trained, has_eight_bit_shards, recomputes, training_bytes

# FLOP/s of an 8192^3 bfloat16 matrix product, measured on random data, and total_memory in torch
MEASURED = {"h100": 780e12, "h200": 717e12}
MEMORY = {"h100": 79.2 * 2**30, "h200": 139.8 * 2**30}
# Peak FLOP/s and bytes of memory in data sheets. Of its peak, an H200 reaches the fraction DATA_SHEET_EFFICIENCY.
DATA_SHEETS = {"a100": (312e12, 80e9), "a100-40gb": (312e12, 40e9), "l40s": (362e12, 48e9), "rtx4090": (165e12, 24e9)}
DATA_SHEET_EFFICIENCY = MEASURED["h200"] / 989e12
GPUS = MEASURED | {name: DATA_SHEET_EFFICIENCY * flops for name, (flops, _) in DATA_SHEETS.items()}
MEMORY |= {name: memory for name, (_, memory) in DATA_SHEETS.items()}
# Fraction of that rate that the matrix products of a step reach at width 576. It grows as width ** 0.7, up to a half.
# These numbers and LAYER_SECONDS were fitted to 11 kinds of steps of SmolLM2-135M, 2 at width 1,536 and 3 at width
# 2,560 (docs/log/benchmarks.md).
MATMUL_EFFICIENCY, EFFICIENCY_WIDTH, EFFICIENCY_POWER = 0.22, 576, 0.7
LAYER_SECONDS = 1.15e-3  # per layer and micro-batch, of small kernels that do not fill the GPU
HOST_SECONDS = 8.5e-3  # per layer and micro-batch, of Python and launches without a CUDA graph
BACKWARD_TOKEN_HEADS = 2**18  # tokens times heads that the operator's backward pass processes at a time


@dataclass(frozen=True)
class StagePlan:
    """The estimate of one stage.

    Attributes:
        bytes: Bytes on each GPU by purpose. Gradients that replace freed activations are not counted twice.
        seconds: Seconds per step.
    """

    name: str
    stage: Stage
    bytes: dict[str, int]
    seconds: float

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


def plan(recipe: Recipe, *, gpu: str = "h100", gpus: int = 1) -> list[StagePlan]:
    """Print what a recipe needs, and return the estimate of each stage.

    Args:
        gpu: One of GPUS. The hours come from its measured speed or, if it was not measured, from its data sheet.
        gpus: Number of GPUs, which share the work as run.data_parallel says.

    Raises:
        ValueError: If the GPU is unknown, the recipe has a wrong value, cuts rows over processes, is for several nodes
            (hybrid), or has batches that so many GPUs cannot share.
    """
    if gpu not in GPUS:
        raise ValueError(f"gpu={gpu!r} is unknown; choose one of {', '.join(GPUS)}")
    if gpus < 1:
        raise ValueError(f"gpus={gpus} must be at least 1")
    check(recipe)
    if recipe.run.context_parallel > 1:
        raise ValueError(
            f"run.context_parallel={recipe.run.context_parallel}: there is no estimate for rows that are cut over "
            "processes. Give --run.context_parallel 1 for that of whole rows"
        )
    if recipe.run.data_parallel == "hybrid":
        raise ValueError(
            "run.data_parallel=hybrid: there is no estimate for several nodes. For the memory, give "
            "--run.data_parallel shard and the number of GPUs of a node"
        )
    check_shares(recipe, gpus)
    teacher, student = skeletons(recipe)
    size = training_bytes(student) + 2 * count(teacher.model)
    sharded = gpus > 1 and distributed.should_shard(recipe.run.data_parallel, size, MEMORY[gpu])
    for name in STAGES:
        if sharded and recipe.stage(name).tokens:
            check_shardable(recipe.stage(name), name)
    plans = [
        plan_stage(
            name,
            recipe.stage(name),
            teacher,
            student,
            gpu,
            gpus,
            sharded,
            recipe.run.cuda_graphs,
            cached=recipe.teacher.cache is not None and name != "align",
        )
        for name in STAGES
        if recipe.stage(name).tokens
    ]
    print_models(recipe, teacher, student)
    print_table(plans, gpu, gpus, sharded)
    loading = gib(loading_bytes(teacher, student, gpus if sharded else 1))
    console.print(f"loading and converting: {loading} of weights per process", highlight=False)
    for path, description in files(recipe, student, plans).items():
        console.print(f"{path:36} {description}", highlight=False, soft_wrap=True)
    return plans


def print_models(recipe: Recipe, teacher: Teacher, student: DeltifyForCausalLM) -> None:
    """Print the numbers of parameters and of KDA layers."""
    mixers = sum(p.numel() for layer in student.model.layers if layer.linear for p in layer.self_attn.parameters())
    kinds = [layer.kind for layer in student.model.layers]
    console.print(
        f"{recipe.name}: {recipe.teacher.model}, {count(teacher.model):,} parameters, to {count(student):,}, of which "
        f"{mixers:,} in {kinds.count('linear_attention')} KDA layers of {len(kinds)}",
        highlight=False,
        soft_wrap=True,
    )


def print_table(plans: list[StagePlan], gpu: str, gpus: int, sharded: bool) -> None:
    """Print tokens, steps, memory and hours of each stage."""
    shared = "" if gpus == 1 else ", sharded" if sharded else ", replicated"
    table = Table(f"on {gpus} x {gpu}{shared}", *(p.name for p in plans))
    table.add_row("tokens", *(f"{p.stage.tokens:,}" for p in plans))
    table.add_row("steps", *(f"{p.stage.steps:,}" for p in plans))
    for purpose in plans[0].bytes:
        table.add_row(f"{purpose}, GiB per GPU", *(f"{p.bytes[purpose] / 2**30:.1f}" for p in plans))
    table.add_row("total, GiB per GPU", *(f"{p.total / 2**30:.1f}" for p in plans))
    table.add_row("hours", *(f"{p.seconds * p.stage.steps / 3600:.2f}" for p in plans))
    console.print(table)
    if gpu not in MEASURED:
        console.print(f"The hours come from the data sheet of {gpu} and were not measured.", highlight=False)


def skeletons(recipe: Recipe, *, unpack: bool = False) -> tuple[Teacher, DeltifyForCausalLM]:
    """Return teacher and student without weights.

    Args:
        unpack: Whether a GGUF file may be unpacked, see `read_config`.
    """
    spec = recipe.student
    teacher = skeleton(read_config(recipe, unpack=unpack))
    kinds = layer_kinds(spec.full_attention_layers, teacher.config.num_hidden_layers)
    config = student_config(
        teacher,
        kinds,
        keep_rope=spec.keep_rope,
        window=spec.sliding_window,
        sinks=spec.sink_tokens,
        head_dim=spec.head_dim,
        gate_bias=spec.gate_bias,
        fold_biases=spec.init.startswith("calibrated"),
    )
    with torch.device("meta"):
        return teacher, model_class(config)(config)


def skeleton(config: PreTrainedConfig) -> Teacher:
    """Return a teacher without weights, whose tokenizer is that of bytes."""
    family = family_of(config)
    with torch.device("meta"):
        return Teacher(freeze(AutoModelForCausalLM.from_config(config)), byte_tokenizer(), family)


def read_config(recipe: Recipe, *, unpack: bool = False) -> PreTrainedConfig:
    """Return the teacher's configuration.

    Args:
        unpack: Whether to read that of a GGUF file from the folder that it is unpacked to, instead of its header.
    """
    source = recipe.teacher.model
    if source.startswith("random:"):
        return random_teacher(source.removeprefix("random:")).config
    path = embedded_gguf() if source == EMBEDDED else Path(source).expanduser()
    if path.suffix == ".gguf" and path.is_file() and not unpack:
        return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    options = {"trust_remote_code": recipe.teacher.trust_remote_code, "revision": recipe.teacher.revision}
    return load_config(source, locate(source), **options)


def plan_stage(
    name: str,
    stage: Stage,
    teacher: Teacher,
    student: DeltifyForCausalLM,
    gpu: str,
    gpus: int,
    sharded: bool = False,
    graphs: bool = True,
    cached: bool = False,
) -> StagePlan:
    """Estimate one stage with float32 student weights and bfloat16 products, which is `run.precision: bf16`.

    With `cached`, the teacher's hidden states are read from a teacher cache, and only its head is in memory.
    """
    pieces = gpus if sharded else 1
    parameters = [p for group in choose_trained(student, stage, name).values() for p in group]
    trained = sum(p.numel() for p in parameters)
    weights, config = count(student), student.config
    adamw_params = 0 if trained < weights else weights - count(student.model.layers)
    share = max(1, stage.batch_size // gpus)
    rows = stage.micro_batch_size or share
    tokens = rows * stage.sequence_length
    cast = trained if name == "align" else weights  # autocast keeps bfloat16 copies of the weights
    own = trained if name == "align" and not sharded else weights  # align shares frozen weights with the teacher
    sizes = {
        "teacher": 2 * count(teacher.model.lm_head) if cached else 2 * count(teacher.model) // pieces,
        "student": 4 * own // pieces + (gathered_bytes(name, stage, student) if sharded else 2 * cast),
        "moments": moment_bytes(stage, parameters, adamw_params, sharded) // pieces,
        "activations": tokens * activation_bytes(name, stage, student) + workspace_bytes(student, tokens),
        "loss": 0 if name == "align" else loss_bytes(config.vocab_size, config.hidden_size, tokens),
        "other gradients": 4 * trained // pieces,
    }
    attention = attention_flops(teacher, student, stage.sequence_length, name)
    flops = product_flops(name, stage, teacher, student) + attention
    if cached:
        flops -= layer_flops(teacher, stage.sequence_length)
    eager = sharded or recomputes(stage, name) or not graphs or cached
    if eager and rows == share and name != "align":  # only gradients that exceed the freed activations count
        freed = (sizes["activations"] + sizes["loss"]) * (config.num_hidden_layers - 1) // config.num_hidden_layers
        sizes["other gradients"] = max(0, sizes["other gradients"] - freed)
    layers = config.num_hidden_layers * (share // rows)
    reached = GPUS[gpu] * min(0.5, MATMUL_EFFICIENCY * (config.hidden_size / EFFICIENCY_WIDTH) ** EFFICIENCY_POWER)
    seconds = LAYER_SECONDS * layers + share * stage.sequence_length * flops / reached
    return StagePlan(name, stage, sizes, max(seconds, HOST_SECONDS * layers if eager else 0.0))


def gathered_bytes(name: str, stage: Stage, student: DeltifyForCausalLM) -> int:
    """Return the bytes of a sharded student's weights that a GPU holds whole for a while.

    These are embeddings and head, two layers or, in align, two mixers, in float32 and bfloat16. Without recomputation,
    the backward pass also needs the bfloat16 copies of all mixers, which autocast makes.
    """
    layers = student.model.layers
    mixers = [count(layer.self_attn) for layer in layers]
    unit = max(mixers) if name == "align" else max(count(layer) for layer in layers)
    kept = 0 if name == "align" or recomputes(stage, name) else 2 * sum(mixers)
    return 4 * (count(student) - count(layers)) + 2 * (4 + 2) * unit + kept


def loading_bytes(teacher: Teacher, student: DeltifyForCausalLM, pieces: int) -> int:
    """Return the bytes of weights that a process holds while it loads the teacher in bfloat16 and converts it.

    A process that holds one of several pieces also has the teacher's head, and gathers embeddings, one layer of the
    teacher and one mixer of the student at a time. A teacher that was saved quantized is loaded whole.
    """
    whole, weights = 2 * count(teacher.model), (2 * count(teacher.model) + 4 * count(student)) // pieces
    if pieces == 1:
        return weights
    embeddings = teacher.model.model.embed_tokens.weight.numel()
    layer = max(count(layer) for layer in teacher.model.model.layers)
    mixer = max(count(layer.self_attn) for layer in student.model.layers)
    held = weights + 2 * (2 * embeddings + layer) + 4 * mixer
    return held if getattr(teacher.config, "quantization_config", None) is None else max(whole, held)


def product_flops(name: str, stage: Stage, teacher: Teacher, student: DeltifyForCausalLM) -> int:
    """Return the FLOPs per token of the products with weights, of both models, recomputation included."""
    groups = choose_trained(student, stage, name)
    if name == "align":  # the teacher's layers and the student's mixers
        return 2 * count(teacher.model.model.layers) + 6 * sum(p.numel() for p in groups["mixers"])
    trained = {id(p) for group in groups.values() for p in group}
    weights = multiplied(student)
    forward, weight_gradients = sum(p.numel() for p in weights), sum(p.numel() for p in weights if id(p) in trained)
    passes = 3 if recomputes(stage, name) else 2  # forward, gradients of inputs, and perhaps forward again
    return 2 * (sum(p.numel() for p in multiplied(teacher.model)) + passes * forward + weight_gradients)


def multiplied(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the weights of layers and head, which hidden states are multiplied with."""
    return [p for part in (model.model.layers, model.lm_head) for p in part.parameters()]


def attention_flops(teacher: Teacher, student: DeltifyForCausalLM, length: int, name: str) -> float:
    """Return the FLOPs per token of attention scores and weighted sums, in sequences of `length` tokens.

    The teacher's attention computes masked positions too. The student's full attention skips them and needs three
    passes, so each layer counts 1.5 times as much.
    """
    kept = sum(layer.kind == "full_attention" for layer in student.model.layers) if name != "align" else 0
    return score_flops(teacher, length) * (teacher.config.num_hidden_layers + 1.5 * kept)


def score_flops(teacher: Teacher, length: int) -> int:
    """Return the FLOPs per token of attention scores and weighted sums in one layer of the teacher."""
    return 4 * length * teacher.config.num_attention_heads * head_width(teacher.config)


def layer_flops(teacher: Teacher, length: int) -> int:
    """Return the FLOPs per token of all layers of the teacher."""
    return 2 * count(teacher.model.model.layers) + teacher.config.num_hidden_layers * score_flops(teacher, length)


def moment_bytes(stage: Stage, trained: list[nn.Parameter], adamw_params: int, sharded: bool) -> int:
    """Return the bytes of the optimizer's moments: two of 4 or 1 bytes for Adam, and one of 4 for Muon."""
    numbers = sum(p.numel() for p in trained)
    wide = sum(p.numel() for p in trained if not has_eight_bit_shards(p)) if sharded else 0  # in float32
    sizes = {"adamw": 8 * numbers, "adamw8bit": 2 * numbers + 6 * wide, "muon": 4 * (numbers + adamw_params)}
    return sizes[stage.optimizer]


def activation_bytes(name: str, stage: Stage, student: DeltifyForCausalLM) -> int:
    """Return the bytes that a token keeps for the backward pass, in all layers that are alive at once."""
    config = student.config
    assert config.head_dim is not None
    D, inner = config.hidden_size, config.num_attention_heads * config.head_dim
    mlp = 2 * (4 if config.mlp_gated else 3) * config.intermediate_size
    mixers = [(21 if layer.linear else 12) * inner for layer in student.model.layers]
    if name == "align":  # one layer's graph, and the teacher's forward pass
        return max(mixers) + mlp + 8 * D
    layers = [mixer + mlp + 16 * D for mixer in mixers]  # input and output of two norms of the float32 stream
    return 4 * D * len(layers) + max(layers) if stage.activation_checkpointing else sum(layers)


def workspace_bytes(student: DeltifyForCausalLM, tokens: int) -> int:
    """Return the temporary bytes of the operator's backward pass."""
    K = student.config.head_dim
    assert K is not None
    per_token_head = 2 * 3 * K + 2 * 2 * 64 + 2 * 2 * K * K // 64 + 2 * 4 * 64 + 4 * K + 2 * K
    return min(BACKWARD_TOKEN_HEADS, tokens * student.config.num_attention_heads) * per_token_head


def loss_bytes(W: int, D: int, tokens: int) -> int:
    """Return the bytes of two chunks of logits, one of their gradients, and the gradients of head and hidden states."""
    rows = min(tokens, max(1, CHUNK_BYTES["cuda"] // (4 * W)))
    return rows * W * (4 + 4 + 2) + 4 * W * D + 12 * tokens * D


def files(recipe: Recipe, student: DeltifyForCausalLM, plans: list[StagePlan]) -> dict[str, str]:
    """Return the files that a run writes, with a description of their size."""
    model = 4 * count(student)
    width = 2 if student.config.vocab_size <= 2**16 else 4
    limit = recipe.data.max_tokens
    text = "" if limit is None else f", {limit:,} tokens and {gib(width * limit)} per source"
    table = {f"{recipe.data.folder}/": f"{width} bytes per token{text}"}
    for name in ("converted", *(p.name for p in plans)):
        table[f"{recipe.folder / name}/"] = f"{gib(model)}, a Hugging Face folder"
    largest = max(p.bytes["moments"] for p in plans)
    kept = recipe.run.keep_checkpoints + 2  # the best one, and a new one before an old one is deleted
    table[f"{recipe.folder}/checkpoints/"] = f"up to {gib(kept * (model + largest))}: {kept} during a stage"
    table[f"{recipe.folder}/"] = (
        "recipe.yaml, run.json, metrics.jsonl, samples.jsonl; results.json and report.html later"
    )
    return table


def count(model: nn.Module) -> int:
    """Return the number of parameters. Tied ones count once."""
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    return sum(p.numel() for p in model.parameters())

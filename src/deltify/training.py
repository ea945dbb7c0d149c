"""What a stage trains, and how fast: the optimizer's groups and the learning rates over the steps."""

import math
from collections.abc import Iterator

import torch
from torch import nn

from . import parallel
from .config import Stage
from .model import DeltifyForCausalLM


def choose_trained(student: DeltifyForCausalLM, stage: Stage, name: str) -> dict[str, list[nn.Parameter]]:
    """The parameters that a stage trains, mixers and the rest; all others are frozen.

    Raises:
        ValueError: if there are none.
    """
    mixers: list[nn.Parameter] = []
    for layer in student.model.layers:
        nope = layer.kind == "full_attention" and not student.config.use_rope[layer.self_attn.layer_idx]
        if layer.linear or nope:
            mixers += layer.self_attn.parameters()
    known = {id(p) for p in mixers}
    rest = [p for p in student.parameters() if id(p) not in known] if name != "align" and stage.lr_rest > 0 else []
    if not mixers and not rest:
        raise ValueError(
            f"{name} has nothing to train: no layer of the student replaces attention; set {name}.tokens to 0"
        )
    student.requires_grad_(False)
    for parameter in mixers + rest:
        parameter.requires_grad_(True)
    return {"mixers": mixers, "rest": rest}


def make_optimizer(student: DeltifyForCausalLM, stage: Stage, name: str) -> torch.optim.Optimizer:
    """AdamW over two groups, mixers and the rest; what is not trained gets no gradient.

    Raises:
        ValueError: for adamw8bit, if bitsandbytes is not installed, or several processes share the work.
    """
    options = []
    for group, parameters in choose_trained(student, stage, name).items():
        matrices = [p for p in parameters if p.dim() == 2]
        vectors = [p for p in parameters if p.dim() != 2]
        options.append({"name": group, "params": matrices, "weight_decay": stage.weight_decay})
        options.append({"name": f"{group}_vectors", "params": vectors, "weight_decay": 0.0})
    options = [o for o in options if o["params"]]
    if stage.optimizer == "adamw":
        return torch.optim.AdamW(options, lr=0.0, betas=(0.9, 0.95), fused=True)
    if parallel.count() > 1:
        raise ValueError(f"{name}.optimizer={stage.optimizer!r} cannot be sharded over processes; choose adamw")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            f"{name}.optimizer={stage.optimizer!r} needs bitsandbytes ({error}); run: pip install bitsandbytes, or "
            "choose adamw"
        ) from None
    return AdamW8bit(options, lr=0.0, betas=(0.9, 0.95))


def trained(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    return (p for group in optimizer.param_groups for p in group["params"])


def set_learning_rates(optimizer: torch.optim.Optimizer, stage: Stage, step: int) -> None:
    """Linear warm-up, then cosine to `lr_end` of the peak; a function of the stage and the step alone.

    The peaks are the stage's, not the optimizer's: a checkpoint must not bring back rates that the recipe changed.
    """
    warm = max(1, round(stage.warmup * stage.steps))
    if step < warm:
        factor = (step + 1) / warm
    else:
        along = (step - warm) / max(1, stage.steps - warm)
        factor = stage.lr_end + (1 - stage.lr_end) * (1 + math.cos(math.pi * along)) / 2
    for group in optimizer.param_groups:
        group["lr"] = factor * (stage.lr_mixers if group["name"].startswith("mixers") else stage.lr_rest)

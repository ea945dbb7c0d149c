"""Trained parameters, optimizers and learning rates of a stage."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..config import Stage
from ..model import DeltifyForCausalLM

BLOCK = 256  # elements of bitsandbytes' 8-bit moments that share a scale
LEAST_EIGHT_BIT = 4096  # elements of a parameter from which on bitsandbytes' moments have 8 bits


def recomputes(stage: Stage, name: str) -> bool:
    """Return whether the backward pass recomputes activations. align never does: only one layer's are alive."""
    return stage.activation_checkpointing and name != "align"


def choose_trained(student: DeltifyForCausalLM, stage: Stage, name: str) -> dict[str, list[nn.Parameter]]:
    """Freeze the parameters that a stage does not train, and return the others by group: mixers and other.

    Raises:
        ValueError: If the stage trains none.
    """
    mixers: list[nn.Parameter] = []
    for layer in student.model.layers:
        nope = layer.kind == "full_attention" and not layer.self_attn.use_rope
        if layer.linear or nope:
            mixers += layer.self_attn.parameters()
    known = {id(p) for p in mixers}
    other = [p for p in student.parameters() if id(p) not in known] if name != "align" and stage.lr_other > 0 else []
    if not mixers and not other:
        raise ValueError(
            f"{name} has nothing to train: no layer of the student replaces attention. Set {name}.tokens to 0"
        )
    student.requires_grad_(False)
    for parameter in mixers + other:
        parameter.requires_grad_(True)
    return {"mixers": mixers, "other": other}


def training_bytes(student: nn.Module, teacher_parameters: Iterable[nn.Parameter] = ()) -> int:
    """Return the bytes of the student's weights, gradients and Adam moments in float32, and of the teacher."""
    teacher = sum(p.numel() * p.element_size() for p in teacher_parameters)
    return 16 * sum(p.numel() for p in student.parameters()) + teacher


def has_eight_bit_shards(parameter: Tensor) -> bool:
    """Return whether `adamw8bit` has 8-bit moments for a sharded parameter: if no block of a scale crosses rows."""
    return parameter.numel() >= LEAST_EIGHT_BIT and parameter.numel() // len(parameter) % BLOCK == 0


def make_optimizers(
    student: DeltifyForCausalLM, stage: Stage, name: str, sharded: bool = False
) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a stage over the parameters that it trains.

    With `muon`, Muon (Jordan et al. 2024) trains the matrices, and AdamW the embeddings, the head and the vectors.
    Muon's updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982, equation 4), so that both take
    the same learning rates.

    Raises:
        ValueError: If `adamw8bit` lacks bitsandbytes, or an optimizer does not work for a sharded student.
    """
    embedding_ids = {id(student.model.embed_tokens.weight), id(student.lm_head.weight)}
    muon_groups, adamw_groups = [], []
    for group, parameters in choose_trained(student, stage, name).items():
        matrices = [p for p in parameters if p.dim() == 2 and (stage.optimizer != "muon" or id(p) in embedding_ids)]
        muon_matrices = [
            p for p in parameters if p.dim() == 2 and stage.optimizer == "muon" and id(p) not in embedding_ids
        ]
        vectors = [p for p in parameters if p.dim() != 2]
        muon_groups.append({"name": f"{group}_muon", "params": muon_matrices, "weight_decay": stage.weight_decay})
        adamw_groups.append({"name": group, "params": matrices, "weight_decay": stage.weight_decay})
        adamw_groups.append({"name": f"{group}_vectors", "params": vectors, "weight_decay": 0.0})
    muon_groups, adamw_groups = ([g for g in each if g["params"]] for each in (muon_groups, adamw_groups))
    check_optimizer(stage, name, sharded)
    if stage.optimizer == "adamw8bit":
        if sharded and not any(has_eight_bit_shards(p) for group in adamw_groups for p in group["params"]):
            raise ValueError(
                f"{name}.optimizer={stage.optimizer!r}: sharded moments have 8 bits where the length of rows is a "
                f"multiple of {BLOCK}, and no trained matrix has such rows. Choose adamw, or "
                "run.data_parallel: replicate"
            )
        if sharded:
            from .adamw8bit import ShardedAdamW8bit as AdamW8bit
        else:
            from bitsandbytes.optim import AdamW8bit
        return [AdamW8bit(adamw_groups, lr=0.0, betas=(0.9, 0.95))]
    optimizers: list[torch.optim.Optimizer] = []
    if adamw_groups:
        optimizers.append(torch.optim.AdamW(adamw_groups, lr=0.0, betas=(0.9, 0.95), fused=True))
    if muon_groups:
        optimizers.append(StackedMuon(muon_groups, lr=0.0, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def check_optimizer(stage: Stage, name: str, sharded: bool) -> None:
    """Raise ValueError if the optimizer of a stage is not installed, or cannot be sharded over processes."""
    if sharded:
        check_shardable(stage, name)
    if stage.optimizer == "adamw8bit":
        try:
            import bitsandbytes.optim  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"{name}.optimizer={stage.optimizer!r} needs bitsandbytes ({error}). Run: pip install bitsandbytes, or "
                "choose adamw"
            ) from None


def check_shardable(stage: Stage, name: str) -> None:
    """Raise ValueError if the optimizer of a stage cannot be sharded over processes."""
    if stage.optimizer == "muon":
        raise ValueError(
            f"{name}.optimizer={stage.optimizer!r} cannot be sharded over processes. Choose adamw or adamw8bit, or "
            "run.data_parallel: replicate"
        )


class StackedMuon(torch.optim.Muon):
    """Gives the results of `torch.optim.Muon` in a tenth of the time: it orthogonalises equal shapes together.

    One by one, the 360 matrices of a model of 30 layers take 9,000 kernel launches per step.
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                grads = [p.grad for p in parameters if p.grad is not None]
                for parameter in parameters:
                    if "momentum_buffer" not in self.state[parameter]:
                        self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                momenta = [self.state[p]["momentum_buffer"] for p in parameters]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                moved = torch._foreach_lerp(grads, momenta, group["momentum"]) if group["nesterov"] else momenta
                updates = orthogonalise(torch.stack(moved), group["ns_coefficients"], group["ns_steps"], group["eps"])
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                size = group["lr"] * 0.2 * math.sqrt(max(shape))
                torch._foreach_add_(parameters, list(updates.to(parameters[0].dtype)), alpha=-size)


def orthogonalise(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Approximate the orthogonal factors of matrices [M, A, B] by Newton-Schulz iterations, in bfloat16."""
    a, b, c = coefficients
    tall = x.shape[1] > x.shape[2]
    y = (x.mT if tall else x).bfloat16()
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if tall else y


def groups(optimizers: list[torch.optim.Optimizer]) -> list[dict]:
    """Return the parameter groups of all optimizers."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def trained(optimizers: list[torch.optim.Optimizer]) -> list[nn.Parameter]:
    """Return the parameters of all optimizers."""
    return [p for group in groups(optimizers) for p in group["params"]]


def set_learning_rates(optimizers: list[torch.optim.Optimizer], stage: Stage, step: int) -> None:
    """Set the learning rates of a step: linear warm-up, then a cosine to `min_lr_ratio` of the peak.

    The peaks come from the stage. A checkpoint must not restore learning rates that the recipe has changed.
    """
    warm = max(1, round(stage.warmup_ratio * stage.steps))
    if step < warm:
        factor = (step + 1) / warm
    else:
        along = (step - warm) / max(1, stage.steps - warm)
        factor = stage.min_lr_ratio + (1 - stage.min_lr_ratio) * (1 + math.cos(math.pi * along)) / 2
    for group in groups(optimizers):
        group["lr"] = factor * (stage.lr_mixers if group["name"].startswith("mixers") else stage.lr_other)

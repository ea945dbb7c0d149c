"""What a stage trains, and how fast: the optimizer's groups and the learning rates over the steps."""

import math

import torch
from torch import Tensor, nn

from ..config import Stage
from ..model import DeltifyForCausalLM


def recomputes(stage: Stage, name: str) -> bool:
    """Whether activations are computed again in the backward; in align only one layer's are alive anyway."""
    return stage.activation_checkpointing and name != "align"


def waits_for_ranks(name: str, ranks: int, sharded: bool) -> bool:
    """Whether a step speaks with other ranks before it has its gradients, as gathered weights and align's loss do."""
    return ranks > 1 and (sharded or name == "align")


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
    rest = [p for p in student.parameters() if id(p) not in known] if name != "align" and stage.lr_other > 0 else []
    if not mixers and not rest:
        raise ValueError(
            f"{name} has nothing to train: no layer of the student replaces attention; set {name}.tokens to 0"
        )
    student.requires_grad_(False)
    for parameter in mixers + rest:
        parameter.requires_grad_(True)
    return {"mixers": mixers, "other": rest}


def training_bytes(student: nn.Module, teacher: nn.Module | None) -> int:
    """Of the student's weights, their gradients and Adam's moments in float32, and of the teacher's weights."""
    fixed = 0 if teacher is None else sum(p.numel() * p.element_size() for p in teacher.parameters())
    return 16 * sum(p.numel() for p in student.parameters()) + fixed


def make_optimizers(
    student: DeltifyForCausalLM, stage: Stage, name: str, sharded: bool = False
) -> list[torch.optim.Optimizer]:
    """The stage's optimizers over the groups mixers and rest; what is not trained gets no gradient.

    With muon the matrices are Muon's (Jordan et al. 2024), but for the embeddings and the head, which with all that is
    no matrix are AdamW's. Its updates are scaled to the size of AdamW's (Liu et al. 2025, 2502.16982, equation 4), so
    that both take the same rates.

    Raises:
        ValueError: for adamw8bit, if bitsandbytes is not installed, or for any but adamw of a sharded student.
    """
    words = {id(student.get_input_embeddings().weight), id(student.get_output_embeddings().weight)}
    inner, others = [], []
    for group, parameters in choose_trained(student, stage, name).items():
        matrices = [p for p in parameters if p.dim() == 2 and (stage.optimizer != "muon" or id(p) in words)]
        turned = [p for p in parameters if p.dim() == 2 and stage.optimizer == "muon" and id(p) not in words]
        vectors = [p for p in parameters if p.dim() != 2]
        inner.append({"name": f"{group}_muon", "params": turned, "weight_decay": stage.weight_decay})
        others.append({"name": group, "params": matrices, "weight_decay": stage.weight_decay})
        others.append({"name": f"{group}_vectors", "params": vectors, "weight_decay": 0.0})
    inner, others = ([o for o in options if o["params"]] for options in (inner, others))
    if stage.optimizer != "adamw" and sharded:
        raise ValueError(
            f"{name}.optimizer={stage.optimizer!r} cannot be sharded over processes; choose adamw, or "
            "run.data_parallel: replicate"
        )
    if stage.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ValueError(
                f"{name}.optimizer={stage.optimizer!r} needs bitsandbytes ({error}); run: pip install bitsandbytes, or "
                "choose adamw"
            ) from None
        return [AdamW8bit(others, lr=0.0, betas=(0.9, 0.95))]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), fused=True)]
    if inner:
        found.append(StackedMuon(inner, lr=0.0, adjust_lr_fn="match_rms_adamw"))
    return found


class StackedMuon(torch.optim.Muon):
    """`torch.optim.Muon`, with matrices of one shape orthogonalised together: the same numbers, in a tenth of the time.

    One after the other, the 360 matrices of a model of 30 layers take 9,000 launches a step.
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                grads = [p.grad for p in parameters]
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
    """[M, A, B] bfloat16: near to the orthogonal factors of [M, A, B] matrices, by Newton-Schulz iterations."""
    a, b, c = coefficients
    tall = x.shape[1] > x.shape[2]
    y = (x.mT if tall else x).bfloat16()
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if tall else y


def groups(optimizers: list[torch.optim.Optimizer]) -> list[dict]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def trained(optimizers: list[torch.optim.Optimizer]) -> list[nn.Parameter]:
    return [p for group in groups(optimizers) for p in group["params"]]


def set_learning_rates(optimizers: list[torch.optim.Optimizer], stage: Stage, step: int) -> None:
    """Linear warm-up, then cosine to `min_lr_ratio` of the peak; a function of the stage and the step alone.

    The peaks are the stage's, not the optimizer's: a checkpoint must not bring back rates that the recipe changed.
    """
    warm = max(1, round(stage.warmup_ratio * stage.steps))
    if step < warm:
        factor = (step + 1) / warm
    else:
        along = (step - warm) / max(1, stage.steps - warm)
        factor = stage.min_lr_ratio + (1 - stage.min_lr_ratio) * (1 + math.cos(math.pi * along)) / 2
    for group in groups(optimizers):
        group["lr"] = factor * (stage.lr_mixers if group["name"].startswith("mixers") else stage.lr_other)

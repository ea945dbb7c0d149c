"""One training step of each stage, and the evaluation on held-out text.

Legend: B batch, T tokens, N = B * T, D model width, L layers, W vocabulary.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..config import Stage
from ..data.batches import Batch
from ..model import DeltifyForCausalLM
from ..model.mixers import find_packing
from ..model.shards import own_part
from ..utils.scoring import perplexity
from . import distributed
from .losses import at_least, hidden_state_loss, linear_kl, squared_difference


class StageTeacher(Protocol):
    """What a stage needs of its teacher, whether its model is in memory or its outputs are on disk.

    Attributes:
        can_be_graphed: Whether a CUDA graph can capture `hidden_states`.
        fingerprint: Fingerprint of the weights.
    """

    can_be_graphed: bool

    @property
    def config(self) -> PreTrainedConfig: ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @property
    def fingerprint(self) -> str: ...

    def hidden_states(self, batch: Batch, row_group: dist.ProcessGroup | None = None) -> Tensor:
        """Return the last hidden states [N, D] of a batch, or of this rank's segments of its rows."""
        ...

    def layer_states(self, batch: Batch, row_group: dist.ProcessGroup | None = None) -> list[Tensor]:
        """Return the last hidden states [N, D] and the output [N, D] of every layer, likewise."""
        ...

    def head(self) -> Tensor:
        """Return the output embeddings [W, D]."""
        ...

    def attention_layers(self) -> list[nn.Module]:
        """Return the attention module of every layer."""
        ...

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters in memory by name."""
        ...


def align_step(
    teacher: StageTeacher,
    student: DeltifyForCausalLM,
    batch: Batch,
    stage: Stage,
    scale: float,
    max_documents: int | None = None,
) -> dict[str, Tensor]:
    """Train each student mixer on the input and output of the teacher attention layer that it replaces.

    The gradients that it adds are those of mean squared differences. `divide_by_variance` makes them those of the loss,
    after all micro-batches, so that no rank waits for others in the middle of a step.

    Returns the loss of this batch alone, and what `divide_by_variance` needs.

    Args:
        scale: Factor of the gradients, which are added to those already there.
        max_documents: Number of documents to pack the batch as; see `find_packing`.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    packing = find_packing(None, batch.position_ids, batch.input_ids.shape[1], False, max_documents)

    def train_mixer(attention, args, kwargs, output):
        layer = student.model.layers[attention.layer_idx]
        if not any(p.requires_grad for p in layer.self_attn.parameters()):
            return  # full attention that keeps RoPE equals the teacher's
        hidden = kwargs["hidden_states"].detach()
        with torch.enable_grad():
            if layer.linear:
                out = layer.self_attn(hidden, None, packing)
            else:
                out, _ = layer.self_attn(hidden, kwargs["position_embeddings"], kwargs["attention_mask"], None)
            difference, center_D, variance = squared_difference(out, output[0])
            with torch.autocast(hidden.device.type, enabled=False):
                (difference * scale).backward()
        found.append((difference.detach(), center_D, variance))

    def run_teacher(student: DeltifyForCausalLM) -> dict[str, Tensor]:
        hooks = [layer.register_forward_hook(train_mixer, with_kwargs=True) for layer in teacher.attention_layers()]
        try:
            with torch.no_grad():
                teacher.hidden_states(batch)
        finally:
            for hook in hooks:
                hook.remove()
        difference_L, center_LD, variance_L = map(torch.stack, zip(*found))
        loss = (difference_L / at_least(variance_L, center_LD)).mean()
        return {"loss": loss, "difference": difference_L, "center": center_LD, "variance": variance_L}

    return student.run_with_full_weights(run_teacher)


@torch.no_grad()
def divide_by_variance(student: DeltifyForCausalLM, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Divide the gradients of each mixer by the variance of the teacher's output, and return the loss of the step.

    The variance is taken over the tokens of all micro-batches and ranks. So the loss is that of the whole batch,
    however it is cut up.

    Args:
        parts: What `align_step` returned for each micro-batch of this rank.
    """

    def mean(name: str) -> Tensor:
        return distributed.all_reduce_mean(torch.stack([part[name] for part in parts]).mean(0))

    center_LD = mean("center")
    for part in parts:  # the variance within parts, and that of their means
        part["variance"] = part["variance"] + (part["center"] - center_LD).square().sum(-1)
    divisor_L = at_least(mean("variance"), center_LD)
    mixers = [layer.self_attn for layer in student.model.layers]
    trained = [ps for mixer in mixers if (ps := [p for p in mixer.parameters() if p.grad is not None])]
    for parameters, divisor in zip(trained, divisor_L, strict=True):
        torch._foreach_div_([own_part(p.grad) for p in parameters], divisor)
    return {"loss": (mean("difference") / divisor_L).mean()}


def match_step(
    teacher: StageTeacher,
    student: DeltifyForCausalLM,
    batch: Batch,
    stage: Stage,
    scale: float,
    max_documents: int | None = None,
    row_group: dist.ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """Train the whole student on the teacher's next-token distribution.

    Cross-entropy and the hidden-state loss are added with the weights that the stage gives them. Positions beyond the
    teacher's context window contribute cross-entropy only.

    With a `loss_mask`, each loss is the mean over the tokens that count, over all micro-batches and ranks of the step.
    Divergence and hidden-state loss are means over those of them that are within the context window.

    Args:
        batch: Whole rows.
        scale: Factor of the gradients, which are added to those already there.
        max_documents: Number of documents to pack the batch as; see `find_packing`.
        row_group: Ranks that share the rows, each of which trains the student on its segment of them. The means of
            their losses and gradients are those of the rows.
    """
    weight, with_layers = stage.hidden_state_weight, bool(stage.hidden_state_weight)
    with torch.no_grad():
        states = teacher.layer_states(batch, row_group) if with_layers else [teacher.hidden_states(batch, row_group)]
    teacher_hidden, *teacher_layers = states
    teacher_head = teacher.head()
    options: dict[str, Any] = {
        "labels": segment(next_tokens(batch), row_group).flatten() if stage.ce_weight else None,
        "ce_weight": stage.ce_weight / (1 - weight),
        "divergence": stage.divergence,
        "temperature": stage.temperature,
    }
    if (weights := kl_weights(batch, teacher.config.max_position_embeddings)) is not None:
        options["weights"] = segment(weights, row_group).flatten()
    batch, count = segment_of(batch, row_group), None
    if batch.counted is not None:
        count = options["count"] = (batch.counted * batch.input_ids.numel()).clamp(min=1e-6)

    def compute_losses(student: DeltifyForCausalLM) -> tuple[Tensor, ...]:
        student_hidden, *student_layers = layer_states(
            student, batch, output_hidden_states=with_layers, max_documents=max_documents, row_group=row_group
        )
        loss, kl, ce = linear_kl(student_hidden, student.lm_head.weight, teacher_hidden, teacher_head, **options)
        if not with_layers:
            return loss, kl, ce
        hidden = hidden_state_loss(student_layers, teacher_layers, options.get("weights"), count)
        return (1 - weight) * loss + weight * hidden, kl, ce, hidden.detach()

    loss, kl, ce, *hidden = student.run_with_full_weights(compute_losses)
    with torch.autocast(loss.device.type, enabled=False):
        (loss * scale).backward()
    losses = {"loss": loss.detach(), "kl": kl}
    if stage.ce_weight:
        losses["ce"] = ce
    if hidden:
        losses["hidden"] = hidden[0]
    return losses


def kl_weights(batch: Batch, context_window: int) -> Tensor | None:
    """Return the weights [B, T] of what the teacher says about tokens. None if all are 1.

    Over the tokens that count in the whole step, they are 1 on average. Tokens beyond the context window have a weight
    of 0. So have those that the `loss_mask` leaves out. The others have equal weights.
    """
    mask = None if batch.loss_mask is None else batch.loss_mask.float()
    if batch.input_ids.shape[1] <= context_window:
        return mask
    mask = torch.ones_like(batch.position_ids, dtype=torch.float32) if mask is None else mask
    inside = mask * (batch.position_ids < context_window)
    counted, within = batch.counted, batch.within
    if counted is None or within is None:
        counted, within = mask.mean(), inside.mean()
    return inside * (counted / within.clamp(min=1e-6))


def segment(x_BT: Tensor, row_group: dist.ProcessGroup | None) -> Tensor:
    """Return this rank's segment of rows [B, T, ...], or the rows if no group shares them."""
    return x_BT if row_group is None else x_BT.chunk(row_group.size(), 1)[row_group.rank()].clone()


def segment_of(batch: Batch, row_group: dist.ProcessGroup | None) -> Batch:
    """Return this rank's segments of the rows of a batch."""
    mask = None if batch.loss_mask is None else segment(batch.loss_mask, row_group)
    ids, positions = segment(batch.input_ids, row_group), segment(batch.position_ids, row_group)
    return Batch(ids, positions, mask, batch.counted, batch.within)


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the last hidden states [N, D] of a language model. Packed documents do not see each other."""
    return layer_states(model, batch)[0]


def layer_states(
    model: PreTrainedModel, batch: Batch, *, output_hidden_states: bool = False, **options
) -> list[Tensor]:
    """Return the last hidden states [N, D] and, with `output_hidden_states`, the output [N, D] of every layer.

    The embeddings are not among them: `align` and `match` do not compare them.

    Args:
        options: Further arguments of the model.
    """
    if output_hidden_states:
        options["output_hidden_states"] = True
    output = model.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **options)
    layers = output.hidden_states[1:] if output_hidden_states else ()
    return [x.flatten(0, 1) for x in (output.last_hidden_state, *layers)]


def next_tokens(batch: Batch) -> Tensor:
    """Return the token [B, T] that follows each token, or -100.

    It is -100 at the end of a document or sequence, and where the prediction does not count.
    """
    labels = F.pad(batch.input_ids[:, 1:], (0, 1), value=-100)
    labels = labels.masked_fill(F.pad(~batch.same_document, (0, 1), value=True), -100)
    return labels if batch.loss_mask is None else labels.masked_fill(~batch.loss_mask, -100)


@torch.no_grad()
def evaluate_heldout(
    teacher: StageTeacher, student: DeltifyForCausalLM, heldout: list[Batch], autocast: Callable
) -> dict[str, float]:
    """Return the KL per token from the teacher and the perplexity of a student on held-out text."""
    kl = ce = tokens = labelled = 0.0
    for batch in heldout:
        batch = batch.to(student.device)
        labels = next_tokens(batch).flatten()
        with autocast():
            teacher_hidden, teacher_head = teacher.hidden_states(batch), teacher.head()
            _, batch_kl, batch_ce = student.run_with_full_weights(
                lambda s: linear_kl(
                    hidden_states(s, batch),  # noqa: B023
                    s.lm_head.weight,
                    teacher_hidden,  # noqa: B023
                    teacher_head,  # noqa: B023
                    labels=labels,  # noqa: B023
                )
            )
        kl += float(batch_kl) * labels.numel()
        ce += float(batch_ce) * labels.numel()
        tokens += labels.numel()
        labelled += int((labels >= 0).sum())
    return {"heldout_kl": kl / tokens, "heldout_perplexity": perplexity(ce / labelled)}

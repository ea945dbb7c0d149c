"""Initialise the new tensors of a student's KDA layers by least squares on a few thousand tokens of text.

Legend: B batch, T tokens, D model width, H heads, K head width, N calibration tokens, E outputs of a regression.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.batches import Batch
from ..model import DeltifyForCausalLM, DeltifyKDA
from ..model.mixers import factors, inverse_softplus
from ..model.shards import full_tensor, whole
from .attention import HeadStatistics, best_retrieval_heads
from .constant_memory import SharedProducts, read_memory, share_products

Memory = tuple[float, float, int]  # beta, half-life as a fraction of the mean distance that the head looks back, lag
# Memories that a head may start with. With a lag of 1, a head sees the previous token but not the current one.
MEMORIES: tuple[Memory, ...] = (
    *((beta, fraction, 0) for beta in (0.1, 0.2, 0.35, 0.6) for fraction in (0.3, 1.0, 3.0)),
    *((beta, 0.1, 0) for beta in (0.2, 0.4)),
    *((0.5, 0.03, 1), (0.3, 0.1, 1), (0.2, 0.3, 1)),
)
RETRIEVAL_HALF_LIFE = 1e5  # tokens, of heads that retrieve; docs/log/recall.md
# Such heads write rarely, or tokens in between overwrite what they keep. Beta has this mean over the tokens, and its
# logit is this multiple of the logarithm of the attention that a token receives.
MEAN_WRITE, WRITE_SLOPE, WRITE_PENALTY = 0.03, 2.0, 1e-2
CHOICE_TOKENS = 2048  # number of tokens on which memories are compared and attention distances are measured
CONV_TAP = 0.03  # SiLU is nearly linear here; 0.3 and 0.1 give a worse initialisation, 0.01 no better one
CONSTANT = 3.0  # size of the constant channel of a head's values, relative to the norm of all its channels
RIDGE_PENALTY, GATE_PENALTY, DIRECTION_PENALTY = 1e-4, 0.1, 1e-3
LEAST_VARIANCE = 1e-4  # outputs whose variance is a smaller fraction of their mean square count as constant
SILENT = 1e-5  # root mean square below which a tensor counts as zero; queries and keys of SmolLM2 have 0.04 or more


class TeacherAttention(Protocol):
    """What is read of a teacher's attention layer."""

    layer_idx: int
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear


def calibrate(
    source: PreTrainedModel,
    student: DeltifyForCausalLM,
    batch: Batch,
    statistics: list[HeadStatistics],
    log: Callable[[str], None],
    *,
    constant: bool = False,
    retrieval_heads: int = 0,
    center: str = "none",
) -> None:
    """Initialise every KDA layer of the student that replaces an attention layer so that it resembles that layer.

    Each layer is fitted to the inputs and outputs of the attention layer. docs/explanation/calibration.md explains the
    parts, docs/log/recipe.md has what each contributes.

    - Constants: a direction u is fitted with u . x near 1 for every input x of the layer. It replaces biases, which KDA
      layers lack: of q, k and v (see `fold_bias`), of the output gate, and of beta.
    - Output gate: a linear prediction of the norm of each head's output, which `o_norm` removes.
    - Centring: queries and keys lose their means, see `center_projections`.
    - Memory: each head gets the one of `MEMORIES` that predicts the teacher head's output best. The heads that
      retrieve get a memory that lasts instead, see `set_retrieval`. `f_proj` starts at zero.
    - Convolutions pass one token, scaled down. The L2 norms of q and k and `o_norm` undo the scale.
    - `o_proj`: the ridge regression of the teacher's attention output on the input of the student's `o_proj`. It also
      restores the scale of each head that `o_norm` removes.

    Degenerate layers are initialised too, and named in a log line. Heads whose queries or keys are zero get constant
    ones, and so do all heads of a layer whose output is the same for every token. Where the student's `o_proj` has no
    input to fit, it keeps the teacher's weights.

    Args:
        source: Model with the attention layers: the teacher, or a student whose attention layers are converted further.
        student: Student whose KDA layers are initialised in place.
        batch: Sequences of calibration text.
        statistics: What the teacher's heads attend to in `batch`, see `measure_attention`.
        log: Function that is called with each line of the summary.
        constant: Whether one channel of each head's values is made constant, see `add_constant`.
        retrieval_heads: Number of heads of the whole model that start with a memory that lasts.
        center: Heads whose queries and keys are centred: "none", "retrieval" (those heads) or "all".
    """
    calibration = Calibration(source, student, batch, statistics, constant, retrieval_heads, center)
    calibration.run()
    for line in calibration.summary():
        log(line)


def first_sequences(batch: Batch) -> Batch:
    """Return the first sequences of calibration text, of CHOICE_TOKENS tokens in all, but one at least."""
    return batch.split(max(1, CHOICE_TOKENS // batch.input_ids.shape[1]))[0]


class Calibration:
    """One pass of the source over calibration text; hooks on its attention layers fit the student's KDA layers."""

    def __init__(
        self,
        source: PreTrainedModel,
        student: DeltifyForCausalLM,
        batch: Batch,
        statistics: list[HeadStatistics],
        constant: bool,
        retrieval_heads: int,
        center: str,
    ):
        self.source, self.student, self.batch = source, student, batch.to(student.device)
        self.statistics, self.constant, self.center = statistics, constant, center
        new = [layer.linear for layer in student.model.layers]
        old = [isinstance(layer.self_attn, DeltifyKDA) for layer in source.model.layers]
        self.layers = [i for i, linear in enumerate(new) if linear and not old[i]]
        self.retrieval_heads = best_retrieval_heads(statistics, self.layers, retrieval_heads)
        self.rows = len(first_sequences(batch).input_ids)
        self.captured = torch.empty(0)  # heads' outputs [..., H * K] in the attention layer that runs
        self.explained: list[str] = []  # for each KDA layer, the fraction of variance that its o_proj explains
        self.silence: dict[int, list[str]] = {}  # for each KDA layer, see `describe_silence`
        self.chosen: Counter[Memory] = Counter()

    @torch.no_grad()
    def run(self) -> None:
        """Run the source once and fit each KDA layer when the attention layer that it replaces has run."""
        layers = [self.source.model.layers[i].self_attn for i in self.layers]
        hooks = [attention.o_proj.register_forward_pre_hook(self.capture) for attention in layers]
        hooks += [attention.register_forward_hook(self.fit_layer, with_kwargs=True) for attention in layers]
        inputs = {"input_ids": self.batch.input_ids, "position_ids": self.batch.position_ids}
        try:
            self.source.model(**inputs, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()

    def capture(self, o_proj: nn.Module, args: tuple) -> None:
        """Keep the outputs of the heads of the attention layer that runs."""
        self.captured = args[0].float()

    def fit_layer(self, attention: TeacherAttention, args: tuple, kwargs: dict, output: tuple) -> None:
        """Fit the student's KDA layer to the attention layer that has just run."""
        layer = self.student.model.layers[attention.layer_idx]
        inputs_BTD = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        with whole(layer.self_attn, partial(DeltifyKDA, self.student.config, attention.layer_idx)) as mixer:
            self.fit_mixer(mixer, attention, inputs_BTD.float(), output[0].float())

    def fit_mixer(self, mixer: DeltifyKDA, attention: TeacherAttention, x_BTD: Tensor, target_BTD: Tensor) -> None:
        """Fit a KDA layer to the inputs and outputs of an attention layer."""
        index = attention.layer_idx
        x_ND = x_BTD.flatten(0, 1)
        constant_direction_D = constant_direction(x_ND)
        take_biases(mixer, attention, constant_direction_D)
        target_ND = target_BTD.flatten(0, 1)
        is_zero = is_silent(target_ND)
        if mixer.o_proj.bias is not None:
            target_ND = target_ND - mixer.o_proj.bias
        variance = (target_ND - target_ND.mean(0)).square().sum()
        is_constant = variance <= LEAST_VARIANCE * target_ND.square().sum()
        silent = silent_heads(mixer, x_ND[:CHOICE_TOKENS])
        # Softmax weighs all tokens equally where queries or keys are zero. Where all outputs are equal, weights do not
        # matter, so equal ones serve.
        equal_H = silent["queries"] | silent["keys"] | (is_constant & ~is_silent(target_ND))

        retrieving = self.retrieval_heads.get(index, [])
        centred = {"none": [], "retrieval": retrieving, "all": list(range(len(mixer.A_log)))}[self.center]
        center_projections(mixer, x_ND, centred, constant_direction_D)
        heads_NHK = self.captured.flatten(0, -2).unflatten(-1, (len(mixer.A_log), -1))
        fit_output_gate(mixer, x_ND, heads_NHK, constant_direction_D)
        weigh_equally(mixer, equal_H, constant_direction_D)
        if self.constant:
            add_constant(mixer, x_ND, constant_direction_D)
        distance_H = self.statistics[index].distance_H.masked_fill(silent["values"], 0)
        parts = list(zip(x_BTD.split(self.rows), self.batch.position_ids.split(self.rows)))
        x_part, positions_part = parts[0]
        choice_inputs = (constant_direction_D, distance_H, heads_NHK[: positions_part.numel()])
        choice = choose_memory(mixer, x_part, positions_part, *choice_inputs)
        self.chosen.update(memory for head, memory in enumerate(choice) if head not in retrieving)
        set_retrieval(mixer, retrieving, self.statistics[index], x_ND, constant_direction_D)

        lags = [0 if head in retrieving else lag for head, (_, _, lag) in enumerate(choice)]
        lag_H = torch.tensor(lags, device=x_ND.device)
        features = torch.cat([memory_output(mixer, x, positions, lag_H) for x, positions in parts])
        can_fit = not is_silent(features)
        if can_fit:
            mixer.o_proj.weight.copy_(ridge(features, target_ND, RIDGE_PENALTY).t())
        explained = 1 - (features @ mixer.o_proj.weight.t() - target_ND).square().sum() / variance
        self.explained.append("nothing to explain" if is_zero or is_constant else f"{100 * float(explained):.0f}%")
        degenerate = "zero" if is_zero else "the same for every token" if is_constant else ""
        self.silence[index] = describe_silence(degenerate, silent, equal_H, can_fit)

    def summary(self) -> list[str]:
        """Return the log lines: variance explained, degenerate layers, and the most frequent memories."""
        lines = [f"variance of the teacher's attention outputs explained, layer by layer: {', '.join(self.explained)}"]
        lines += [f"layer {layer}: {'; '.join(facts)}" for layer, facts in self.silence.items() if facts]
        for (beta, fraction, lag), count in self.chosen.most_common(5):
            lagging = ", lagging one token" if lag else ""
            lines.append(f"{count} heads: beta {beta}, half-life {fraction} of the mean distance{lagging}")
        if self.retrieval_heads:
            named = ", ".join(f"{layer}: {sorted(heads)}" for layer, heads in sorted(self.retrieval_heads.items()))
            lines.append(f"heads that retrieve, with a half-life of {RETRIEVAL_HALF_LIFE:,.0f} tokens: {named}")
        return lines


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """Return x [..., H * K] as [..., H, K]."""
    return x.unflatten(-1, (-1, head_dim))


def repeat_heads(x: Tensor, heads: int, head_dim: int) -> Tensor:
    """Repeat the key/value heads of `x` [key/value heads * K, ...] for their query heads: [heads * K, ...].

    Query head h gets key/value head h // (heads / key/value heads).
    """
    blocks = x.unflatten(0, (-1, head_dim))
    return blocks.repeat_interleave(heads // blocks.shape[0], dim=0).flatten(0, 1)


def widen(x: Tensor, projection: str, heads: int, head_dim: int, seed: int = 0) -> Tensor:
    """Return a projection of a layer for heads of `head_dim` channels, the first of which are those of `x`.

    The new channels of queries, keys and values begin as random directions, half as large as the others. Queries and
    keys get the same directions. Their biases are zero. `o_proj` ignores the new channels until it is fitted.

    Args:
        x: Weight [H * K, D] or bias [H * K] of q_proj, k_proj or v_proj; weight [D, H * K] or bias [D] of o_proj.
        projection: Which of them.
        heads: Number of heads.
        head_dim: Width of the heads, at least that of `x`.
        seed: Random seed of the directions, another one for each layer.
    """
    dim = x.dim() - 1 if projection == "o_proj" else 0
    if (projection == "o_proj" and x.dim() == 1) or x.shape[dim] == heads * head_dim:
        return x
    blocks = x.unflatten(dim, (heads, -1))
    shape = list(blocks.shape)
    shape[dim + 1] = head_dim - shape[dim + 1]
    new = blocks.new_zeros(shape)
    if projection != "o_proj" and x.dim() == 2:
        generator = torch.Generator().manual_seed(2 * seed + (projection == "v_proj"))
        size_H11 = blocks.square().mean((1, 2), keepdim=True).sqrt()
        new += torch.randn(shape, generator=generator).to(new) * size_H11 / 2
    return torch.cat([blocks, new], dim + 1).flatten(dim, dim + 1)


# ---- degenerate layers -----------------------------------------------------------------------------------------------


def is_silent(x: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """Return whether a tensor is zero, or nearly so, over all dimensions or over `dims`."""
    return x.square().mean(dims).sqrt() < SILENT


def silent_heads(mixer: DeltifyKDA, x_ND: Tensor) -> dict[str, Tensor]:
    """Return for queries, keys and values whether they are zero in each head, [H]."""
    projections = {"queries": mixer.q_proj, "keys": mixer.k_proj, "values": mixer.v_proj}
    return {
        name: is_silent(split_heads(projection(x_ND), mixer.head_dim), (0, 2))
        for name, projection in projections.items()
    }


def describe_silence(output: str, silent: dict[str, Tensor], equal_H: Tensor, can_fit: bool) -> list[str]:
    """Return what is degenerate in an attention layer, and how the student's layer is initialised there.

    Args:
        output: What all outputs of the layer are, such as "zero", or "".
        silent: Heads whose queries, keys or values are zero, see `silent_heads`.
        equal_H: Heads that weigh all tokens equally.
        can_fit: Whether `o_proj` was fitted.
    """

    def name_heads(heads_H: Tensor) -> str:
        return "all heads" if heads_H.all() else f"heads {heads_H.nonzero().flatten().tolist()}"

    facts = [f"attention output is {output}"] if output else []
    facts += [f"{name} are zero in {name_heads(heads_H)}" for name, heads_H in silent.items() if heads_H.any()]
    if equal_H.any():
        facts.append(f"{name_heads(equal_H)} start with equal weights for all tokens")
    return facts if can_fit else [*facts, "o_proj keeps the teacher's weights, because it has no input to fit"]


def weigh_equally(mixer: DeltifyKDA, heads_H: Tensor, constant_direction_D: Tensor) -> None:
    """Make queries and keys of some heads constant, so that their memory is a mean of values."""
    channels = heads_H.repeat_interleave(mixer.head_dim)
    for projection in (mixer.q_proj, mixer.k_proj):
        projection.weight[channels] = constant_direction_D if projection.bias is None else 0
        if projection.bias is not None:
            projection.bias[channels] = 1


# ---- the parts of a layer --------------------------------------------------------------------------------------------


def fold_bias(projection: nn.Linear, bias_C: Tensor, constant_direction_D: Tensor) -> None:
    """Add a bias b to the weights of a projection: W + b u^T."""
    projection.weight.add_(torch.outer(bias_C, constant_direction_D).to(projection.weight.dtype))


def take_biases(mixer: DeltifyKDA, attention: TeacherAttention, constant_direction_D: Tensor) -> None:
    """Fold the teacher's biases of q, k and v into the weights of a KDA layer without biases."""
    heads = len(mixer.A_log)
    for name in ("q_proj", "k_proj", "v_proj"):
        projection, source = getattr(mixer, name), getattr(attention, name)
        if source.bias is not None and projection.bias is None:
            bias = repeat_heads(full_tensor(source.bias).float(), heads, attention.q_proj.out_features // heads)
            fold_bias(projection, widen(bias, name, heads, mixer.head_dim), constant_direction_D)


def fit_output_gate(mixer: DeltifyKDA, x_ND: Tensor, heads_NHK: Tensor, constant_direction_D: Tensor) -> None:
    """Fit the output gate of each head to the norm of the head's output in the teacher.

    All channels of a head share one gate, whose logits come from a ridge regression on the layer's input. The gate
    stays constant where `g_proj` has no more channels than there are heads.
    """
    low, high = factors(mixer.g_proj)
    for parameter in mixer.g_proj.parameters():
        parameter.zero_()
    if high.bias is None:
        low.weight[-1] = constant_direction_D
    N, H, _ = heads_NHK.shape
    if len(low.weight) <= H:
        return
    norm_NH = heads_NHK.norm(dim=-1)
    largest_H = norm_NH.kthvalue(max(1, int(0.98 * N)), dim=0).values.clamp(min=1e-9)  # not an outlier
    logits_NH = (norm_NH / largest_H).clamp(0.02, 0.95).logit()
    mean_input_D, mean_logits_H = x_ND.mean(0), logits_NH.mean(0)
    weight_DH = ridge(x_ND - mean_input_D, logits_NH - mean_logits_H, GATE_PENALTY)
    low.weight[:H] = weight_DH.t()
    high.weight[:, :H] = torch.eye(H, device=weight_DH.device).repeat_interleave(mixer.head_dim, dim=0)
    gate_bias(mixer).copy_((mean_logits_H - mean_input_D @ weight_DH).repeat_interleave(mixer.head_dim))


def gate_bias(mixer: DeltifyKDA) -> Tensor:
    """Return the parameters that act as the bias of the output gate, [H * K], as a view.

    They are the bias of `g_proj[1]`; or, if it has none, the weights of the last channel, which `fit_output_gate` makes
    constant.
    """
    _, high = factors(mixer.g_proj)
    return high.weight[:, -1] if high.bias is None else high.bias


def add_constant(mixer: DeltifyKDA, x_ND: Tensor, constant_direction_D: Tensor) -> None:
    """Make the channel of each head's values with the smallest mean square constant, and open its output gate.

    The memory of a constant is the sum of its weights, by which softmax divides; `o_norm` then divides by little else.
    The constant also lets `o_proj` reproduce nearly constant outputs, as of layers that look at the first token.
    """
    v_NHK = split_heads(mixer.v_proj(x_ND), mixer.head_dim)
    squares_HK = v_NHK.square().mean(0)
    first_channel_H = mixer.head_dim * torch.arange(len(squares_HK), device=constant_direction_D.device)
    channels_H = squares_HK.argmin(1) + first_channel_H
    mixer.v_proj.weight[channels_H] = CONSTANT * squares_HK.sum(1).sqrt()[:, None] * constant_direction_D
    factors(mixer.g_proj)[1].weight[channels_H] = 0
    gate_bias(mixer)[channels_H] = 4.0  # sigmoid(4) = 0.98


def choose_memory(
    mixer: DeltifyKDA,
    x_BTD: Tensor,
    position_ids_BT: Tensor,
    constant_direction_D: Tensor,
    distance_H: Tensor,
    teacher_heads_NHK: Tensor,
) -> list[Memory]:
    """Give each head the memory that predicts the teacher's head best, and return the memories.

    Memories are compared by the residual of a regression of the teacher head's output on the student head's output,
    normalised and gated.

    Args:
        mixer: KDA layer, changed in place.
        x_BTD: Inputs of the layer.
        position_ids_BT: Positions of the inputs in their documents.
        constant_direction_D: Vector whose product with every input is about 1.
        distance_H: Mean distance in tokens that each head looks back.
        teacher_heads_NHK: Outputs of the teacher's heads for the same inputs.
    """
    inputs = head_inputs(mixer, x_BTD)
    one_BT1 = (x_BTD @ constant_direction_D)[..., None]
    shared = [inputs.share(torch.full_like(distance_H, lag), position_ids_BT) for lag in (0, 1)]
    residuals = []
    for beta, fraction, lag in MEMORIES:
        beta_BTH = (math.log(beta / (1 - beta)) * one_BT1).sigmoid().expand(-1, -1, len(distance_H))
        o = read_memory(shared[lag], beta_BTH, math.log(2) / half_life(fraction, distance_H))
        features_NHK = mixer.o_norm(o, inputs.gate).flatten(0, 1)
        residuals.append(residual_sum_of_squares(features_NHK, teacher_heads_NHK))
    best = [MEMORIES[index] for index in torch.stack(residuals).argmin(0).tolist()]
    set_memory(mixer, best, constant_direction_D, distance_H)
    return best


@dataclass(frozen=True)
class HeadInputs:
    """Queries, keys and values of a KDA layer, [B, T, H, K], without lag, and the logits of its output gate."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor

    def share(self, lag_H: Tensor, position_ids_BT: Tensor) -> SharedProducts:
        """Return what memories share whose keys and values lag by 0 or 1 tokens in each head."""
        k, v = self.k, self.v
        if lag_H.any():
            k, v = (torch.where(lag_H[:, None] > 0, delay(x, position_ids_BT), x) for x in (k, v))
        return share_products(self.q, k, v, position_ids_BT)


def head_inputs(mixer: DeltifyKDA, x_BTD: Tensor) -> HeadInputs:
    """Return the inputs of a layer's heads, for convolutions as `set_memory` makes them."""
    q, k, v = (
        F.silu(CONV_TAP * split_heads(projection(x_BTD), mixer.head_dim))
        for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    return HeadInputs(q, k, v, split_heads(mixer.g_proj(x_BTD), mixer.head_dim))


def delay(x_BTHK: Tensor, position_ids_BT: Tensor) -> Tensor:
    """Return what the token before each token has, or zero for the first token of a document."""
    return F.pad(x_BTHK, (0, 0, 0, 0, 1, 0))[:, :-1].masked_fill((position_ids_BT == 0)[..., None, None], 0)


def memory_output(mixer: DeltifyKDA, x_BTD: Tensor, position_ids_BT: Tensor, lag_H: Tensor) -> Tensor:
    """Return the input [N, H * K] of `o_proj` of a layer whose decay is constant, as `set_memory` makes it.

    It equals `mixer.inner` and takes half its time on a CPU.
    """
    inputs = head_inputs(mixer, x_BTD)
    decay_rate_H = F.softplus(mixer.dt_bias.view(-1, mixer.head_dim)[:, 0])
    o = read_memory(inputs.share(lag_H, position_ids_BT), mixer.b_proj(x_BTD).sigmoid(), decay_rate_H)
    return mixer.o_norm(o, inputs.gate).flatten(2).flatten(0, 1)


def half_life(fraction: float | Tensor, distance_H: Tensor) -> Tensor:
    """Return the half-life in tokens of each head, from its fraction of the mean distance."""
    return (fraction * distance_H).clamp(min=0.5)


def set_memory(mixer: DeltifyKDA, memories: list[Memory], constant_direction_D: Tensor, distance_H: Tensor) -> None:
    """Set decay, beta and convolutions of each head."""
    device = constant_direction_D.device
    beta_H, fraction_H, lag_H = torch.tensor(memories, device=device, dtype=torch.float32).unbind(1)
    mixer.A_log.zero_()
    mixer.dt_bias.copy_(
        inverse_softplus(math.log(2) / half_life(fraction_H, distance_H)).repeat_interleave(mixer.head_dim)
    )
    factors(mixer.f_proj)[1].weight.zero_()
    mixer.b_proj.weight.copy_(beta_H.logit()[:, None] * constant_direction_D)
    # queries never lag: the current token reads what earlier tokens wrote
    for conv, lag in ((mixer.q_conv1d, torch.zeros_like(lag_H)), (mixer.k_conv1d, lag_H), (mixer.v_conv1d, lag_H)):
        lag_of_tap = torch.arange(conv.weight.shape[-1] - 1, -1, -1, device=lag.device)  # the last tap has lag 0
        weight = CONV_TAP * (lag_of_tap == lag[:, None]).float()  # [H, taps]
        conv.weight.copy_(weight.repeat_interleave(mixer.head_dim, dim=0)[:, None])


def center_projections(mixer: DeltifyKDA, x_ND: Tensor, heads: list[int], constant_direction_D: Tensor) -> None:
    """Subtract from queries and keys of some heads their means over the tokens.

    Softmax ignores a constant in all keys. The delta rule does not: normalised keys that share a direction are nearly
    parallel, so that each token overwrites what the others wrote.
    """
    for projection in (mixer.q_proj, mixer.k_proj):
        for head in heads:
            channels = slice(head * mixer.head_dim, (head + 1) * mixer.head_dim)
            mean = x_ND.mean(0) @ projection.weight[channels].t()
            if projection.bias is None:
                projection.weight[channels] -= torch.outer(mean, constant_direction_D)
            else:
                projection.bias[channels] = -mean


def set_retrieval(
    mixer: DeltifyKDA, heads: list[int], statistics: HeadStatistics, x_ND: Tensor, constant_direction_D: Tensor
) -> None:
    """Give some heads a memory that lasts, and make them write the tokens that receive attention from afar.

    Heads that attend to the match more than to what follows it write all tokens alike. What they need is not what
    receives most attention.
    """
    half_life = torch.tensor(math.log(2) / RETRIEVAL_HALF_LIFE, device=x_ND.device)
    mean_D = x_ND.mean(0)
    for head in heads:
        channels = slice(head * mixer.head_dim, (head + 1) * mixer.head_dim)
        mixer.dt_bias[channels] = inverse_softplus(half_life)  # A_log is 0
        for conv in (mixer.k_conv1d, mixer.v_conv1d):
            conv.weight[channels] = mixer.q_conv1d.weight[channels]  # no lag
        weight_D = torch.zeros_like(mean_D)
        if statistics.copy_H[head] > statistics.match_H[head]:
            received_N1 = (statistics.received_NH[:, head, None] + 1e-3).log()
            weight_D = WRITE_SLOPE * ridge(x_ND - mean_D, received_N1 - received_N1.mean(), WRITE_PENALTY)[:, 0]
        logit_N = x_ND @ weight_D
        mixer.b_proj.weight[head] = weight_D + shift_to_mean(logit_N, MEAN_WRITE) * constant_direction_D


def shift_to_mean(logit_N: Tensor, mean: float) -> float:
    """Return the constant c for which sigmoid(logit + c) has this mean."""
    low, high = -30.0 - float(logit_N.max()), 30.0 - float(logit_N.min())
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if float((logit_N + middle).sigmoid().mean()) > mean else (middle, high)
    return middle


# ---- least squares ---------------------------------------------------------------------------------------------------


def constant_direction(x_ND: Tensor) -> Tensor:
    """Return u [D] with u . x near 1 for every input x of a layer."""
    return ridge(x_ND, torch.ones_like(x_ND[:, :1]), DIRECTION_PENALTY)[:, 0]


def residual_sum_of_squares(features_NHK: Tensor, teacher_heads_NHK: Tensor) -> Tensor:
    """Return the squared error [H] of each head's ridge regression of the teacher's head on the features."""
    gram = torch.einsum("nhk,nhj->hkj", features_NHK, features_NHK)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE_PENALTY * diagonal.mean(-1, keepdim=True).clamp(min=1e-12)
    weight = torch.linalg.solve(gram, torch.einsum("nhk,nhj->hkj", features_NHK, teacher_heads_NHK))
    return (torch.einsum("nhk,hkj->nhj", features_NHK, weight) - teacher_heads_NHK).square().sum((0, 2))


def ridge(X_ND: Tensor, Y_NE: Tensor, penalty: float) -> Tensor:
    """Return W [D, E] that minimises |X W - Y|^2 + penalty * mean diagonal of X^T X * |W|^2.

    W is zero where X is.
    """
    if is_silent(X_ND):
        return X_ND.new_zeros(X_ND.shape[1], Y_NE.shape[1])
    gram = X_ND.T @ X_ND
    gram.diagonal().add_(penalty * gram.diagonal().mean())
    return torch.linalg.solve(gram, X_ND.T @ Y_NE)

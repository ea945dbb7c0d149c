"""A student from a teacher: every tensor has a source in one table, and the gates a start.

Legend: B batch, T tokens, D model width, H heads, K head width, N calibration tokens.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..data.token_files import Batch
from ..model import ArceeKDAConfig, DeltifyConfig, DeltifyForCausalLM, DeltifyKDA
from ..model.generation import followed_settings
from ..model.mixers import Packing, find_packing, inverse_softplus
from .teacher import Teacher, freeze

INITS = ("calibrated", "calibrated-constant", "library", "arcee")
ARCHITECTURES = {"deltify": DeltifyConfig, "arcee_kda": ArceeKDAConfig}


# ---- which layers ----------------------------------------------------------------------------------------------------


LETTERS = {"K": "linear_attention", "F": "full_attention", "S": "sliding_attention"}


def layer_kinds(spec: str | list[int], layers: int) -> list[str]:
    """The kind of each layer.

    Args:
        spec: the layers that stay full attention: "none", "all", a ratio such as "3:1" (three KDA, then one), or a
            list; or a pattern of letters that repeats over the layers, such as "KKKF" or "S": K for KDA, F for full
            attention, S for attention to a sliding window with sinks.
    """
    if isinstance(spec, list):
        if bad := [i for i in spec if not 0 <= i < layers]:
            raise ValueError(f"full_attention_layers names {bad}; the teacher has layers 0 to {layers - 1}")
        return [LETTERS["F" if i in spec else "K"] for i in range(layers)]
    pattern = {"none": "K", "all": "F"}.get(spec, spec)
    if ratio := re.fullmatch(r"(\d+):(\d+)", spec):
        pattern = "K" * int(ratio[1]) + "F" * int(ratio[2])
    if not pattern or set(pattern) - LETTERS.keys():
        raise ValueError(
            f"full_attention_layers={spec!r}; use none, all, a ratio like 3:1, a list of layers, or a pattern of the "
            "letters K (KDA), F (full attention) and S (sliding window with sinks) like KKKF"
        )
    return [LETTERS[pattern[i % len(pattern)]] for i in range(layers)]


# fields that a student's configuration takes from its teacher's as they are
SHARED_FACTS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "rms_norm_eps"),
    *("rope_parameters", "max_position_embeddings", "initializer_range", "tie_word_embeddings"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)


def student_config(teacher: Teacher, kinds: list[str], *, keep_rope: bool, window: int, sinks: int) -> DeltifyConfig:
    """The student's configuration: the teacher's facts, and layers of these kinds.

    Full attention has the teacher's RoPE or, without `keep_rope`, none; sliding layers always have it.
    """
    t = teacher.config
    rope, slides = teacher.family.rope(t), teacher.family.slides(t)
    if sliding := [i for i, kind in enumerate(kinds) if kind == "full_attention" and slides[i]]:
        raise ValueError(
            f"layers {sliding} of this {t.model_type} teacher attend to a window of {t.sliding_window} tokens, which a "
            "kept layer would not; convert them to KDA, or set sliding_window to null in the teacher's config.json if "
            "its rows never outgrow the window"
        )
    rotates = {"linear_attention": False, "full_attention": keep_rope, "sliding_attention": True}
    return ARCHITECTURES[teacher.family.student](
        **{name: getattr(t, name) for name in SHARED_FACTS},
        **teacher.family.facts(t),
        head_dim=getattr(t, "head_dim", None) or t.hidden_size // t.num_attention_heads,
        layer_types=kinds,
        use_rope=[rotates[kind] and rope[i] for i, kind in enumerate(kinds)],
        sliding_window=window,
        sink_tokens=sinks,
    )


def sliding_control(teacher: Teacher, window: int = 64, sinks: int = 4) -> DeltifyForCausalLM:
    """The teacher itself, seeing `window` tokens back and the first `sinks` tokens: the control of every conversion.

    No training and no new number: its tensors are the teacher's own, shared. Its memory is constant, as a KDA model's.
    """
    kinds = ["sliding_attention"] * teacher.config.num_hidden_layers
    config = student_config(teacher, kinds, keep_rope=True, window=window, sinks=sinks)
    with torch.device("meta"):
        control = model_class(config)(config)
    control.load_state_dict(teacher.model.state_dict(), strict=True, assign=True)
    control.tie_weights()
    control.model.rotary_emb = LlamaRotaryEmbedding(config).to(teacher.model.device)  # its buffers are in no state dict
    control.generation_config, _ = followed_settings(teacher.model.generation_config)
    freeze(control)
    return control


# ---- where every tensor comes from -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """How a student's tensor is made; `pattern` is the end of its name in a KDA layer."""

    pattern: str
    source: str  # shown to the user
    rule: str  # "copy", "repeat" (whole key/value head blocks, once per query head) or "init"


KDA_ORIGINS = [
    Origin("q_proj", "teacher's q_proj", "copy"),
    Origin("k_proj", "teacher's k_proj, each key/value head repeated for its query heads", "repeat"),
    Origin("v_proj", "teacher's v_proj, each key/value head repeated for its query heads", "repeat"),
    Origin("o_proj", "teacher's o_proj", "copy"),
    Origin("q_conv1d", "{init}", "init"),
    Origin("k_conv1d", "{init}", "init"),
    Origin("v_conv1d", "{init}", "init"),
    Origin("f_proj", "{init}", "init"),
    Origin("b_proj", "{init}", "init"),
    Origin("g_proj", "{init}", "init"),
    Origin("A_log", "{init}", "init"),
    Origin("dt_bias", "{init}", "init"),
    Origin("o_norm", "{init}", "init"),
]


def origin_of(name: str, config: DeltifyConfig) -> Origin:
    """The origin of the student's tensor `name`; tensors outside KDA layers are copies."""
    parts = name.split(".")
    kind = config.layer_types[int(parts[2])] if "self_attn" in parts else None
    if kind == "sliding_attention":
        seen = f"a window of {config.sliding_window} tokens and {config.sink_tokens} sinks"
        return Origin(name, f"teacher's tensor of the same name, seeing {seen}", "copy")
    if kind != "linear_attention":
        return Origin(name, "teacher's tensor of the same name", "copy")
    return next(origin for origin in KDA_ORIGINS if origin.pattern == parts[4])


def repeat_heads(x: Tensor, heads: int, head_dim: int) -> Tensor:
    """Rows of `x` [key/value heads * K, ...] as [heads * K, ...]: query head h gets block h // group."""
    blocks = x.unflatten(0, (-1, head_dim))
    return blocks.repeat_interleave(heads // blocks.shape[0], dim=0).flatten(0, 1)


def convert(
    teacher: Teacher,
    *,
    full_attention_layers: str | list[int] = "none",
    keep_rope: bool = False,
    sliding_window: int = 64,
    sink_tokens: int = 4,
    init: str = "calibrated",
    calibration: Batch | None = None,
    long_memory_heads: int = 0,
    seed: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> DeltifyForCausalLM:
    """A student in float32 on the teacher's device.

    Args:
        full_attention_layers: the layers that stay attention, see `layer_kinds`.
        keep_rope: whether full attention keeps its rotary positions; without, it is NoPE.
        sliding_window, sink_tokens: what sliding layers see, see `DeltifyConfig`.
        init: Initialisation of gates and convolutions: "library" (fla's default), "arcee" (the model card's: forgets at
            once) or "calibrated" (memory, output gate and projection by least squares, see `calibrate`). The last needs
            `calibration`, and so does "calibrated-constant", which makes one channel of each head's values a constant
            (see `add_constant`).
        calibration: rows of text, a few thousand tokens.
        long_memory_heads: heads of each KDA layer that a calibrated start, and no other, gives a long memory, see
            `lengthened`.
        report: called with a line for each group of tensors and each calibrated layer.
    """
    if init not in INITS:
        raise ValueError(f"init={init!r}; choose one of {list(INITS)}")
    if init.startswith("calibrated") and calibration is None:
        raise ValueError(f"init={init!r} needs calibration text; or choose init='library'")
    heads = teacher.config.num_attention_heads
    if not 0 <= long_memory_heads <= heads:
        raise ValueError(
            f"long_memory_heads={long_memory_heads}; a layer of this teacher has {heads} heads, so give 0 to {heads}"
        )
    kinds = layer_kinds(full_attention_layers, teacher.config.num_hidden_layers)
    config = student_config(teacher, kinds, keep_rope=keep_rope, window=sliding_window, sinks=sink_tokens)
    device = teacher.model.device
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = model_class(config)(config).float()
    copy_weights(teacher, student)
    student.to(device)
    mixers = [layer.self_attn for layer in student.model.layers if layer.linear]
    if init == "arcee":
        for mixer in mixers:
            nn.init.zeros_(mixer.dt_bias)
    for line in origins(student, init):
        report(line)
    if config.qk_norm and mixers:
        report("the teacher's q_norm and k_norm are dropped in KDA layers: L2 normalisation takes their place")
    if init.startswith("calibrated"):
        constant = init == "calibrated-constant"
        calibrate(teacher, student, calibration, report, constant=constant, long_memory_heads=long_memory_heads)
    student.generation_config, dropped = followed_settings(teacher.model.generation_config)
    if dropped:
        report(f"the teacher's generation settings {', '.join(dropped)} are dropped: a student cannot follow them")
    return student


def model_class(config: DeltifyConfig) -> type[DeltifyForCausalLM]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM._model_mapping[type(config)]


@torch.no_grad()
def copy_weights(teacher: Teacher, student: DeltifyForCausalLM) -> None:
    config = student.config
    source = teacher.model.state_dict()
    for name, target in student.state_dict().items():
        origin = origin_of(name, config)
        if origin.rule == "init":
            continue
        if name not in source:
            raise ValueError(f"the teacher ({teacher.config.model_type}) has no tensor {name}; it cannot be converted")
        value = source[name]
        if origin.rule == "repeat":
            value = repeat_heads(value, config.num_attention_heads, config.head_dim)
        if value.shape != target.shape:
            raise ValueError(f"{name} is {tuple(value.shape)} in the teacher, {tuple(target.shape)} in the student")
        target.copy_(value)


def origins(student: DeltifyForCausalLM, init: str) -> list[str]:
    """One line per group of tensors: how many, how many numbers, and where they come from."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name, tensor in student.named_parameters():
        origin = origin_of(name, student.config)
        short = ".".join("*" if part.isdigit() else part for part in name.split("."))
        if origin.rule == "init":
            short = f"model.layers.*.self_attn.{origin.pattern}"
        source = origin.source.format(init=f"init: {init}")
        if init.startswith("calibrated") and origin.pattern == "o_proj":
            source = "least squares: the student's mixer against the teacher's attention output"
        count = groups.setdefault((short, source), [0, 0])
        count[0] += 1
        count[1] += tensor.numel()
    return [f"{name:48} {n:4} tensors {numbers:>12,} numbers  {text}" for (name, text), (n, numbers) in groups.items()]


# ---- calibrated start ------------------------------------------------------------------------------------------------


@torch.no_grad()
def attention_distances(teacher: Teacher, batch: Batch) -> list[Tensor]:
    """Per layer, the mean distance [H] in tokens that each head of the teacher looks back, over the rows of a batch.

    The first token of a document, the sink, is left out.
    """
    sums: dict[int, Tensor] = {}

    def measure(layer: int, positions_T: Tensor, weights_HTT: Tensor) -> None:
        tokens = len(positions_T)
        place = torch.arange(tokens, device=weights_HTT.device)
        distance = (place[:, None] - place).clamp_(min=0)
        weights = weights_HTT.float() * (positions_T > 0)
        sums[layer] = sums.get(layer, 0) + torch.stack([(weights * distance).sum((1, 2)), weights.sum((1, 2))])

    attention = teacher.config._attn_implementation
    teacher.model.set_attn_implementation("eager")
    try:
        for ids, positions in zip(batch.input_ids.split(1), batch.position_ids.split(1)):

            def hook(module, args, output, positions=positions):
                measure(module.layer_idx, positions[0], output[1][0])
                return output[0], None

            handles = [layer.self_attn.register_forward_hook(hook) for layer in teacher.model.model.layers]
            teacher.model.model(input_ids=ids, position_ids=positions, use_cache=False)
            for handle in handles:
                handle.remove()
    finally:
        teacher.model.set_attn_implementation(attention)
    return [total / mass.clamp(min=1e-6) for _, (total, mass) in sorted(sums.items())]


# Where a head's memory may start: beta of every token, half-life as a share of the mean distance the head looks back,
# and by how many tokens keys and values lag (1: the head sees the token before, but not its own).
CANDIDATES = (
    *((beta, share, 0) for beta in (0.1, 0.2, 0.35, 0.6) for share in (0.3, 1.0, 3.0)),
    *((beta, 0.1, 0) for beta in (0.2, 0.4)),
    *((0.5, 0.03, 1), (0.3, 0.1, 1), (0.2, 0.3, 1)),
)
LONG_BETA, LONG_HALF_LIFE = 0.1, 4096.0  # of heads that begin with a long memory; docs/recipe.md, Memory
CHOICE_TOKENS = 2048  # that the candidates are compared on
CONV_TAP = 0.03  # where SiLU is nearly linear; 0.3 and 0.1 start worse, 0.01 no better
RIDGE_PENALTY, GATE_PENALTY = 1e-4, 0.1
LEAST_VARIANCE = 1e-4  # of a mixer's outputs, as a share of their mean square: those that vary less count as constant
SILENT = 1e-5  # root mean square below which numbers count as zeros; SmolLM2's queries and so on have .04 and more


@torch.no_grad()
def calibrate(
    teacher: Teacher,
    student: DeltifyForCausalLM,
    batch: Batch,
    report: Callable[[str], None],
    *,
    constant: bool = False,
    long_memory_heads: int = 0,
) -> None:
    """Gives every KDA layer of the student a start that already resembles the attention it replaces.

    All by least squares on what the teacher's own layers read and write, layer by layer; docs/recipe.md says what each
    part brings.

    - Output gate: a linear guess from the layer's input at how large each head's output is, which o_norm takes away.
    - Memory: each head gets the one of `CANDIDATES` from which its output in the teacher is predicted best, but for
      `long_memory_heads` of them (see `lengthened`). beta, whose projection has no bias, is made constant by the
      direction in which all inputs agree; f_proj starts silent.
    - Convolutions pass one token, scaled down (the L2 norms of q and k, and o_norm, undo the scale).
    - o_proj: the ridge regression of the teacher's attention output on what the student's o_proj reads. It takes in the
      scale per head that o_norm discards.

    Layers that say nothing get a start, too, and a line of the report. Heads whose queries or keys are zero get
    constant ones, and so do all heads of a layer that says the same of every token; heads whose values are zero get no
    long memory; and where there is nothing to fit an o_proj on, it stays the teacher's.
    """
    batch, rows = batch.to(student.device), batch.input_ids.shape[1]
    few = max(1, CHOICE_TOKENS // rows)
    packing, few_packing = (
        find_packing(None, positions, rows, cached=False)
        for positions in (batch.position_ids, batch.position_ids[:few])
    )
    gather = lambda x, packing: x.flatten(0, 1) if packing is None else packing.gather(x)[0]  # noqa: E731
    distances, heads, shares, chosen = attention_distances(teacher, batch), {}, {}, Counter()
    silence: dict[int, list[str]] = {}

    def keep(module, args):
        heads["output"] = args[0].float()

    def fit(module, args, kwargs, output):
        layer = student.model.layers[module.layer_idx]
        if not layer.linear:
            return
        mixer, x = layer.self_attn, kwargs["hidden_states"].float()
        N, K = gather(x, packing), mixer.head_dim
        target = gather(output[0].float(), packing)
        zero = is_silent(target)
        if mixer.o_proj.bias is not None:
            target = target - mixer.o_proj.bias
        varies = (target - target.mean(0)).square().sum()
        alike = varies <= LEAST_VARIANCE * target.square().sum()
        silent = silent_heads(mixer, N)
        # softmax weighs all tokens equally where queries or keys are zero; where all say the same, no weights matter
        equal = silent["queries"] | silent["keys"] | (alike & ~is_silent(target))
        fit_output_gate(mixer, N, gather(heads["output"], packing).unflatten(-1, (-1, K)))
        wanted = gather(heads["output"][:few], few_packing).unflatten(-1, (-1, K))
        one = ridge(N, torch.ones_like(N[:, :1]), 1e-3)[:, 0]
        weigh_equally(mixer, equal, one)
        if constant:
            add_constant(mixer, N, one)
        distance = distances[module.layer_idx].masked_fill(silent["values"], 0)
        choice = choose_memory(mixer, x[:few], few_packing, one, distance, wanted, long_memory_heads)
        chosen.update(memory for memory in choice if memory in CANDIDATES)
        features = inner_of(mixer, x, packing).flatten(0, 1)
        fitted = not is_silent(features)
        if fitted:
            mixer.o_proj.weight.copy_(ridge(features, target, RIDGE_PENALTY).t())
        explained = 1 - (features @ mixer.o_proj.weight.t() - target).square().sum() / varies
        shares[module.layer_idx] = "nothing to explain" if zero or alike else f"{100 * float(explained):.0f}%"
        says = "zero" if zero else "the same for every token" if alike else ""
        silence[module.layer_idx] = describe_silence(says, silent, equal, fitted)

    layers = [layer.self_attn for layer in teacher.model.model.layers]
    hooks = [attention.o_proj.register_forward_pre_hook(keep) for attention in layers]
    hooks += [attention.register_forward_hook(fit, with_kwargs=True) for attention in layers]
    teacher.model.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    report(f"variance of the teacher's attention outputs explained, layer by layer: {', '.join(shares.values())}")
    for layer, facts in silence.items():
        if facts:
            report(f"layer {layer}: {'; '.join(facts)}")
    for (beta, share, lag), count in chosen.most_common(5):
        report(
            f"{count} heads: beta {beta}, half-life {share} of the mean distance{', one token behind' if lag else ''}"
        )
    if long_memory_heads:
        report(f"of each layer, heads given a half-life of {LONG_HALF_LIFE:,.0f} tokens: {long_memory_heads}")


def inner_of(mixer: DeltifyKDA, x_BTD: Tensor, packing: Packing | None) -> Tensor:
    return mixer.inner(x_BTD if packing is None else packing.gather(x_BTD), None, packing)


def is_silent(x: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """Returns whether numbers are zero, or next to it, over all dimensions or some."""
    return x.square().mean(dims).sqrt() < SILENT


def silent_heads(mixer: DeltifyKDA, x_ND: Tensor) -> dict[str, Tensor]:
    """Returns for queries, keys and values whether they are zero in each head, [H]."""
    projections = {"queries": mixer.q_proj, "keys": mixer.k_proj, "values": mixer.v_proj}
    return {
        name: is_silent(projection(x_ND).unflatten(-1, (-1, mixer.head_dim)), (0, 2))
        for name, projection in projections.items()
    }


def describe_silence(output: str, silent: dict[str, Tensor], equal_H: Tensor, fitted: bool) -> list[str]:
    """Returns what of an attention layer says nothing, and how the student's layer starts there."""

    def some(heads_H: Tensor) -> str:
        return "all heads" if heads_H.all() else f"heads {heads_H.nonzero().flatten().tolist()}"

    facts = [f"attention output is {output}"] if output else []
    facts += [f"{name} are zero in {some(heads_H)}" for name, heads_H in silent.items() if heads_H.any()]
    if equal_H.any():
        facts.append(f"{some(equal_H)} start with equal weights for all tokens")
    return facts if fitted else [*facts, "o_proj starts as the teacher's, for there is nothing to fit it on"]


def weigh_equally(mixer: DeltifyKDA, heads_H: Tensor, one_D: Tensor) -> None:
    """Makes queries and keys of some heads constant: their memory is then a mean of values."""
    channels = heads_H.repeat_interleave(mixer.head_dim)
    for projection in (mixer.q_proj, mixer.k_proj):
        projection.weight[channels] = one_D if projection.bias is None else 0
        if projection.bias is not None:
            projection.bias[channels] = 1


def fit_output_gate(mixer: DeltifyKDA, x_ND: Tensor, heads_NHK: Tensor) -> None:
    """The gate of all channels of a head follows the size of the head's output in the teacher, in logits, by ridge
    regression from the layer's input. Silent where the low rank of g_proj has no room for all heads."""
    low, high = mixer.g_proj
    for silent in (low.weight, high.weight, high.bias):
        silent.zero_()
    N, H, K = heads_NHK.shape
    if len(low.weight) < H:
        return
    size = heads_NHK.norm(dim=-1)
    largest = size.kthvalue(max(1, int(0.98 * N)), dim=0).values.clamp(min=1e-9)
    logits = (size / largest).clamp(0.02, 0.95).logit()
    middle, mean = x_ND.mean(0), logits.mean(0)
    weight = ridge(x_ND - middle, logits - mean, GATE_PENALTY)
    low.weight[:H] = weight.t()
    high.weight[:, :H] = torch.eye(H, device=weight.device).repeat_interleave(K, dim=0)
    high.bias.copy_((mean - middle @ weight).repeat_interleave(K))


CONSTANT = 3.0  # size of the constant among a head's values, as a share of theirs


def add_constant(mixer: DeltifyKDA, x_ND: Tensor, one_D: Tensor) -> None:
    """Makes the channel of each head's values that varies least a constant, and leaves it ungated.

    A memory of constants is the sum of its weights, by which softmax divides; o_norm, then, divides by little else. And
    the teacher's outputs, nearly constant in layers that look at the first token, get something to be made of.
    """
    v_NHK = mixer.v_proj(x_ND).unflatten(-1, (-1, mixer.head_dim))
    squares_HK = v_NHK.square().mean(0)
    channels = squares_HK.argmin(1) + mixer.head_dim * torch.arange(len(squares_HK), device=one_D.device)
    mixer.v_proj.weight[channels] = CONSTANT * squares_HK.sum(1).sqrt()[:, None] * one_D
    mixer.g_proj[1].weight[channels] = 0
    mixer.g_proj[1].bias[channels] = 4.0


def choose_memory(
    mixer: DeltifyKDA,
    x_BTD: Tensor,
    packing: Packing | None,
    one_D: Tensor,
    distance_H: Tensor,
    heads_NHK: Tensor,
    long_memory_heads: int = 0,
) -> list[tuple[float, float, int]]:
    """Gives each head the best of `CANDIDATES`, and says which: the one whose output of the head, normalised and gated,
    leaves least of the teacher's unexplained; `long_memory_heads` of them then get a long memory. `one_D`: what maps
    every input to about 1."""
    left = []
    for candidate in CANDIDATES:
        set_memory(mixer, [candidate] * len(distance_H), one_D, distance_H)
        features = inner_of(mixer, x_BTD, packing).flatten(0, 1).unflatten(-1, (-1, mixer.head_dim))
        left.append(unexplained(features.float(), heads_NHK))
    best = [CANDIDATES[index] for index in torch.stack(left).argmin(0).tolist()]
    best = lengthened(best, distance_H, long_memory_heads)
    set_memory(mixer, best, one_D, distance_H)
    return best


def lengthened(
    choice: list[tuple[float, float, int]], distance_H: Tensor, heads: int
) -> list[tuple[float, float, int]]:
    """The choice, but the `heads` whose half-life is longest get one of LONG_HALF_LIFE tokens, where it is not longer.

    What teaches a head to keep something comes from where it is needed, faded by all decays between: a head that
    forgets half in a hundred tokens never hears of what was needed after a thousand.
    """
    choice, distances = list(choice), distance_H.tolist()
    half_lives = [share * distance for (_, share, _), distance in zip(choice, distances)]
    for head in sorted(range(len(choice)), key=half_lives.__getitem__, reverse=True)[:heads]:
        if 0 < half_lives[head] < LONG_HALF_LIFE:
            choice[head] = (LONG_BETA, LONG_HALF_LIFE / distances[head], 0)
    return choice


def set_memory(mixer: DeltifyKDA, choice: list[tuple[float, float, int]], one_D: Tensor, distance_H: Tensor) -> None:
    """Decay, beta and convolutions of each head, as one of `CANDIDATES` has them."""
    beta_H, share_H, lag_H = torch.tensor(choice, device=one_D.device, dtype=torch.float32).unbind(1)
    half_life_H = (share_H * distance_H).clamp(min=0.5)
    mixer.A_log.zero_()
    mixer.dt_bias.copy_(inverse_softplus(math.log(2) / half_life_H).repeat_interleave(mixer.head_dim))
    mixer.f_proj[1].weight.zero_()
    mixer.b_proj.weight.copy_(beta_H.logit()[:, None] * one_D)
    for conv, lag in ((mixer.q_conv1d, torch.zeros_like(lag_H)), (mixer.k_conv1d, lag_H), (mixer.v_conv1d, lag_H)):
        taps = torch.arange(conv.weight.shape[-1] - 1, -1, -1, device=lag.device)
        passes = CONV_TAP * (taps == lag[:, None]).float()  # [H, taps]
        conv.weight.copy_(passes.repeat_interleave(mixer.head_dim, dim=0)[:, None])


def unexplained(features_NHK: Tensor, wanted_NHK: Tensor) -> Tensor:
    """[H] squares that the ridge regression of each head's `wanted` on its features leaves."""
    gram = torch.einsum("nhk,nhj->hkj", features_NHK, features_NHK)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE_PENALTY * diagonal.mean(-1, keepdim=True).clamp(min=1e-12)
    weight = torch.linalg.solve(gram, torch.einsum("nhk,nhj->hkj", features_NHK, wanted_NHK))
    return (torch.einsum("nhk,hkj->nhj", features_NHK, weight) - wanted_NHK).square().sum((0, 2))


def ridge(X_ND: Tensor, Y_NE: Tensor, penalty: float) -> Tensor:
    """W [D, E] that minimises |X W - Y|^2 + penalty * mean diagonal of X^T X * |W|^2; zero where X is."""
    if is_silent(X_ND):
        return X_ND.new_zeros(X_ND.shape[1], Y_NE.shape[1])
    gram = X_ND.T @ X_ND
    gram.diagonal().add_(penalty * gram.diagonal().mean())
    return torch.linalg.solve(gram, X_ND.T @ Y_NE)

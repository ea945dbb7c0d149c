"""Make a student from a teacher or a student: which layers become KDA, and where every tensor comes from.

Legend: K head width.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from ..config import CENTER, INITS
from ..data.batches import Batch
from ..model import ArceeKDAConfig, DeltifyConfig, DeltifyForCausalLM, DeltifyKDA
from ..model.generation import supported_settings
from ..model.mixers import init_gates
from ..model.modeling import rotary_embedding
from ..model.shards import allocate, full_tensor, is_sharded, own_part, own_rows
from .attention import HeadStatistics, measure_attention
from .calibration import calibrate, first_sequences, repeat_heads, widen
from .teacher import Teacher, freeze, head_width

ARCHITECTURES = {"deltify": DeltifyConfig, "arcee_kda": ArceeKDAConfig}


# ---- which layers ----------------------------------------------------------------------------------------------------


KIND_BY_LETTER = {"K": "linear_attention", "F": "full_attention", "S": "sliding_attention"}


def measured_layers(spec: str | list[int]) -> int | None:
    """Return N of "measured:N", or None for any other value of full_attention_layers."""
    measured = re.fullmatch(r"measured:(\d+)", spec) if isinstance(spec, str) else None
    return int(measured[1]) if measured else None


def layer_kinds(spec: str | list[int], layers: int, statistics: list[HeadStatistics] | None = None) -> list[str]:
    """Return the kind of each layer.

    Args:
        spec: Layers that stay full attention: "none", "all", a ratio such as "3:1" (three KDA layers, then one that
            stays), a list of layer indices, or "measured:N": the N layers whose heads retrieve most. Or a pattern that
            repeats over the layers, such as "KKKF" or "S": K for KDA, F for full attention, S for attention to a
            sliding window with sinks.
        layers: Number of layers.
        statistics: What the teacher's heads attend to. Without it, "measured:N" means the last N layers, which suffices
            for sizes.

    Raises:
        ValueError: If `spec` has another form, or lists a layer that does not exist.
    """
    if (number := measured_layers(spec)) and number <= layers:
        retrieval = list(range(layers)) if statistics is None else [float(s.retrieval_H.sum()) for s in statistics]
        spec = sorted(range(layers), key=retrieval.__getitem__)[-number:]
    if isinstance(spec, list):
        if bad := [i for i in spec if not 0 <= i < layers]:
            raise ValueError(f"full_attention_layers names {bad}; the teacher has layers 0 to {layers - 1}")
        return [KIND_BY_LETTER["F" if i in spec else "K"] for i in range(layers)]
    pattern = {"none": "K", "all": "F"}.get(spec, spec)
    if ratio := re.fullmatch(r"(\d+):(\d+)", spec):
        pattern = "K" * int(ratio[1]) + "F" * int(ratio[2])
    if not pattern or set(pattern) - KIND_BY_LETTER.keys():
        raise ValueError(
            f"full_attention_layers={spec!r}; use none, all, a ratio like 3:1, a list of layers, measured:N with N "
            f"from 1 to {layers}, or a pattern like KKKF of K (KDA), F (full attention), S (sliding window with sinks)"
        )
    return [KIND_BY_LETTER[pattern[i % len(pattern)]] for i in range(layers)]


FAST_WIDTHS = (64, 128)  # of heads, for which there are GPU kernels
WIDENED = ("q_proj", "k_proj", "v_proj", "o_proj")  # projections of KDA layers that `widen` knows
O_NORM_EPS = 1e-5  # the only value that vLLM and SGLang support
COPIED_CONFIG_FIELDS = (  # from the teacher's configuration, unchanged
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "rms_norm_eps"),
    *("rope_parameters", "max_position_embeddings", "initializer_range", "tie_word_embeddings"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)


def student_config(
    teacher: Teacher,
    kinds: list[str],
    *,
    keep_rope: bool,
    window: int,
    sinks: int,
    head_dim: int | None = None,
    gate_bias: bool = False,
    fold_biases: bool = True,
) -> DeltifyConfig:
    """Return the student's configuration: the teacher's architecture, with layers of these kinds.

    Args:
        teacher: Teacher whose architecture is copied.
        kinds: Kind of each layer, see `layer_kinds`.
        keep_rope: Whether full-attention layers keep the teacher's RoPE. Sliding layers always do.
        window: Number of tokens that sliding layers see.
        sinks: Number of first tokens that sliding layers always see.
        head_dim: Width of the heads, see `convert`.
        gate_bias: Whether the output gate of KDA layers has a bias.
        fold_biases: Whether KDA layers have no biases of q, k and v, even if the teacher has.

    Raises:
        ValueError: If a layer that stays full attention has a sliding window in the teacher, or heads of this width
            cannot be made.
    """
    config = teacher.config
    width = student_head_dim(teacher, kinds, head_dim)
    rope, slides = teacher.family.rope(config), teacher.family.slides(config)
    if sliding := [i for i, kind in enumerate(kinds) if kind == "full_attention" and slides[i]]:
        raise ValueError(
            f"layers {sliding} of this {config.model_type} teacher attend to a window of {config.sliding_window} "
            "tokens. A layer that stays full attention would ignore the window. Convert these layers to KDA; or, if no "
            "sequence is longer than the window, set sliding_window to null in the teacher's config.json"
        )
    if "sliding_attention" in kinds and (config.rope_parameters or {}).get("rope_type") == "longrope":
        raise ValueError(
            "this teacher's rotary positions (longrope) depend on the length of the text, which layers with sliding "
            "windows do not support. Choose KDA or full attention. In an evaluation, give --no-controls"
        )
    facts = teacher.family.facts(config)
    rotates = {"linear_attention": False, "full_attention": keep_rope, "sliding_attention": True}
    return ARCHITECTURES[teacher.family.student](
        **{name: getattr(config, name) for name in COPIED_CONFIG_FIELDS},
        **facts,
        kda_bias=bool(facts["attention_bias"]) and not fold_biases,
        gate_bias=gate_bias,
        o_norm_eps=O_NORM_EPS,
        head_dim=width,
        layer_types=kinds,
        use_rope=[rotates[kind] and rope[i] for i, kind in enumerate(kinds)],
        sliding_window=window,
        sink_tokens=sinks,
    )


def student_head_dim(teacher: Teacher, kinds: list[str], head_dim: int | None) -> int:
    """Return the width of a student's heads, which is the teacher's if `head_dim` is None.

    Raises:
        ValueError: If heads of this width cannot be made.
    """
    own = head_width(teacher.config)
    width = own if head_dim is None else head_dim
    if width < own or (width > own and set(kinds) != {"linear_attention"}):
        raise ValueError(
            f"head_dim={head_dim}; choose the width of this teacher's heads, {own}, or a larger one if all layers "
            "become KDA (full_attention_layers: none)"
        )
    return width


def sliding_control(teacher: Teacher, window: int = 64, sinks: int = 4) -> DeltifyForCausalLM:
    """Return the teacher with attention to only the last `window` tokens and the first `sinks` tokens.

    It is the control of every conversion: an untrained model with a cache of constant size. It shares the teacher's
    tensors and has no parameters of its own.
    """
    kinds = ["sliding_attention"] * teacher.config.num_hidden_layers
    config = student_config(teacher, kinds, keep_rope=True, window=window, sinks=sinks)
    with torch.device("meta"):
        control = model_class(config)(config)
    control.load_state_dict(teacher.model.state_dict(), strict=True, assign=True)
    control.tie_weights()
    # its buffers are not in the state dict
    control.model.rotary_emb = rotary_embedding(config).to(teacher.model.device)
    control.generation_config, _ = supported_settings(teacher.model.generation_config)
    freeze(control)
    return control


# ---- where every tensor comes from -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """Where a tensor of the student comes from."""

    pattern: str  # module or parameter of a KDA layer; elsewhere the tensor's whole name
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
    """Return the origin of the student's tensor `name`. Tensors outside KDA layers are copies."""
    parts = name.split(".")
    kind = config.layer_types[int(parts[2])] if "self_attn" in parts else None
    if kind == "sliding_attention":
        sees = f"a window of {config.sliding_window} tokens and {config.sink_tokens} sinks"
        return Origin(name, f"teacher's tensor of the same name; the layer sees {sees}", "copy")
    if kind != "linear_attention":
        return Origin(name, "teacher's tensor of the same name", "copy")
    return next(origin for origin in KDA_ORIGINS if origin.pattern == parts[4])


def convert(
    teacher: Teacher,
    *,
    full_attention_layers: str | list[int] = "none",
    keep_rope: bool = False,
    sliding_window: int = 64,
    sink_tokens: int = 4,
    init: str = "calibrated",
    calibration: Batch | None = None,
    retrieval_heads: int = 0,
    center: str = "none",
    head_dim: int | None = None,
    gate_bias: bool = False,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
    shard: Callable[[DeltifyForCausalLM], None] | None = None,
) -> DeltifyForCausalLM:
    """Return a student in float32 on the teacher's device.

    If the teacher is sharded over processes, all of them must convert it together. Each then holds at most one whole
    layer of the student.

    Args:
        teacher: Teacher that is converted. It is not changed.
        full_attention_layers: Layers that stay attention, as in a recipe. "measured:N" needs calibration text.
        keep_rope: Whether full-attention layers keep rotary positions. Without them they have no positions (NoPE).
        sliding_window: Number of tokens that sliding layers see, see `DeltifyConfig`.
        sink_tokens: Number of first tokens that sliding layers always see.
        init: Initialisation of gates and convolutions. "library": as in fla. "arcee": as in AFM-4.5B's model card,
            which forgets at once. "calibrated": memory, output gate and output projection by least squares.
            "calibrated-constant": the same, with one constant channel in each head's values.
        calibration: Sequences of text, a few thousand tokens. Calibrated initialisations need them.
        retrieval_heads: Number of heads that start with a long memory: the heads of all layers that attend most to an
            earlier occurrence of the current tokens in the teacher. Calibrated initialisations only.
        center: Heads for which the mean over tokens is subtracted from queries and keys: "none", "retrieval" (those
            heads) or "all". Calibrated initialisations only.
        head_dim: Width of the heads. Defaults to the teacher's. If it is larger, the first channels of a head come from
            the teacher, see `widen`. The kernels are fast for 64 and 128.
        gate_bias: Whether the output gate has a bias, as in AFM-4.5B-Base-KDA-Only and fla. Without it, other runtimes
            can run the student, see `export`. Calibrated initialisations then make one channel of the gate constant,
            which takes the place of the bias.
        seed: Random seed of the initialisation.
        log: Function that is called with a line for each group of tensors and with the summary of the calibration.
        shard: Function that shards the student, on the meta device, over the processes of a sharded teacher.

    Raises:
        ValueError: If an argument does not fit the teacher, or calibration text is missing.
    """
    if init not in INITS:
        raise ValueError(f"init={init!r}; choose one of {list(INITS)}")
    is_calibrated = init.startswith("calibrated")
    if is_calibrated and calibration is None:
        raise ValueError(f"init={init!r} needs calibration text. Give it, or choose init='library'")
    if center not in CENTER:
        raise ValueError(f"center={center!r}; choose one of {list(CENTER)}")
    layers, heads = teacher.config.num_hidden_layers, teacher.config.num_attention_heads
    if not 0 <= retrieval_heads <= layers * heads:
        raise ValueError(
            f"retrieval_heads={retrieval_heads}; this teacher has {layers * heads} heads. Choose 0 to that number"
        )
    student_head_dim(teacher, layer_kinds(full_attention_layers, layers), head_dim)  # before anything is measured
    is_measured = measured_layers(full_attention_layers) is not None
    if is_measured and calibration is None:
        raise ValueError(f"full_attention_layers={full_attention_layers!r} needs calibration text. Give it")
    statistics = None
    if calibration is not None and (is_measured or is_calibrated):
        sample = calibration if is_measured or retrieval_heads else first_sequences(calibration)
        statistics = measure_attention(teacher, sample.to(teacher.model.device))
    kinds = layer_kinds(full_attention_layers, layers, statistics)
    if is_sharded(teacher.model):  # rounding may differ between GPUs
        dist.broadcast_object_list(kinds, src=0)
    if is_measured:
        log(f"attention layers, which retrieve most: {[i for i, kind in enumerate(kinds) if kind == 'full_attention']}")
    attention = {"keep_rope": keep_rope, "window": sliding_window, "sinks": sink_tokens}
    config = student_config(
        teacher, kinds, **attention, head_dim=head_dim, gate_bias=gate_bias, fold_biases=is_calibrated
    )
    student = new_student(teacher.model, config, init, seed, shard)
    mixers = [layer.self_attn for layer in student.model.layers if layer.linear]
    is_wider = config.head_dim > head_width(teacher.config)
    for line in origins(student, init, is_wider):
        log(line)
    if is_wider and config.head_dim not in FAST_WIDTHS:
        log(f"heads of {config.head_dim} channels are slow on a GPU: its kernels support {FAST_WIDTHS}")
    if config.qk_norm and mixers:
        log("the teacher's q_norm and k_norm are dropped in KDA layers, which use L2 normalisation instead")
    if mixers and config.attention_bias and is_calibrated:
        log("the teacher's biases of q, k and v are folded into the weights of KDA layers, which have no such biases")
    if is_calibrated:
        assert calibration is not None and statistics is not None
        constant = init == "calibrated-constant"
        start = {"constant": constant, "retrieval_heads": retrieval_heads, "center": center}
        calibrate(teacher.model, student, calibration, statistics, log, **start)
    student.generation_config, dropped = supported_settings(teacher.model.generation_config)
    if dropped:
        log(f"the teacher's generation settings {', '.join(dropped)} are dropped: a student does not support them")
    return student


def convert_further(
    student: DeltifyForCausalLM,
    kinds: list[str],
    teacher: Teacher,
    calibration: Batch,
    *,
    retrieval_heads: int = 0,
    center: str = "none",
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> DeltifyForCausalLM:
    """Return a student in float32, in which KDA layers replace further attention layers of a trained student.

    These layers have the calibrated initialisation. They are fitted to the student's own attention layers, at inputs
    that the student itself computes. All other weights are the student's.

    Args:
        student: Trained student. It is not changed.
        kinds: Kind of each layer of the new student. Only KDA may differ from the student's.
        teacher: Teacher, whose heads `retrieval_heads` are chosen from.
        calibration: Sequences of text, a few thousand tokens.
        retrieval_heads: Number of heads of the new KDA layers that start with a long memory, see `convert`.
        center: Heads of the new KDA layers that are centred, see `convert`.
        seed: Random seed of the initialisation.
        log: Function that is called with each line of the summary.

    Raises:
        ValueError: If another layer than an attention layer that becomes KDA differs.
    """
    old = list(student.config.layer_types)
    further = [i for i, kind in enumerate(kinds) if kind != old[i]]
    if not further or any(kinds[i] != "linear_attention" for i in further):
        raise ValueError(f"the student has the layers {old}; only attention layers of it can become KDA, not {kinds}")
    config = copy.deepcopy(student.config)
    config.layer_types = kinds
    config.use_rope = [rope and kind != "linear_attention" for rope, kind in zip(config.use_rope, kinds)]
    new = new_student(student, config, "calibrated", seed)
    sample = calibration if retrieval_heads else first_sequences(calibration)
    statistics = measure_attention(teacher, sample.to(teacher.model.device))
    log(f"layers {further} become KDA, all other weights stay")
    calibrate(student, new, calibration, statistics, log, retrieval_heads=retrieval_heads, center=center)
    new.generation_config = student.generation_config
    return new


def new_student(
    source: PreTrainedModel,
    config: DeltifyConfig,
    init: str,
    seed: int,
    shard: Callable[[DeltifyForCausalLM], None] | None = None,
) -> DeltifyForCausalLM:
    """Return a student in float32 on the source's device, with the weights of the source and initialised KDA layers.

    Args:
        source: Teacher, or student whose layers are converted further.
        config: Configuration of the new student.
        init: Initialisation of what the source lacks, see `convert`.
        seed: Random seed of the initialisation.
        shard: See `convert`.
    """
    with torch.device("meta"):
        student = model_class(config)(config).float()
    if shard is not None:
        shard(student)
    allocate(student, source.device)
    initialise_mixers(student, init, seed)
    copy_weights(source, student, seed)
    return student


def model_class(config: DeltifyConfig) -> type[DeltifyForCausalLM]:
    """Return the class of the model that a configuration describes."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM._model_mapping[type(config)]


@torch.no_grad()
def copy_weights(source: PreTrainedModel, student: DeltifyForCausalLM, seed: int) -> None:
    """Copy all tensors of a student that come from the source: the teacher, or a student with KDA layers of its own.

    Args:
        seed: Random seed of channels that the source lacks, see `widen`.

    Raises:
        ValueError: If the source lacks a tensor, or has it in another shape.
    """
    config, tensors = student.config, source.state_dict()
    for name, target in student.state_dict().items():
        origin = origin_of(name, config)
        if name not in tensors:
            if origin.rule == "init":
                continue
            raise ValueError(f"this {source.config.model_type} model cannot be converted: it has no tensor {name}")
        value = full_tensor(tensors[name])
        if origin.pattern in WIDENED:
            if origin.rule == "repeat":
                value = repeat_heads(value, config.num_attention_heads, head_width(source.config))
            own_seed = seed * config.num_hidden_layers + int(name.split(".")[2])
            value = widen(value, origin.pattern, config.num_attention_heads, config.head_dim, own_seed)
        if value.shape != target.shape:
            raise ValueError(
                f"{name} is {tuple(value.shape)} in the {source.config.model_type} model, {tuple(target.shape)} in the "
                "new student"
            )
        own_part(target).copy_(value[own_rows(target)])


@torch.no_grad()
def initialise_mixers(student: DeltifyForCausalLM, init: str, seed: int) -> None:
    """Initialise the tensors of KDA layers that do not come from the teacher, one layer at a time.

    The values are drawn on the CPU. They depend on neither the device nor the number of processes.
    """
    new = [origin.pattern for origin in KDA_ORIGINS if origin.rule == "init"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for index, layer in enumerate(student.model.layers):
            if not layer.linear:
                continue
            with torch.device("meta"):
                mixer = DeltifyKDA(student.config, index).float()
            for name, part in mixer.named_children():
                if name in new:
                    part.to_empty(device="cpu").apply(student._init_weights)
            mixer.A_log, mixer.dt_bias = (nn.Parameter(torch.empty(len(p))) for p in (mixer.A_log, mixer.dt_bias))
            init_gates(mixer)
            if init == "arcee":
                mixer.dt_bias.zero_()
            for name, target in layer.self_attn.named_parameters():
                if name.split(".")[0] in new:
                    own_part(target).copy_(mixer.get_parameter(name)[own_rows(target)])


def origins(student: DeltifyForCausalLM, init: str, is_wider: bool = False) -> list[str]:
    """Return a line for each group of tensors: number of tensors, number of parameters, and where they come from.

    Args:
        init: Initialisation of the student.
        is_wider: Whether the student's heads are wider than the teacher's.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for name, tensor in student.named_parameters():
        origin = origin_of(name, student.config)
        short = ".".join("*" if part.isdigit() else part for part in name.split("."))
        if origin.rule == "init":
            short = f"model.layers.*.self_attn.{origin.pattern}"
        source = origin.source.format(init=f"init: {init}")
        if is_wider and origin.pattern in WIDENED:
            source += "; new channels: zero" if origin.pattern == "o_proj" else "; new channels: random directions"
        if init.startswith("calibrated") and origin.pattern == "o_proj":
            source = "init: least squares from the student's mixer to the teacher's attention output"
        count = groups.setdefault((short, source), [0, 0])
        count[0] += 1
        count[1] += tensor.numel()
    return [
        f"{name:48} {tensors:4} tensors {parameters:>12,} parameters  {source}"
        for (name, source), (tensors, parameters) in groups.items()
    ]

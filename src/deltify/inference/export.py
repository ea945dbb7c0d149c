"""Conversion between layouts: deltify's, flash-linear-attention's `kda`, and transformers' native `kimi_linear`.

A model that a layout cannot express is refused. Nothing is dropped silently.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ..model import DeltifyConfig, DeltifyForCausalLM
from ..model.loading import check_shapes, checkpoint_shapes
from ..training.checkpoint import save_model

# parts of tensor names in deltify and in the other layout, replaced in this order; a kimi_linear layer also has one
# convolution for q, k and v together
RENAMES = {
    "kda": [
        ("model.embed_tokens.", "model.embeddings."),
        (".self_attn.", ".attn."),
        (".input_layernorm.", ".attn_norm."),
        (".post_attention_layernorm.", ".mlp_norm."),
    ],
    "kimi_linear": [
        (".f_proj.0.", ".forget_gate.f_a_proj."),
        (".f_proj.1.", ".forget_gate.f_b_proj."),
        (".g_proj.0.", ".g_a_proj."),
        (".g_proj.1.", ".g_b_proj."),
        (".self_attn.A_log", ".self_attn.forget_gate.A_log"),
        (".self_attn.dt_bias", ".self_attn.forget_gate.dt_bias"),
    ],
}
LAYOUTS = ("deltify", *RENAMES)


def export(source: str | Path, layout: str, output: str | Path) -> None:
    """Write a model in another layout.

    Args:
        source: Folder of the model, in any of the layouts.
        layout: "deltify", "kda" (KDAForCausalLM of flash-linear-attention) or "kimi_linear" (of transformers).
        output: Folder to write, which must be absent or empty.

    Raises:
        ValueError: If the layout is unknown or cannot express the model. The message names what it cannot express.
        FileExistsError: If the output is a file, or a folder that is not empty.
        FileNotFoundError: If the source is not a folder of a model.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"Layout {layout!r} is unknown. Choose one of {list(LAYOUTS)}.")
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder. Name another one.")
    model, tokenizer = read_layout(source), AutoTokenizer.from_pretrained(source)
    if layout == "deltify":
        save_model(output, model, tokenizer)
        return
    check_supported(model, layout)
    write = {"kda": write_kda, "kimi_linear": write_kimi_linear}[layout]
    write(model, tokenizer, output)


def check_supported(model: DeltifyForCausalLM, layout: str) -> None:
    """Raise ValueError if the layout cannot express the model."""
    c = model.config
    gate_biases = [p for name, p in model.named_parameters() if name.endswith("g_proj.1.bias") and bool(p.any())]
    problems = {
        "attention layers": set(c.layer_types or ()) != {"linear_attention"},
        "an MLP without a gate": not c.mlp_gated,
        f"the activation {c.hidden_act}": c.hidden_act not in ("silu", "swish"),
        "biases of q, k, v, o or the MLP": c.attention_bias or c.attention_out_bias or c.mlp_bias,
        "a bias of the output gate (g_proj.1.bias)": layout == "kimi_linear" and bool(gate_biases),
        "a bounded gate": layout == "kimi_linear" and c.gate_lower_bound is not None,
    }
    if found := [name for name, present in problems.items() if present]:
        raise ValueError(f"Layout {layout} does not support {', '.join(found)}. Export with --layout deltify instead.")


def renamed(tensors: dict[str, Tensor], pairs: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Return the tensors with parts of their names replaced."""

    def new_name(name: str) -> str:
        for old, new in pairs:
            name = name.replace(old, new)
        return name

    return {new_name(name): tensor for name, tensor in tensors.items()}


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the state dict, without the head if it is tied to the embedding."""
    tied = model.config.tie_word_embeddings
    return {k: v.contiguous() for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}


# ---- flash-linear-attention ------------------------------------------------------------------------------------------


def write_kda(model: DeltifyForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder that flash-linear-attention can load."""
    c = model.config
    config = {
        "model_type": "kda",
        "architectures": ["KDAForCausalLM"],
        "num_heads": c.num_attention_heads,
        "norm_eps": c.rms_norm_eps,
        "hidden_act": "swish",
        "safe_gate": c.gate_lower_bound is not None,
        "lower_bound": c.gate_lower_bound,
        **{name: getattr(c, name) for name in SAME_IN_KDA},
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(renamed(weights(model), RENAMES["kda"]), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tokenizer.save_pretrained(folder)


SAME_IN_KDA = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim", "conv_size"),
    *("max_position_embeddings", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"),
)


# defaults of flash-linear-attention's KDAConfig for fields that config.json lacks
FLA_DEFAULTS = {"num_heads": 16, "head_dim": 128, "hidden_size": 2048, "num_hidden_layers": 24, "vocab_size": 32000}


def read_kda(folder: Path, config: dict) -> DeltifyForCausalLM:
    """Return the model in a folder of flash-linear-attention.

    Raises:
        ValueError: If the model has parts that deltify does not support, or tensors do not fit.
    """
    config = FLA_DEFAULTS | config
    if (act := config.get("hidden_act", "swish")) not in ("swish", "silu"):
        raise ValueError(f"{folder}: hidden_act={act!r} is not supported. Only 'swish' is.")
    only = {"attn": None, "allow_neg_eigval": False, "attnres_block_size": None, "expand_v": 1, "num_v_heads": None}
    for name, allowed in only.items():
        if config.get(name, allowed) not in (allowed, config["num_heads"] if name == "num_v_heads" else allowed):
            raise ValueError(f"{folder}: {name}={config[name]!r} is not supported. Only {allowed!r} is.")
    shapes = checkpoint_shapes(str(folder), {}) or {}  # raises for damaged, missing and pickled files
    if config.get("intermediate_size") is None:  # fla derives it from hidden_ratio
        config["intermediate_size"] = shapes["model.layers.0.mlp.up_proj.weight"][0]
    ours = DeltifyConfig(
        num_attention_heads=config["num_heads"],
        rms_norm_eps=config.get("norm_eps", 1e-6),
        hidden_act="silu",
        gate_lower_bound=config.get("lower_bound") if config.get("safe_gate") else None,
        **{name: config[name] for name in SAME_IN_KDA if name in config},
    )
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return filled(ours, renamed(tensors, [(new, old) for old, new in RENAMES["kda"]]))


# ---- transformers' kimi_linear ---------------------------------------------------------------------------------------


def write_kimi_linear(model: DeltifyForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder that transformers loads as kimi_linear."""
    c = model.config
    config = AutoConfig.for_model(
        "kimi_linear",
        **{name: getattr(c, name) for name in SAME_IN_KIMI},
        linear_num_heads=c.num_attention_heads,
        linear_head_dim=c.head_dim,
        linear_conv_kernel_dim=c.conv_size,
        layer_types=["linear_attention"] * c.num_hidden_layers,
        mlp_layer_types=["dense"] * c.num_hidden_layers,
    )
    theirs = AutoModelForCausalLM.from_config(config).to(model.dtype)
    tensors = {name: x for name, x in model.state_dict().items() if not name.endswith("g_proj.1.bias")}
    for i in range(c.num_hidden_layers):
        mixer = f"model.layers.{i}.self_attn."
        tensors[f"{mixer}conv1d.weight"] = torch.cat([tensors.pop(f"{mixer}{n}_conv1d.weight") for n in "qkv"])
        tensors[f"{mixer}A_log"] = tensors[f"{mixer}A_log"].view(1, 1, -1, 1)
    theirs.load_state_dict(renamed(tensors, RENAMES["kimi_linear"]), strict=True)
    theirs.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


SAME_IN_KIMI = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("rms_norm_eps", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"),
)


def read_kimi_linear(folder: Path) -> DeltifyForCausalLM:
    """Return the model in a kimi_linear folder of transformers.

    Raises:
        ValueError: If the model has parts that deltify does not support, or tensors do not fit.
    """
    checkpoint_shapes(str(folder), {})  # raises for damaged, missing and pickled files
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{folder} lacks {', '.join(missing[:5])}. Download it again.")
    if extra := sorted(info["unexpected_keys"]):
        raise ValueError(f"{folder} has {', '.join(extra[:5])}, which are not part of its layout.")
    t = theirs.config
    if set(t.layer_types) != {"linear_attention"} or set(t.mlp_layer_types) != {"dense"}:
        raise ValueError(f"{folder} has latent attention or expert layers, which deltify does not support.")
    ours = DeltifyConfig(
        **{name: getattr(t, name) for name in SAME_IN_KIMI if name != "num_attention_heads"},
        num_attention_heads=t.linear_num_heads,
        head_dim=t.linear_head_dim,
        conv_size=t.linear_conv_kernel_dim,
    )
    tensors = renamed(theirs.state_dict(), [(new, old) for old, new in RENAMES["kimi_linear"]])
    for i in range(t.num_hidden_layers):
        mixer = f"model.layers.{i}.self_attn."
        for name, part in zip("qkv", tensors.pop(f"{mixer}conv1d.weight").chunk(3)):
            tensors[f"{mixer}{name}_conv1d.weight"] = part
        tensors[f"{mixer}A_log"] = tensors[f"{mixer}A_log"].flatten()
        tensors[f"{mixer}g_proj.1.bias"] = torch.zeros(t.linear_num_heads * t.linear_head_dim)
    return filled(ours, tensors)


# ---- reading any layout ----------------------------------------------------------------------------------------------


def read_layout(source: str | Path) -> DeltifyForCausalLM:
    """Return the model in a folder of any layout.

    Raises:
        FileNotFoundError: If the folder has no config.json.
        ValueError: If the layout is unknown, or the model is not supported.
    """
    path = Path(source) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{source} is not a model folder: it has no config.json.")
    config = json.loads(path.read_text())
    kind = config.get("model_type")
    if kind == "kda":
        return read_kda(Path(source), config)
    if kind == "kimi_linear":
        return read_kimi_linear(Path(source))
    if kind not in ("deltify", "arcee_kda"):
        raise ValueError(f"{source} has model_type {kind!r}. Supported are deltify, arcee_kda, kda and kimi_linear.")
    return AutoModelForCausalLM.from_pretrained(source, dtype="auto")


def filled(config: DeltifyConfig, tensors: dict[str, Tensor]) -> DeltifyForCausalLM:
    """Return a model with exactly these tensors.

    Raises:
        ValueError: If a tensor is missing, left over or of another shape.
    """
    model = DeltifyForCausalLM(config)
    if config.tie_word_embeddings:
        tensors = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    shapes = [{name: tuple(x.shape) for name, x in group.items()} for group in (tensors, model.state_dict())]
    check_shapes(shapes[0], shapes[1], tied=set())
    model.load_state_dict(tensors, strict=True)
    return model.eval()

"""Conversion between layouts: deltify's, flash-linear-attention's `kda`, Moonshot's `kimi_linear`, and to GGUF.

A model that a layout cannot express is refused. Nothing is dropped silently.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from ..conversion.folding import fold_with_cost
from ..model import DeltifyConfig, DeltifyForCausalLM
from ..model.loading import checkpoint_shapes
from ..training.checkpoint import save_model
from .gguf_export import DEFAULT_DTYPE, write_gguf
from .kimi_linear import (
    FOLDABLE,
    deviations,
    o_norm_eps,
    read_kimi_linear,
    refusals,
    refuse,
    with_generation_settings,
    write_kimi_linear,
)
from .loading import load_tokenizer, model_of_tensors, read_tensors, renamed

LAYOUTS = ("deltify", "kda", "kimi_linear", "gguf")


def export(
    source: str | Path,
    layout: str,
    output: str | Path,
    identity_layer: str = "auto",
    dtype: str | None = None,
    fold_gate_bias: str | None = None,
) -> str:
    """Write a model in another layout, and return a line that describes what was written.

    Args:
        source: Folder of the model, in any of the layouts.
        layout: "deltify", "kda" (KDAForCausalLM of flash-linear-attention) or "kimi_linear" (Moonshot's, which
            transformers, vLLM, MLX-LM and llama.cpp's converter read) or "gguf" (llama.cpp's).
        output: Folder to write, which must be absent or empty. For gguf also a file, NAME.gguf.
        identity_layer: For kimi_linear: "auto" appends an identity layer to a model without attention layers, "never"
            does not.
        dtype: For gguf: "f32", "f16", "bf16" or "q8_0". Defaults to "f16".
        fold_gate_bias: Source of text, such as "python-docs", for a model with biases in KDA layers. They are folded
            into the weights, see `fold_biases`. The line then has the KL that this costs.

    Raises:
        ValueError: If the layout is unknown or cannot express the model. The message names what it cannot express.
        FileExistsError: If the output is a file, or a folder that is not empty.
        FileNotFoundError: If the source is not a folder of a model.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"Layout {layout!r} is unknown. Choose one of {list(LAYOUTS)}.")
    if identity_layer != "auto" and layout != "kimi_linear":
        raise ValueError(f"Layout {layout} has no identity layer. Use --identity-layer with --layout kimi_linear.")
    if dtype is not None and layout != "gguf":
        raise ValueError(f"Layout {layout} keeps the model's dtype. Use --dtype with --layout gguf.")
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder. Name another one.")
    model, tokenizer = read_layout(source), load_tokenizer(source)
    if fold_gate_bias is None:
        return write(model, tokenizer, layout, output, identity_layer, dtype)
    if layout in ("kimi_linear", "gguf"):  # before folding, which takes a while
        refuse(layout, [problem for problem in refusals(model) if FOLDABLE not in problem])
    model, cost = fold_with_cost(model, tokenizer, fold_gate_bias)
    line = write(model, tokenizer, layout, output, identity_layer, dtype)
    return f"{line}, biases of KDA layers folded: KL {cost:.2g} nats per token from the model with biases"


def write(
    model: DeltifyForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    layout: str,
    output: Path,
    identity_layer: str,
    dtype: str | None,
) -> str:
    """Write a model in a layout, with the arguments of `export`."""
    if layout == "kimi_linear":
        return write_kimi_linear(model, tokenizer, output, identity_layer)
    if layout == "gguf":
        dtype = dtype or DEFAULT_DTYPE
        file = output if output.suffix == ".gguf" else output / f"{output.name}-{dtype}.gguf"
        return write_gguf(model, tokenizer, file, dtype)
    parts = [f"{len(model.model.layers)} layers in layout {layout}"]
    if layout == "kda":
        write_kda(model, tokenizer, output)
        parts += deviations(model)
    else:
        save_model(output, model, tokenizer)
    return f"{output}: {', '.join(parts)}"


# ---- flash-linear-attention ------------------------------------------------------------------------------------------


# parts of tensor names in deltify and in this layout
RENAMES = [
    ("model.embed_tokens.", "model.embeddings."),
    (".self_attn.", ".attn."),
    (".input_layernorm.", ".attn_norm."),
    (".post_attention_layernorm.", ".mlp_norm."),
]
SAME_IN_KDA = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim", "conv_size"),
    *("max_position_embeddings", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"),
)


def write_kda(model: DeltifyForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder that flash-linear-attention can load.

    Raises:
        ValueError: If the layout cannot express the model. The message names what it cannot express.
    """
    c = model.config
    problems = {
        "attention layers": set(c.layer_types) != {"linear_attention"},
        "an MLP without a gate": not c.mlp_gated,
        f"the activation {c.hidden_act}": c.hidden_act not in ("silu", "swish"),
        "biases of q, k, v, o or the MLP": c.kda_bias or c.attention_out_bias or c.mlp_bias,
    }
    refuse("kda", [name for name, present in problems.items() if present])
    config = {
        "model_type": "kda",
        "architectures": ["KDAForCausalLM"],
        "num_heads": c.num_attention_heads,
        "norm_eps": o_norm_eps(model),
        "hidden_act": "swish",
        "safe_gate": c.gate_lower_bound is not None,
        "lower_bound": c.gate_lower_bound,
        **{name: getattr(c, name) for name in SAME_IN_KDA},
    }
    tensors = {name: x.contiguous() for name, x in renamed(model.state_dict(), RENAMES).items()}
    if c.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for name in [name for name in tensors if name.endswith(".g_proj.1.weight")]:  # fla's output gate always has a bias
        tensors.setdefault(name.replace("weight", "bias"), tensors[name].new_zeros(len(tensors[name])))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# defaults of flash-linear-attention's KDAConfig for fields that config.json lacks
FLA_DEFAULTS: dict[str, Any] = {
    **{"num_heads": 16, "head_dim": 128, "hidden_size": 2048, "num_hidden_layers": 24, "vocab_size": 32000},
    "norm_eps": 1e-6,
}


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
        rms_norm_eps=config["norm_eps"],
        hidden_act="silu",
        gate_bias=True,
        gate_lower_bound=config.get("lower_bound") if config.get("safe_gate") else None,
        **{name: config[name] for name in SAME_IN_KDA if name in config},
    )
    tensors = renamed(read_tensors(folder), [(new, old) for old, new in RENAMES])
    return with_generation_settings(model_of_tensors(ours, tensors, str(folder)), folder)


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

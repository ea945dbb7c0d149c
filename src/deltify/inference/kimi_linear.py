"""Moonshot's `kimi_linear` layout, which transformers, MLX-LM, vLLM and llama.cpp's converter read natively.

KDA layers keep their tensors. An attention layer without RoPE becomes multi-head latent attention (MLA) whose latent is
the layer's normalised input. An identity layer, which adds zero to the hidden states, is for runtimes that fail without
an attention layer.

Legend: D model width, H heads, G key/value heads, K head width, R width of MLA's latent, F inner width of the MLP.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..model import DeltifyConfig, DeltifyForCausalLM
from ..model.loading import checkpoint_shapes
from .loading import model_of_tensors, read_tensors, renamed

# parts of tensor names in deltify and in this layout
RENAMES = [
    (".f_proj.0.", ".f_a_proj."),
    (".f_proj.1.", ".f_b_proj."),
    (".g_proj.0.", ".g_a_proj."),
    (".g_proj.1.", ".g_b_proj."),
]
# names of a dense MLP where transformers saves a model that it made itself
TRANSFORMERS_RENAMES = [(f".mlp.{name}_proj.", f".block_sparse_moe.{name}_proj.") for name in ("gate", "up", "down")]
SAME_IN_CONFIG = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim", "max_position_embeddings"),
    *("initializer_range", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
)
SHARD_BYTES = 5_000_000_000
IDENTITY_LAYER = ("auto", "never")
# the fields of mixture-of-experts models, for a model with dense MLPs. Most readers fail if one is missing.
NO_EXPERTS = {
    "num_experts": 0,
    "num_experts_per_token": 0,
    "num_shared_experts": 0,
    "moe_intermediate_size": 1,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "routed_scaling_factor": 1.0,
    "num_expert_group": 1,
    "topk_group": 1,
    "use_grouped_topk": True,
}


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_kimi_linear(
    model: DeltifyForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, identity_layer: str = "auto"
) -> str:
    """Write a folder in this layout, and return a line that describes it.

    Args:
        model: Model to write.
        tokenizer: Tokenizer to write, with its chat template.
        folder: Folder to write.
        identity_layer: "auto" appends an identity layer to a model without attention layers, "never" does not.

    Raises:
        ValueError: If the layout cannot express the model. The message names what it cannot express.
    """
    if identity_layer not in IDENTITY_LAYER:
        raise ValueError(f"identity_layer={identity_layer!r} is unknown. Choose one of {list(IDENTITY_LAYER)}.")
    kinds = model.config.layer_types
    added = identity_layer == "auto" and "full_attention" not in kinds
    tensors = native_tensors(model, added)
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(tensors, folder, max_shard_size=SHARD_BYTES)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(native_config(model, added), indent=2))
    parts = [f"{kinds.count('linear_attention')} KDA layers"]
    if kept := kinds.count("full_attention"):
        parts.append(f"{kept} attention layers as MLA")
    parts += deviations(model)
    if not math.isclose(o_norm_eps(model), 1e-5, rel_tol=1e-3):
        parts.append("not for vLLM and SGLang, whose o_norm has eps 1e-05")
    if added:
        parts.append("an identity layer, since transformers, MLX-LM and llama.cpp need an attention layer")
    return f"{folder}: {', '.join(parts)}"


def refuse(layout: str, found: list[str]) -> None:
    """Raise ValueError if there are parts of a model that a layout cannot express."""
    if found:
        raise ValueError(f"Layout {layout} does not support {', '.join(found)}. Export with --layout deltify.")


FOLDABLE = "(see --fold-gate-bias)"  # ends the name of a part that this option removes
QKV_BIASES = (".q_proj.bias", ".k_proj.bias", ".v_proj.bias")


def refusals(model: DeltifyForCausalLM) -> list[str]:
    """Return the parts of a model that this layout cannot express."""
    c = model.config
    kinds = c.layer_types
    kept = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    biases = [name for name, x in model.state_dict().items() if name.endswith(".bias") and bool(x.any())]
    in_kda = tuple(f"model.layers.{i}." for i, kind in enumerate(kinds) if kind == "linear_attention")

    def folds(name: str) -> bool:
        return name.startswith(in_kda) and name.endswith(QKV_BIASES)

    problems = {
        "a model without KDA layers": "linear_attention" not in kinds,
        "sliding attention layers": "sliding_attention" in kinds,
        "RoPE in attention layers": any(c.use_rope[i] for i in kept),
        "qk-norm in attention layers": c.qk_norm and bool(kept),
        "an MLP without a gate": not c.mlp_gated,
        f"the activation {c.hidden_act}": c.hidden_act not in ("silu", "swish"),
        "a bounded gate (gate_lower_bound, which only vLLM has)": c.gate_lower_bound is not None,
        f"a bias of the output gate {FOLDABLE}": any(name.endswith(".g_proj.1.bias") for name in biases),
        # llama.cpp loads such biases and ignores them
        f"biases of q, k or v in KDA layers {FOLDABLE}": any(map(folds, biases)),
        "biases of q, k, v or o": any(
            name.endswith((*QKV_BIASES, ".o_proj.bias")) and not folds(name) for name in biases
        ),
        "biases of the MLP": any(".mlp." in name for name in biases),
    }
    return [name for name, present in problems.items() if present]


def native_tensors(model: DeltifyForCausalLM, identity_layer: bool) -> dict[str, Tensor]:
    """Return a model's tensors under this layout's names, in the model's dtype except A_log and dt_bias in float32.

    Args:
        model: Model to convert. Its tensors are shared, not copied, where they do not change.
        identity_layer: Whether to append a layer of zeros.

    Raises:
        ValueError: If the layout cannot express the model. The message names what it cannot express.
    """
    refuse("kimi_linear", refusals(model))
    c, sizes = model.config, latent_sizes(model.config)
    tensors = {}
    for name, x in renamed(model.state_dict(), RENAMES).items():
        if name.endswith(".A_log"):
            x = x.float().view(1, 1, -1, 1)
        if name.endswith(".dt_bias"):
            x = x.float()
        if not name.endswith(".bias"):  # those that exist are zero
            tensors[name] = x.contiguous()
    if c.tie_word_embeddings:  # vLLM, SGLang and llama.cpp need a head of its own
        tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    for i, kind in enumerate(c.layer_types):
        if kind == "full_attention":
            prefix = f"model.layers.{i}."
            layer = {name: tensors.pop(prefix + name) for name in GROUPED}
            tensors |= {prefix + name: x for name, x in to_latent(layer, c.head_dim, sizes).items()}
    if identity_layer:
        prefix = f"model.layers.{c.num_hidden_layers}."
        tensors |= {prefix + name: x.to(model.dtype) for name, x in identity(c, sizes).items()}
    return tensors


def native_config(model: DeltifyForCausalLM, identity_layer: bool) -> dict:
    """Return the config.json of `native_tensors`."""
    c = model.config
    kinds = c.layer_types + ["full_attention"] * identity_layer
    kda = [i for i, kind in enumerate(kinds, 1) if kind == "linear_attention"]  # layers are counted from 1
    return {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        "dtype": str(model.dtype).removeprefix("torch."),
        **{name: getattr(c, name) for name in SAME_IN_CONFIG},
        "num_hidden_layers": len(kinds),
        "num_key_value_heads": c.num_attention_heads,
        "model_max_length": c.max_position_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": o_norm_eps(model),
        "rope_theta": 10000.0,  # without effect, but MLX-LM needs it
        "tie_word_embeddings": False,
        **latent_sizes(c)._asdict(),
        "q_lora_rank": None,
        "mla_use_nope": True,
        **NO_EXPERTS,
        "first_k_dense_replace": len(kinds),
        "linear_attn_config": {
            "num_heads": c.num_attention_heads,
            "head_dim": c.head_dim,
            "short_conv_kernel_size": c.conv_size,
            "kda_layers": kda,
            "full_attn_layers": [i for i in range(1, len(kinds) + 1) if i not in kda],
        },
        "layer_types": kinds,
        "mlp_layer_types": ["dense"] * len(kinds),
    }


def deviations(model: DeltifyForCausalLM) -> list[str]:
    """Return what an exported model computes differently."""
    eps, own = o_norm_eps(model), model.config.rms_norm_eps
    found = []
    if not math.isclose(eps, own, rel_tol=1e-3):
        found.append(f"rms_norm_eps {eps:g} instead of {own:g}, as in o_norm")
    if model.config.layer_types[:1] == ["full_attention"]:
        found.append(f"keys and values of layer 0 scaled by {layer_0_scale(model):.4f}, the effect of a norm's eps")
    return found


def o_norm_eps(model: DeltifyForCausalLM) -> float:
    """Return the eps of o_norm, which other libraries use in all norms.

    Calibrated KDA layers have outputs with a mean square far below it, which makes o_norm a division by its root. The
    inputs of the other norms have a far larger mean square.
    """
    return next(layer.self_attn.o_norm.eps for layer in model.model.layers if layer.linear)


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_kimi_linear(folder: Path) -> DeltifyForCausalLM:
    """Return the model in a folder of this layout, written by deltify or saved by transformers.

    An identity layer at the end is dropped. MLA layers become attention layers again.

    Raises:
        ValueError: If the model has parts that deltify does not support, or tensors do not fit.
    """
    config = json.loads((folder / "config.json").read_text())
    linear = linear_config(config)
    if (act := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise ValueError(f"{folder}: hidden_act={act!r} is not supported. Only 'silu' is.")
    if (bound := linear.get("gate_lower_bound")) is not None:
        raise ValueError(f"{folder}: gate_lower_bound={bound} is not supported in this layout.")
    names = checkpoint_shapes(str(folder), {}) or {}
    if extra := sorted(name for name in names if ".experts." in name or name.endswith(".bias")):
        raise ValueError(f"{folder} has {', '.join(extra[:5])}. Layers with experts or biases are not supported.")
    tensors = read_tensors(folder)
    kinds = ["linear_attention"] * config["num_hidden_layers"]
    for i in linear["full_attn_layers"]:
        kinds[i - 1] = "full_attention"
    if kinds[-1] == "full_attention" and is_identity(tensors, len(kinds) - 1):
        kinds.pop()
        tensors = {name: x for name, x in tensors.items() if not name.startswith(f"model.layers.{len(kinds)}.")}
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight", torch.empty(0))
    same = {name: config[name] for name in SAME_IN_CONFIG if name in config}
    facts: dict[str, Any] = {
        "num_hidden_layers": len(kinds),
        "layer_types": kinds,
        "num_attention_heads": linear["num_heads"],
        "head_dim": linear["head_dim"],
        "conv_size": linear["short_conv_kernel_size"],
        "max_position_embeddings": config.get("max_position_embeddings", config.get("model_max_length")),
        "tie_word_embeddings": head is None or torch.equal(head, embedding),
        "rms_norm_eps": config["rms_norm_eps"],
    }
    ours = DeltifyConfig(**(same | facts))
    if "full_attention" in kinds:
        sizes = LatentSizes(*(config[name] for name in LatentSizes._fields))
        restore_attention_(tensors, ours, sizes, folder)
    tensors = {name: x.flatten() if name.endswith(".A_log") else x for name, x in tensors.items()}
    tensors = renamed(tensors, [(new, old) for old, new in RENAMES + TRANSFORMERS_RENAMES])
    return with_generation_settings(model_of_tensors(ours, tensors, str(folder)), folder)


def with_generation_settings(model: DeltifyForCausalLM, folder: Path) -> DeltifyForCausalLM:
    """Return the model with the generation settings in its folder, if there are any."""
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def linear_config(config: dict) -> dict:
    """Return the facts about KDA layers in a config.json: Moonshot's entry, or the same of transformers' fields."""
    if "linear_attn_config" in config:
        return config["linear_attn_config"]
    return {
        "num_heads": config["linear_num_heads"],
        "head_dim": config["linear_head_dim"],
        "short_conv_kernel_size": config["linear_conv_kernel_dim"],
        "full_attn_layers": [i for i, kind in enumerate(config["layer_types"], 1) if kind == "full_attention"],
    }


# ---- attention layers as MLA -----------------------------------------------------------------------------------------

# tensors of an attention layer that differ between grouped-query attention and MLA
GROUPED = ("input_layernorm.weight", *(f"self_attn.{name}_proj.weight" for name in "qkvo"))


LATENT_SCALE = 32.0  # MLA's norm removes it, and its eps, which differs between runtimes, has no effect


class LatentSizes(NamedTuple):
    """Sizes of MLA layers, with their names in config.json."""

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


def latent_sizes(c: DeltifyConfig) -> LatentSizes:
    """Return Moonshot's sizes, for which vLLM has kernels, or larger ones if the model is too wide for them."""
    rank = max(512, c.hidden_size) if "full_attention" in c.layer_types else 512
    head = max(128, c.head_dim)
    return LatentSizes(rank, head, 64, head)


def to_latent(layer: dict[str, Tensor], head_dim: int, sizes: LatentSizes) -> dict[str, Tensor]:
    """Return the tensors of an attention layer without RoPE, and of the norm before it, as MLA that computes the same.

    The latent is the layer's normalised input, padded with zeros. MLA normalises it again, which changes nothing but
    the scale. The weight of the norm moves into that second norm and into q_proj.
    """
    dtype = layer["self_attn.q_proj.weight"].dtype
    w_D, *qkv, o_proj = (layer[name].float() for name in GROUPED)
    D, K = len(w_D), head_dim
    q_HKD, k_GKD, v_GKD = (x.view(-1, K, D) for x in qkv)
    H, G = len(q_HKD), len(k_GKD)
    R, nope, rope, v = sizes
    q = q_HKD.new_zeros(H, nope + rope, D)
    q[:, :K] = q_HKD * w_D * ((nope + rope) / K) ** 0.5  # MLA divides by (nope + rope) ** 0.5
    kv = q.new_zeros(H, nope + v, R)
    kv[:, :K, :D] = k_GKD.repeat_interleave(H // G, 0)
    kv[:, nope : nope + K, :D] = v_GKD.repeat_interleave(H // G, 0)
    o = q.new_zeros(D, H, v)
    o[..., :K] = o_proj.view(D, H, K)
    norm = q.new_zeros(R)
    norm[:D] = w_D * (D / R) ** 0.5
    tensors = {
        "input_layernorm.weight": torch.ones_like(w_D),
        "self_attn.q_proj.weight": q.view(-1, D),
        "self_attn.kv_a_proj_with_mqa.weight": LATENT_SCALE * torch.eye(R + rope, D, device=q.device),
        "self_attn.kv_a_layernorm.weight": norm,
        "self_attn.kv_b_proj.weight": kv.view(-1, R),
        "self_attn.o_proj.weight": o.view(D, -1),
    }
    return {name: x.to(dtype) for name, x in tensors.items()}


def layer_0_scale(model: DeltifyForCausalLM) -> float:
    """Return the factor by which `to_latent` changes keys and values of layer 0, for the median token.

    The first norm divides by (mean square + eps) ** 0.5, and the second one removes the eps. Inputs of later layers are
    so large that this does not matter.
    """
    square = model.model.embed_tokens.weight.float().square().mean(-1).median().item()
    return (1 + model.config.rms_norm_eps / square) ** 0.5


def from_latent(layer: dict[str, Tensor], head_dim: int, shared: int, sizes: LatentSizes) -> dict[str, Tensor]:
    """Return the inverse of `to_latent`.

    Args:
        layer: Tensors that `to_latent` returned.
        head_dim: Width of a head.
        shared: Number of query heads of a key/value head.
        sizes: Sizes of the MLA layer.
    """
    dtype, (R, nope, rope, v), K = layer["self_attn.q_proj.weight"].dtype, sizes, head_dim
    norm, q, kv, o = (
        layer[f"self_attn.{name}.weight"].float() for name in ("kv_a_layernorm", "q_proj", "kv_b_proj", "o_proj")
    )
    D = len(o)
    w_D = norm[:D] * (R / D) ** 0.5
    q_HKD = q.view(-1, nope + rope, D)[:, :K] / ((nope + rope) / K) ** 0.5
    kv_GXD = kv.view(-1, nope + v, R)[::shared, :, :D]
    tensors = (
        w_D,
        torch.where(w_D == 0, 0.0, q_HKD / w_D).flatten(0, 1),
        kv_GXD[:, :K].flatten(0, 1),
        kv_GXD[:, nope : nope + K].flatten(0, 1),
        o.view(D, -1, v)[..., :K].flatten(1),
    )
    return {name: x.to(dtype) for name, x in zip(GROUPED, tensors)}


def restore_attention_(tensors: dict[str, Tensor], c: DeltifyConfig, sizes: LatentSizes, folder: Path) -> None:
    """Replace MLA layers in `tensors` by attention layers, and set their number of key/value heads in `c`.

    Raises:
        ValueError: If a layer is not one that `to_latent` returns.
    """
    R, nope, _, v = sizes
    H, K = c.num_attention_heads, c.head_dim
    shapes = {name: x.shape for name, x in identity(c, sizes).items() if not name.startswith(("mlp.", "post_"))}
    latent = {
        f"model.layers.{i}.": {name: tensors.pop(f"model.layers.{i}.{name}", torch.empty(0)) for name in shapes}
        for i, kind in enumerate(c.layer_types)
        if kind == "full_attention"
    }
    refused = [prefix for prefix, layer in latent.items() if any(layer[name].shape != shapes[name] for name in shapes)]
    if c.hidden_size > R or min(nope, v) < K:
        refused = list(latent)
    if not refused:
        kv = [layer["self_attn.kv_b_proj.weight"].view(H, nope + v, R) for layer in latent.values()]
        shared = math.gcd(*map(equal_heads, kv))
        c.num_key_value_heads = H // shared
        for prefix, layer in latent.items():
            grouped = from_latent(layer, K, shared, sizes)
            again = to_latent(grouped, K, sizes)
            if not all(equal_up_to_rounding(again[name], layer[name]) for name in shapes):
                refused.append(prefix)
            tensors |= {prefix + name: x for name, x in grouped.items()}
    if refused:
        names = ", ".join(prefix.strip(".") for prefix in refused)
        raise ValueError(f"{folder}: the latent attention of {names} is not supported. Only exported GQA layers are.")


def equal_heads(x: Tensor) -> int:
    """Return the largest number of neighbouring heads [H, ...] that are equal in each of their groups."""
    sizes = [n for n in range(len(x), 0, -1) if len(x) % n == 0]
    return next(n for n in sizes if torch.equal(x[::n].repeat_interleave(n, 0), x))


def equal_up_to_rounding(a: Tensor, b: Tensor) -> bool:
    """Return whether tensors are equal up to a few roundings of their dtype. Zeros must be zeros."""
    return torch.allclose(a.float(), b.float(), rtol=8 * torch.finfo(b.dtype).eps, atol=0)


# ---- identity layer --------------------------------------------------------------------------------------------------


def identity(c: DeltifyConfig, sizes: LatentSizes) -> dict[str, Tensor]:
    """Return the tensors of a layer whose attention and MLP are zero."""
    H, D, F = c.num_attention_heads, c.hidden_size, c.intermediate_size
    R, nope, rope, v = sizes
    ones = {"input_layernorm": (D,), "post_attention_layernorm": (D,), "self_attn.kv_a_layernorm": (R,)}
    zeros = {
        "self_attn.q_proj": (H * (nope + rope), D),
        "self_attn.kv_a_proj_with_mqa": (R + rope, D),
        "self_attn.kv_b_proj": (H * (nope + v), R),
        "self_attn.o_proj": (D, H * v),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }
    tensors = {name: torch.ones(shape) for name, shape in ones.items()}
    tensors |= {name: torch.zeros(shape) for name, shape in zeros.items()}
    return {f"{name}.weight": x for name, x in tensors.items()}


def is_identity(tensors: dict[str, Tensor], layer: int) -> bool:
    """Return whether a layer's attention and MLP are zero."""
    outputs = [tensors.get(f"model.layers.{layer}.{name}.weight") for name in ("self_attn.o_proj", "mlp.down_proj")]
    return all(x is not None and not x.any() for x in outputs)

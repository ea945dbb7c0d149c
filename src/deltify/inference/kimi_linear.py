"""Moonshot's `kimi_linear` layout, which transformers, MLX-LM, vLLM and llama.cpp's converter read natively.

KDA layers keep their tensors. An attention layer without RoPE becomes multi-head latent attention (MLA) whose latent is
the layer's normalised input. An identity layer, which adds zero to the hidden states, is for runtimes that fail without
an attention layer.

Legend: D model width, H heads, G key/value heads, K head width, R width of MLA's latent, F inner width of the MLP.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..model import DeltifyConfig, DeltifyForCausalLM

# parts of tensor names in deltify and in this layout
RENAMES = [
    (".f_proj.0.", ".f_a_proj."),
    (".f_proj.1.", ".f_b_proj."),
    (".g_proj.0.", ".g_a_proj."),
    (".g_proj.1.", ".g_b_proj."),
]
SAME_IN_CONFIG = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim", "max_position_embeddings"),
    *("rms_norm_eps", "initializer_range", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
)
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


def refusals(model: DeltifyForCausalLM) -> list[str]:
    """Return the parts of a model that this layout cannot express."""
    c = model.config
    kinds = c.layer_types or []
    kept = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    biases = [name for name, x in model.state_dict().items() if name.endswith(".bias") and bool(x.any())]
    problems = {
        "sliding attention layers": "sliding_attention" in kinds,
        "RoPE in attention layers": any((c.use_rope or [])[i] for i in kept),
        "qk-norm in attention layers": c.qk_norm and bool(kept),
        "an MLP without a gate": not c.mlp_gated,
        f"the activation {c.hidden_act}": c.hidden_act not in ("silu", "swish"),
        "a bounded gate (gate_lower_bound, which only vLLM has)": c.gate_lower_bound is not None,
        "a bias of the output gate (g_proj.1.bias)": any(name.endswith(".g_proj.1.bias") for name in biases),
        # llama.cpp loads such biases and ignores them
        "biases of q, k, v or o": any(name.endswith(tuple(f".{x}_proj.bias" for x in "qkvo")) for name in biases),
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
    if found := refusals(model):
        raise ValueError(f"Layout kimi_linear does not support {', '.join(found)}. Export with --layout deltify.")
    c, sizes = model.config, latent_sizes(model.config)
    tensors = {}
    for name, x in model.state_dict().items():
        for old, new in RENAMES:
            name = name.replace(old, new)
        if name.endswith(".A_log"):
            x = x.float().view(1, 1, -1, 1)
        if name.endswith(".dt_bias"):
            x = x.float()
        if not name.endswith(".bias"):  # those that exist are zero
            tensors[name] = x.contiguous()
    if c.tie_word_embeddings:  # vLLM, SGLang and llama.cpp need a head of its own
        tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    for i, kind in enumerate(c.layer_types or []):
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
    kinds = list(c.layer_types or []) + ["full_attention"] * identity_layer
    kda = [i for i, kind in enumerate(kinds, 1) if kind == "linear_attention"]  # layers are counted from 1
    eps = {layer.self_attn.o_norm.eps for layer in model.model.layers if layer.linear}
    return {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        "dtype": str(model.dtype).removeprefix("torch."),
        **{name: getattr(c, name) for name in SAME_IN_CONFIG},
        "num_hidden_layers": len(kinds),
        "num_key_value_heads": c.num_attention_heads,
        "model_max_length": c.max_position_embeddings,
        "hidden_act": "silu",
        "o_norm_eps": eps.pop() if eps else c.rms_norm_eps,  # for our reader. Other runtimes take one of their own.
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


# ---- attention layers as MLA -----------------------------------------------------------------------------------------

# tensors of an attention layer that differ between grouped-query attention and MLA
GROUPED = ("input_layernorm.weight", *(f"self_attn.{name}_proj.weight" for name in "qkvo"))


class LatentSizes(NamedTuple):
    """Sizes of MLA layers, with their names in config.json."""

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


def latent_sizes(c: DeltifyConfig) -> LatentSizes:
    """Return Moonshot's sizes, for which vLLM has kernels, or larger ones if the model is too wide for them."""
    rank = max(512, c.hidden_size) if "full_attention" in (c.layer_types or ()) else 512
    head = max(128, c.head_dim or 0)
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
        "self_attn.kv_a_proj_with_mqa.weight": torch.eye(R + rope, D, device=q.device),
        "self_attn.kv_a_layernorm.weight": norm,
        "self_attn.kv_b_proj.weight": kv.view(-1, R),
        "self_attn.o_proj.weight": o.view(D, -1),
    }
    return {name: x.to(dtype) for name, x in tensors.items()}


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

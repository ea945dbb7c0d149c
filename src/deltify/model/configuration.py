"""Configuration of a KDA language model."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from .remote import auto_map, write_code

LAYER_TYPES = ("linear_attention", "full_attention", "sliding_attention")
FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # kinds of RoPE that do not depend on the length of the text
# Default of fields that __post_init__ sets. config.json may lack them, or have null for them. The type is Any, so that
# the fields can have the types of their later values. transformers does not check the fields of subclasses.
UNSET: Any = None


def has_rope(config: "DeltifyConfig") -> bool:
    """Return whether an attention layer rotates queries and keys."""
    return any(rope and kind != "linear_attention" for rope, kind in zip(config.use_rope, config.layer_types))


def has_fixed_rope(config: PreTrainedConfig) -> bool:
    """Return whether the angles of a model's RoPE, if it has any, do not depend on the length of the text."""
    return (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") in FIXED_ROPE


class DeltifyConfig(PreTrainedConfig):
    """Configuration of a Llama-like decoder with KDA, full-attention and sliding-attention layers.

    Args:
        head_dim: Width K = V of a head, in all layers.
        num_attention_heads: Number of heads of KDA layers, and of query heads of attention layers.
        num_key_value_heads: Number of key/value heads of attention layers. KDA layers have one per head.
        mlp_gated: Whether the MLP is down(act(gate(x)) * up(x)) instead of down(act(up(x))).
        attention_bias: Whether q, k and v projections of attention layers have biases.
        attention_out_bias: Whether output projections have biases, in all layers.
        kda_bias: Whether q, k and v projections of KDA layers have biases. vLLM, llama.cpp and MLX support none.
        gate_bias: Whether the output gate of KDA layers has a bias. vLLM, llama.cpp and MLX support none.
        qk_norm: Whether attention layers normalise q and k of each head by RMSNorm. KDA layers use L2 norms instead.
        layer_types: Kind of each layer: "linear_attention" (KDA), "full_attention" or "sliding_attention" (the last
            tokens and a document's first ones, its sinks). Defaults to KDA in all layers.
        use_rope: Whether attention rotates q and k, for each layer. Defaults to none (NoPE). KDA layers ignore it.
        sliding_window: Number of tokens that sliding layers see, the current one included.
        sink_tokens: Number of tokens at a document's start that sliding layers always see.
        conv_size: Number of taps of the short convolutions.
        gate_lower_bound: Lower bound of the log-decay, in [-5, 0), for the bounded gate. None for the softplus gate.
        o_norm_eps: Epsilon of the norm of the heads' outputs in KDA layers. Defaults to `rms_norm_eps`.
    """

    model_type = "deltify"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int = UNSET
    head_dim: int = UNSET
    hidden_act: str = "silu"
    mlp_gated: bool = True
    mlp_bias: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    kda_bias: bool = False
    gate_bias: bool = False
    attention_dropout: float = 0.0
    qk_norm: bool = False
    layer_types: list[str] = UNSET
    use_rope: list[bool] = UNSET
    rope_parameters: dict | None = None
    max_position_embeddings: int = 8192
    sliding_window: int = 64
    sink_tokens: int = 4
    conv_size: int = 4
    gate_lower_bound: float | None = None
    rms_norm_eps: float = 1e-5
    o_norm_eps: float = UNSET
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        defaults = {
            "head_dim": self.hidden_size // self.num_attention_heads,
            "num_key_value_heads": self.num_attention_heads,
            "o_norm_eps": self.rms_norm_eps,
            "layer_types": ["linear_attention"] * self.num_hidden_layers,
            "use_rope": [False] * self.num_hidden_layers,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name in ("layer_types", "use_rope"):
            if len(getattr(self, name)) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries for num_hidden_layers={self.num_hidden_layers}"
                )
        if unknown := set(self.layer_types) - set(LAYER_TYPES):
            raise ValueError(f"layer_types contains {sorted(unknown)}; choose from {list(LAYER_TYPES)}")
        for name, least in (("sliding_window", 1), ("sink_tokens", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Save as transformers does, with the model's code beside config.json for use without deltify."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.auto_map = auto_map(self)
        write_code(Path(save_directory))
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


class ArceeKDAConfig(DeltifyConfig):
    """Configuration of a student of an Arcee model, such as AFM-4.5B: its MLP is ungated and has relu^2."""

    model_type = "arcee_kda"

    vocab_size: int = 128004
    hidden_size: int = 2560
    intermediate_size: int = 18432
    num_hidden_layers: int = 36
    num_attention_heads: int = 20
    num_key_value_heads: int = 4
    head_dim: int = 128
    hidden_act: str = "relu2"
    mlp_gated: bool = False
    gate_bias: bool = True
    max_position_embeddings: int = 65536
    bos_token_id: int | None = 128000
    eos_token_id: int | list[int] | None = 128001

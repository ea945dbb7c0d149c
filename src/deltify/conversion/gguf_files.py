"""Unpack GGUF files into folders of bf16 safetensors, and refuse tensors and keys that are not understood.

transformers skips what it does not know: a tensor without a known name, a key that changes the positions, a second
file. Here the names come from the package gguf and the expected tensors from a transformers model on the meta device.
Both lists must agree.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerFast

from ..model.shards import write_tensors
from ..utils.console import console
from .vocabulary import fit_tokenizer, set_beginning

PIECE = 2**19  # elements dequantized at a time, few enough for a processor's cache
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

# ---- which keys are read ---------------------------------------------------------------------------------------------

# keys, without the architecture's prefix, and the configuration fields that take their values
FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
# keys that `GgufModel` reads by themselves
READ = {
    *("rope.freq_base", "rope.dimension_count", "attention.key_length", "attention.value_length", "vocab_size"),
    *("attention.sliding_window", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
}
# keys that have no effect while they have this value; ... stands for any value
NEUTRAL: dict[str, object] = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "use_parallel_residual": False,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.finetuned": ...,
    "tensor_data_layout": ...,
}
# architectures by gguf's name, and whether they rotate neighbouring channels of q and k together instead of halves
ARCHITECTURES = {"llama": True, "qwen2": False, "qwen3": False}


@dataclass(frozen=True)
class Split:
    """How a byte-level tokenizer splits text before merging."""

    pattern: str | None  # regular expression of the parts; None for GPT-2's
    digits: bool = False  # whether each digit is split off first
    nfc: bool = False  # whether text is normalised to Unicode NFC
    whole_words: bool = False  # whether a part that is a token skips the merges
    begins: bool = False  # whether texts begin with the beginning-of-sequence token, unless the file says otherwise


# regular expressions of llama.cpp; %s stands for the number of digits in a group
WORDS_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LETTERS_PATTERN = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s"
TEKKEN_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{LETTERS_PATTERN % ('*', '+')}|[^\r\n\p{{L}}\p{{N}}]?{LETTERS_PATTERN % ('+', '*')}"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {  # by the value of `tokenizer.ggml.pre`
    "default": Split(None),
    "gpt-2": Split(None),
    "smollm": Split(None, digits=True),
    "qwen2": Split(WORDS_PATTERN % "", nfc=True),
    "deepseek-r1-qwen": Split(WORDS_PATTERN % ""),
    "llama-bpe": Split(WORDS_PATTERN % "{1,3}", whole_words=True, begins=True),
    "tekken": Split(TEKKEN_PATTERN, whole_words=True, begins=True),
}


# ---- read ------------------------------------------------------------------------------------------------------------


def parts_of(path: Path) -> list[Path]:
    """Return the files of a model in order. Most models have one; large ones are split.

    Raises:
        FileNotFoundError: If a part is missing.
    """
    name = PART.fullmatch(path.name)
    if name is None:
        return [path]
    paths = [path.with_name(f"{name[1]}-{part:05d}-of-{name[3]}.gguf") for part in range(1, int(name[3]) + 1)]
    if missing := [part.name for part in paths if not part.is_file()]:
        raise FileNotFoundError(f"{path} is one part of {len(paths)}; {', '.join(missing)} must lie beside it")
    return paths


class GgufModel:
    """Keys and tensors of a GGUF model of one or several files, with their names in transformers."""

    def __init__(self, path: Path):
        readers = [gguf.GGUFReader(part) for part in parts_of(path)]
        self.path, self.fields = path, readers[0].fields
        self.tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        if (count := self.key("split.count", 1)) != len(readers):
            raise ValueError(
                f"{path} is one part of {count}, but {len(readers)} were found. Keep all parts in one folder, "
                "under the names that llama.cpp gave them (NAME-00001-of-00002.gguf)"
            )
        if (kind := self.key("general.type", "model")) != "model":
            raise ValueError(f"{path} holds a {kind}, not a whole model")
        self.architecture = self.key("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"{path} has the architecture {self.architecture!r}; supported in GGUF files are "
                f"{', '.join(ARCHITECTURES)}. Give the model's safetensors folder or hub id"
            )
        self.config = self.read_config()
        self.names = self.tensor_names()

    def key(self, name: str, default: Any = None) -> Any:
        """Return the value of a key, or `default` if the file lacks it."""
        return self.fields[name].contents() if name in self.fields else default

    def read_config(self) -> PreTrainedConfig:
        """Return the configuration that the keys describe.

        Raises:
            ValueError: If an unknown key could change what the model computes, a key is missing, or keys disagree.
        """
        prefix = f"{self.architecture}."
        own = {name.removeprefix(prefix): self.key(name) for name in self.fields if name.startswith(prefix)}
        own = {name: distinct(value) for name, value in own.items()}
        unknown = [name for name in own if name not in {**FIELDS, **NEUTRAL} and name not in READ]
        unknown += [n for n, neutral in NEUTRAL.items() if n in own and neutral is not ... and own[n] != neutral]
        unknown += [name for name in FIELDS if isinstance(own.get(name), list)]  # layers that differ
        if unknown:
            listed = ", ".join(f"{prefix}{name} = {own[name]}" for name in sorted(unknown))
            raise ValueError(f"{self.path} has {listed}, which is not understood. Give the model's safetensors folder")
        if missing := [f"{prefix}{name}" for name in FIELDS if name not in own and name != "attention.head_count_kv"]:
            raise ValueError(f"{self.path} lacks the keys {', '.join(missing)}")
        facts = {field: own[name] for name, field in FIELDS.items() if name in own}
        facts.setdefault("num_key_value_heads", facts["num_attention_heads"])
        head_dim = own.get("attention.key_length") or facts["hidden_size"] // facts["num_attention_heads"]
        for name in ("rope.dimension_count", "attention.value_length"):
            if own.get(name, head_dim) != head_dim:
                raise ValueError(
                    f"{self.path} has {prefix}{name} = {own[name]} but heads of {head_dim}; they must agree"
                )
        window = own.get("attention.sliding_window") or 0
        if 0 < window < facts["max_position_embeddings"]:
            raise ValueError(
                f"{self.path} has {prefix}attention.sliding_window = {window}. Sliding windows are supported in "
                "safetensors folders only"
            )
        vocabulary = self.shape("token_embd.weight")[0]
        if own.get("vocab_size", vocabulary) != vocabulary:
            raise ValueError(f"{self.path} has {prefix}vocab_size = {own['vocab_size']} for {vocabulary} embeddings")
        special = {name: self.key(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL_TOKENS.items()}
        return AutoConfig.for_model(
            self.architecture,
            **facts,
            **{f"{name}_id": token for name, token in special.items() if name != "unk_token"},
            head_dim=head_dim,
            vocab_size=vocabulary,
            rope_parameters=self.rope(own, head_dim),
            tie_word_embeddings="output.weight" not in self.tensors,
            **self.biases(),
        )

    def rope(self, own: dict, head_dim: int) -> dict:
        """Return the rotary parameters, from keys and from the tensor of factors that Llama 3.1 and later have."""
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": own.get("rope.freq_base", 10000.0)}
        factor = own.get("rope.scaling.factor") or 1.0
        kind = own.get("rope.scaling.type", "none" if factor == 1.0 else "linear")  # as llama.cpp reads it
        if kind in ("linear", "yarn"):
            rope |= {"rope_type": kind, "factor": factor}
            if kind == "yarn":
                original = own.get("rope.scaling.original_context_length", own["context_length"])
                rope["original_max_position_embeddings"] = original
        elif kind != "none":
            raise ValueError(f"{self.path} has rope.scaling.type = {kind!r}; supported are none, linear and yarn")
        if "rope_freqs.weight" in self.tensors:
            if kind != "none":
                raise ValueError(f"{self.path} has both rope.scaling.type = {kind} and rope_freqs.weight")
            rope |= llama3_scaling(self.values("rope_freqs.weight"), rope["rope_theta"], head_dim, self.path)
        return rope

    def biases(self) -> dict[str, bool]:
        """Return the configuration fields for the biases that the file has."""
        if self.architecture == "qwen2":  # q, k and v always have biases, and no field exists
            return {}
        fields = {"attention_bias": "blk.0.attn_q.bias" in self.tensors}
        return fields | ({"mlp_bias": "blk.0.ffn_up.bias" in self.tensors} if self.architecture == "llama" else {})

    def tensor_names(self) -> dict[str, str]:
        """Return the file's name of each of the model's tensors.

        Raises:
            ValueError: If the file lacks a tensor, has an unexpected one, or has one of another shape.
        """
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        gguf_names = gguf.get_tensor_name_map(architecture, self.config.num_hidden_layers)
        names, problems = {}, []
        for name, tensor in model.state_dict().items():
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            stem, _, kind = name.rpartition(".")
            names[name] = gguf_name = f"{gguf_names.get_name(stem)}.{kind}"
            if gguf_name not in self.tensors:
                problems.append(f"{gguf_name} is missing")
            elif self.shape(gguf_name) != tuple(tensor.shape):
                problems.append(f"{gguf_name} has shape {list(self.shape(gguf_name))}, expected {list(tensor.shape)}")
        unexpected = self.tensors.keys() - set(names.values()) - {"rope_freqs.weight"}
        problems += [f"{name} is not expected" for name in sorted(unexpected)]
        if problems:
            omitted = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ValueError(f"{self.path} does not fit its own keys: {'; '.join(problems[:5])}{omitted}")
        return names

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor in the order of torch."""
        if name not in self.tensors:
            raise ValueError(f"{self.path} lacks the tensor {name}. Is it one part of a split file?")
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def values(self, name: str) -> np.ndarray:
        """Return a small tensor's values in float32."""
        tensor = self.tensors[name]
        return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(self.shape(name))

    def pieces(self, name: str) -> Iterator[tuple[int, int]]:
        """Yield ranges of rows that are small enough to be dequantized at once."""
        rows, *rest = self.shape(name)
        step = max(1, PIECE // max(1, int(np.prod(rest))))
        yield from ((start, min(rows, start + step)) for start in range(0, rows, step))

    def read_piece(self, name: str, first: int, last: int, into: Tensor) -> int:
        """Write rows of the file's tensor into the bf16 tensor `into`; return the bytes read."""
        tensor = self.tensors[name]
        data = tensor.data.reshape(self.shape(name)[0], -1)[first:last]
        values = np.require(gguf.dequantize(data, tensor.tensor_type), requirements="W")  # float32 is not copied
        into[first:last].copy_(torch.from_numpy(values).view(into[first:last].shape))
        return data.nbytes

    def read(self, names: list[str], pool: ThreadPoolExecutor, advance: Callable[[int], None]) -> dict[str, Tensor]:
        """Return the model's tensors `names` in bfloat16, dequantized by the threads of `pool`.

        Args:
            names: Names of tensors in transformers.
            pool: Threads that dequantize.
            advance: Function that is called with the number of bytes read.
        """
        tensors = {name: torch.empty(self.shape(self.names[name]), dtype=torch.bfloat16) for name in names}
        jobs = [
            pool.submit(self.read_piece, self.names[name], *piece, tensor)
            for name, tensor in tensors.items()
            for piece in self.pieces(self.names[name])
        ]
        for job in jobs:
            advance(job.result())
        if ARCHITECTURES[self.architecture]:
            for kind, heads in (("q", self.config.num_attention_heads), ("k", self.config.num_key_value_heads)):
                for name in names:
                    if f".{kind}_proj." in name:
                        tensors[name] = halves_from_neighbours(tensors[name], heads)
        return tensors


def distinct(value: Any) -> Any:
    """Return the one value of a list of equal values, which some files have with an entry per layer; else `value`."""
    return value[0] if isinstance(value, list) and value and value.count(value[0]) == len(value) else value


def halves_from_neighbours(x: Tensor, heads: int) -> Tensor:
    """Return rows of q or k in transformers' order.

    llama.cpp rotates neighbouring channels together, transformers a channel of a head's first half with one of its
    second half.
    """
    return x.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def llama3_scaling(factors: np.ndarray, theta: float, head_dim: int, path: Path) -> dict:
    """Return the parameters of Llama 3.1's position scaling that multiply wavelengths by these factors [head_dim / 2].

    Raises:
        ValueError: If no known parameters give these factors.
    """
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
    smooth = ((original / wavelength - low) / (high - low)).clip(0, 1)
    if not np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-3):
        raise ValueError(f"{path} has rope_freqs.weight, which are not Llama 3's factors. Give its safetensors folder")
    scaling = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    return {"rope_type": "llama3", **scaling, "original_max_position_embeddings": original}


# ---- the tokenizer ---------------------------------------------------------------------------------------------------

SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


def read_tokenizer(model: GgufModel):
    """Return the tokenizer of a GGUF file, which splits and begins texts as the file says.

    Raises:
        ValueError: If the file does not say how text is split, or names an unknown way.
    """
    first = parts_of(model.path)[0].resolve()
    # Not AutoTokenizer, which would read the whole file once more for its configuration. The folder has nothing else,
    # because transformers would prefer a tokenizer.json beside the file.
    with tempfile.TemporaryDirectory() as alone:
        try:
            (Path(alone) / first.name).symlink_to(first)
        except OSError:  # Windows allows it to some users only
            shutil.copyfile(first, Path(alone) / first.name)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(alone, gguf_file=first.name)
    tokenizer.clean_up_tokenization_spaces = False  # older releases of transformers default to True, and warn
    begins, backend = True, tokenizer.backend_tokenizer  # sentencepiece vocabularies begin texts
    if model.key("tokenizer.ggml.model") == "gpt2":
        name = model.key("tokenizer.ggml.pre")
        if name not in SPLITS:
            raise ValueError(
                f"{model.path} has tokenizer.ggml.pre = {name!r}; supported are {', '.join(SPLITS)}. Give the model's "
                "safetensors folder or hub id"
            )
        if name == "default":
            console.print(f"warning: {model.path.name} does not name its tokenizer; text is split as GPT-2 does")
        begins = SPLITS[name].begins
        split_text(backend, SPLITS[name])
    else:
        mark_spaces(backend, bool(model.key("tokenizer.ggml.add_space_prefix", True)))
    vocabulary = model.key("tokenizer.ggml.tokens")
    for name, key in SPECIAL_TOKENS.items():
        token = model.key(f"tokenizer.ggml.{key}_token_id")
        setattr(tokenizer, name, None if token is None else vocabulary[token])
    tokenizer = fit_tokenizer(tokenizer, model.config, str(model.path))
    begins = model.key("tokenizer.ggml.add_bos_token", begins) and tokenizer.bos_token_id is not None
    set_beginning(tokenizer, begins, bool(model.key("tokenizer.ggml.add_eos_token", False)))
    return tokenizer


def mark_spaces(backend: Tokenizer, prefix: bool) -> None:
    """Make a tokenizer with a sentencepiece vocabulary treat spaces as llama.cpp does.

    Args:
        backend: Tokenizer, changed in place.
        prefix: Whether a space is put before a text, and before what follows a special token.
    """
    first = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    last = [decoders.Strip(" ", left=1, right=0)] if prefix else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *last])


def split_text(backend: Tokenizer, split: Split) -> None:
    """Make a tokenizer split text in this way."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None)
    steps = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    steps += [pre_tokenizers.Split(Regex(split.pattern), "isolated")] if split.pattern else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level]) if steps else byte_level
    if split.nfc:
        backend.normalizer = normalizers.NFC()
    if split.whole_words:
        backend.model.ignore_merges = True


def name_split(state: dict) -> str | None:
    """Return the key of SPLITS that describes how a tokenizer.json splits text, or None if none does."""
    for name, split in SPLITS.items():
        known = Tokenizer(models.BPE())
        split_text(known, split)
        if name != "default" and steps_before_merging(json.loads(known.to_str())) == steps_before_merging(state):
            return name
    return None


def steps_before_merging(state: dict) -> tuple:
    """Return the parts of a tokenizer.json that determine which bytes can be merged."""
    first = state["pre_tokenizer"] or {"type": "Sequence", "pretokenizers": []}
    steps = first["pretokenizers"] if first["type"] == "Sequence" else [first]
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]  # not of ids
    model = state["model"]
    marks = [model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix")]
    normalizer = state["normalizer"]
    if normalizer == {"type": "Sequence", "normalizers": []}:  # transformers 5.17 writes this for none
        normalizer = None
    return model["type"], model.get("ignore_merges"), marks, normalizer, steps


# ---- write -----------------------------------------------------------------------------------------------------------


def unpack(path: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file to `folder` as transformers reads them, weights in bfloat16.

    It does not use `save_pretrained` of a model, which writes on rank 0 alone: any process may write the folder.

    Raises:
        ValueError: If the file has a tensor or key that is not understood, or lacks one.
    """
    model = GgufModel(path)
    tokenizer = read_tokenizer(model)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {name: 2 * int(np.prod(model.shape(stored))) for name, stored in model.names.items()}
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    total = sum(tensor.data.nbytes for tensor in model.tensors.values())
    with (
        ThreadPoolExecutor(os.cpu_count() or 1) as pool,
        Progress(TextColumn(f"unpack {path.name}"), *columns, console=console, transient=True) as bar,
    ):
        task = bar.add_task("unpack", total=total)
        write_tensors(folder, sizes, lambda names: model.read(names, pool, lambda n: bar.advance(task, n)))
    model.config.architectures = [AutoModelForCausalLM._model_mapping[type(model.config)].__name__]
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(folder)
    ends = [model.key(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    special = {"bos_token_id": model.config.bos_token_id, "pad_token_id": model.config.pad_token_id}
    GenerationConfig(eos_token_id=ends if len(ends) > 1 else next(iter(ends), None), **special).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

"""Read names, shapes and data types of a checkpoint's tensors before it is loaded, and refuse what does not fit."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

T = TypeVar("T")


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file: data type in the notation of safetensors, shape, file, and name there."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    name: str


Tensors = dict[str, StoredTensor]

PLAIN = {"F64", "F32", "F16", "BF16"}  # all other data types are quantized codes, useless without scales

# prefixes of wrapped modules: torch.compile, DDP and DataParallel, FSDP, activation checkpointing
WRAPPERS = r"(?<![^.])(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."


def checkpoint_tensors(source: str, options: dict) -> Tensors | None:
    """Return all tensors in the safetensors files of a folder or hub id by name, without reading their values.

    Returns None if there are no such files.

    Raises:
        ValueError: If the checkpoint is pickled, or a file is damaged or missing.
    """
    hub = {name: options[name] for name in HUB_OPTIONS if name in options}
    quiet = {"_raise_exceptions_for_missing_entries": False}
    single = cached_file(source, SAFE_WEIGHTS_NAME, **hub, **quiet)
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **hub, **quiet)
    if single is None and index is None:
        if any(cached_file(source, name, **hub, **quiet) for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
            raise ValueError(f"{source} has pickled weights, which can run code when loaded. Convert it to safetensors")
        return None
    if single is None and Path(source).is_dir():
        check_shards(Path(index))
    files = [single] if single else get_checkpoint_shard_files(source, index, **hub)[0]
    tensors: Tensors = {}
    for file in files or []:
        try:
            with safe_open(file, framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                for name, x in slices.items():
                    tensors[name] = StoredTensor(x.get_dtype(), tuple(x.get_shape()), file, name)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}). Download or save it again") from error
    return tensors


def checkpoint_shapes(source: str, options: dict) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of `checkpoint_tensors`.

    Raises:
        ValueError: As `checkpoint_tensors` and `plain_shapes` do.
    """
    tensors = checkpoint_tensors(source, options)
    return None if tensors is None else plain_shapes(tensors, source)


def plain_shapes(tensors: Tensors, source: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor, and refuse quantized ones.

    Raises:
        ValueError: If a tensor has an integer or 8-bit data type. Its values mean nothing without their scales.
    """
    if codes := sorted(f"{name} ({x.dtype})" for name, x in tensors.items() if x.dtype not in PLAIN):
        raise ValueError(
            f"{source} has quantized weights: {', '.join(codes[:3])}. Give the model in bfloat16 or float32"
        )
    return {name: x.shape for name, x in tensors.items()}


def check_shards(index: Path) -> None:
    """Check that all files of a sharded checkpoint exist.

    Raises:
        ValueError: If one is missing.
    """
    named = set(json.loads(index.read_text())["weight_map"].values())
    if missing := sorted(name for name in named if not (index.parent / name).is_file()):
        raise ValueError(f"{index.parent} lacks {', '.join(missing)}, which {index.name} lists. Download it again")


def with_prefix(tensors: dict[str, T]) -> dict[str, T]:
    """Return the values under the names of a model with a head: `model.` is added, prefixes of wrappers are removed."""
    tensors = {re.sub(WRAPPERS, "", name): x for name, x in tensors.items()}
    return {name if name.startswith(("model.", "lm_head.")) else f"model.{name}": x for name, x in tensors.items()}


def renamings(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return options of `from_pretrained` that remove the prefixes of wrappers from names of tensors."""
    wrapped = {name: re.sub(WRAPPERS, "", name) for name in names if re.search(WRAPPERS, name)}
    return {"key_mapping": {f"^{re.escape(name)}$": plain for name, plain in wrapped.items()}} if wrapped else {}


def layer_types_of(shapes: dict[str, tuple[int, ...]], layers: int, listed: Sequence[str] = ()) -> list[str]:
    """Return the kind of each layer from the names of its tensors: only a KDA layer has an A_log.

    Args:
        shapes: Shapes of the tensors by name.
        layers: Number of layers.
        listed: Kinds in the configuration. They tell sliding attention from full attention, whose tensors are alike.
    """
    listed = list(listed) if len(listed) == layers else ["full_attention"] * layers
    attention = ["sliding_attention" if kind == "sliding_attention" else "full_attention" for kind in listed]
    linear = [f"model.layers.{i}.self_attn.A_log" in shapes for i in range(layers)]
    return ["linear_attention" if is_linear else kind for is_linear, kind in zip(linear, attention)]


def kda_biases(shapes: dict[str, tuple[int, ...]]) -> tuple[bool, bool]:
    """Return whether any KDA layer has biases of q, k and v, and whether any has a bias of the output gate."""
    mixers = {name.removesuffix("A_log") for name in shapes if name.endswith(".A_log")}
    return any(f"{mixer}q_proj.bias" in shapes for mixer in mixers), any(
        f"{mixer}g_proj.1.bias" in shapes for mixer in mixers
    )


def check_shapes(
    stored: dict[str, tuple[int, ...]],
    expected: dict[str, tuple[int, ...]],
    tied: set[str],
    source: str = "the checkpoint",
) -> None:
    """Check that the tensors on disk are exactly the model's.

    Args:
        stored: Shapes on disk by name.
        expected: Shapes of the model by name.
        tied: Names that may be missing on disk.
        source: Name of the checkpoint, for errors.

    Raises:
        ValueError: If a tensor is missing, unexpected or of another shape.
    """
    missing = sorted(expected.keys() - stored.keys() - tied)
    unexpected = sorted(stored.keys() - expected.keys())
    wrong = sorted(name for name in expected.keys() & stored.keys() if expected[name] != stored[name])
    problems = [f"{name} is missing" for name in missing] + [f"{name} is not expected" for name in unexpected]
    problems += [f"{name} has shape {list(stored[name])}, expected {list(expected[name])}" for name in wrong]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{source} does not fit its config: {'; '.join(problems[:5])}{more}")

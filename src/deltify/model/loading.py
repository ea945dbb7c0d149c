"""Reads what a folder's tensors say about a model before it is loaded, and refuses what does not fit."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


Tensors = dict[str, tuple[str, tuple[int, ...]]]  # by name: dtype as safetensors writes it, and shape

PLAIN = {"F64", "F32", "F16", "BF16"}  # dtypes of numbers; all others are codes, which need scales to be read

# what wrappers put before a module's name: torch.compile, DDP and DataParallel, FSDP, activation checkpointing
WRAPPERS = r"(?<![^.])(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."


def checkpoint_tensors(source: str, options: dict) -> Tensors | None:
    """Return dtype and shape of all tensors in the safetensors files of a folder or hub id; None if it has none.

    Raises:
        ValueError: If the checkpoint is pickled, or a file is damaged or missing; names it.
    """
    hub = {name: options[name] for name in HUB_OPTIONS if name in options}
    quiet = {"_raise_exceptions_for_missing_entries": False}
    single = cached_file(source, SAFE_WEIGHTS_NAME, **hub, **quiet)
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **hub, **quiet)
    if single is None and index is None:
        if any(cached_file(source, name, **hub, **quiet) for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
            raise ValueError(f"{source} holds pickled weights, which can run code when read; convert it to safetensors")
        return None
    if single is None and Path(source).is_dir():
        missing_shards(Path(str(index)))
    files = [single] if single else get_checkpoint_shard_files(source, index, **hub)[0]
    found: Tensors = {}
    for file in files or []:
        try:
            with safe_open(file, framework="pt") as tensors:
                slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
                found |= {name: (x.get_dtype(), tuple(x.get_shape())) for name, x in slices.items()}
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); fetch or save it again") from error
    return found


def checkpoint_shapes(source: str, options: dict) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of `checkpoint_tensors`.

    Raises:
        ValueError: As there, or if a tensor holds codes of a quantized weight.
    """
    tensors = checkpoint_tensors(source, options)
    return None if tensors is None else plain_shapes(tensors, source)


def plain_shapes(tensors: Tensors, source: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor, and refuse those that hold no numbers.

    Raises:
        ValueError: If a tensor is of an integer or 8-bit dtype: without its scales, a code is no weight.
    """
    if codes := sorted(f"{name} ({dtype})" for name, (dtype, _) in tensors.items() if dtype not in PLAIN):
        raise ValueError(
            f"{source} holds codes of quantized weights: {', '.join(codes[:3])}. Give the model in bfloat16 or float32"
        )
    return {name: shape for name, (_, shape) in tensors.items()}


def missing_shards(index: Path) -> None:
    named = set(json.loads(index.read_text())["weight_map"].values())
    if missing := sorted(name for name in named if not (index.parent / name).is_file()):
        raise ValueError(f"{index.parent} lacks {', '.join(missing)}, which {index.name} names; fetch it again")


def with_prefix(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the names as the model with a head has them: one without has no `model.` in front."""
    shapes = {re.sub(WRAPPERS, "", name): shape for name, shape in shapes.items()}
    return {name if name.startswith(("model.", "lm_head.")) else f"model.{name}": x for name, x in shapes.items()}


def renamings(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return what `from_pretrained` must be told of names that a wrapper left its own name in."""
    wrapped = {name: re.sub(WRAPPERS, "", name) for name in names if re.search(WRAPPERS, name)}
    return {"key_mapping": {f"^{re.escape(name)}$": plain for name, plain in wrapped.items()}} if wrapped else {}


def layer_types_of(shapes: dict[str, tuple[int, ...]], layers: int, told: Sequence[str] = ()) -> list[str]:
    """The kind of each layer, from the names of its tensors: a KDA layer has an A_log.

    That an attention layer slides, its tensors do not say: `told`, the config's own list, does.
    """
    told = list(told) if len(told) == layers else ["full_attention"] * layers
    attention = ["sliding_attention" if kind == "sliding_attention" else "full_attention" for kind in told]
    linear = [f"model.layers.{i}.self_attn.A_log" in shapes for i in range(layers)]
    return ["linear_attention" if is_linear else kind for is_linear, kind in zip(linear, attention)]


def check_shapes(
    found: dict[str, tuple[int, ...]],
    wanted: dict[str, tuple[int, ...]],
    tied: set[str],
    source: str = "the checkpoint",
) -> None:
    """Raises ValueError unless the tensors on disk are exactly the model's; names up to five that are not."""
    missing = sorted(wanted.keys() - found.keys() - tied)
    unexpected = sorted(found.keys() - wanted.keys())
    wrong = sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name])
    problems = [f"{name} is missing" for name in missing] + [f"{name} is not expected" for name in unexpected]
    problems += [f"{name} has shape {list(found[name])}, expected {list(wanted[name])}" for name in wrong]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{source} does not fit its config: {'; '.join(problems[:5])}{more}")

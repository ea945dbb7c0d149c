"""Precomputed teacher outputs: the last hidden state of every training and validation sequence, on disk.

`capture` writes them once. `CachedTeacher` reads them, so that match and extend run without the teacher's model
in memory. Hidden states and the teacher's head give its full distribution. Bytes per token:

    int8                        D + D / 16      612 for SmolLM2-135M
    bf16                        2 D           1,152
    logits in bf16, instead     2 W          98,304

Legend: B sequences, T tokens, N = B * T, D model width, W vocabulary.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NoReturn, cast

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from ..config import Stage
from ..data.batches import Batch, MixedBatches
from ..utils.console import with_progress
from ..utils.files import write_text
from .losses import linear_kl
from .steps import segment
from .teachers import LiveTeacher

FORMATS = ("int8", "bf16")
SHARD_BYTES = 2**28
GROUP = 32  # channels that share one scale

Quantized = dict[str, Tensor]  # hidden and, in int8, scale


# ---- writing ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def capture(
    name: str,
    teacher: LiveTeacher,
    folder: Path,
    format: str,
    heldout: list[Batch],
    mixes: dict[str, tuple[Stage, MixedBatches]],
) -> dict[str, float]:
    """Write the teacher's hidden states of all sequences that some stages and the held-out text have.

    An interrupted capture resumes where it stopped.

    Args:
        name: Name of the teacher in the recipe.
        format: int8, with one scale per 32 channels, or bf16.
        heldout: Validation batches.
        mixes: Stages that will read the cache, and their training batches.

    Returns:
        rows, tokens, bytes_per_token, and kl: the divergence of the stored distributions from the exact ones on the
        held-out text, in nats per token.

    Raises:
        ValueError: If the format is unknown, or the folder holds a cache of another format or of other weights.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; choose one of {', '.join(FORMATS)}")
    describe_cache(folder, teacher, {"teacher": name, "format": format, "weights": teacher.fingerprint})
    head = teacher.head()
    save_file({"head": head.detach().cpu().contiguous()}, folder / "head.safetensors")
    writer, kl, heldout_tokens = ShardWriter(folder), 0.0, 0
    batches = chain(((True, batch) for batch in heldout), ((False, batch) for batch in training_batches(mixes)))
    total = len(heldout) + sum(stage.steps * (stage.batch_size // micro_rows(stage)) for stage, _ in mixes.values())
    for is_heldout, batch in with_progress(batches, "capture", total):
        keys = [sequence_key(ids, positions) for ids, positions in zip(batch.input_ids, batch.position_ids)]
        if not is_heldout and writer.known.issuperset(keys):
            continue
        hidden = run_teacher(teacher, batch.to(head.device))
        quantized = quantize(hidden, format)
        if is_heldout:
            stored = dequantize(quantized).to(hidden.dtype).flatten(0, 1)
            kl += float(linear_kl(stored, head, hidden.flatten(0, 1), head)[1]) * batch.input_ids.numel()
            heldout_tokens += batch.input_ids.numel()
        writer.add(keys, quantized)
    writer.flush()
    size = sum(path.stat().st_size for path in folder.glob("rows-*.safetensors"))
    tokens = sum(map(tokens_of, writer.known))
    kl /= max(heldout_tokens, 1)
    return {"rows": len(writer.known), "tokens": tokens, "bytes_per_token": size / tokens, "kl": kl}


def describe_cache(folder: Path, teacher: LiveTeacher, about: dict[str, str]) -> None:
    """Write a cache's targets.json, configuration and tokenizer.

    Raises:
        ValueError: If the folder holds a cache that is described otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "targets.json").is_file() and (existing := read_about(folder)) != about:
        raise ValueError(f"{folder} holds a cache of {existing}, not of {about}. Delete it, or use another folder")
    write_text(folder / "targets.json", json.dumps(about))
    teacher.config.save_pretrained(folder)
    teacher.tokenizer.save_pretrained(folder)


def micro_rows(stage: Stage) -> int:
    """Return the number of sequences that the capture runs at a time."""
    return stage.micro_batch_size or stage.batch_size


def training_batches(mixes: dict[str, tuple[Stage, MixedBatches]]) -> Iterator[Batch]:
    """Yield all micro-batches of some stages."""
    for stage, mix in mixes.values():
        for step in range(stage.steps):
            yield from mix.batch(step).split(micro_rows(stage))


def run_teacher(teacher: LiveTeacher, batch: Batch) -> Tensor:
    """Return the last hidden states [B, T, D]."""
    return teacher.hidden_states(batch).unflatten(0, batch.input_ids.shape)


class ShardWriter:
    """Writes sequences to shards of about SHARD_BYTES, each sequence once."""

    def __init__(self, folder: Path):
        self.folder, self.known = folder, set(read_index(folder))
        self.pending: list[tuple[str, Quantized]] = []
        self.size = 0

    def add(self, keys: list[str], quantized: Quantized) -> None:
        """Add the sequences [B, ...] of a batch that are not known yet, and write a shard if it is full."""
        new = [i for i, key in enumerate(keys) if key not in self.known]
        for i in new:
            self.known.add(keys[i])
            self.pending.append((keys[i], {name: x[i].cpu() for name, x in quantized.items()}))
            self.size += sum(x.nbytes for x in self.pending[-1][1].values())
        if self.size > SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the pending sequences to a new shard. An interrupted write leaves no shard."""
        if self.pending:
            numbers = [int(path.stem.removeprefix("rows-")) for path in self.folder.glob("rows-*.safetensors")]
            path = self.folder / f"rows-{max(numbers, default=-1) + 1:06d}.safetensors"
            unfinished = path.with_suffix(".unfinished")
            tensors = {f"{key}.{name}": x.contiguous() for key, parts in self.pending for name, x in parts.items()}
            save_file(tensors, unfinished)
            unfinished.replace(path)
        self.pending, self.size = [], 0


# ---- the format ------------------------------------------------------------------------------------------------------


def sequence_key(ids_T: Tensor, positions_T: Tensor) -> str:
    """Return a unique name of a sequence: a hash of its tokens and document bounds, and its length."""
    content = torch.stack([ids_T, positions_T]).cpu().numpy().tobytes()
    return f"{hashlib.sha256(content).hexdigest()[:24]}-{len(ids_T)}"


def tokens_of(key: str) -> int:
    """Return the length of the sequence that a key names."""
    return int(key.rpartition("-")[2])


def quantize(hidden_BTD: Tensor, format: str) -> Quantized:
    """Return hidden states as they are stored. In int8, 32 channels share a scale, because a few are much larger."""
    if format == "bf16":
        return {"hidden": hidden_BTD.bfloat16()}
    groups = hidden_BTD.float().unflatten(-1, (-1, math.gcd(hidden_BTD.shape[-1], GROUP)))
    scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-7).half()
    rounded = (groups / scale.float()).round().clamp(-127, 127)
    return {"hidden": rounded.to(torch.int8).flatten(-2), "scale": scale[..., 0]}


def dequantize(quantized: Quantized) -> Tensor:
    """Return stored hidden states in float32."""
    hidden = quantized["hidden"].float()
    if "scale" not in quantized:
        return hidden
    scale = quantized["scale"].float()[..., None]
    return (hidden.unflatten(-1, (scale.shape[-2], -1)) * scale).flatten(-2)


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_about(folder: Path) -> dict[str, str]:
    """Return the contents of targets.json: the teacher's name, the format, and the fingerprint of the weights.

    Raises:
        FileNotFoundError: If the folder holds no cache.
    """
    if not (folder / "targets.json").is_file():
        raise FileNotFoundError(f"{folder} holds no teacher cache. Make one with: deltify capture RECIPE -o {folder}")
    return json.loads((folder / "targets.json").read_text())


def read_index(folder: Path) -> dict[str, Path]:
    """Return the shard of each sequence."""
    index = {}
    for path in sorted(folder.glob("rows-*.safetensors")):
        with safe_open(path, "pt") as file:
            index |= {name.partition(".")[0]: path for name in file.keys() if name.endswith(".hidden")}  # noqa: SIM118
    return index


def check_sequence(folder: Path, index: dict[str, Path], key: str) -> None:
    """Raise ValueError if a cache lacks a sequence."""
    if key not in index:
        raise ValueError(
            f"{folder} lacks a sequence of {tokens_of(key)} tokens that this recipe needs. Run deltify capture again, "
            "with the same recipe and text"
        )


def check_cache(folder: Path, batches: Iterable[Batch]) -> None:
    """Raise ValueError if a cache lacks a sequence of some batches."""
    index = read_index(folder)
    for batch in batches:
        for pair in zip(batch.input_ids, batch.position_ids):
            check_sequence(folder, index, sequence_key(*pair))


class CachedTeacher:
    """A `StageTeacher` that reads the hidden states that `capture` wrote, instead of computing them.

    Args:
        device: Device of the head.
        dtype: Data type of the head and the hidden states.

    Raises:
        FileNotFoundError: If the folder holds no cache.
    """

    can_be_graphed = False

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype):
        self.folder, self.dtype, self.about, self.index = folder, dtype, read_about(folder), read_index(folder)
        self.config = AutoConfig.from_pretrained(folder)
        self.tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(folder))
        self.head_WD = load_file(folder / "head.safetensors")["head"].to(device, dtype)

    @property
    def fingerprint(self) -> str:
        return self.about.get("weights", "")

    def hidden_states(self, batch: Batch, row_group: dist.ProcessGroup | None = None) -> Tensor:
        sequences = [self.read(sequence_key(*pair)) for pair in zip(batch.input_ids, batch.position_ids)]
        own = segment(torch.stack(sequences), row_group)
        return own.to(batch.input_ids.device, self.dtype).flatten(0, 1)

    def read(self, key: str) -> Tensor:
        """Return the hidden states [T, D] of a sequence.

        Raises:
            ValueError: If the cache does not have it.
        """
        check_sequence(self.folder, self.index, key)
        with safe_open(self.index[key], "pt") as file:
            names = [name for name in ("hidden", "scale") if f"{key}.{name}" in file.keys()]  # noqa: SIM118
            return dequantize({name: file.get_tensor(f"{key}.{name}") for name in names})

    def layer_states(self, batch: Batch, row_group: dist.ProcessGroup | None = None) -> list[Tensor]:
        self.refuse("the outputs of the teacher's layers")

    def head(self) -> Tensor:
        return self.head_WD

    def attention_layers(self) -> list[nn.Module]:
        self.refuse("the teacher's attention layers")

    def refuse(self, what: str) -> NoReturn:
        raise TypeError(f"the teacher cache {self.folder} does not hold {what}; use the teacher itself")

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {}

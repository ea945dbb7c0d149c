"""What a teacher has to say, on file: its last hidden states of every row that a run will train on or be judged by.

`capture` writes them once; `open_targets` gives a teacher that looks them up instead of computing them, so that match
and extend run without one in memory. With the teacher's head they give its whole distribution, in D + D / 16 bytes a
token (int8) or 2 D (bf16), where logits in bfloat16 would take 2 W: for SmolLM2-135M 612, 1,152 and 98,304.

Legend: B rows, T tokens, D model width, W vocabulary.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import torch
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from ..config import Stage
from ..conversion.teacher import Teacher, family_of
from ..data.batches import Batch, MixedBatches
from ..utils.console import console
from ..utils.files import write_text
from ..utils.fingerprint import fingerprint
from .losses import linear_kl

FORMATS = ("int8", "bf16")
SHARD_BYTES = 2**28
GROUP = 32  # channels with one scale


@torch.no_grad()
def capture(
    name: str,
    teacher: Teacher,
    folder: Path,
    format: str,
    heldout: list[Batch],
    mixes: dict[str, tuple[Stage, MixedBatches]],
) -> dict[str, float]:
    """Writes the teacher's hidden states of all rows of some stages and the held-out text; goes on where it stopped.

    Args:
        name: of the teacher, as the recipe has it.
        format: int8, with one scale for 32 channels, or bf16.
        heldout: batches that judge during training.
        mixes: each stage that will ask the teacher, and its text.

    Returns:
        rows, tokens, bytes_per_token, and kl: of the stored distributions from the exact ones, nats per token, over the
        held-out rows.

    Raises:
        ValueError: if the format is unknown, or the folder holds targets of another format or of other weights.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; choose one of {', '.join(FORMATS)}")
    folder.mkdir(parents=True, exist_ok=True)
    about = {"teacher": name, "format": format, "weights": fingerprint(teacher.model)}
    if (folder / "targets.json").is_file() and (there := read_about(folder)) != about:
        raise ValueError(f"{folder} holds targets of {there}, not of {about}; delete it, or use another folder")
    write_text(folder / "targets.json", json.dumps(about))
    teacher.config.save_pretrained(folder)
    teacher.tokenizer.save_pretrained(folder)
    head = teacher.model.lm_head.weight
    save_file({"head": head.detach().cpu().contiguous()}, folder / "head.safetensors")
    known, waiting, size = set(read_index(folder)), [], 0
    device, kl, judged = head.device, 0.0, 0
    batches = chain(((True, batch) for batch in heldout), ((False, batch) for batch in training_batches(mixes)))
    total = len(heldout) + sum(stage.steps * (stage.batch_size // micro_rows(stage)) for stage, _ in mixes.values())
    silent = not console.is_terminal
    for is_heldout, batch in track(batches, "capture", total, console=console, transient=True, disable=silent):
        keys = [row_key(ids, positions) for ids, positions in zip(batch.input_ids, batch.position_ids)]
        new = [i for i, key in enumerate(keys) if key not in known]
        if not new and not is_heldout:
            continue
        hidden = read_rows(teacher, batch.to(device))
        packed = pack(hidden, format)
        if is_heldout:
            stored = unpack(packed).to(hidden.dtype).flatten(0, 1)
            kl += float(linear_kl(stored, head, hidden.flatten(0, 1), head)[1]) * batch.input_ids.numel()
            judged += batch.input_ids.numel()
        for i in new:
            known.add(keys[i])
            waiting.append((keys[i], {name: x[i].cpu() for name, x in packed.items()}))
            size += sum(x.nbytes for x in waiting[-1][1].values())
        if size > SHARD_BYTES:
            waiting, size = write_shards(folder, waiting), 0
    write_shards(folder, waiting)
    shards = [path.stat().st_size for path in folder.glob("rows-*.safetensors")]
    tokens = sum(int(key.rpartition("-")[2]) for key in known)
    return {"rows": len(known), "tokens": tokens, "bytes_per_token": sum(shards) / tokens, "kl": kl / max(judged, 1)}


def read_about(folder: Path) -> dict[str, str]:
    """What targets.json says: the teacher's name, the format, and the fingerprint of the weights.

    Raises:
        FileNotFoundError: if there are no targets.
    """
    if not (folder / "targets.json").is_file():
        raise FileNotFoundError(f"there are no targets in {folder}; make them with: deltify capture RECIPE -o {folder}")
    return json.loads((folder / "targets.json").read_text())


def micro_rows(stage: Stage) -> int:
    return stage.micro_batch_size or stage.batch_size


def training_batches(mixes: dict[str, tuple[Stage, MixedBatches]]) -> Iterator[Batch]:
    for stage, mix in mixes.values():
        for step in range(stage.steps):
            yield from mix.batch(step).split(micro_rows(stage))


def read_rows(teacher: Teacher, batch: Batch) -> Tensor:
    """Last hidden states [B, T, D]."""
    output = teacher.model.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    return output.last_hidden_state


def row_key(ids_T: Tensor, positions_T: Tensor) -> str:
    """A name for a row that no other has: a hash of its tokens and document bounds, and its length."""
    content = torch.stack([ids_T, positions_T]).cpu().numpy().tobytes()
    return f"{hashlib.sha256(content).hexdigest()[:24]}-{len(ids_T)}"


def pack(hidden_BTD: Tensor, format: str) -> dict[str, Tensor]:
    """hidden [B, T, D] as it is stored; in int8 with a scale for every 32 channels, as a few are much larger."""
    if format == "bf16":
        return {"hidden": hidden_BTD.bfloat16()}
    groups = hidden_BTD.float().unflatten(-1, (-1, math.gcd(hidden_BTD.shape[-1], GROUP)))
    scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-7).half()
    whole = (groups / scale.float()).round().clamp(-127, 127)
    return {"hidden": whole.to(torch.int8).flatten(-2), "scale": scale[..., 0]}


def unpack(packed: dict[str, Tensor]) -> Tensor:
    hidden = packed["hidden"].float()
    if "scale" not in packed:
        return hidden
    scale = packed["scale"].float()[..., None]
    return (hidden.unflatten(-1, (scale.shape[-2], -1)) * scale).flatten(-2)


def write_shards(folder: Path, rows: list[tuple[str, dict[str, Tensor]]]) -> list:
    """Writes rows to a shard of their own, whole or not at all; returns an empty list to go on with."""
    if rows:
        path = folder / f"rows-{len(list(folder.glob('rows-*.safetensors'))):06d}.safetensors"
        unfinished = path.with_suffix(".unfinished")
        save_file({f"{key}.{name}": x.contiguous() for key, parts in rows for name, x in parts.items()}, unfinished)
        unfinished.replace(path)
    return []


def read_index(folder: Path) -> dict[str, Path]:
    """The shard of each row."""
    index = {}
    for path in sorted(folder.glob("rows-*.safetensors")):
        with safe_open(path, "pt") as file:
            index |= {name.partition(".")[0]: path for name in file.keys() if name.endswith(".hidden")}  # noqa: SIM118
    return index


@dataclass
class StoredModel:
    """In the place of a teacher's model: `model(input_ids, position_ids)` looks its hidden states up."""

    folder: Path
    index: dict[str, Path]
    lm_head: SimpleNamespace
    config: object
    dtype: torch.dtype

    @property
    def model(self) -> "StoredModel":
        return self

    def __call__(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        rows = [self.row(row_key(*row)) for row in zip(input_ids, position_ids)]
        return SimpleNamespace(last_hidden_state=torch.stack(rows).to(input_ids.device, self.dtype))

    def row(self, key: str) -> Tensor:
        if key not in self.index:
            raise ValueError(
                f"{self.folder} has no targets for a row of {key.rpartition('-')[2]} tokens that this recipe asks for; "
                "run deltify capture again, with the same recipe and text"
            )
        with safe_open(self.index[key], "pt") as file:
            names = [name for name in ("hidden", "scale") if f"{key}.{name}" in file.keys()]  # noqa: SIM118
            return unpack({name: file.get_tensor(f"{key}.{name}") for name in names})


def open_targets(folder: Path, device: torch.device, dtype: torch.dtype) -> Teacher:
    """A teacher that only knows what `capture` wrote.

    Raises:
        FileNotFoundError: if there are no targets.
    """
    read_about(folder)
    config = AutoConfig.from_pretrained(folder)
    head = load_file(folder / "head.safetensors")["head"].to(device, dtype)
    model = StoredModel(folder, read_index(folder), SimpleNamespace(weight=head), config, dtype)
    return Teacher(model, AutoTokenizer.from_pretrained(folder), family_of(config))

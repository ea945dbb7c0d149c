"""Batches of token sequences from token files, as a pure function of the step.

Resuming a run needs nothing but the step number.

Legend: B batch, T tokens of a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .token_files import TokenFile

CYCLE = 1000  # sequences in which each file appears as often as its weight says


@dataclass(frozen=True)
class Batch:
    """Sequences of tokens. A sequence may hold several documents, whose positions each start at 0."""

    input_ids: Tensor  # [B, T] int64
    position_ids: Tensor  # [B, T] int64
    loss_mask: Tensor | None = None  # [B, T] bool: whether the prediction made at a token counts; None if all do
    counted: Tensor | None = None  # fraction of the whole step's tokens, over all ranks, that count; None if all do
    within: Tensor | None = None  # fraction that counts and is within the teacher's context window; None if unknown

    def __post_init__(self):
        if (self.loss_mask is None) != (self.counted is None):
            raise ValueError("a batch has loss_mask and counted, or neither of them")
        if self.within is not None and self.counted is None:
            raise ValueError("a batch that has within has loss_mask and counted, too")

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of the batch, in a fixed order."""
        tensors = (self.input_ids, self.position_ids, self.loss_mask, self.counted, self.within)
        return [x for x in tensors if x is not None]

    @property
    def same_document(self) -> Tensor:
        """Whether token t + 1 belongs to the document of token t, [B, T - 1]."""
        return self.position_ids[:, 1:] > 0

    def split(self, rows: int) -> "list[Batch]":
        """Return micro-batches of `rows` sequences."""
        parts = [self.input_ids.split(rows), self.position_ids.split(rows)]
        if self.loss_mask is not None:
            parts.append(self.loss_mask.split(rows))
        return [Batch(*part, counted=self.counted, within=self.within) for part in zip(*parts)]

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on a device."""
        return Batch(*(x.to(device) for x in self.tensors))


@dataclass(frozen=True)
class MixedBatches:
    """Batches of sequences from weighted token files. Every epoch walks each file in a new random order.

    If a file's documents are to fill sequences (`TokenFile.lengths`), a sequence is the end of one document, of the
    smallest length that is enough. Sequences of any other file are cut without regard to documents.
    """

    files: list[TokenFile]
    weights: list[float]
    length: int  # T
    rows: int  # sequences of a whole batch, over all ranks
    seed: int
    context_window: int | None = None  # of the teacher, in tokens; batches of longer sequences have `Batch.within`
    names: Sequence[str] = ()  # of the files, for errors
    field: str = "sequence_length"  # of the recipe, which has the length; for errors

    def __post_init__(self):
        for name, file in zip(self.names or ["a source"] * len(self.files), self.files, strict=True):
            if len(file) < self.length:
                raise ValueError(
                    f"{name} has {len(file)} tokens, fewer than one sequence of {self.length}. Give more text, or "
                    f"lower {self.field}"
                )
            if file.lengths and not len(self.starts(file)):
                raise ValueError(
                    f"{name}: no document of sparse recall text fills a sequence of {self.length} tokens. Give more "
                    f"text, raise data.max_tokens if it is set, or give a {self.field} up to {max(file.lengths)}"
                )

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> Batch:
        """Return the part of the batch of `step` that belongs to `rank`.

        Raises:
            ValueError: If the batch cannot be divided among the ranks.
        """
        if self.rows % ranks:
            raise ValueError(
                f"a batch of {self.rows} sequences cannot be divided among {ranks} ranks. Make batch_size a multiple "
                f"of {ranks}"
            )
        share = self.rows // ranks
        own = slice(rank * share, (rank + 1) * share)
        places = [self.place(index) for index in range(step * self.rows, (step + 1) * self.rows)]
        rows = [ids_and_positions(*place, self.length) for place in places[own]]
        ids, positions = (torch.from_numpy(np.stack(part)) for part in zip(*rows))
        window = self.length if self.context_window is None else self.context_window
        if self.length <= window and all(file.loss_mask is None for file in self.files):
            return Batch(ids, positions)
        # of all ranks, so that every token that counts has the same weight in the step
        masks = np.stack([mask_window(*place, self.length) for place in places])
        fractions = [masks.mean()]
        if self.length > window:
            inside = np.stack([positions_window(*place, self.length) < window for place in places])
            fractions.append((masks & inside).mean())
        return Batch(ids, positions, torch.from_numpy(masks[own]), *torch.tensor(fractions, dtype=torch.float32))

    def place(self, index: int) -> tuple[TokenFile, int]:
        """Return the file of the sequence with this global index, and where it begins there."""
        which, turn = self.source_of(index)
        epoch, place = divmod(turn, self.counts[which])
        if which not in self.orders or self.orders[which][0] != epoch:
            self.orders[which] = epoch, self.order(which, epoch)
        return self.files[which], int(self.orders[which][1][place])

    def order(self, which: int, epoch: int) -> np.ndarray:
        """Return where the sequences of a file begin in an epoch, in order."""
        file, rng = self.files[which], np.random.default_rng([self.seed, which, epoch])
        if file.lengths:
            return rng.permutation(self.starts(file))
        # a new offset each epoch, so that sequences do not always break at the same tokens
        offset = int(rng.integers(0, len(file) % self.length + 1))
        return offset + self.length * rng.permutation(len(file) // self.length)

    def starts(self, file: TokenFile) -> np.ndarray:
        """Return where the sequences of a file begin whose documents are to fill sequences."""
        enough = min((length for length in file.lengths if length >= self.length), default=None)
        return file.bounds[1:][np.diff(file.bounds) == enough] - self.length

    @cached_property
    def counts(self) -> list[int]:
        """The number of sequences of each file in an epoch."""
        return [len(self.starts(file)) if file.lengths else len(file) // self.length for file in self.files]

    @cached_property
    def orders(self) -> dict[int, tuple[int, np.ndarray]]:
        """The latest epoch of each file that was read, and its `order`: shuffling a large file takes a while."""
        return {}

    def source_of(self, index: int) -> tuple[int, int]:
        """Return the file of a sequence, and the number of earlier sequences from that file."""
        cycle, place = divmod(index, len(self.cycle))
        which = int(self.cycle[place])
        return which, int(cycle * (self.cycle == which).sum() + (self.cycle[:place] == which).sum())

    @cached_property
    def cycle(self) -> np.ndarray:
        """The files of CYCLE consecutive sequences, shuffled: each as often as its weight says, at least once."""
        shares = np.asarray(self.weights) / sum(self.weights)
        counts = np.maximum(1, np.round(CYCLE * shares)).astype(int) if len(shares) > 1 else [1]
        return np.random.default_rng(self.seed).permutation(np.repeat(np.arange(len(counts)), counts))


def ids_and_positions(file: TokenFile, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and positions [length] int64 of consecutive tokens of a token file."""
    return file.tokens[start : start + length].astype(np.int64), positions_window(file, start, length)


def positions_window(file: TokenFile, start: int, length: int) -> np.ndarray:
    """Return the positions of consecutive tokens of a token file, [length] int64.

    Those of a document that begins before `start` count from 0 at `start`.
    """
    places = np.arange(start, start + length)
    begins = file.bounds[np.searchsorted(file.bounds, places, side="right") - 1]
    return places - np.maximum(begins, start)


def mask_window(file: TokenFile, start: int, length: int) -> np.ndarray:
    """Return whether the predictions made at consecutive tokens of a token file count, [length] bool."""
    if file.loss_mask is None:
        return np.ones(length, bool)
    return file.loss_mask[start : start + length].astype(bool)


def heldout_batches(files: list[TokenFile], length: int, rows: int, limit: int) -> list[Batch]:
    """Return batches of `rows` sequences of `length` tokens from the beginning of each file, in order.

    All their tokens count, whatever the files' masks say.

    Args:
        files: Validation texts.
        length: Number of tokens of a sequence.
        rows: Number of sequences of a batch; the last one may have fewer.
        limit: Number of tokens in all, an equal share from each file. Each file gives at least one sequence.

    Raises:
        ValueError: If a file is shorter than one sequence.
    """
    stretches = []
    for file in files:
        if len(file) < length:
            raise ValueError(
                f"a held-out text has {len(file)} tokens, fewer than one sequence of {length}. Lower "
                "run.heldout_sequence_length, or set data.heldout to a longer validation text"
            )
        count = max(1, min(limit // len(files), len(file)) // length)
        stretches += [ids_and_positions(file, index * length, length) for index in range(count)]
    groups = (stretches[start : start + rows] for start in range(0, len(stretches), rows))
    return [Batch(*(torch.from_numpy(np.stack(part)) for part in zip(*group))) for group in groups]

"""Text to packed token files, and from them batches that are a pure function of the step.

A token file is a folder: `tokens.bin` (uint16 or uint32, the documents one after the other), `bounds.npy` ([documents
+ 1] int64) and `meta.json` (what it was made from, and checksums). Resuming a run needs nothing but the step number.

Legend: B batch, T tokens of a row.
"""

import hashlib
import json
import math
import time
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config import DataSpec
from ..utils.console import console, log
from ..utils.files import digest, make_once
from . import recall
from .encoding import encode_all
from .sources import BUILT_IN, REPAIRED, Piece, pieces, scattered_over, text_files

HELDOUT_TOKENS = 2**16  # held out of a source even if fewer are asked for, so that most recipes share its token files
PATIENCE = 1000  # documents in a row without a held-out one (chance 5e-23), after which a source must repeat itself


# ---- token files -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenFile:
    """Documents as one array of token ids, read from disk as needed."""

    tokens: np.ndarray  # [total] uint16 or uint32
    bounds: np.ndarray  # [documents + 1] int64
    digest: str = ""  # differs when the tokens or bounds do

    def __len__(self) -> int:
        return len(self.tokens)


class TokenWriter:
    """A token file that grows by documents; after `finish`, `open_tokens` reads it."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.tokenizer = folder, tokenizer
        largest = max(tokenizer.get_vocab().values(), default=0)  # some numbers may have no token
        self.dtype = np.dtype(np.uint16 if largest < 2**16 else np.uint32)
        self.bounds = array("q", [0])
        self.out = (folder / "tokens.bin").open("wb")

    def __len__(self) -> int:
        return self.bounds[-1]

    def extend(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents of these lengths; those without tokens are left out."""
        self.out.write(tokens.tobytes())
        ends = len(self) + np.cumsum(lengths[lengths > 0])
        self.bounds.frombytes(ends.astype(np.int64).tobytes())

    def move(self, cut: int, to: "TokenWriter") -> None:
        """Moves the tokens from `cut` on to the end of another file; a document cut in two becomes two."""
        size = self.dtype.itemsize
        self.out.flush()
        to.out.write(np.fromfile(self.folder / "tokens.bin", self.dtype, offset=cut * size).tobytes())
        self.out.truncate(cut * size)
        first, shift = bisect_left(self.bounds, cut), len(to) - cut
        to.bounds.extend(bound + shift for bound in self.bounds[first:] if bound > cut)
        self.bounds = self.bounds[:first] + array("q", [cut])

    def finish(self, about: dict) -> None:
        self.out.close()
        np.save(self.folder / "bounds.npy", np.asarray(self.bounds, np.int64))
        meta = {"tokenizer": tokenizer_fingerprint(self.tokenizer), "dtype": self.dtype.name}
        meta |= {"documents": len(self.bounds) - 1, "tokens": len(self), "digest": digest_of(self.folder)} | about
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=1))


def tokenize(
    texts: Iterable[str | Piece],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    max_tokens: int | None = None,
    origin: dict | None = None,
    processes: int | None = None,
) -> TokenFile:
    """Writes the token file `folder` from texts, each ended by the end-of-sequence token, and opens it.

    A folder appears only when complete. One made from the same tokenizer and files is opened as it is; `folder` should
    therefore name the text it holds.

    Special tokens that a text spells become those tokens, as people train on rendered chats. meta.json counts them in
    `special_tokens_in_text`, and replaced characters (`text.documents`) in `replaced_characters`.

    Args:
        texts: Texts, or the pieces of a source (`text.pieces`), which is faster.
        max_tokens: The file ends with the document that reaches them.
        origin: Where the texts are from (`origin_of`), kept in meta.json.
        processes: Number of processes that tokenize. Defaults to the number of cores. The file is the same for any.

    Raises:
        ValueError: if there is no text, or the folder was made with another tokenizer or from files that changed since.
    """
    origin = origin or {}

    def make(unfinished: Path) -> None:
        writer = TokenWriter(unfinished, tokenizer)
        name = origin.get("source", folder.name)
        found = write_documents(texts, writer, None, max_tokens, 0, name, processes)
        if not len(writer):
            raise ValueError(f"there is no text for {folder.name!r}: every document is empty, or there is none")
        writer.finish(origin | {"max_tokens": max_tokens, "split": "all"} | found)

    tokens = make_once(folder, make, open_tokens)
    check_made_from(folder, folder, tokenizer, origin)
    return tokens


def tokenize_split(
    texts: Iterable[str | Piece],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    max_tokens: int | None = None,
    heldout_tokens: int = HELDOUT_TOKENS,
    heldout_sequence_length: int = 1,
    origin: dict | None = None,
    processes: int | None = None,
) -> tuple[TokenFile, TokenFile]:
    """The token files `folder`/train and `folder`/heldout, written as `tokenize` does, in one pass over the texts.

    Reading ends when training has `max_tokens` and `heldout_tokens` are held out; what either has no room for is left
    out. Where the documents are so few that one side has none of them, or `heldout_sequence_length` tokens are not held
    out, a twentieth of the tokens is held out instead, or `heldout_sequence_length` if that is more. Both meta.json
    count what was found in the documents of both.

    Raises:
        ValueError: as `tokenize` does, or if there is too little text to hold some out.
    """
    origin, parts = origin or {}, ("train", "heldout")

    def make(unfinished: Path) -> None:
        train, held = (TokenWriter(unfinished / part, tokenizer) for part in parts)
        name = origin.get("source", folder.name)
        found = write_documents(texts, train, held, max_tokens, heldout_tokens, name, processes)
        if not len(train) or len(held) < heldout_sequence_length:
            total = len(train) + len(held)
            if not total:
                raise ValueError(f"there is no text in {name!r}: every document is empty, or there is none")
            share = max(total // 20, heldout_sequence_length)
            if 2 * share > max(len(train), len(held)):
                raise ValueError(
                    f"{name!r} has {total} tokens, too few to hold out {share} of them; give data.heldout, a text that "
                    "judges, or more text"
                )
            if len(train):
                train.move(len(train) - share, held)
            else:
                held.move(share, train)
        for writer in (train, held):
            writer.finish(origin | {"max_tokens": max_tokens, "split": writer.folder.name} | found)

    train, heldout = make_once(folder, make, lambda whole: [open_tokens(whole / part) for part in parts])
    for part in parts:
        check_made_from(folder / part, folder, tokenizer, origin)
    return train, heldout


def write_documents(
    texts: Iterable[str | Piece],
    train: TokenWriter,
    held: TokenWriter | None,
    max_tokens: int | None,
    heldout_tokens: int,
    name: str,
    processes: int | None,
) -> dict:
    """Tokenize texts to one file, or to two, until training has `max_tokens` and `heldout_tokens` are held out.

    Returns:
        What meta.json says of the documents that were written: special_tokens_in_text, replaced_characters.
    """
    judged = train if held is None else held  # without a second file, no document is for it
    special, replaced, first, skipped = Counter(), 0, "", 0

    def wanted() -> tuple[bool, bool]:
        return max_tokens is None or len(train) < max_tokens, len(judged) < heldout_tokens

    options = {"split": held is not None, "wanted": wanted, "processes": processes}
    parts = encode_all(texts, train.tokenizer, train.dtype.name, **options)
    with closing(parts), tokenize_bar(name, max_tokens) as show:
        for part in parts:
            trains = np.where(part.held, 0, part.lengths)
            judges = part.lengths - trains
            room = before_limit(trains, len(train), max_tokens)
            skips = run_lengths(~room & ~part.held, skipped)
            ends = np.flatnonzero(skips >= PATIENCE)[:1]
            skipped = int(skips[-1]) if len(skips) else skipped
            kept = np.where(part.held, before_limit(judges, len(judged), heldout_tokens), room)
            for end in ends:
                kept[end + 1 :] = False
            here, there = trains[kept], judges[kept]
            train.extend(part.tokens[: here.sum()], here)
            if held is not None:
                held.extend(part.tokens[trains.sum() :][: there.sum()], there)
            special.update(part.spelled[kept[part.spelled[:, 0]], 1].tolist())
            for document, count, place in part.repaired:
                if kept[document]:
                    replaced, first = replaced + count, first or place
            show(part.size, len(train), part.done)
            if not wanted()[0] and (not wanted()[1] or len(ends)):
                break
            if part.error is not None:
                raise part.error
    names = train.tokenizer.convert_ids_to_tokens(sorted(special))
    found = {token: special[i] for token, i in zip(names, sorted(special))}
    if replaced:
        log(f"{name}: {REPAIRED}; {replaced:,} were, the first in {first}")
    if found:
        counts = ", ".join(f"{token} {count:,}" for token, count in found.items())
        log(f"{name}: the text spells special tokens, which stay special tokens: {counts}")
    return {"special_tokens_in_text": found, "replaced_characters": replaced}


def before_limit(lengths: np.ndarray, tokens: int, limit: int | None) -> np.ndarray:
    """Tell of each document whether it begins before a file with `tokens` tokens so far has reached its limit."""
    return tokens + np.cumsum(lengths) - lengths < (math.inf if limit is None else limit)


def run_lengths(flags: np.ndarray, before: int) -> np.ndarray:
    """Return how many flags in a row are set up to each, with `before` ahead of the first."""
    index = np.arange(len(flags))
    last = np.maximum.accumulate(np.where(flags, -1 - before, index))
    return index - last


@contextmanager
def tokenize_bar(name: str, max_tokens: int | None) -> Iterator[Callable[[int, int, float | None], None]]:
    """Show megabytes of text, their rate and the time left, where the whole is known; silent without a terminal."""
    shown = "tokenize {task.description}  {task.fields[size]:,.0f} MB, {task.fields[speed]:,.1f} MB/s"
    columns = (TextColumn(shown, markup=False), BarColumn(), TimeRemainingColumn())
    size, started = 0, time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name.rpartition("/")[2], total=None, size=0.0, speed=0.0)

        def show(more: int, tokens: int, done: float | None) -> None:
            nonlocal size
            size += more
            parts = [part for part in (done, tokens / max_tokens if max_tokens else None) if part is not None]
            speed = size / 1e6 / (time.perf_counter() - started)
            known = {"total": 1.0, "completed": min(1.0, max(parts))} if parts else {}
            bar.update(task, size=size / 1e6, speed=speed, **known)

        yield show


def check_made_from(folder: Path, whole: Path, tokenizer: PreTrainedTokenizerBase, origin: dict) -> None:
    """Raises ValueError if a token file, part of the folder `whole`, is of another tokenizer or of other text."""
    meta = json.loads((folder / "meta.json").read_text())
    if meta["tokenizer"] != tokenizer_fingerprint(tokenizer):
        raise ValueError(f"{whole} was made with another tokenizer; delete it, or name another data.folder")
    # text that is gone has not changed: its tokens go on to serve
    if origin.get("files") and meta.get("files") != origin["files"]:
        raise ValueError(
            f"the text at {origin['source']} changed since it was tokenized into {whole}; delete that folder, or name "
            "another data.folder"
        )


def open_tokens(folder: Path) -> TokenFile:
    """Open a token file.

    Raises:
        ValueError: If it is not whole; says what is wrong.
    """
    if missing := [name for name in ("meta.json", "tokens.bin", "bounds.npy") if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}")
    meta, found = json.loads((folder / "meta.json").read_text()), digest_of(folder)
    if meta["digest"] != found:
        raise ValueError(f"{folder} is damaged: its checksum is not the one that was written")
    tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
    return TokenFile(tokens, np.load(folder / "bounds.npy"), found)


def digest_of(folder: Path) -> str:
    """A checksum of a token file's tokens and bounds."""
    return digest(folder / "tokens.bin")[:32] + digest(folder / "bounds.npy")[:32]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash that differs whenever two tokenizers give a document different ids, its end included.

    Of a tokenizer that works in Python it covers class, vocabulary and special tokens; its rules are code.
    """
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules |= {"padding": None, "truncation": None}  # those of the last call
    else:
        rules = [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map]
    facts = json.dumps([rules, tokenizer.eos_token_id], default=str)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


# ---- sources ---------------------------------------------------------------------------------------------------------


def open_data(
    spec: DataSpec,
    teacher_name: str,
    tokenizer: PreTrainedTokenizerBase,
    heldout_tokens: int,
    heldout_sequence_length: int = 512,
) -> tuple[list[TokenFile], list[TokenFile]]:
    """The training sources and the held-out texts as token files, made at the first use.

    Args:
        heldout_tokens: that will judge; 65,536 or so are held out of each source at least, if it has them.
        heldout_sequence_length: tokens in a row of them, for sources of too few documents to hold out whole ones.

    Of recall:SOURCE nothing is held out: its text is SOURCE's.

    Raises:
        ValueError: if a source has too little text, or changed since it was tokenized.
    """
    room = max(heldout_tokens, HELDOUT_TOKENS)
    teacher = Path(teacher_name).expanduser()
    folder = Path(spec.folder) / short_name(str(teacher.resolve()) if teacher.exists() else teacher_name)
    if spec.max_tokens:
        folder = folder.with_name(f"{folder.name}-{spec.max_tokens}")
    train, held = [], []
    for source in spec.train:
        origin = origin_of(source)
        name, limits = short_name(origin["source"]), {"max_tokens": spec.max_tokens, "origin": origin}
        if spec.heldout is None and not scattered_over(source):
            limits |= {"heldout_tokens": room, "heldout_sequence_length": heldout_sequence_length}
            pair = tokenize_split(pieces(source), tokenizer, folder / f"{name}-split{room}", **limits)
            train.append(pair[0])
            held.append(pair[1])
        else:
            train.append(tokenize(pieces(source), tokenizer, folder / f"{name}-all", **limits))
    if spec.heldout is None and not held:
        raise ValueError(f"nothing is held out of {', '.join(spec.train)}; give data.heldout, a text that judges")
    if spec.heldout is not None:
        origin = origin_of(spec.heldout)
        here = folder / f"{short_name(origin['source'])}-first{room}"
        held = [tokenize(pieces(spec.heldout), tokenizer, here, max_tokens=room, origin=origin)]
    return train, held


def origin_of(source: str) -> dict:
    """What meta.json says of a source: `source`, a path made absolute, and `files`, which differs when the files do.

    `files` is a hash of their names, sizes and times of change; empty for text that is in no files, None for files that
    are gone.
    """
    if source == recall.RECALL:
        return {"source": source, "files": digest(Path(recall.__file__))[:16]}
    if source in BUILT_IN or source.startswith("hf:"):
        return {"source": source, "files": ""}
    if inner := scattered_over(source):
        parts = [origin_of(part) for part in (recall.RECALL, inner)]
        files = None if parts[1]["files"] is None else f"{parts[0]['files']} {parts[1]['files']}"
        return {"source": f"{recall.RECALL}:{parts[1]['source']}", "files": files}
    path = Path(source).expanduser().resolve()
    if not path.exists():
        return {"source": str(path), "files": None}
    states = [(str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns) for f in text_files(str(path))]
    return {"source": str(path), "files": hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]}


def short_name(text: str) -> str:
    """A file name for a source or a model: its last part to read, and a hash of the whole to tell it from others."""
    return f"{file_name(text.rsplit('/', 1)[-1])[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def file_name(text: str) -> str:
    """A text as a file name."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in text).strip("._")


# ---- batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor  # [B, T] int64
    position_ids: Tensor  # [B, T] int64; starts again at 0 with each document

    @property
    def same_document(self) -> Tensor:
        """[B, T - 1]: whether token t + 1 goes on with the document of token t."""
        return self.position_ids[:, 1:] > 0

    def split(self, rows: int) -> "list[Batch]":
        """Micro-batches of `rows` rows."""
        return [Batch(*pair) for pair in zip(self.input_ids.split(rows), self.position_ids.split(rows))]

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(self.input_ids.to(device), self.position_ids.to(device))


@dataclass(frozen=True)
class Mix:
    """Rows of T tokens from weighted token files; each file is walked in a new random order every epoch."""

    files: list[TokenFile]
    weights: list[float]
    length: int
    rows: int  # of a whole batch, over all ranks
    seed: int

    def __post_init__(self):
        for file in self.files:
            if len(file) < self.length:
                raise ValueError(f"a source has {len(file)} tokens, fewer than one row of length={self.length}")

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> Batch:
        """Rank `rank`'s share of the batch of `step`; depends on nothing else."""
        if self.rows % ranks:
            raise ValueError(f"{self.rows} rows cannot be shared by {ranks} ranks; make the batch a multiple of them")
        share = self.rows // ranks
        first = step * self.rows + rank * share
        rows = [self.row(index) for index in range(first, first + share)]
        ids, positions = (torch.from_numpy(np.stack(part)) for part in zip(*rows))
        return Batch(ids, positions)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and positions of the row with this global index, both [T] int64."""
        which, turn = self.source_of(index)
        file = self.files[which]
        epoch, place = divmod(turn, len(file) // self.length)
        if which not in self.orders or self.orders[which][0] != epoch:
            self.orders[which] = epoch, *self.order(which, epoch)
        _, offset, windows = self.orders[which]
        return window(file, offset + int(windows[place]) * self.length, self.length)

    def order(self, which: int, epoch: int) -> tuple[int, np.ndarray]:
        """Where the first window of a file begins in an epoch, and the order of its windows."""
        windows, spare = divmod(len(self.files[which]), self.length)
        random = np.random.default_rng([self.seed, which, epoch])
        # a new offset each epoch, so that rows do not always break at the same tokens
        return int(random.integers(0, spare + 1)), random.permutation(windows)

    @cached_property
    def orders(self) -> dict[int, tuple[int, int, np.ndarray]]:
        """Of each file, the epoch that was asked for last, and its order: to shuffle a large file takes a while."""
        return {}

    def source_of(self, index: int) -> tuple[int, int]:
        """The file of a row, and how many rows that file gave before."""
        cycle, place = divmod(index, len(self.cycle))
        which = int(self.cycle[place])
        return which, int(cycle * (self.cycle == which).sum() + (self.cycle[:place] == which).sum())

    @cached_property
    def cycle(self) -> np.ndarray:
        """The files of 1,000 consecutive rows: each as often as its weight says (at least once), shuffled."""
        shares = np.asarray(self.weights) / sum(self.weights)
        counts = np.maximum(1, np.round(1000 * shares)).astype(int) if len(shares) > 1 else [1]
        return np.random.default_rng(self.seed).permutation(np.repeat(np.arange(len(counts)), counts))


def window(file: TokenFile, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and positions [length] int64 of a stretch of a token file; a document cut at the start counts from 0."""
    ids = file.tokens[start : start + length].astype(np.int64)
    here = np.arange(start, start + length)
    begins = file.bounds[np.searchsorted(file.bounds, here, side="right") - 1]
    return ids, here - np.maximum(begins, start)


def heldout_batches(files: list[TokenFile], length: int, rows: int, limit: int) -> list[Batch]:
    """The first `limit` tokens of some files, an equal share of each, in batches of `rows` x `length`, in order."""
    stretches = []
    for file in files:
        if len(file) < length:
            raise ValueError(
                f"a held-out text has {len(file)} tokens, fewer than one row of length={length}; lower "
                "run.heldout_sequence_length, or give data.heldout, a longer text that judges"
            )
        count = max(1, min(limit // len(files), len(file)) // length)
        stretches += [window(file, index * length, length) for index in range(count)]
    groups = (stretches[start : start + rows] for start in range(0, len(stretches), rows))
    return [Batch(*(torch.from_numpy(np.stack(part)) for part in zip(*group))) for group in groups]

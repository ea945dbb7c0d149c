"""Tokenize text into token files.

A token file is a folder: `tokens.bin` (uint16 or uint32, the documents one after the other), `bounds.npy` ([documents
+ 1] int64) and `meta.json` (what it was made from, and checksums). That of chats has `loss_mask.bin`, too (uint8 for
each token: 1 if the prediction made at it counts, because the next token belongs to an answer).
"""

import hashlib
import json
import math
import time
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from ..config import DataSpec
from ..utils.console import console, log
from ..utils.files import create_once, digest
from . import recall, sparse_recall
from .chats import Chats, encode_chats
from .encoding import encode_all
from .sources import BUILT_IN, CHAT, REPAIRED, Piece, chats_of, hub_parts, pieces, recall_over, text_files

HELDOUT_TOKENS = 2**16  # smallest number reserved per source, so that most recipes can share its token files
# One document in 20 is held out. After this many without one (probability 5e-23) the source repeats itself.
MAX_SKIPPED_DOCUMENTS = 1000


# ---- token files -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenFile:
    """Documents as one array of token ids, read from disk as needed."""

    tokens: np.ndarray  # [total] uint16 or uint32
    bounds: np.ndarray  # [documents + 1] int64
    digest: str = ""  # differs when the tokens or bounds do
    lengths: tuple[int, ...] = ()  # number of tokens that documents may have, if each is to fill a sequence
    loss_mask: np.ndarray | None = None  # [total] uint8: whether the prediction made at a token counts; None if all do

    def __len__(self) -> int:
        return len(self.tokens)


class TokenWriter:
    """Write a token file, document by document; after `finish`, `open_tokens` reads it.

    Args:
        folder: Folder to write.
        tokenizer: Tokenizer of the teacher.
        masked: Whether it has a loss mask.
    """

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, masked: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.tokenizer = folder, tokenizer
        largest = max(tokenizer.get_vocab().values(), default=0)  # ids may have gaps
        self.dtype = np.dtype(np.uint16 if largest < 2**16 else np.uint32)
        self.bounds = array("q", [0])
        self.out = (folder / "tokens.bin").open("wb")
        self.mask_out = (folder / "loss_mask.bin").open("wb") if masked else None

    def __len__(self) -> int:
        return self.bounds[-1]

    def extend(self, tokens: np.ndarray, lengths: np.ndarray, loss_mask: np.ndarray | None = None) -> None:
        """Append documents of these lengths. Those without tokens are left out."""
        self.out.write(tokens.tobytes())
        if self.mask_out is not None and loss_mask is not None:
            self.mask_out.write(loss_mask.astype(np.uint8).tobytes())
        ends = len(self) + np.cumsum(lengths[lengths > 0])
        self.bounds.frombytes(ends.astype(np.int64).tobytes())

    def move(self, cut: int, to: "TokenWriter") -> None:
        """Move the tokens from index `cut` to the end of another file. A document that is cut becomes two."""
        for own, other, dtype in ((self.out, to.out, self.dtype), (self.mask_out, to.mask_out, np.dtype(np.uint8))):
            if own is not None and other is not None:
                own.flush()
                other.write(np.fromfile(own.name, dtype, offset=cut * dtype.itemsize).tobytes())
                own.truncate(cut * dtype.itemsize)
        first, shift = bisect_left(self.bounds, cut), len(to) - cut
        to.bounds.extend(bound + shift for bound in self.bounds[first:] if bound > cut)
        self.bounds = self.bounds[:first] + array("q", [cut])

    def truncate(self, length: int) -> None:
        """Drop all tokens from index `length` on."""
        for own, dtype in ((self.out, self.dtype), (self.mask_out, np.dtype(np.uint8))):
            if own is not None and length < len(self):
                own.flush()
                own.truncate(length * dtype.itemsize)
        if length < len(self):
            self.bounds = self.bounds[: bisect_left(self.bounds, length)] + array("q", [length])

    def finish(self, about: dict) -> None:
        """Close the file and write bounds.npy and meta.json, which also gets the entries `about`."""
        self.out.close()
        if self.mask_out is not None:
            self.mask_out.close()
        np.save(self.folder / "bounds.npy", np.asarray(self.bounds, np.int64))
        meta = {"tokenizer": tokenizer_fingerprint(self.tokenizer), "dtype": self.dtype.name}
        meta |= {"documents": len(self.bounds) - 1, "tokens": len(self), "digest": digest_of(self.folder)} | about
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=1))


def tokenize(
    texts: Iterable[str | Piece] | Chats,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    max_tokens: int | None = None,
    origin: dict | None = None,
    processes: int | None = None,
) -> TokenFile:
    """Write the token file `folder` from texts, each ended by the end-of-sequence token, and open it.

    The folder appears only when it is complete. An existing one is opened if it was made with the same tokenizer from
    the same files. The texts are not compared, so `folder` should name the text it holds.

    The names of special tokens in a text become those tokens, so that rendered chats can be training text. meta.json
    counts them in `special_tokens_in_text`, and replaced characters (see `sources.documents`) in `replaced_characters`.

    Args:
        texts: Texts, or the pieces of a source (`sources.pieces`), which is faster. Or chats, whose token file has a
            loss mask.
        tokenizer: Tokenizer of the teacher.
        folder: Path of the token file.
        max_tokens: Number of tokens after which the file ends, with a whole document. Defaults to no limit.
        origin: Where the texts come from (`origin_of`), kept in meta.json.
        processes: Number of processes that tokenize. Defaults to the number of cores. The file is the same for any.

    Raises:
        ValueError: If there is no text, or the folder was made with another tokenizer or from files that changed since.
    """
    origin = origin_with_template(origin or {}, texts, tokenizer)

    def make(unfinished: Path) -> None:
        writer = TokenWriter(unfinished, tokenizer, isinstance(texts, Chats))
        name = origin.get("source", folder.name)
        counts = write_documents(texts, writer, None, max_tokens, 0, name, processes)
        if not len(writer):
            raise ValueError(f"there is no text for {folder.name!r}: every document is empty, or there is none")
        writer.finish(origin | {"max_tokens": max_tokens, "split": "all"} | counts)

    tokens = create_once(folder, make, open_tokens)
    check_made_from(folder, folder, tokenizer, origin)
    return tokens


def tokenize_split(
    texts: Iterable[str | Piece] | Chats,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    max_tokens: int | None = None,
    heldout_tokens: int = HELDOUT_TOKENS,
    heldout_sequence_length: int = 1,
    origin: dict | None = None,
    processes: int | None = None,
) -> tuple[TokenFile, TokenFile]:
    """Return the token files `folder`/train and `folder`/heldout, written as by `tokenize` in one pass over the texts.

    Reading ends when training has `max_tokens` and `heldout_tokens` are held out. A document for a side that is already
    full is left out. Where there are few documents, one side may get none, or fewer than `heldout_sequence_length`
    tokens may be held out. Then 5 % of the tokens are held out instead, or `heldout_sequence_length` if that is more.
    The counts in each meta.json cover the documents of both files. `cut` says whether tokens were held out instead of
    documents.

    Args:
        texts: Texts, pieces or chats, see `tokenize`.
        tokenizer: Tokenizer of the teacher.
        folder: Path of the folder of both token files.
        max_tokens: Number of training tokens after which that file ends. Defaults to no limit.
        heldout_tokens: Number of held-out tokens.
        heldout_sequence_length: Smallest number of held-out tokens: one sequence.
        origin: Where the texts come from (`origin_of`), kept in meta.json.
        processes: Number of processes that tokenize. Defaults to the number of cores.

    Raises:
        ValueError: As `tokenize` does, or if there is too little text to hold some out.
    """
    origin, parts = origin_with_template(origin or {}, texts, tokenizer), ("train", "heldout")

    def make(unfinished: Path) -> None:
        train, held = (TokenWriter(unfinished / part, tokenizer, isinstance(texts, Chats)) for part in parts)
        name = origin.get("source", folder.name)
        counts = write_documents(texts, train, held, max_tokens, heldout_tokens, name, processes) | {"cut": False}
        total = len(train) + len(held)
        too_much = len(held) > max(len(train), 2 * heldout_tokens, 2 * HELDOUT_TOKENS)  # because of a long document
        if not len(train) or len(held) < heldout_sequence_length or too_much:
            if not total:
                raise ValueError(f"there is no text in {name!r}: every document is empty, or there is none")
            share = max(min(total // 20, heldout_tokens), heldout_sequence_length)
            if 2 * share > max(len(train), len(held)):
                raise ValueError(
                    f"{name!r} has {total} tokens, too few to hold out {share} of them. Set data.heldout to a "
                    "validation text, or give more text"
                )
            # recall data leaves out documents that are held out, but not the end of one that is trained on
            counts |= {"cut": not too_much, "heldout_sequence_length": heldout_sequence_length}
            if len(train) and not too_much:
                train.move(len(train) - share, held)
            else:
                if max_tokens is not None:
                    held.truncate(share + max(0, max_tokens - len(train)))
                held.move(share, train)
        for writer in (train, held):
            writer.finish(origin | {"max_tokens": max_tokens, "split": writer.folder.name} | counts)

    train, heldout = create_once(folder, make, lambda whole: [open_tokens(whole / part) for part in parts])
    for part in parts:
        check_made_from(folder / part, folder, tokenizer, origin)
    then = json.loads((folder / "train" / "meta.json").read_text()).get("heldout_sequence_length")
    if (then or heldout_sequence_length) != heldout_sequence_length or len(heldout) < heldout_sequence_length:
        raise ValueError(
            f"{folder} holds out {len(heldout):,} tokens, for validation sequences of {then or 'fewer'} tokens, not of "
            f"{heldout_sequence_length}. Name another data.folder, or delete {folder}"
        )
    return train, heldout


def write_documents(
    texts: Iterable[str | Piece] | Chats,
    train: TokenWriter,
    held: TokenWriter | None,
    max_tokens: int | None,
    heldout_tokens: int,
    name: str,
    processes: int | None,
) -> dict:
    """Tokenize texts into one file, or two, until training has `max_tokens` and `heldout_tokens` are held out.

    Returns:
        Counts for meta.json of the documents that were written: special_tokens_in_text, replaced_characters. Also
        rows_left_out, if the source has rows that are no chats.
    """
    heldout = train if held is None else held  # without a second file, no document is held out
    special, replaced, first, skipped = Counter(), 0, "", 0
    unfit, reason = 0, None

    def has_room() -> tuple[bool, bool]:
        return max_tokens is None or len(train) < max_tokens, len(heldout) < heldout_tokens

    to_encode, options = (train.tokenizer, train.dtype.name), {"split": held is not None, "wanted": has_room}
    if isinstance(texts, Chats):
        parts = encode_chats(texts, *to_encode, **options)
    else:
        parts = encode_all(texts, *to_encode, **options, processes=processes)
    with closing(parts), tokenize_bar(name, max_tokens) as show:
        for part in parts:
            train_lengths = np.where(part.held, 0, part.lengths)
            held_lengths = part.lengths - train_lengths
            fits = before_limit(train_lengths, len(train), max_tokens)
            # training documents without room, counted since the last document that was held out or had room
            skips = run_lengths(~fits & ~part.held, skipped)
            ends = np.flatnonzero(skips >= MAX_SKIPPED_DOCUMENTS)[:1]
            skipped = int(skips[-1]) if len(skips) else skipped
            kept = np.where(part.held, before_limit(held_lengths, len(heldout), heldout_tokens), fits)
            for end in ends:
                kept[end + 1 :] = False
            kept_train, kept_held = train_lengths[kept], held_lengths[kept]
            for writer, first_token, sizes in ((train, 0, kept_train), (held, train_lengths.sum(), kept_held)):
                if writer is not None:  # in a part, the tokens of held-out documents come after all others
                    chosen = slice(first_token, first_token + sizes.sum())
                    writer.extend(
                        part.tokens[chosen], sizes, None if part.loss_mask is None else part.loss_mask[chosen]
                    )
            special.update(part.spelled[kept[part.spelled[:, 0]], 1].tolist())
            for document, count, place in part.repaired:
                if kept[document]:
                    replaced, first = replaced + count, first or place
            if part.unfit:
                unfit, reason = unfit + len(part.unfit), reason or part.unfit[0]
            show(part.size, len(train), part.done)
            train_has_room, held_has_room = has_room()
            if not train_has_room and (not held_has_room or len(ends)):
                break
            if part.error is not None:
                raise part.error
    names = train.tokenizer.convert_ids_to_tokens(sorted(special))
    counts = {token: special[i] for token, i in zip(names, sorted(special))}
    if replaced:
        log(f"{name}: {REPAIRED}; {replaced:,} were, the first in {first}")
    if counts:
        listed = ", ".join(f"{token} {count:,}" for token, count in counts.items())
        log(f"{name}: the text contains names of special tokens, which become those tokens: {listed}")
    if unfit:
        log(f"{name}: {unfit:,} rows were left out, the first because of this: {reason}")
    found = {"special_tokens_in_text": counts, "replaced_characters": replaced}
    return found | ({"rows_left_out": unfit} if unfit else {})


def before_limit(lengths: np.ndarray, tokens: int, limit: int | None) -> np.ndarray:
    """Return for each document whether it begins before a file that has `tokens` tokens reaches its limit."""
    return tokens + np.cumsum(lengths) - lengths < (math.inf if limit is None else limit)


def run_lengths(flags: np.ndarray, before: int) -> np.ndarray:
    """Return for each flag how many in succession are set up to it, with `before` set ones ahead of the first."""
    index = np.arange(len(flags))
    last = np.maximum.accumulate(np.where(flags, -1 - before, index))
    return index - last


@contextmanager
def tokenize_bar(name: str, max_tokens: int | None) -> Generator[Callable[[int, int, float | None], None]]:
    """Show megabytes of text, speed and, where the total is known, the time left. Silent without a terminal."""
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
            total, completed = (1.0, min(1.0, max(parts))) if parts else (None, None)
            bar.update(task, total=total, completed=completed, size=size / 1e6, speed=speed)

        yield show


def check_made_from(folder: Path, whole: Path, tokenizer: PreTrainedTokenizerBase, origin: dict) -> None:
    """Check that a token file, which is part of the folder `whole`, was made with this tokenizer from this text.

    Raises:
        ValueError: If it was not.
    """
    meta = json.loads((folder / "meta.json").read_text())
    if meta["tokenizer"] != tokenizer_fingerprint(tokenizer):
        raise ValueError(f"{whole} was made with another tokenizer. Delete it, or choose another data.folder")
    if meta.get("chat_template") != origin.get("chat_template"):
        raise ValueError(f"{whole} was made with another chat template. Delete it, or choose another data.folder")
    # deleted text has not changed: its token file stays valid
    if origin.get("files") and meta.get("files") != origin["files"]:
        raise ValueError(
            f"the text at {origin['source']} changed since it was tokenized into {whole}. Delete that folder, or "
            "choose another data.folder"
        )


def open_tokens(folder: Path) -> TokenFile:
    """Open a token file.

    Raises:
        ValueError: If it is incomplete or damaged.
    """
    if missing := [name for name in ("meta.json", "tokens.bin", "bounds.npy") if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}")
    meta, checksum = json.loads((folder / "meta.json").read_text()), digest_of(folder)
    if meta["digest"] != checksum:
        raise ValueError(f"{folder} is damaged: its checksum differs from the one in meta.json")
    tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
    mask = folder / "loss_mask.bin"
    loss_mask = np.memmap(mask, dtype=np.uint8, mode="r") if mask.is_file() else None
    return TokenFile(tokens, np.load(folder / "bounds.npy"), checksum, tuple(meta.get("lengths", ())), loss_mask)


def digest_of(folder: Path) -> str:
    """Return a checksum of a token file's tokens and bounds and, if it has one, of its loss mask."""
    names = [name for name in ("tokens.bin", "bounds.npy", "loss_mask.bin") if (folder / name).is_file()]
    return "".join(digest(folder / name)[:32] for name in names)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash that differs whenever two tokenizers give a document different ids.

    For a tokenizer implemented in Python it covers class, vocabulary and special tokens, but not its code.
    """
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules |= {"padding": None, "truncation": None}  # they depend on the last call
    else:
        rules = [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map]
    splits = ["split_special_tokens"] if tokenizer.split_special_tokens else []
    facts = json.dumps([rules, tokenizer.eos_token_id, *splits], default=str)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


# ---- sources ---------------------------------------------------------------------------------------------------------


def open_data(
    spec: DataSpec,
    teacher_name: str,
    tokenizer: PreTrainedTokenizerBase,
    heldout_tokens: int,
    heldout_sequence_length: int = 512,
) -> tuple[list[TokenFile], list[TokenFile]]:
    """Return the training sources and the held-out texts as token files, made at the first use.

    Nothing is reserved from `recall:SOURCE` and `sparse-recall:SOURCE`, which reuse the text of SOURCE.

    Args:
        spec: Sources, validation text and folder.
        teacher_name: Name or path of the teacher, which names the folder of its token files.
        tokenizer: Tokenizer of the teacher.
        heldout_tokens: Number of validation tokens needed. At least HELDOUT_TOKENS are reserved per source, if it has
            that many.
        heldout_sequence_length: Number of tokens of a validation sequence. Sources of few documents reserve as many.

    Raises:
        ValueError: If a source has too little text, or changed since it was tokenized; or if a source reads text that
            is held out.
    """
    if spec.heldout is not None and (leaks := sharing(spec.heldout, spec.train)):
        raise ValueError(
            f"data.heldout={spec.heldout} is text of {', '.join(leaks)}: the student would be trained on its "
            "validation text. Name another text, or leave data.heldout out to hold back a part of each source"
        )
    heldout_budget = max(heldout_tokens, HELDOUT_TOKENS)
    teacher = Path(teacher_name).expanduser()
    folder = Path(spec.folder).expanduser() / short_name(str(teacher.resolve()) if teacher.exists() else teacher_name)
    if spec.max_tokens:
        folder = folder.with_name(f"{folder.name}-{spec.max_tokens}")
    train, held, cut = [], [], []
    for source in spec.train:
        origin = origin_of(source)
        name = short_name(origin["source"])
        if spec.heldout is None and not recall_over(source):
            whole = folder / f"{name}-split{heldout_budget}"
            pair = tokenize_split(
                texts_of(source),
                tokenizer,
                whole,
                max_tokens=spec.max_tokens,
                heldout_tokens=heldout_budget,
                heldout_sequence_length=heldout_sequence_length,
                origin=origin,
            )
            train.append(pair[0])
            held.append(pair[1])
            if json.loads((whole / "train" / "meta.json").read_text()).get("cut"):
                cut.append(source)
        else:
            whole = folder / f"{name}-all"
            train.append(tokenize(texts_of(source), tokenizer, whole, max_tokens=spec.max_tokens, origin=origin))
    for source in cut:
        if leaks := sharing(source, [other for other in spec.train if other != source]):
            raise ValueError(
                f"{', '.join(leaks)} would have validation text: {source} has too few documents, so the end of its "
                "text is held out. Set data.heldout to another validation text, or give the text as several files"
            )
    if spec.heldout is None and not held:
        raise ValueError(
            f"none of the sources {', '.join(spec.train)} can provide validation text. Set data.heldout to a "
            "validation text"
        )
    if spec.heldout is not None:
        origin = origin_of(spec.heldout)
        token_folder = folder / f"{short_name(origin['source'])}-first{heldout_budget}"
        held = [tokenize(texts_of(spec.heldout), tokenizer, token_folder, max_tokens=heldout_budget, origin=origin)]
    return train, held


def texts_of(source: str) -> Iterable[str | Piece] | Chats:
    """Return what `tokenize` reads of a source."""
    chats = chats_of(source)
    return pieces(source) if chats is None else Chats(chats)


def origin_with_template(
    origin: dict, texts: Iterable[str | Piece] | Chats, tokenizer: PreTrainedTokenizerBase
) -> dict:
    """Return the entries of meta.json that describe a source, with a hash of the chat template if it renders them."""
    if not isinstance(texts, Chats):
        return origin
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    return origin | {"chat_template": hashlib.sha256(template.encode()).hexdigest()[:16]}


def sharing(source: str, others: Iterable[str]) -> list[str]:
    """Return those of other sources that read text of this one, whatever they make of it."""
    return [other for other in others if texts_read(source) & texts_read(other)]


def texts_read(source: str) -> set[str]:
    """Return the absolute paths of the files that a source reads, or its name if it reads none."""
    inner = recall_over(source) or chats_of(source) or source
    if inner.startswith("hf:"):
        return {":".join(("hf", *hub_parts(inner)))}
    if inner in BUILT_IN:
        return {inner}
    path = Path(inner).expanduser().resolve()
    return {str(file.resolve()) for file in text_files(str(path))} if path.exists() else {str(path)}


def origin_of(source: str) -> dict:
    """Return the entries of meta.json that describe a source: `source`, `files` and, for sparse recall, `lengths`.

    `source` is the source's name or absolute path. `files` is a hash of the names, sizes and modification times of its
    files. It is empty for text that is not in files, and None for files that no longer exist.
    """
    if source == recall.RECALL:
        return {"source": source, "files": digest(Path(recall.__file__))[:16]}
    if source in BUILT_IN or source.startswith("hf:"):
        return {"source": source, "files": ""}
    if inner := recall_over(source):
        kind, origin = source.partition(":")[0], origin_of(inner)
        modules = [recall] if kind == recall.RECALL else [recall, sparse_recall]
        parts = [*(digest(Path(module.__file__))[:16] for module in modules), origin["files"]]
        about = {"source": f"{kind}:{origin['source']}", "files": None if None in parts else " ".join(parts)}
        return about if kind == recall.RECALL else about | {"lengths": sparse_recall.LENGTHS}
    if (chats := chats_of(source)) is not None:
        origin = origin_of(chats)
        return origin | {"source": f"{CHAT}:{origin['source']}"}
    path = Path(source).expanduser().resolve()
    if not path.exists():
        return {"source": str(path), "files": None}
    states = [(str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns) for f in text_files(str(path))]
    return {"source": str(path), "files": hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]}


def short_name(text: str) -> str:
    """Return a file name for a source or a model: its last part, and a hash of the whole to make it unique."""
    return f"{file_name(text.rsplit('/', 1)[-1])[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def file_name(text: str) -> str:
    """Return a text as a file name."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in text).strip("._")

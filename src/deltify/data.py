"""Text to one packed token file, and from it batches that are a pure function of the step.

A token file is a folder: `tokens.bin` (uint16 or uint32, the documents one after the other), `bounds.npy` ([documents
+ 1] int64) and `meta.json` (what it was made from). Resuming a run needs nothing but the step number.

Legend: B batch, T tokens of a row.
"""

import gzip
import hashlib
import importlib
import io
import json
import pkgutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

PYTHON_DOCS = "python-docs"
TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")


# ---- documents -------------------------------------------------------------------------------------------------------


def documents(source: str) -> Iterator[str]:
    """The documents of a source, in a fixed order.

    Args:
        source: a text file (one document), a .jsonl[.gz|.zst] file (the field `text` of each line), a folder of such
            files, `python-docs` (CPython's own manual topics and the standard library's docstrings, 1.7 MB that every
            machine has), or `hf:NAME[:CONFIG][:SPLIT]`, a dataset of the Hugging Face hub, streamed.
    """
    if source == PYTHON_DOCS:
        yield from python_docs()
    elif source.startswith("hf:"):
        yield from hub_documents(source)
    else:
        path = Path(source).expanduser()
        if not path.exists():
            raise FileNotFoundError(
                f"there is no text at {source!r}; give a file ({', '.join(TEXT_SUFFIXES)}), a folder, "
                f"{PYTHON_DOCS!r} or hf:NAME"
            )
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.name.endswith(TEXT_SUFFIXES):
                yield from file_documents(file)


def file_documents(path: Path) -> Iterator[str]:
    if path.suffix in (".txt", ".md"):
        yield path.read_text(encoding="utf-8")
        return
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)["text"]
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{path}, line {number}: {line[:60]!r} is not a JSON object with a field 'text'"
                    ) from error


def open_text(path: Path) -> io.TextIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".zst":
        import zstandard

        return io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(path.open("rb")), encoding="utf-8")
    return path.open(encoding="utf-8")


def python_docs() -> Iterator[str]:
    """CPython's manual topics and the docstrings of the standard library's modules, classes and functions."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    skipped = ("test", "idlelib", "lib2to3", "turtledemo", "antigravity", "this", "__main__")
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in skipped:
            continue
        try:
            module = importlib.import_module(name)
        except Exception:  # a module that another system lacks
            continue
        yield from module_docstrings(module)
        for info in pkgutil.iter_modules(getattr(module, "__path__", [])):
            if not info.name.startswith("_") and info.name != "tests":
                try:
                    yield from module_docstrings(importlib.import_module(f"{name}.{info.name}"))
                except Exception:
                    continue


def module_docstrings(module) -> Iterator[str]:
    """One text with the docstrings of a module and of what it defines, if it is longer than a remark."""
    parts = [module.__doc__ or ""]
    for name, item in sorted(vars(module).items()):
        if getattr(item, "__module__", None) == module.__name__ and callable(item) and not name.startswith("_"):
            parts.append(f"{name}: {item.__doc__}" if item.__doc__ else "")
            for key, method in sorted(vars(item).items()) if isinstance(item, type) else ():
                if callable(method) and not key.startswith("_") and method.__doc__:
                    parts.append(f"{name}.{key}: {method.__doc__}")
    text = "\n\n".join(part.strip() for part in parts if part.strip())
    if len(text) > 200:
        yield text


def hub_documents(source: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"{source!r} is read with the package datasets; run: pip install datasets") from None

    name, config, split = ([*source.split(":")[1:], None, None])[:3]
    for row in load_dataset(name, config or None, split=split or "train", streaming=True):
        yield row["text"]


def split_heldout(texts: Iterable[str], every: int = 20) -> tuple[list[str], list[str]]:
    """(training, held-out): a document is held out by the hash of its text, one in `every`, on any machine."""
    train, heldout = [], []
    for text in texts:
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
        (heldout if digest % every == 0 else train).append(text)
    return train, heldout


# ---- token files -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenFile:
    """Documents as one array of token ids, read from disk as needed."""

    tokens: np.ndarray  # [total] uint16 or uint32
    bounds: np.ndarray  # [documents + 1] int64

    def __len__(self) -> int:
        return len(self.tokens)


def tokenize(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, folder: Path, *, max_tokens: int | None = None
) -> TokenFile:
    """Writes the token file `folder` from texts, each ended by the end-of-sequence token, and opens it.

    A folder appears only when complete. One made from the same tokenizer is opened as it is; `folder` should therefore
    name the text it holds.

    Raises:
        ValueError: if there is no text, or the folder was made with another tokenizer.
    """
    fingerprint = tokenizer_fingerprint(tokenizer)
    if (folder / "meta.json").is_file():
        meta = json.loads((folder / "meta.json").read_text())
        if meta["tokenizer"] != fingerprint:
            raise ValueError(f"{folder} was made with another tokenizer; delete it, or name another data folder")
        return open_tokens(folder)
    unfinished = folder.with_name(folder.name + ".unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    bounds = [0]
    with (unfinished / "tokens.bin").open("wb") as out:
        for text in texts:
            ids = tokenizer(text, verbose=False)["input_ids"]
            if not ids:
                continue
            if tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
                ids.append(tokenizer.eos_token_id)
            out.write(np.asarray(ids, dtype).tobytes())
            bounds.append(bounds[-1] + len(ids))
            if max_tokens is not None and bounds[-1] >= max_tokens:
                break
    if len(bounds) == 1:
        raise ValueError(f"there is no text for {folder.name!r}: every document is empty, or there is none")
    np.save(unfinished / "bounds.npy", np.asarray(bounds, np.int64))
    meta = {"tokenizer": fingerprint, "dtype": dtype.name, "documents": len(bounds) - 1, "tokens": bounds[-1]}
    (unfinished / "meta.json").write_text(json.dumps(meta, indent=1))
    unfinished.rename(folder)
    return open_tokens(folder)


def open_tokens(folder: Path) -> TokenFile:
    meta = json.loads((folder / "meta.json").read_text())
    tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
    bounds = np.load(folder / "bounds.npy")
    if len(tokens) != bounds[-1] or len(tokens) != meta["tokens"]:
        raise ValueError(f"{folder} is damaged: {len(tokens)} tokens on disk, {meta['tokens']} recorded; delete it")
    return TokenFile(tokens, bounds)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash that differs whenever two tokenizers give a text different ids."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]


# ---- batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor  # [B, T] int64
    position_ids: Tensor  # [B, T] int64; starts again at 0 with each document

    @property
    def same_document(self) -> Tensor:
        """[B, T - 1]: whether token t + 1 goes on with the document of token t."""
        return self.position_ids[:, 1:] > 0

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
        windows = len(file) // self.length
        epoch, place = divmod(turn, windows)
        order = np.random.default_rng([self.seed, which, epoch])
        # a new offset each epoch, so that rows do not always break at the same tokens
        offset = int(order.integers(0, len(file) - windows * self.length + 1))
        start = offset + int(order.permutation(windows)[place]) * self.length
        return window(file, start, self.length)

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
            raise ValueError(f"a held-out text has {len(file)} tokens, fewer than one row of length={length}")
        count = max(1, min(limit // len(files), len(file)) // length)
        stretches += [window(file, index * length, length) for index in range(count)]
    groups = (stretches[start : start + rows] for start in range(0, len(stretches), rows))
    return [Batch(*(torch.from_numpy(np.stack(part)) for part in zip(*group))) for group in groups]

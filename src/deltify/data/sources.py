"""Read text as documents: from files, folders, built-in sources and datasets of the Hugging Face hub.

A source comes in pieces, so that slow work such as parsing lines or generating text can happen in another process
(`encoding.py`). `documents` does it in this process. For the sake of those processes, this module imports nothing
heavy.
"""

import contextlib
import gzip
import hashlib
import importlib
import json
import os
import pkgutil
import re
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any, Protocol

from .recall import COUNT, RECALL, SENTENCE_END, recall_documents, scattered_documents, scattered_outlines
from .sparse_recall import LENGTHS, SPARSE_RECALL, sparse_documents

PYTHON_DOCS = "python-docs"
CHAT = "chat"
BUILT_IN = (PYTHON_DOCS, RECALL)
TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
CHARACTERS_PER_TOKEN = 4  # approximate, for text that no tokenizer takes part in
PIECE = 2**19  # approximate size in characters or bytes; a tokenizer takes a tenth of a second for it
COMPRESSED = 2**14  # bytes that are decompressed at a time
REPAIRED = "halves of surrogate pairs are not characters and are read as U+FFFD"
BYTE_ORDER_MARK = "\ufeff"
SizesOf = Callable[[list[str]], list[int]]
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Piece:
    """A part of a source. `texts` yields pairs of a place and the text found there."""

    make: Callable[..., Iterable[tuple[str, str]]]  # a module's function, so that another process can import it
    args: tuple
    done: float | None = None  # fraction of the source read up to the end of this piece, if the total is known
    # If given, `make` also gets a function that counts tokens. Each document is cut at its beginning to the greatest of
    # these numbers of tokens that it has. Shorter documents are left out.
    lengths: tuple[int, ...] = ()

    def texts(self, sizes_of: SizesOf) -> Iterable[tuple[str, str]]:
        """Return pairs of place and text. `sizes_of` counts the tokens of each of some texts."""
        return self.make(*self.args, sizes_of) if self.lengths else self.make(*self.args)


@dataclass(frozen=True)
class Document:
    """A text that is valid Unicode and not blank."""

    text: str
    place: str  # file and line, or document number
    repaired: int = 0  # number of replaced characters


def documents(source: str) -> Iterator[str]:
    """Yield the documents of a source, in a fixed order.

    Args:
        source: One of the following.
            A text file (one document), a .jsonl[.gz|.zst] file (the field `text` of each line), or a folder of such
            files, without hidden files and folders (`._x.txt`, `.ipynb_checkpoints`).
            `python-docs`: the manual topics and standard library docstrings of this Python, 1.7 MB.
            `recall`: synthetic documents that ask for facts stated earlier, see recall.py.
            `recall:SOURCE`: such facts scattered over the training documents of another source.
            `sparse-recall:SOURCE`: documents that fill a training sequence with the sentences of another source and
            ask for few facts, see sparse_recall.py. Without a tokenizer, lengths are approximate.
            `hf:NAME[:CONFIG][:SPLIT]`: a dataset of the Hugging Face hub, streamed.

    `chat:SOURCE` (chats.py) is not among them: a chat has no text without the tokenizer's template.

    A byte-order mark at the beginning of a text is dropped. Halves of surrogate pairs, which a cut emoji leaves in
    JSON, are replaced by U+FFFD; a warning names the first one. Blank texts are left out.
    """
    for text, _ in documents_so_far(source):
        yield text


def documents_so_far(source: str) -> Iterator[tuple[str, float | None]]:
    """Yield the documents of a source, each with the fraction of the source read so far, if the total is known."""
    warned, number = False, count(1)
    for piece in pieces(source):
        if isinstance(piece, Piece):
            texts = piece.texts(lambda texts: [len(text) // CHARACTERS_PER_TOKEN for text in texts])
        else:
            texts = [(f"{source}, document {next(number)}", piece)]
        for document in cleaned(texts):
            if document.repaired and not warned:
                warned = True
                warnings.warn(f"{document.place}: {REPAIRED}; this source may have more of them", stacklevel=3)
            yield document.text, piece.done if isinstance(piece, Piece) else None


def cleaned(texts: Iterable[tuple[str, str]]) -> Iterator[Document]:
    """Yield the texts that are not blank, repaired and without byte-order marks, from pairs of place and text."""
    for place, text in texts:
        text, repaired = repair(text.removeprefix(BYTE_ORDER_MARK))
        if text and not text.isspace():
            yield Document(text, place, repaired)


def repair(text: str) -> tuple[str, int]:
    """Return the text as valid Unicode, and the number of characters replaced by U+FFFD.

    Surrogate pairs become the characters they stand for. Single halves are replaced.
    """
    try:
        text.encode()
        return text, 0
    except UnicodeEncodeError:
        joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        return SURROGATE.subn("\ufffd", joined)


def pieces(source: str) -> Iterator[str | Piece]:
    """Yield the pieces of a source, or plain texts if it has no pieces. See `documents` for the sources."""
    if chats_of(source):
        raise ValueError(f"{source!r} can be read only with a teacher's chat template: in data.train or data.heldout")
    if source == PYTHON_DOCS:
        yield from python_docs()
    elif source == RECALL:
        for first in range(0, COUNT, 100):
            yield Piece(recall_texts, (first, first + 100), min(1.0, (first + 100) / COUNT))
    elif inner := recall_over(source):
        yield from (scattered_pieces if source.startswith(RECALL) else sparse_pieces)(inner)
    elif source.startswith("hf:"):
        yield from hub_documents(source)
    else:
        yield from file_pieces(text_files(source))


def recall_texts(first: int, last: int) -> Iterator[tuple[str, str]]:
    """Yield place and text of documents of `recall`."""
    for number, text in enumerate(recall_documents(first, last), first + 1):
        yield f"{RECALL}, document {number}", text


def scattered_pieces(source: str) -> Iterator[Piece]:
    """Yield the pieces of `recall:SOURCE`. This process chooses the sentences of each document."""
    done = None

    def passages() -> Iterator[str]:
        nonlocal done
        for text, read in documents_so_far(source):
            done = read
            if not held_out(text):
                yield text

    outlines, size = [], 0
    for outline in scattered_outlines(passages()):
        outlines.append(outline)
        size += sum(map(len, outline[1]))
        if size > PIECE:
            yield Piece(scattered_texts, (source, outlines), done)
            outlines, size = [], 0
    if outlines:
        yield Piece(scattered_texts, (source, outlines), done)


def scattered_texts(source: str, outlines: list[tuple[int, list[str]]]) -> Iterator[tuple[str, str]]:
    """Yield place and text of documents of `recall:SOURCE`."""
    for (number, _), text in zip(outlines, scattered_documents(outlines)):
        yield f"{RECALL}:{source}, document {number + 1}", text


def sparse_pieces(source: str) -> Iterator[Piece]:
    """Yield the pieces of `sparse-recall:SOURCE`: sentences, of which documents of every length are made."""
    sentences, size, numbers, done = [], 0, count(1), None
    for text, done in documents_so_far(source):
        if held_out(text):
            continue
        for sentence in filter(None, SENTENCE_END.split(text)):
            sentences.append(sentence)
            size += len(sentence)
            if size > PIECE:
                yield Piece(sparse_texts, (source, next(numbers), sentences), done, LENGTHS)
                sentences, size = [], 0
    if sentences:
        yield Piece(sparse_texts, (source, next(numbers), sentences), done, LENGTHS)


def sparse_texts(source: str, piece: int, sentences: list[str], sizes_of: SizesOf) -> Iterator[tuple[str, str]]:
    """Yield place and text of documents of `sparse-recall:SOURCE`."""
    known: dict[str, int] = {}

    def added(texts: list[str]) -> list[int]:  # after another sentence; each text is counted once for all lengths
        new = [text for text in texts if text not in known]
        end, *sizes = sizes_of([".", *(f".{text}" for text in new)])
        known.update(zip(new, (size - end for size in sizes)))
        return [known[text] for text in texts]

    for length in LENGTHS:
        for document in sparse_documents(sentences, length, added, f"{piece}:{sentences[0]}"):
            yield f"{SPARSE_RECALL}:{source}, part {piece}", document.text


def recall_over(source: str) -> str | None:
    """Return the SOURCE of `recall:SOURCE` or `sparse-recall:SOURCE`, or None for another source."""
    kind, _, inner = source.partition(":")
    return inner if kind in (RECALL, SPARSE_RECALL) and inner else None


def chats_of(source: str) -> str | None:
    """Return the SOURCE of `chat:SOURCE`, or None for another source."""
    kind, _, inner = source.partition(":")
    return inner if kind == CHAT and inner else None


def text_files(source: str) -> list[Path]:
    """Return the files of a source that is a path, in order. Of a folder, only visible files of a known kind.

    Raises:
        FileNotFoundError: If there is no such path.
        ValueError: If the file is of an unknown kind, or the folder has no file of a known kind.
    """
    path, known = Path(source).expanduser(), ", ".join(TEXT_SUFFIXES)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no text at {source!r}. Give a file ({known}), a folder, {PYTHON_DOCS!r}, {RECALL!r}, "
            f"{RECALL}:SOURCE, {SPARSE_RECALL}:SOURCE, {CHAT}:SOURCE or hf:NAME"
        )
    files = sorted(visible_files(path)) if path.is_dir() else [path]
    files = [file for file in files if file.name.lower().endswith(TEXT_SUFFIXES) and file.is_file()]
    if not files:
        problem = "has no text file" if path.is_dir() else "is not a text file"
        raise ValueError(f"{source!r} {problem}; text files end in {known}")
    return files


def visible_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and its subfolders, linked ones included, but hidden ones."""
    seen: set[Path] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        here = Path(place)
        if here.resolve() in seen:  # by another link, or in a circle
            folders.clear()
            continue
        seen.add(here.resolve())
        folders[:] = sorted(name for name in folders if name[0] != ".")
        yield from (here / name for name in names if name[0] != ".")


def file_pieces(files: list[Path]) -> Iterator[Piece]:
    """Yield the pieces of text files: a whole plain file, or a block of lines of a JSON-lines file.

    Raises:
        ValueError: If a compressed file is damaged or incomplete.
    """
    sizes = [path.stat().st_size for path in files]
    total, before = max(1, sum(sizes)), 0
    for path, size in zip(files, sizes):
        suffix = path.suffix.lower()
        if suffix in (".txt", ".md"):
            yield Piece(whole_text, (str(path),), (before + size) / total)
        else:
            first = 1
            with path.open("rb") as file, named_damage(path):
                for lines in line_blocks(unpacked(file, suffix)):
                    yield Piece(texts_of_lines, (str(path), first, lines), (before + file.tell()) / total)
                    first += lines.count(b"\n") if b"\r" not in lines else len(lines.splitlines())
        before += size


@contextlib.contextmanager
def named_damage(path: Path) -> Iterator[None]:
    """Name the file in errors of decompression."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}). Get it again") from error


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def unpacked(file: IO[bytes], suffix: str) -> Readable:
    """Return a file that decompresses what it reads."""
    return gzip.open(file) if suffix == ".gz" else ZstdFile(file) if suffix == ".zst" else file


class ZstdFile:
    """The frames of a .zst file as one file. Zstandard's own reader takes a file that was cut for a whole one."""

    def __init__(self, file: IO[bytes]):
        self.file, self.left = file, b""
        self.frame: Any = None

    def read(self, size: int, /) -> bytes:
        """Return at least `size` bytes of the content, or what is left of it.

        Raises:
            EOFError: If the file ends within a frame.
            zlib.error: If it is no .zst file, or damaged.
        """
        import zstandard

        parts: list[bytes] = []
        missing = size
        while missing > 0:
            if not (block := self.left or self.file.read(COMPRESSED)):
                if self.frame is not None:
                    raise EOFError("the file ends within a zstd frame")
                break
            self.frame = self.frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                parts.append(self.frame.decompress(block))
                missing -= len(parts[-1])
            except zstandard.ZstdError as error:
                raise zlib.error(str(error)) from None
            self.left = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
        return b"".join(parts)


def line_blocks(file: Readable) -> Iterator[bytes]:
    """Yield a file's bytes in blocks of whole lines."""
    parts = []
    while block := file.read(PIECE):
        end = block.rfind(b"\n") + 1
        if end:
            yield b"".join([*parts, block[:end]])
            parts = []
        parts.append(block[end:])
    if any(parts):
        yield b"".join(parts)


def whole_text(path: str) -> Iterator[tuple[str, str]]:
    """Yield place and text of a plain file."""
    try:
        yield path, Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from error


def texts_of_lines(path: str, first: int, lines: bytes) -> Iterator[tuple[str, str]]:
    """Yield place and field `text` of JSON lines. `first` is the number of the first one in its file."""
    for place, line in decoded_lines(path, first, lines):
        yield place, text_of_line(line, place)


def decoded_lines(path: str, first: int, lines: bytes) -> Iterator[tuple[str, str]]:
    """Yield place and text of lines that are not blank. `first` is the number of the first one in its file."""
    for number, line in enumerate(lines.splitlines(), first):
        place = f"{path}, line {number}"
        try:
            line = line.decode().removeprefix(BYTE_ORDER_MARK)
        except UnicodeDecodeError as error:
            raise not_utf8(path, error, f", line {number}") from error
        if line.strip():
            yield place, line


def not_utf8(path: str, error: UnicodeDecodeError, where: str = "") -> ValueError:
    return ValueError(f"{path} is not UTF-8 ({error}{where}). Convert it, for example with iconv")


def text_of_line(line: str, place: str) -> str:
    record = record_of_line(line, place)
    if "text" not in record:
        chat = "messages" in record or "completion" in record
        hint = f". Name the source {CHAT}:FILE, to train on the answers of its chats" if chat else ""
        raise ValueError(f"{place}: {line[:60]!r} is not a JSON object with a field 'text'{hint}")
    text = record["text"]
    if not isinstance(text, str):
        raise ValueError(f"{place}: the field 'text' is {json.dumps(text)[:60]}, not a string. Remove the line")
    return text


def record_of_line(line: str, place: str) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: {line[:60]!r} is not a JSON object ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{place}: {line[:60]!r} is not a JSON object, but a {type(record).__name__}")
    return record


def records(source: str) -> Iterator[tuple[str, dict]]:
    """Yield place and object of each line of JSON-lines files, or of each row of a dataset of the hub.

    Raises:
        ValueError: If a line is not a JSON object in UTF-8, or a file has no JSON lines.
    """
    if source.startswith("hf:"):
        yield from ((f"{source}, row {number}", row) for number, row in enumerate(hub_rows(source), 1))
        return
    for piece in file_pieces(text_files(source)):
        if piece.make is whole_text:
            raise ValueError(
                f"{piece.args[0]} has no JSON lines. Give a file that ends in {', '.join(TEXT_SUFFIXES[2:])}"
            )
        for place, line in decoded_lines(*piece.args):
            yield place, record_of_line(line, place)


def python_docs() -> Iterator[str]:
    """Yield CPython's manual topics and the docstrings of the standard library."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    skipped = ("test", "idlelib", "lib2to3", "turtledemo", "antigravity", "this", "__main__")
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in skipped:
            continue
        try:
            module = importlib.import_module(name)
        except Exception:  # some modules exist on other systems only
            continue
        yield from module_docstrings(module)
        for info in pkgutil.iter_modules(getattr(module, "__path__", [])):
            if not info.name.startswith("_") and info.name != "tests":
                try:
                    yield from module_docstrings(importlib.import_module(f"{name}.{info.name}"))
                except Exception:
                    continue


def module_docstrings(module) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and functions as one text, unless that is very short."""
    parts = [module.__doc__ or ""]
    with warnings.catch_warnings(action="ignore"):  # of what the standard library deprecates
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
    """Yield the texts of a dataset of the hub, streamed."""
    for number, row in enumerate(hub_rows(source), 1):
        if not isinstance(row.get("text"), str):
            raise ValueError(f"{source}, row {number}: the column 'text' has no string; its columns are {list(row)}")
        yield row["text"]


def hub_rows(source: str) -> Iterable[dict]:
    """Return the rows of a dataset of the hub, streamed."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"{source!r} needs the package datasets. Run: pip install datasets") from None

    name, config, split = hub_parts(source)
    return load_dataset(name, config or None, split=split, streaming=True)


def hub_parts(source: str) -> tuple[str, str, str]:
    """Return name, configuration (empty for the default one) and split of `hf:NAME[:CONFIG][:SPLIT]`."""
    name, config, split = [*source.split(":")[1:], "", ""][:3]
    return name, config, split or "train"


def held_out(text: str, every: int = 20) -> bool:
    """Return whether a document is held out for validation: one in `every`, by the hash of its text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) % every == 0

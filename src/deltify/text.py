"""Text as documents: files, folders, what every machine has, and datasets of the hub."""

import gzip
import hashlib
import importlib
import io
import json
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path

from .recall import RECALL, recall_documents, scattered_documents

PYTHON_DOCS = "python-docs"
BUILT_IN = (PYTHON_DOCS, RECALL)
TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")


def documents(source: str) -> Iterator[str]:
    """The documents of a source, in a fixed order.

    Args:
        source: a text file (one document), a .jsonl[.gz|.zst] file (the field `text` of each line), a folder of such
            files, `python-docs` (CPython's own manual topics and the standard library's docstrings, 1.7 MB that every
            machine has), `recall` (synthetic documents that ask for what they said before, see recall.py),
            `recall:SOURCE` (such text scattered over another source, but for its documents that are held out), or
            `hf:NAME[:CONFIG][:SPLIT]`, a dataset of the Hugging Face hub, streamed.
    """
    if source == PYTHON_DOCS:
        yield from python_docs()
    elif source == RECALL:
        yield from recall_documents()
    elif inner := scattered_over(source):
        yield from scattered_documents(text for text in documents(inner) if not held_out(text))
    elif source.startswith("hf:"):
        yield from hub_documents(source)
    else:
        for file in text_files(source):
            yield from file_documents(file)


def scattered_over(source: str) -> str | None:
    """The SOURCE of a `recall:SOURCE`."""
    return source.removeprefix(f"{RECALL}:") if source.startswith(f"{RECALL}:") else None


def text_files(source: str) -> list[Path]:
    """The files of a source that is a path, in order; in a folder, those of other kinds are left out.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: for a file of an unknown kind, or a folder without any of a known one.
    """
    path, known = Path(source).expanduser(), ", ".join(TEXT_SUFFIXES)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no text at {source!r}; give a file ({known}), a folder, {PYTHON_DOCS!r}, {RECALL!r}, "
            f"{RECALL}:SOURCE or hf:NAME"
        )
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in files if file.name.endswith(TEXT_SUFFIXES) and file.is_file()]
    if not files:
        what = "holds no file that is read as text" if path.is_dir() else "is not a kind of file that is read as text"
        raise ValueError(f"{source!r} {what}; known are {known}")
    return files


def file_documents(path: Path) -> Iterator[str]:
    try:
        if path.suffix in (".txt", ".md"):
            yield path.read_text(encoding="utf-8")
            return
        with open_text(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield text_of_line(line, f"{path}, line {number}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); convert it, for example with iconv") from error


def text_of_line(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: {line[:60]!r} is not a JSON object with a field 'text'") from error
    if not isinstance(text, str):
        raise ValueError(f"{where}: the field 'text' is {json.dumps(text)[:60]}, not a string; remove the line")
    return text


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
    for number, row in enumerate(load_dataset(name, config or None, split=split or "train", streaming=True), 1):
        if not isinstance(row.get("text"), str):
            raise ValueError(f"{source}, row {number}: no string in the column 'text'; its columns are {list(row)}")
        yield row["text"]


def held_out(text: str, every: int = 20) -> bool:
    """Whether a document judges instead of training: one in `every`, by the hash of its text, on any machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) % every == 0

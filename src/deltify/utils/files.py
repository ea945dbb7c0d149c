"""Files and folders that appear whole or not at all, and checksums that tell whether they still are."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, TypeVar

from filelock import FileLock

T = TypeVar("T")
MANIFEST = "manifest.json"
PIECE_BYTES = 2**26


def make_once(folder: Path, make: Callable[[Path], None], check: Callable[[Path], T]) -> T:
    """Return what `check` returns for a folder, which `make` writes if it is not there, or not whole.

    The folder takes its name once it is whole. Of several processes that ask at once, one makes it and the others wait.

    Args:
        make: Writes a folder. Every process may be the one that makes it: nothing in it may ask for the rank.
        check: Raises ValueError if a folder is not whole. It looks at one that is there, which is made anew if it is
            broken, and at a new one before it gets its name.
    """
    if (found := checked(folder, check)) is not None:
        return found[0]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if (found := checked(folder, check)) is not None:
            return found[0]
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        make(unfinished)
        check(unfinished)
        publish(unfinished, folder)
        return check(folder)


def checked(folder: Path, check: Callable[[Path], T]) -> tuple[T] | None:
    """What `check` returns for a folder; None if there is none, or a broken one, which is named on the terminal."""
    if not folder.exists():
        return None
    try:
        return (check(folder),)
    except ValueError as error:
        print(f"{folder} is broken ({error}); it is made anew", file=sys.stderr)
        return None


def publish(unfinished: Path, folder: Path) -> None:
    """Moves a finished folder to its place; an older one there goes away, and is never seen half-removed.

    Its bytes are on the disk before its name is: a machine that loses power must not keep the name alone.
    """
    for path in [*unfinished.rglob("*"), unfinished]:
        sync(path)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    unfinished.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """A checksum of a file's every byte: the SHA-256 of the SHA-256s of its pieces, which are taken side by side."""

    def of_piece(start: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(PIECE_BYTES)).digest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        pieces = pool.map(of_piece, range(0, path.stat().st_size, PIECE_BYTES))
        return hashlib.sha256(b"".join(pieces)).hexdigest()


def write_manifest(folder: Path) -> None:
    """Writes manifest.json: of every file in `folder`, its size and checksum."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    table = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "digest": digest(p)} for p in files}
    write_text(folder / MANIFEST, json.dumps(table, indent=1))


def check_manifest(folder: Path, *, digests: bool = True) -> None:
    """Raises ValueError if a file of `folder` is not what manifest.json says, and names it; or if there is none.

    Without `digests`, sizes alone are compared.
    """
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"it has no {MANIFEST}, which is written last")
    for name, entry in json.loads((folder / MANIFEST).read_text()).items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else 0
        if size != entry["bytes"]:
            raise ValueError(f"{name} has {size:,} bytes of {entry['bytes']:,}")
        if digests and digest(path) != entry["digest"]:
            raise ValueError(f"the checksum of {name} is not the one that was written")


@contextmanager
def atomic_write(path: Path) -> Generator[TextIO]:
    """Open a text file that replaces `path` when the block ends without an error."""
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        yield file
    unfinished.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all."""
    with atomic_write(path) as file:
        file.write(text)


def read_jsonl(path: Path, *, repair: bool = False) -> list[dict]:
    """Return the lines of a JSON lines file, without a last line that was cut. An absent file has no lines.

    Args:
        path: File to read.
        repair: Whether to remove a cut line from the file, so that lines can be appended.
    """
    if not path.is_file():
        return []
    whole, newline, cut = path.read_text(encoding="utf-8").rpartition("\n")
    if cut and repair:
        write_text(path, whole + newline)
    return [json.loads(line) for line in (whole + newline).split("\n")[:-1]]

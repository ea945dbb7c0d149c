"""Write files and folders atomically, and verify them by checksums."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, TypeVar

from filelock import FileLock

T = TypeVar("T")
MANIFEST = "manifest.json"
PIECE_BYTES = 2**26


def create_once(folder: Path, make: Callable[[Path], None], check: Callable[[Path], T]) -> T:
    """Create a folder unless it exists and is complete, and return what `check` returns for it.

    The folder gets its name when it is complete. If several processes call this at once, one creates the folder and the
    others wait.

    Args:
        folder: Path of the folder.
        make: Function that writes the folder to another path. It must not depend on the rank: any process may call it.
        check: Function that raises ValueError if a folder is incomplete. An existing folder that fails is created
            again. A new folder is checked before it gets its name.
    """
    if (existing := checked(folder, check)) is not None:
        return existing[0]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if (existing := checked(folder, check)) is not None:
            return existing[0]
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        make(unfinished)
        found = check(unfinished)
        replace_folder(unfinished, folder)
        return found


def checked(folder: Path, check: Callable[[Path], T]) -> tuple[T] | None:
    """Return what `check` returns for a folder, in a tuple; None if the folder is missing or broken."""
    if not folder.exists():
        return None
    try:
        return (check(folder),)
    except ValueError as error:
        print(f"{folder} is broken ({error}) and is created again", file=sys.stderr)
        return None


def replace_folder(unfinished: Path, folder: Path) -> None:
    """Move a complete folder to its place and remove an older one there.

    No folder is ever seen half-written or half-removed. All data is on disk before the folder gets its name, so that a
    power failure does not leave an empty folder.
    """
    for path in [*unfinished.rglob("*"), unfinished]:
        fsync_path(path)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    unfinished.rename(folder)
    fsync_path(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def fsync_path(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """Return a checksum of a file: the SHA-256 of the SHA-256 of each of its pieces, which are hashed in parallel."""

    def of_piece(start: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(PIECE_BYTES)).digest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        pieces = pool.map(of_piece, range(0, path.stat().st_size, PIECE_BYTES))
        return hashlib.sha256(b"".join(pieces)).hexdigest()


def write_manifest(folder: Path) -> None:
    """Write manifest.json with size and checksum of every file in `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    table = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "digest": digest(p)} for p in files}
    write_text(folder / MANIFEST, json.dumps(table, indent=1))


def check_manifest(folder: Path, *, digests: bool = True) -> None:
    """Check the files of a folder against its manifest.json.

    Args:
        folder: Path of the folder.
        digests: Whether to compare checksums, not only sizes.

    Raises:
        ValueError: If a file differs, or there is no manifest.json.
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


def append_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Append rows to a JSON lines file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


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

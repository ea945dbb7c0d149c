"""The terminal of all of deltify's output. Processes other than the first are silent."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")
console = Console()


def with_progress(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Yield items and show how many of `total` were taken. Silent without a terminal."""
    hidden = not console.is_terminal
    yield from track(items, what, total=total, console=console, transient=True, disable=hidden)


def log(line: str) -> None:
    """Print a line without rich's wrapping, markup and colours."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)

"""The terminal of all of deltify's output. Processes other than the first are silent."""

from rich.console import Console

console = Console()


def log(line: str) -> None:
    """Print a line without rich's wrapping, markup and colours."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)

"""The terminal, where every part of deltify prints its lines; silent on all processes but the first."""

from rich.console import Console

console = Console()


def log(line: str) -> None:
    """Print a line as it is: not folded, without markup or colours of rich."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)

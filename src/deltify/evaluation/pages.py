"""Pages made from templates."""

import functools

from jinja2 import Environment, PackageLoader, select_autoescape

from ..utils.formats import duration, flat, gib, rounded
from .svg import swatch


def render(template: str, **facts) -> str:
    """Return a page made from a template. Facts in HTML are escaped."""
    return environment().get_template(template).render(**facts)


@functools.cache
def environment() -> Environment:
    """Return the templates and their filters."""
    escape = select_autoescape(["html"], default=False)
    made = Environment(
        loader=PackageLoader("deltify.evaluation"), autoescape=escape, trim_blocks=True, lstrip_blocks=True
    )
    filters = {"duration": duration, "flat": flat, "gib": gib, "rounded": rounded}
    made.filters |= filters | {"swatch": swatch, "unbroken": unbroken}
    return made


def unbroken(text: str) -> str:
    """Return a text in which no line ends before a percent sign."""
    return text.replace(" %", "\u00a0%")

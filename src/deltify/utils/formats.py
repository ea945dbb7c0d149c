"""Numbers, times and texts in a short form for readers."""


def flat(text: str) -> str:
    """Return a text as one line."""
    return " ".join(text.split())


def short(tokens: float) -> str:
    """Return a length in tokens in units of 1,024, such as 512, 1.5k, 4k or 1M."""
    for unit, letter in ((2**20, "M"), (2**10, "k")):
        if tokens >= unit:
            return f"{tokens / unit:.{'3g' if tokens < 999.5 * unit else '0f'}}{letter}"
    return f"{tokens:g}"


def rounded(number: float) -> str:
    """Return a number with three digits, such as 0.194, 16.4k, 250M or 1.2B."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * unit:  # what is rounded to 1,000 of the next smaller unit
            return f"{number / unit:.3g}{letter}"
    return f"{number:.3g}"


def gib(size: float) -> str:
    """Return a number of bytes in GiB, or in MiB if it is smaller."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """Return a time such as 40 s, 12 min, 3 h 05 min or 2 d 4 h."""
    minutes, hours = round(seconds / 60), seconds / 3600
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{round(hours) // 24} d {round(hours) % 24} h"

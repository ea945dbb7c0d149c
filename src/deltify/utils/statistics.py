"""Means with their standard errors, and choices at even distances."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def mean_over_documents(documents: list[np.ndarray]) -> tuple[float | None, float | None]:
    """Return the mean over all tokens and its standard error over documents. None stands for what is not known."""
    if any(np.isnan(values).any() for values in documents):
        return None, None
    sizes = np.array([len(values) for values in documents])
    sums = np.array([values.sum(dtype=np.float64) for values in documents])
    mean = sums.sum() / sizes.sum()
    if len(documents) < 2:
        return float(mean), None
    spread = np.square(sums - mean * sizes).sum() * len(documents) / (len(documents) - 1)
    return float(mean), float(np.sqrt(spread) / sizes.sum())


def spread(items: Sequence[T], most: int) -> list[T]:
    """Return at most `most` items at even distances, with the first and the last."""
    places = np.unique(np.linspace(0, len(items) - 1, most).round().astype(int)) if items else []
    return [items[place] for place in places]

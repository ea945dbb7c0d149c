"""Means with their standard errors."""

import numpy as np


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

"""The n-gram baselines of the evaluation."""

import numpy as np
import pytest
import torch

from deltify.data.batches import Batch
from deltify.data.token_files import TokenFile
from deltify.evaluation.heldout import ngram_baselines


def test_count_models_equal_counting_by_hand():
    train = [TokenFile(np.array([1, 2, 1, 2, 3], np.uint16), np.array([0, 5]))]
    heldout = [Batch(torch.tensor([[1, 2, 4]]), torch.tensor([[0, 1, 2]]))]
    unigram, bigram = ngram_baselines(train, heldout, 5)
    p = {2: 3 / 10, 4: 1 / 10}
    assert unigram.perplexity == pytest.approx((p[2] * p[4]) ** -0.5)
    assert bigram.perplexity == pytest.approx(((2 + 5 * p[2]) / (2 + 5) * (5 * p[4]) / (2 + 5)) ** -0.5)

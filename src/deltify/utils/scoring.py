"""Next-token scores of a language model.

Legend: N tokens, D model width, W vocabulary.
"""

import math

from torch import Tensor
from transformers import PreTrainedModel


def log_probs(model: PreTrainedModel, hidden_ND: Tensor) -> Tensor:
    """Return the log-probabilities [N, W] of the next token in float32."""
    return model.lm_head(hidden_ND).float().log_softmax(-1)


def label_log_probs(log_probs_NW: Tensor, labels_N: Tensor) -> Tensor:
    """Return the log-probability [N] of each label."""
    return log_probs_NW.gather(1, labels_N[:, None])[:, 0]


def kl_terms(log_p_NW: Tensor, log_q_NW: Tensor) -> Tensor:
    """Return the terms [N, W] of KL(p | q), which the caller sums over tokens, the vocabulary or both."""
    return log_p_NW.exp() * (log_p_NW - log_q_NW)


def perplexity(loss: float) -> float:
    """Return exp(loss), kept finite for very large losses."""
    return math.exp(min(loss, 700.0))

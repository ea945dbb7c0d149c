"""Remove the biases of a trained student's KDA layers, which other runtimes do not support.

Legend: D model width, C = H * K channels of all heads, K head width, N tokens.
"""

import copy
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.batches import Batch
from ..data.sources import documents
from ..model import DeltifyForCausalLM, DeltifyKDA
from ..model.mixers import factors
from ..utils.scoring import kl_terms
from ..utils.tokens import token_ids
from .calibration import constant_direction, fold_bias

FIT_SEQUENCES, TEST_SEQUENCES, LENGTH = 16, 8, 512  # of text: what u is fitted to, and what the cost is measured on


def fold_with_cost(
    model: DeltifyForCausalLM, tokenizer: PreTrainedTokenizerBase, source: str
) -> tuple[DeltifyForCausalLM, float]:
    """Return `fold_biases` of a model, and the forward KL of it from the model, in nats per token.

    Args:
        model: Model with biases in KDA layers. It is not changed.
        tokenizer: Its tokenizer.
        source: Source of text, see `documents`. 12,288 tokens of it are used.

    Raises:
        ValueError: If the model has no such biases, or the source has too little text.
    """
    if not (model.config.gate_bias or model.config.kda_bias):
        raise ValueError("The model has no biases in KDA layers. Export it without --fold-gate-bias.")
    needed = (FIT_SEQUENCES + TEST_SEQUENCES) * LENGTH
    ids: list[int] = []
    for text in documents(source):
        ids += token_ids(tokenizer, text)
        if len(ids) >= needed:
            break
    else:
        raise ValueError(f"{source} has {len(ids):,} tokens, but folding biases needs {needed:,}. Name a longer text.")
    input_ids = torch.tensor(ids[:needed]).view(-1, LENGTH)
    batch = Batch(input_ids, torch.arange(LENGTH).expand_as(input_ids))
    fit, test = batch.split(FIT_SEQUENCES)
    folded = fold_biases(model, fit)
    return folded, sum(mean_kl(model, folded, part) for part in test.split(1)) / TEST_SEQUENCES


@torch.no_grad()
def mean_kl(model: DeltifyForCausalLM, folded: DeltifyForCausalLM, batch: Batch) -> float:
    """Return the mean over the tokens of KL(model | folded)."""
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    log_p, log_q = (m(**inputs).logits.float().log_softmax(-1) for m in (model, folded))
    return float(kl_terms(log_p, log_q).sum(-1).mean())


@torch.no_grad()
def fold_biases(model: DeltifyForCausalLM, batch: Batch) -> DeltifyForCausalLM:
    """Return a copy of a model whose KDA layers have no biases of q, k, v and the output gate.

    The copy computes nearly the same. A direction u with u . x near 1 for every input x of a layer carries the biases:
    W x + b becomes (W + b u^T) x. The output gate has rank K. One of its K channels becomes u, so the direction that
    changes the gate least is given up.

    Args:
        model: Model of any dtype. It is not changed.
        batch: Sequences of text that u is fitted to, a few thousand tokens.
    """
    folded = copy.deepcopy(model)
    folded.config.kda_bias = folded.config.gate_bias = False
    pairs = [(a.self_attn, b.self_attn) for a, b in zip(model.model.layers, folded.model.layers) if a.linear]
    hooks = [mixer.register_forward_pre_hook(partial(fold_layer, copied)) for mixer, copied in pairs]
    try:
        batch = batch.to(model.device)
        model.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return folded


def fold_layer(folded: DeltifyKDA, mixer: DeltifyKDA, args: tuple) -> None:
    """Fold the biases of `mixer`, which is about to run, into the weights of its copy `folded`."""
    x_ND = args[0].flatten(0, 1).float()
    u_D = constant_direction(x_ND)
    for projection in (folded.q_proj, folded.k_proj, folded.v_proj):
        if projection.bias is not None:
            fold_bias(projection, projection.bias.float(), u_D)
            projection.register_parameter("bias", None)
    low, high = factors(folded.g_proj)
    if high.bias is not None:
        low_KD, high_CK, bias_C = fold_gate(low.weight.float(), high.weight.float(), high.bias.float(), x_ND)
        low.weight.copy_(torch.cat([low_KD, u_D[None]]))
        high.weight.copy_(torch.cat([high_CK, bias_C[:, None]], 1))
        high.register_parameter("bias", None)


def fold_gate(low_KD: Tensor, high_CK: Tensor, bias_C: Tensor, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best approximation of high low x + bias whose rank is lower by one: (low, high, bias).

    Best means the least squared error over the inputs x_ND.
    """
    basis_CK, sizes_K, turn_KK = torch.linalg.svd(high_CK, full_matrices=False)
    to_z_KD = (sizes_K[:, None] * turn_KK) @ low_KD  # high low x = basis z
    z_NK = x_ND @ to_z_KD.T
    mean_K = z_NK.mean(0)
    _, axes_KK = torch.linalg.eigh((z_NK - mean_K).T @ (z_NK - mean_K))  # the first axis varies least
    least_K, kept = axes_KK[:, 0], axes_KK[:, 1:]
    return kept.T @ to_z_KD, basis_CK @ kept, bias_C + basis_CK @ least_K * (least_K @ mean_K)

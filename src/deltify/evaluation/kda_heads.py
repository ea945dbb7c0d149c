"""Measure what each KDA head of a student can hold: decay, writing, overwriting, and reading at copies.

Legend: T tokens, D model width, H heads, K head width, S sampled tokens, P copies.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from ..conversion.attention import far_copies
from ..data.batches import Batch
from ..model.causal_lm import CausalLM
from ..model.mixers import DeltifyKDA
from ..ops import kda, short_conv
from ..ops.reference import l2norm, log_decay

DISTANCES = (128, 512, 1024)  # after which is measured what is left of a value
# No difference of two distances is a multiple of it, so that a token reads for one sampled token at most.
SAMPLE_EVERY = 17
STATES = 5  # states in the second half of a sequence whose keys are measured
STRONG = 0.3  # beta above which a write counts as strong
SLOWEST = 1e-9  # decay rate per token; half-lives are at most 7e8 tokens, because JSON has no infinity
COSINES = ("cosine_copy", "cosine_match", "cosine_others")


def kda_layers(model: nn.Module) -> list[DeltifyKDA]:
    """Return the KDA layers of a model."""
    return [module for module in model.modules() if isinstance(module, DeltifyKDA)]


@torch.no_grad()
def inspect_heads(model: CausalLM, batch: Batch) -> dict[int, dict[str, Tensor]]:
    """Return the quantities [H] of the heads of each KDA layer, on average over a batch.

    Args:
        model: Student.
        batch: Sequences that are one document each.

    Returns:
        Quantities by layer and name, see docs/guides/inspect.md. Those at copies are NaN if the text has none.
    """
    totals: dict[int, dict[str, Tensor]] = {}
    copies = 0
    for ids_1T, positions_1T in zip(batch.input_ids.split(1), batch.position_ids.split(1)):
        pairs_2P = far_copies(ids_1T[0].tolist(), positions_1T[0].tolist()).to(ids_1T.device)
        copies += pairs_2P.shape[1]

        def hook(mixer: nn.Module, args: tuple) -> None:
            assert isinstance(mixer, DeltifyKDA)
            measured = measure_layer(mixer, args[0], pairs_2P)  # noqa: B023  removed before the next sequence
            total = totals.setdefault(mixer.layer_idx, {})
            for name, x in measured.items():
                total[name] = total.get(name, 0) + x.cpu()

        handles = [mixer.register_forward_pre_hook(hook) for mixer in kda_layers(model)]
        try:
            model.get_decoder()(input_ids=ids_1T, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
    for total in totals.values():
        for name, x in total.items():
            total[name] = x / (copies if name in COSINES else len(batch.input_ids))
        half_life_HK = math.log(2) / total.pop("rate").clamp(min=SLOWEST)
        low_H, high_H = half_life_HK.quantile(torch.tensor([0.1, 0.9]), dim=1)
        # the half-life of the mean rate: the mean of half-lives would be that of the slowest channels
        mean_H = 1 / (1 / half_life_HK).mean(1)
        total |= {"half_life": mean_H, "half_life_p10": low_H, "half_life_p90": high_H}
        nearest_H = torch.maximum(total["cosine_copy"], total["cosine_match"])
        total["cosine_margin"] = nearest_H - total["cosine_others"]
    return totals


def measure_layer(mixer: DeltifyKDA, x_1TD: Tensor, pairs_2P: Tensor) -> dict[str, Tensor]:
    """Return means [H] over the tokens of one sequence, the mean decay `rate` [H, K], and sums [H] of cosines.

    Args:
        mixer: KDA layer.
        x_1TD: Inputs of the layer.
        pairs_2P: Copies, see `far_copies`, over which cosines are summed.
    """
    q_THK, k_THK, f_THK, b_TH = operator_inputs(mixer, x_1TD)
    rate, bias = mixer.A_log.float().exp()[:, None], mixer.dt_bias.float().view_as(f_THK[0])
    log_decay_THK = log_decay(f_THK, rate, bias, mixer.lower_bound)
    beta_TH = b_TH.sigmoid()
    measured = {
        "rate": -log_decay_THK.mean(0),
        "beta_mean": beta_TH.mean(0),
        "beta_median": beta_TH.median(0).values,
        "beta_strong": (beta_TH > STRONG).float().mean(0),
        "effective_keys": effective_keys(l2norm(k_THK), log_decay_THK, beta_TH),
    }
    for distance, left_H in values_left(mixer, k_THK, f_THK, b_TH).items():
        measured[f"left_{distance}"] = left_H
    return measured | cosines_at_copies(l2norm(q_THK), l2norm(k_THK), pairs_2P)


def operator_inputs(mixer: DeltifyKDA, x_1TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, keys and decay logits [T, H, K] and beta logits [T, H] of a layer, as its operator gets them."""
    q, _ = short_conv(mixer.q_proj(x_1TD), mixer.q_conv1d())
    k, _ = short_conv(mixer.k_proj(x_1TD), mixer.k_conv1d())
    q, k, f = (x[0].float().unflatten(-1, (-1, mixer.head_dim)) for x in (q, k, mixer.f_proj(x_1TD)))
    return q, k, f, mixer.b_proj(x_1TD)[0].float()


def effective_keys(k_THK: Tensor, log_decay_THK: Tensor, beta_TH: Tensor) -> Tensor:
    """Return the participation ratio [H] of the keys that the state holds, on average over STATES tokens.

    It is (tr C)^2 / tr C^2 of C = sum of beta k k^T over earlier tokens, with each key decayed since it was written. n
    orthogonal keys of equal weight give n. Overwriting is not counted.
    """
    tokens = len(k_THK)
    since_start_THK = log_decay_THK.cumsum(0)
    written_THK = beta_TH.sqrt()[..., None] * k_THK
    ratios = []
    for end in np.linspace(tokens / 2, tokens, STATES).astype(int):
        held_THK = written_THK[:end] * (since_start_THK[end - 1] - since_start_THK[:end]).exp()
        gram_HKK = torch.einsum("thk,thj->hkj", held_THK, held_THK)
        trace_H = gram_HKK.diagonal(dim1=1, dim2=2).sum(1)
        ratios.append(trace_H.square() / gram_HKK.square().sum((1, 2)).clamp(min=1e-30))
    return torch.stack(ratios).mean(0)


def values_left(mixer: DeltifyKDA, k_THK: Tensor, f_THK: Tensor, b_TH: Tensor) -> dict[int, Tensor]:
    """Return the fraction [H] of a value that its own key still reads, by distance in tokens.

    One pass of the operator measures all sampled tokens: each writes a 1 into a value channel of its own, and the
    tokens at the distances from it read with its key. Distances that the sequence is too short for are left out.
    """
    tokens, heads, _ = k_THK.shape
    distances = [distance for distance in DISTANCES if distance + SAMPLE_EVERY < tokens]
    start_S = torch.arange(SAMPLE_EVERY, tokens - distances[-1], SAMPLE_EVERY, device=k_THK.device)
    channel_S = torch.arange(len(start_S), device=k_THK.device)
    v_THS = k_THK.new_zeros(tokens, heads, len(start_S))
    v_THS[start_S, :, channel_S] = 1 / b_TH[start_S].sigmoid().clamp(min=1e-12)  # the operator multiplies by beta
    q_THK = torch.zeros_like(k_THK)
    for distance in distances:
        q_THK[start_S + distance] = k_THK[start_S]
    q, k, v, f, b = (x[None] for x in (q_THK, k_THK, v_THS, f_THK, b_TH))
    options = {"lower_bound": mixer.lower_bound, "scale": 1.0, "backend": "chunked"}  # in float32 on every device
    o, _ = kda(q, k, v, f, b, mixer.A_log, mixer.dt_bias, **options)
    o_THS = o[0]
    return {distance: o_THS[start_S + distance, :, channel_S].mean(0) for distance in distances}


def cosines_at_copies(q_THK: Tensor, k_THK: Tensor, pairs_2P: Tensor) -> dict[str, Tensor]:
    """Return sums [H] over copies of the cosines of the query with keys.

    `cosine_copy` is that with the key of the token that is copied, `cosine_match` that with the key of the token before
    it, and `cosine_others` the mean of those with all other keys up to the query.

    Args:
        q_THK: Normalised queries.
        k_THK: Normalised keys.
        pairs_2P: Index of the query, and of the token that is copied.
    """
    at_P, source_P = pairs_2P
    q_PHK, copied_PHK, matched_PHK = q_THK[at_P], k_THK[source_P], k_THK[source_P - 1]
    others_PHK = (k_THK.cumsum(0)[at_P] - copied_PHK - matched_PHK) / (at_P - 1)[:, None, None]
    keys = copied_PHK, matched_PHK, others_PHK
    return {name: (q_PHK * key_PHK).sum((0, 2)) for name, key_PHK in zip(COSINES, keys)}

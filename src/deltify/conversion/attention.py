"""Measure what each head of a teacher attends to: how far it looks back, and whether it retrieves.

Retrieval is measured on copies: places where the last tokens occurred once before in the document, far back, and the
next token is the same as there. A head that retrieves attends to that next token, or to the token before it
(arXiv 2404.15574 scores heads by the first).

Legend: B batch, T tokens, H heads, N tokens of the batch, P copies.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.batches import Batch
from .teacher import Teacher

NGRAM = 3  # tokens that occurred before
FAR = 128  # tokens from which on attention counts as far
LEAST_COPY_DISTANCE = 160  # a little more than FAR, because values are several tokens long


@dataclass
class HeadStatistics:
    """What the heads of one attention layer attend to, on average over a batch."""

    distance_H: Tensor  # mean distance in tokens, without the first token of a document, which is an attention sink
    copy_H: Tensor  # mean attention to the token that is copied
    match_H: Tensor  # mean attention to the token before it, which equals the current one
    received_NH: Tensor  # attention that each token receives from tokens FAR or more after it

    @property
    def retrieval_H(self) -> Tensor:
        return self.copy_H + self.match_H


@torch.no_grad()
def measure_attention(teacher: Teacher, batch: Batch) -> list[HeadStatistics]:
    """Return the statistics of each layer of the teacher on a batch."""
    layers = [layer.self_attn for layer in teacher.model.model.layers]
    sums: dict[int, list[Tensor]] = {}
    received: dict[int, list[Tensor]] = {layer: [] for layer in range(len(layers))}
    attention = teacher.config._attn_implementation or "eager"
    teacher.model.set_attn_implementation("eager")  # the only one that returns attention weights

    def read(ids_1T: Tensor, positions_1T: Tensor) -> None:
        positions_T = positions_1T[0]
        place = torch.arange(len(positions_T), device=positions_T.device)
        distance_TT = (place[:, None] - place).clamp_(min=0)
        far_TT = distance_TT >= FAR
        at_P, source_P = far_copies(ids_1T[0].tolist(), positions_T.tolist()).to(positions_T.device)

        def hook(module, args, output):
            weights_HTT = output[1][0].float()
            counted = weights_HTT * (positions_T > 0)
            total = [(counted * distance_TT).sum((1, 2)), counted.sum((1, 2))]
            total += [weights_HTT[:, at_P, source_P - k].sum(1) for k in (0, 1)]
            total.append(torch.full_like(total[0], len(at_P)))
            layer = module.layer_idx
            sums[layer] = [a + b for a, b in zip(sums[layer], total)] if layer in sums else total
            received[layer].append((counted * far_TT).sum(1).t())
            return output[0], None  # so that the weights of only one layer are in memory

        handles = [layer.register_forward_hook(hook) for layer in layers]
        try:
            teacher.model.model(input_ids=ids_1T, position_ids=positions_1T, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    try:
        # one sequence at a time: the weights of all heads take H * T * T numbers
        for sequence in zip(batch.input_ids.split(1), batch.position_ids.split(1)):
            read(*sequence)
    finally:
        teacher.model.set_attn_implementation(attention)
    statistics = []
    for layer in range(len(layers)):
        distance, mass, copied, matched, copies = sums[layer]
        means = distance / mass.clamp(min=1e-6), copied / copies.clamp(min=1), matched / copies.clamp(min=1)
        statistics.append(HeadStatistics(*means, torch.cat(received[layer])))
    return statistics


def far_copies(ids: list[int], positions: list[int]) -> Tensor:
    """Return places t and s, [2, P]: after the tokens that end at t comes the token at s, as it did there.

    The last NGRAM tokens at t occurred exactly once before in the document, LEAST_COPY_DISTANCE or more tokens back.
    """
    seen: dict[tuple[int, ...], list[int]] = {}
    copies: list[tuple[int, int]] = []
    for t in range(len(ids) - 1):
        if positions[t] == 0:
            seen = {}
        if positions[t] < NGRAM - 1:
            continue
        earlier = seen.setdefault(tuple(ids[t - NGRAM + 1 : t + 1]), [])
        is_far = len(earlier) == 1 and t - earlier[0] >= LEAST_COPY_DISTANCE
        if is_far and ids[earlier[0] + 1] == ids[t + 1] and positions[t + 1] > 0:
            copies.append((t, earlier[0] + 1))
        earlier.append(t)
    return torch.tensor(copies, dtype=torch.long).reshape(-1, 2).t()


def best_retrieval_heads(statistics: list[HeadStatistics], layers: list[int], heads: int) -> dict[int, list[int]]:
    """Return the `heads` heads of all `layers` together that retrieve most, by layer."""
    scores = {(layer, head): float(x) for layer in layers for head, x in enumerate(statistics[layer].retrieval_H)}
    chosen: dict[int, list[int]] = {}
    for layer, head in sorted(scores, key=scores.__getitem__, reverse=True)[:heads]:
        chosen.setdefault(layer, []).append(head)
    return chosen

"""A model whose rows are cut over two processes gives the logits and gradients of one process, in float64."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import random_student
from processes import run_in_processes
from torch import Tensor

from deltify.model import DeltifyForCausalLM

ROWS, SEGMENT = 2, 8
ROPE = {"use_rope": [True] * 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
SMALL = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 12, "vocab_size": 50}
# where documents begin in each row of two segments, None for positions that are left out; and whether layers recompute
DYNAMIC = ROPE | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
CASES: dict[str, tuple[dict[str, Any], list[list[int]] | None, bool]] = {
    "NoPE": ({}, None, False),
    "RoPE": (ROPE, None, False),
    "RoPE and recomputed layers": (ROPE, None, True),
    "RoPE that depends on the length": (DYNAMIC | {"max_position_embeddings": 5}, None, False),
    "RoPE, packed across the border": (ROPE | {"gate_bias": True, "kda_bias": True}, [[0, 3, 7], [0, 10]], False),
    "NoPE, packed at the border": ({"qk_norm": True}, [[0, 8], [0, 6, 9, 13]], True),
}


def make(facts: dict[str, Any], recompute: bool) -> DeltifyForCausalLM:
    model = random_student("KKKA", **(SMALL | facts)).double().train()
    if recompute:
        model.gradient_checkpointing_enable()
    return model


def rows_of(starts: list[list[int]] | None) -> tuple[Tensor, Tensor | None]:
    """Return ids and positions of whole rows."""
    ids = torch.randint(0, SMALL["vocab_size"], (ROWS, 2 * SEGMENT), generator=torch.Generator().manual_seed(1))
    if starts is None:
        return ids, None
    place = torch.arange(2 * SEGMENT)
    return ids, torch.stack([place - torch.tensor([max(s for s in row if s <= p) for p in place]) for row in starts])


def compute(case: str, begin: int, end: int, **options) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits of tokens begin to end, and the gradients of a loss that weights tokens by their places."""
    facts, starts, recompute = CASES[case]
    model = make(facts, recompute)
    ids, positions = (None if x is None else x[:, begin:end] for x in rows_of(starts))
    logits = model(input_ids=ids, position_ids=positions, **options).logits
    (logits.sin() * torch.arange(1, 2 * SEGMENT + 1)[begin:end, None]).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def compute_segments() -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    begin = dist.get_rank() * SEGMENT
    return {case: compute(case, begin, begin + SEGMENT, row_group=dist.group.WORLD) for case in CASES}


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory) -> list[dict[str, tuple[Tensor, dict[str, Tensor]]]]:
    return run_in_processes(compute_segments, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_of_cut_rows_are_those_of_whole_rows(case, of_ranks):
    want_logits, want = compute(case, 0, 2 * SEGMENT)
    (first_logits, first), (second_logits, second) = (results[case] for results in of_ranks)
    assert (torch.cat([first_logits, second_logits], 1) - want_logits).abs().max() <= 1e-10 * want_logits.abs().max()
    assert want.keys() == first.keys() and len(want) > 40
    for name, gradient in want.items():
        assert gradient.norm() > 0, name
        assert (first[name] + second[name] - gradient).norm() <= 1e-10 * gradient.norm(), name


def test_what_cannot_be_cut_is_refused(alone):
    ids, _ = rows_of(None)
    model = random_student("KKKA", **SMALL)
    whole, cut = model(ids).logits, model(ids, row_group=alone)  # one segment is the whole row
    assert torch.allclose(cut.logits, whole, atol=1e-4) and cut.past_key_values is None
    for argument in ("attention_mask", "seq_idx"):
        with pytest.raises(ValueError, match=f"row_group with {argument}"):
            model(ids, row_group=alone, **{argument: torch.zeros_like(ids)})
    with pytest.raises(ValueError, match=r"row_group with (past_key_values|cache)"):
        model(ids, row_group=alone, past_key_values=model(ids, use_cache=True).past_key_values)
    with pytest.raises(ValueError, match="labels with row_group"):
        model(ids, labels=ids, row_group=alone)
    with pytest.raises(ValueError, match="sliding_attention layers cannot be cut"):
        random_student("KS", **SMALL)(ids, row_group=alone)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="needs attn_implementation='sdpa', not 'eager'"):
        model(ids, row_group=alone)

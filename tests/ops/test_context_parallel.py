"""Rows that are cut over processes give the outputs, states and gradients of whole rows, in float64."""

import pytest
import torch
import torch.distributed as dist
from processes import run_in_processes
from torch import Tensor

from deltify.ops import kda, short_conv_split
from deltify.ops.context_parallel import CutRows, inputs_before, kda_context_parallel

B, SEGMENT, H, K, V, TAPS = 2, 6, 2, 4, 3, 4
D = H * (2 * K + V)
# where documents of each row begin, for rows of 2 * SEGMENT and of 4 * SEGMENT tokens; 0 is left out
CUTS = {
    "one document": ([], []),
    "at a border and inside": ([6], [3, 10]),
    "just before and after borders": ([5, 7], [4, 6]),
    "long ones": ([13], [2, 19]),  # with four ranks: whole segments in the middle of a document
}


def inputs(ranks: int) -> list[Tensor]:
    """Return q, k, v, f, b, A_log and dt_bias of whole rows, and the input and taps of a convolution."""
    torch.manual_seed(0)
    T = ranks * SEGMENT
    shapes = [(B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H, K), (B, T, H), (H,), (H * K,), (B, T, 3 * D)]
    return [torch.randn(shape, dtype=torch.float64) for shape in (*shapes, (3 * D, 1, TAPS))]


def bounds_of(starts: tuple[list[int], list[int]], begin: int, end: int) -> Tensor:
    """Return the bounds of documents in tokens begin to end of all rows, one after the other."""
    size = end - begin
    inside = [row * size + s - begin for row in range(B) for s in (begin, *starts[row]) if begin <= s < end]
    return torch.tensor(sorted({*inside, B * size}), dtype=torch.int32)


def loss(tensors: list[Tensor], begin: int) -> Tensor:
    """Return a weighted sum of outputs [B, T, ...], whose weights depend on the place in the row."""
    place = torch.arange(begin, begin + tensors[0].shape[1])
    return sum((x.sin() * (1 + place % 5).view(-1, *[1] * (x.dim() - 2))).sum() for x in tensors)


def whole(ranks: int, starts: tuple[list[int], list[int]], lower_bound: float | None) -> list[Tensor]:
    """Return outputs of whole rows and all gradients, from one process."""
    leaves = [x.requires_grad_() for x in inputs(ranks)]
    *kda_inputs, x, taps = leaves
    bounds = bounds_of(starts, 0, ranks * SEGMENT)
    flat = [t.flatten(0, 1)[None] for t in kda_inputs[:5]]
    o, state = kda(*flat, *kda_inputs[5:], cu_seqlens=bounds, lower_bound=lower_bound, backend="reference")
    y, _ = short_conv_split(x.flatten(0, 1)[None], taps, 3, cu_seqlens=bounds)
    outputs = [part.view(B, ranks * SEGMENT, -1) for part in (o, *y)]
    last = torch.tensor([(bounds <= (row + 1) * ranks * SEGMENT - 1).sum() - 1 for row in range(B)])
    total = loss(outputs, 0) + state[last].sin().sum()
    return [*outputs, state[last], *torch.autograd.grad(total, leaves)]


def cut(ranks: int, starts: tuple[list[int], list[int]], lower_bound: float | None) -> list[Tensor]:
    """Return the same from this rank's segment, with the gradients of shared parameters summed over the group."""
    groups = [dist.new_group(range(first, first + ranks)) for first in range(0, dist.get_world_size(), ranks)]
    group = groups[dist.get_rank() // ranks]
    begin, end = group.rank() * SEGMENT, (group.rank() + 1) * SEGMENT
    row_inputs = inputs(ranks)
    own = [x[:, begin:end] if x.shape[:1] == (B,) and x.dim() > 2 else x for x in row_inputs]
    leaves = [x.clone().requires_grad_() for x in own]
    *kda_inputs, x, taps = leaves
    carried = [0 if begin in s else begin - max([0, *(p for p in s if p < begin)]) for s in starts]
    rows = CutRows(group, torch.tensor(carried))
    packed = any(begin < s < end for s in (*starts[0], *starts[1]))
    bounds = bounds_of(starts, begin, end) if packed else None
    flat = [t.flatten(0, 1)[None] if packed else t for t in (*kda_inputs[:5], x)]
    options = {"cut": rows, "cu_seqlens": bounds}
    o, state = kda_context_parallel(*flat[:5], *kda_inputs[5:], lower_bound=lower_bound, **options)
    before = inputs_before(flat[5], TAPS - 1, **options)
    y, _ = short_conv_split(flat[5], taps, 3, state=before, cu_seqlens=bounds)
    outputs = [part.view(B, SEGMENT, -1) for part in (o, *y)]
    last = rows.documents(bounds, SEGMENT)[1]
    total = loss(outputs, begin)
    if group.rank() == ranks - 1:
        total = total + state[last].sin().sum()
    gradients = torch.autograd.grad(total, leaves)
    for gradient in gradients[5:7] + gradients[8:]:
        dist.all_reduce(gradient, group=group)
    return [x.detach() for x in (*outputs, state[last], *gradients)]


def cut_all() -> dict[tuple, list[Tensor]]:
    """Return this rank's results of all cases, for groups of two and of four."""
    cases = [(ranks, starts, bound) for ranks in (2, 4) for starts in CUTS for bound in (None, -5.0)]
    return {case: cut(case[0], CUTS[case[1]], case[2]) for case in cases}


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory) -> list[dict[tuple, list[Tensor]]]:
    return run_in_processes(cut_all, 4, tmp_path_factory.mktemp("ranks"))


NAMES = "o y1 y2 y3 state dq dk dv df db dA_log ddt_bias dx dtaps".split()


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("starts", CUTS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_outputs_and_gradients_of_cut_rows_are_those_of_whole_rows(ranks, starts, lower_bound, of_ranks):
    want = dict(zip(NAMES, whole(ranks, CUTS[starts], lower_bound)))
    for first in range(0, 4, ranks):
        parts = [dict(zip(NAMES, of_ranks[rank][ranks, starts, lower_bound])) for rank in range(first, first + ranks)]
        for name in NAMES:
            by_token = name not in ("state", "dA_log", "ddt_bias", "dtaps")
            got = torch.cat([part[name] for part in parts], 1) if by_token else parts[-1][name]
            assert (got - want[name]).abs().max() <= 1e-10 * want[name].abs().max().clamp(min=1), name


def test_one_rank_gives_what_the_operator_gives(alone):
    *kda_inputs, _, _ = inputs(4)
    one_row = [x[:1] for x in kda_inputs[:5]] + kda_inputs[5:]
    want, cut = kda(*one_row), CutRows(alone, torch.zeros(1, dtype=torch.int64))
    for bounds in (None, torch.tensor([0, 4 * SEGMENT], dtype=torch.int32)):
        for got, x in zip(kda_context_parallel(*one_row, cut=cut, cu_seqlens=bounds), want):
            assert torch.allclose(got, x, rtol=0, atol=1e-12)


def test_segments_that_do_not_fit_are_refused(alone):
    cut = CutRows(alone, torch.zeros(B, dtype=torch.int64))
    q, k, v, f, b, *shared, x, _ = inputs(1)
    with pytest.raises(ValueError, match=r"shape \[1, 6, 2, 4\]; segments of 2 rows must be \[2, tokens"):
        kda_context_parallel(q[:1], k[:1], v[:1], f[:1], b[:1], *shared, cut=cut)
    with pytest.raises(ValueError, match=r"must be \[1, 2 \* tokens"):
        inputs_before(x[:1, :5], 3, cut=cut, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="segments have 2 tokens, fewer than the 3"):
        inputs_before(x[:, :2], 3, cut=cut)

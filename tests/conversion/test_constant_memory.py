"""KDA with a constant decay per head equals KDA."""

import pytest
import torch

from deltify.conversion.calibration import delay, memory_output, set_memory
from deltify.conversion.constant_memory import read_memory, share_products
from deltify.conversion.student import convert
from deltify.conversion.teacher import random_teacher
from deltify.model.mixers import find_packing, inverse_softplus
from deltify.ops import kda


@pytest.mark.parametrize(
    "shape, starts",
    [
        ((2, 128, 4, 16), []),
        ((3, 200, 4, 8), [(0, 5), (0, 70), (1, 64), (1, 128), (2, 199), (2, 1)]),
        ((2, 32, 3, 8), [(0, 5)]),
        ((1, 1, 1, 4), []),
    ],
)
def test_a_constant_memory_equals_kda(shape, starts):
    """Documents begin anywhere: within a chunk, at its bounds, at the last token."""
    torch.manual_seed(0)
    B, T, H, K = shape
    q, k, v = torch.randn(3, B, T, H, K)
    b = torch.randn(B, T, H)
    rate = torch.tensor([0.001, 0.1, 1.2, 30.0])[:H]
    positions = torch.arange(T).repeat(B, 1)
    for row, start in starts:
        positions[row, start:] = torch.arange(T - start)
    packing = find_packing(None, positions, T, cached=False)

    def packed(x):
        return x if packing is None else x.flatten(0, 1)[None]

    dt_bias = inverse_softplus(rate).repeat_interleave(K)
    inputs = (packed(q), packed(k), packed(v), torch.zeros_like(packed(q)), packed(b), torch.zeros(H), dt_bias)
    bounds = None if packing is None else packing.cu_seqlens
    wanted, _ = kda(*inputs, cu_seqlens=bounds, backend="reference")
    shared = share_products(q, k, v, positions)
    for _ in range(2):  # the shared products serve more than once
        torch.testing.assert_close(read_memory(shared, b.sigmoid(), rate), wanted.view_as(v), rtol=1e-4, atol=1e-5)


def test_a_delayed_token_does_not_come_from_another_document():
    x = torch.arange(1.0, 7.0).view(1, 6, 1, 1)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert delay(x, positions).flatten().tolist() == [0, 1, 2, 0, 4, 5]


def test_calibration_sees_what_the_layer_will_put_out():
    """With documents in a sequence, and with heads that lag."""
    torch.manual_seed(0)
    student = convert(random_teacher("llama"), init="library")
    mixer, width = student.model.layers[0].self_attn, student.config.hidden_size
    heads = student.config.num_attention_heads
    x, one = torch.randn(2, 80, width), torch.randn(width) / width
    positions = torch.arange(80).repeat(2, 1)
    positions[0, 30:] = torch.arange(50)
    lags = [head % 2 for head in range(heads)]
    with torch.no_grad():
        set_memory(mixer, [(0.2, 0.5, lag) for lag in lags], one, torch.linspace(2, 50, heads))
        packing = find_packing(None, positions, 80, cached=False)
        wanted = mixer.inner(packing.gather(x), None, packing)[0]
        got = memory_output(mixer, x, positions, torch.tensor(lags))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)

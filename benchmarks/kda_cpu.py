"""The operator on a CPU, beside transformers' own torch functions for KDA, in float32.

Both sides start from the same raw inputs: gate, sigmoid and L2 norms are timed on both.
Run: python benchmarks/kda_cpu.py
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from common import median_seconds, row, write
from transformers.models.kimi_linear import modeling_kimi_linear as peer

from deltify.ops import kda, kda_step

HEADS, WIDTH = 16, 128


def make_inputs(tokens: int) -> list[Tensor]:
    """Raw inputs with the field's default gates: A in U(1, 16), softplus(dt_bias) log-uniform in [1e-3, 0.1]."""
    torch.manual_seed(0)
    q, k, v, f = (torch.randn(1, tokens, HEADS, WIDTH) for _ in range(4))
    dt = torch.empty(HEADS * WIDTH).uniform_(-6.9, -2.3).exp()
    return [q, k, v, f, torch.randn(1, tokens, HEADS), torch.empty(HEADS).uniform_(1, 16).log(), dt.expm1().log()]


def peer_gates(f: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Log-decay and beta as transformers' KimiLinearForgetGate and layer compute them."""
    g = f + dt_bias.view(f.shape[-2:])
    softplus = torch.where(g > 20.0, g, torch.log(1.0 + torch.exp(g)))
    return -A_log.exp()[:, None] * softplus, torch.sigmoid(b)


def peer_run(function, inputs: list[Tensor], state: Tensor | None = None) -> Tensor:
    q, k, v = inputs[:3]
    g, beta = peer_gates(*inputs[3:])
    options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    return function(q, k, v, g, beta, **options)[0]


def training(function, inputs: list[Tensor]) -> None:
    leaves = [x.detach().requires_grad_() for x in inputs]
    torch.autograd.grad(function(leaves).sum(), leaves)


def main() -> None:
    chunk, loop = peer.chunk_kimi_delta_attention, peer.recurrent_kimi_delta_attention
    rows = []
    for tokens in (1024, 4096):
        inputs, case = make_inputs(tokens), f"B1-T{tokens}-H{HEADS}-K{WIDTH}"
        with torch.no_grad():
            error = float((kda(*inputs)[0] - peer_run(loop, inputs)).abs().max())
            assert error < 1e-4, f"ours and the peer differ by {error}"
            ours = median_seconds(lambda x=inputs: kda(*x))
            for name, function in (("chunk function", chunk), ("token loop", loop)):
                theirs = median_seconds(lambda x=inputs, f=function: peer_run(f, x), budget=1.0)
                rows.append(row(f"forward/softplus/{case}", "seconds", ours, theirs, f"transformers' {name}"))
        ours = median_seconds(lambda x=inputs: training(lambda leaves: kda(*leaves)[0], x))
        theirs = None
        if tokens == 1024:  # at 4096 autograd through either peer does not fit into 24 GiB
            theirs = median_seconds(lambda x=inputs: training(lambda y: peer_run(chunk, y), x), budget=0.0, least=1)
        rows.append(row(f"training/softplus/{case}", "seconds", ours, theirs, "autograd, chunk function"))
    with torch.no_grad():
        inputs, state = make_inputs(1), torch.zeros(1, HEADS, WIDTH, WIDTH)
        now = [x[:, 0] for x in inputs[:5]]
        ours = median_seconds(lambda: kda_step(*now, *inputs[5:], state), most=5000)
        theirs = median_seconds(lambda: peer_run(loop, inputs, state), most=5000)
        rows.append(
            row(f"decode/softplus/B1-T1-H{HEADS}-K{WIDTH}", "seconds", ours, theirs, "transformers' token loop")
        )
    write("kda_cpu", rows)


if __name__ == "__main__":
    main()

"""One KDA layer at AFM-4.5B's width, forward and backward, beside flash-linear-attention's, in bfloat16.

Run: python benchmarks/mixer_gpu.py (needs a CUDA GPU; flash-linear-attention==0.6.0 for the peer)
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import eager_seconds, keep, row, write

from deltify.model import ArceeKDAConfig
from deltify.model.mixers import DeltifyKDA, init_gates

try:
    from fla.layers import KimiDeltaAttention
except ImportError:
    KimiDeltaAttention = None

WIDTH, HEADS, HEAD = 2560, 20, 128
PEER = "fla KimiDeltaAttention"


def ours() -> DeltifyKDA:
    config = ArceeKDAConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=4, head_dim=HEAD, num_hidden_layers=1
    )
    mixer = DeltifyKDA(config, 0)
    with torch.no_grad():
        init_gates(mixer)
    mixer.to("cuda", torch.bfloat16)
    for name in ("A_log", "dt_bias"):
        getattr(mixer, name).data = getattr(mixer, name).data.float()
    return mixer


def measure(mixer: torch.nn.Module, call, tokens: int) -> tuple[float, float, float]:
    """(seconds of a forward without gradients, of a forward and backward, MiB at the peak of the latter)."""
    x = torch.randn(1, tokens, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    parameters, dy = list(mixer.parameters()), torch.randn_like(x)
    both = lambda: torch.autograd.grad(call(x), [x, *parameters], dy)
    seconds = eager_seconds(both, calls=3, repeats=3)
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = torch.cuda.max_memory_allocated() / 2**20
    with torch.no_grad():
        return eager_seconds(lambda: call(x), calls=5, repeats=3), seconds, peak


def main() -> None:
    rows = []
    for tokens in (2048, 32768):
        mixer = ours()
        mine, theirs = measure(mixer, mixer, tokens), (None, None, None)
        if KimiDeltaAttention:
            peer = KimiDeltaAttention(hidden_size=WIDTH, num_heads=HEADS, head_dim=HEAD, layer_idx=0)
            peer.to("cuda", torch.bfloat16).train()
            theirs = measure(peer, lambda x, peer=peer: peer(x)[0], tokens)
        for what, metric, a, b in zip(("forward", "training", "training"), ("s", "s", "peak MiB"), mine, theirs):
            rows.append(row(f"mixer/{what}/B1-T{tokens}-D{WIDTH}", metric, a, b, PEER))
        keep("mixer_gpu", rows)
        print(*rows[-3:], sep="\n", flush=True)
    write("mixer_gpu", rows)


if __name__ == "__main__":
    main()

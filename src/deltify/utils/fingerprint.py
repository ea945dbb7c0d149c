"""Compute the fingerprint of a model, which identifies the results of its weights.

Needle answers, benchmark answers, the teacher cache, saved states and runs store it. It covers every byte of the
weights, at 2 GB/s per core.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

PIECE = 2**25  # elements that one thread hashes at a time

# fields of a configuration that affect what a model computes from its weights
FIELDS = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "mlp_gated", "qk_norm", "rms_norm_eps", "o_norm_eps", "conv_size", "gate_lower_bound"),
    *("rope_parameters", "use_rope", "no_rope_layers", "sliding_window", "sink_tokens", "layer_types"),
)


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Return 16 hexadecimal digits that differ when two models differ in a weight or in how they use it.

    Weights are hashed as bfloat16, so that a model has the same fingerprint on every device, in float32 and bfloat16.
    In float16 it has another one, because rounding differs. If the model is sharded over processes, all of them must
    call this. They gather one tensor at a time.
    """
    config = getattr(model, "config", None)
    facts = {name: getattr(config, name, None) for name in FIELDS}
    if set(facts["layer_types"] or ()) <= {"full_attention"}:  # only some versions of transformers list it
        facts["layer_types"] = None
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    tensors = sorted(model.state_dict().items())
    at_once = 1 if any(isinstance(x, DTensor) for _, x in tensors) else len(tensors)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for start in range(0, len(tensors), at_once):
            whole = [(name, full_tensor(x.detach())) for name, x in tensors[start : start + at_once]]
            pieces = [(name, piece) for name, x in whole for piece in x.reshape(-1).split(PIECE)]
            for (name, _), piece_hash in zip(pieces, pool.map(hash_piece, [piece for _, piece in pieces])):
                digest.update(name.encode() + piece_hash)
    digest.update(json.dumps([(name, list(x.shape)) for name, x in tensors]).encode())
    return digest.hexdigest()[:16]


def full_tensor(x: Tensor) -> Tensor:
    """Return a tensor, gathered from all processes if it is sharded."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@torch.no_grad()
def hash_piece(x: Tensor) -> bytes:
    """Return the SHA-256 of a tensor, as bfloat16 if it is floating point."""
    if x.is_floating_point():
        x = x.bfloat16()
    return hashlib.sha256(x.cpu().contiguous().view(torch.uint8).numpy().data).digest()

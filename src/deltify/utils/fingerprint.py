"""One fingerprint of a model, by which what it computed is told from what other weights computed.

Needle answers, benchmark answers, captured targets, saved states and runs carry it. Every byte counts: it takes about
as long as reading the weights from memory does, 2 GB/s for each core (10 GB: 3 to 5 s on two cores).
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

PIECE = 2**25  # elements that one thread hashes at a time

# what of a configuration changes what a model computes from its weights
FACTS = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "mlp_gated", "qk_norm", "rms_norm_eps", "conv_size", "gate_lower_bound"),
    *("rope_parameters", "use_rope", "no_rope_layers", "sliding_window", "sink_tokens", "layer_types"),
)


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Return 16 hexadecimal digits that differ when two models differ in a weight or in how they use it.

    Weights are compared as bfloat16, so that one model has one fingerprint on every device, in float32 and in bfloat16.
    float16 has another: it rounds otherwise.
    """
    config = getattr(model, "config", None)
    facts = {name: getattr(config, name, None) for name in FACTS}
    if set(facts["layer_types"] or ()) <= {"full_attention"}:  # some versions of transformers list it, some do not
        facts["layer_types"] = None
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    tensors = sorted(model.state_dict().items())
    pieces = [(name, piece) for name, x in tensors for piece in x.detach().reshape(-1).split(PIECE)]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        hashes = pool.map(hash_piece, [piece for _, piece in pieces])
        for (name, _), piece_hash in zip(pieces, hashes):
            digest.update(name.encode() + piece_hash)
    digest.update(json.dumps([(name, list(x.shape)) for name, x in tensors]).encode())
    return digest.hexdigest()[:16]


@torch.no_grad()
def hash_piece(x: Tensor) -> bytes:
    if x.is_floating_point():
        x = x.bfloat16()
    return hashlib.sha256(x.cpu().contiguous().view(torch.uint8).numpy()).digest()

"""What a model has read, as one small file: only a model whose state has constant size can do this.

    state = read(model, tokenizer.encode(book))      # once
    state.save("book.state")
    state = load_state("book.state", model)          # any time later
    model.generate(question_ids, past_key_values=state.cache(model))

Legend: T tokens, L layers.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from .model.modeling import DeltifyCache, store

FORMAT = "deltify-state-1"


@dataclass(frozen=True)
class State:
    """The state of every layer after some text, batch of one; holds no token of it."""

    conv: list[Tensor]  # L x [1, 3 * H * K, taps - 1]
    recurrent: list[Tensor]  # L x [1, H, K, V] float32
    fingerprint: str  # of the model that read
    tokens: int  # read

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whose size does not depend on how much was read."""
        tensors = {f"conv.{i}": x.contiguous().cpu() for i, x in enumerate(self.conv)}
        tensors |= {f"recurrent.{i}": x.contiguous().cpu() for i, x in enumerate(self.recurrent)}
        # a fixed width keeps the file's size the same for any number of tokens
        note = {"format": FORMAT, "fingerprint": self.fingerprint, "tokens": f"{self.tokens:016d}"}
        save_file(tensors, path, note)

    def cache(self, model: PreTrainedModel) -> DeltifyCache:
        """A copy to go on from, for `generate` or `forward`; the state itself stays as it is.

        The cache counts no tokens: `generate` then takes the whole prompt as new, and KDA layers need no positions.
        """
        cache = DeltifyCache(config=model.config)
        for layer, conv, recurrent in zip(cache.layers, self.conv, self.recurrent):
            store(layer, conv.to(model.device, model.dtype), recurrent.to(model.device))
        return cache


@torch.no_grad()
def read(
    model: PreTrainedModel, ids: Sequence[int] | Tensor, *, state: State | None = None, piece: int = 4096
) -> State:
    """The state after reading token ids [T], from the start or on from `state`; memory does not depend on T.

    Raises:
        ValueError: if there is nothing to read, or the model is a hybrid, whose attention layers keep every token.
    """
    refuse_hybrids(model)
    row = torch.as_tensor(ids, dtype=torch.long, device=model.device).view(1, -1)
    if row.shape[1] == 0:
        raise ValueError("there is nothing to read: the text has no tokens")
    cache = DeltifyCache(config=model.config) if state is None else state.cache(model)
    for part in row.split(piece, dim=1):
        model.model(input_ids=part, past_key_values=cache, use_cache=True)
    conv, recurrent = (
        [getattr(layer, kind)[0].clone() for layer in cache.layers] for kind in ("conv_states", "recurrent_states")
    )
    seen = row.shape[1] + (0 if state is None else state.tokens)
    return State(conv, recurrent, fingerprint(model), seen)


def load_state(path: str | Path, model: PreTrainedModel) -> State:
    """A state that `State.save` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a state, is damaged, or was read by another model.
    """
    refuse_hybrids(model)
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no state {path}; make one with: deltify read MODEL TEXT -o {path}")
    try:
        with safe_open(path, framework="pt") as file:
            note = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a state, or is damaged ({error})") from error
    if note.get("format") != FORMAT:
        raise ValueError(f"{path} is not a state of format {FORMAT}, but {note.get('format')!r}")
    if note["fingerprint"] != fingerprint(model):
        raise ValueError(
            f"{path} was read by another model (fingerprint {note['fingerprint']}, this one has {fingerprint(model)}); "
            "read the text again with this model"
        )
    conv, recurrent = ([tensors[f"{kind}.{i}"] for i in range(len(tensors) // 2)] for kind in ("conv", "recurrent"))
    return State(conv, recurrent, note["fingerprint"], int(note["tokens"]))


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of the architecture and of the gates, which every training step changes and no dtype does."""
    digest = hashlib.sha256()
    facts = {name: getattr(model.config, name) for name in ("model_type", "hidden_size", "head_dim", "layer_types")}
    digest.update(json.dumps(facts).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.endswith(("A_log", "dt_bias")):
            digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def refuse_hybrids(model: PreTrainedModel) -> None:
    kept = [i for i, kind in enumerate(model.config.layer_types) if kind != "linear_attention"]
    if kept:
        raise ValueError(f"layers {kept} are attention and keep every token; only pure KDA models have a state to save")

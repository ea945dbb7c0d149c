"""What a model has read, as one small file: only a model whose state has constant size can do this.

    state = read(model, book, tokenizer)             # once
    state.save("book.state")
    state = load_state("book.state", model)          # any time later
    model.generate(question_ids, past_key_values=state.cache(model))

Legend: T tokens, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..model.cache import write_states
from ..model.modeling import DeltifyCache, DeltifyPreTrainedModel
from ..model.sliding import SinkLayer
from ..utils.fingerprint import fingerprint
from ..utils.tokens import token_ids
from .prefill import read_pieces

FORMAT = "deltify-state-4"


@dataclass(frozen=True)
class State:
    """The state of every layer after some text, batch of one; holds no token of it.

    A KDA layer has "conv" [1, 3 * H * K, taps - 1] and "recurrent" [1, H, K, V] in float32; a sliding layer "keys" and
    "values" [1, key/value heads, sinks + window - 1, K] and "seen" [1].
    """

    layers: list[dict[str, Tensor]]
    fingerprint: str  # of the model that read
    tokens: int  # read

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whose size does not depend on how much was read."""
        named = {f"{i}.{name}": x for i, layer in enumerate(self.layers) for name, x in layer.items()}
        tensors = {name: x.contiguous().cpu() for name, x in named.items()}
        # a fixed width keeps the file's size the same for any number of tokens
        note = {"format": FORMAT, "fingerprint": self.fingerprint, "tokens": f"{self.tokens:016d}"}
        save_file(tensors, path, note)

    def cache(self, model: PreTrainedModel) -> DeltifyCache:
        """A copy to go on from, for `generate` or `forward`; the state itself stays as it is.

        The cache counts no tokens: `generate` then takes the whole prompt as new, and neither KDA nor sliding layers
        need positions.
        """
        cache = DeltifyCache(config=model.config)
        for layer, tensors in zip(cache.layers, self.layers):
            x = {name: tensor.to(model.device) for name, tensor in tensors.items()}
            if isinstance(layer, SinkLayer):
                layer.put(x["keys"].to(model.dtype), x["values"].to(model.dtype), x["seen"])
            else:
                write_states(layer, x["conv"].to(model.dtype), x["recurrent"])
        return cache


@torch.no_grad()
def read(
    model: PreTrainedModel,
    text: str | Sequence[int] | Tensor,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    state: State | None = None,
    piece: int = 4096,
) -> State:
    """The state after reading a text, from the start or on from `state`; memory does not depend on its length.

    Args:
        text: a string, for which `tokenizer` is needed, or token ids [T], which are read as they are. A string that
            goes on from `state` gets none of the tokens that begin a document; no string gets one that ends it.
        piece: tokens in a forward pass.

    Raises:
        ValueError: if there is nothing to read, or some layer keeps every token.
    """
    refuse_growing(model)
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError("text is a string; give the model's tokenizer too, or token ids instead")
        text = token_ids(tokenizer, text, begins=state is None)
    row = torch.as_tensor(text, dtype=torch.long, device=model.device).view(1, -1)
    if row.shape[1] == 0:
        raise ValueError("there is nothing to read: the text has no tokens")
    cache = DeltifyCache(config=model.config) if state is None else state.cache(model)
    for _ in read_pieces(model, row, cache, piece):
        pass
    seen = row.shape[1] + (0 if state is None else state.tokens)
    return State([tensors_of(layer) for layer in cache.layers], fingerprint(model), seen)


def tensors_of(layer) -> dict[str, Tensor]:
    """What a cache layer of constant size holds, by name."""
    if isinstance(layer, SinkLayer):
        return layer.tensors()
    return {"conv": layer.conv_states[0], "recurrent": layer.recurrent_states[0]}


def load_state(path: str | Path, model: PreTrainedModel) -> State:
    """A state that `State.save` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a state, is damaged, or was read by another model.
    """
    refuse_growing(model)
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
    if note["fingerprint"] != (mine := fingerprint(model)):
        raise ValueError(
            f"{path} was read by another model (fingerprint {note['fingerprint']}, this one has {mine}); read the text "
            "again with this model"
        )
    layers: list[dict[str, Tensor]] = [{} for _ in range(model.config.num_hidden_layers)]
    for name, tensor in tensors.items():
        layer, part = name.split(".")
        layers[int(layer)][part] = tensor
    return State(layers, note["fingerprint"], int(note["tokens"]))


def refuse_growing(model: PreTrainedModel) -> None:
    kinds = getattr(model.config, "layer_types", None) or ()
    if not isinstance(model, DeltifyPreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is no deltify model; states are kept by models that deltify converted"
        )
    if kept := [i for i, kind in enumerate(kinds) if kind == "full_attention"]:
        raise ValueError(
            f"layers {kept} are attention and keep every token; only KDA and sliding layers have a state to save"
        )
    if "linear_attention" not in kinds:
        raise ValueError("no layer is KDA: without gates, nothing tells this model's states from another's")

"""States of models that have read a text, as small files for later use.

    state = State.from_text(model, book, tokenizer)  # once
    state.save("book.state")
    state = State.load("book.state", model)          # any time later
    model.generate(question_ids, past_key_values=state.cache(model))

Only models whose layers are all KDA or sliding have such a state. Its size does not depend on the text's length.

Legend: T tokens, H heads, K key width, V value width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, LinearAttentionLayer

from ..model import DeltifyConfig
from ..model.cache import held, states_of, write_states
from ..model.modeling import DeltifyCache, DeltifyPreTrainedModel
from ..model.sliding import SinkLayer
from ..utils.fingerprint import fingerprint
from ..utils.tokens import token_ids
from .prefill import read_pieces

FORMAT = "deltify-state-4"
FINGERPRINTS: "WeakKeyDictionary[PreTrainedModel, str]" = WeakKeyDictionary()  # each takes seconds


@dataclass(frozen=True)
class State:
    """The state of every layer after some text, with batch size 1.

    A KDA layer has "conv" [1, 3 * H * K, taps - 1] and "recurrent" [1, H, K, V] in float32. A sliding layer has "keys"
    and "values" [1, key/value heads, sinks + window - 1, K] and "seen" [1].

    Args:
        layers: Tensors of each layer by name.
        fingerprint: Fingerprint of the model that read the text.
        tokens: Number of tokens read.
    """

    layers: list[dict[str, Tensor]]
    fingerprint: str
    tokens: int

    @classmethod
    @torch.no_grad()
    def from_text(
        cls,
        model: PreTrainedModel,
        text: str | Sequence[int] | Tensor,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        state: "State | None" = None,
        piece: int = 4096,
    ) -> "State":
        """Return the state after reading a text. Memory does not depend on the text's length.

        Args:
            model: Model of deltify whose layers are all KDA or sliding.
            text: A string, or token ids [T].
            tokenizer: Tokenizer for a string. A string gets the tokens that begin a document, unless it continues from
                `state`. It never gets the tokens that end one.
            state: State to continue from. Defaults to the beginning of a document.
            piece: Number of tokens in a forward pass.

        Raises:
            ValueError: If the text is empty, a string has no tokenizer, or the model has attention layers.
        """
        config = constant_state_config(model)
        if isinstance(text, str):
            if tokenizer is None:
                raise ValueError("text is a string. Give the model's tokenizer too, or token ids instead.")
            text = token_ids(tokenizer, text, begins=state is None)
        ids_1T = torch.as_tensor(text, dtype=torch.long, device=model.device).view(1, -1)
        if ids_1T.shape[1] == 0:
            raise ValueError("There is nothing to read: the text has no tokens.")
        cache = DeltifyCache(config=config) if state is None else state.cache(model)
        for _ in read_pieces(model, ids_1T, cache, piece):
            pass
        tokens = ids_1T.shape[1] + (0 if state is None else state.tokens)
        return cls.from_cache(model, cache, tokens)

    @classmethod
    def from_cache(cls, model: PreTrainedModel, cache: Cache, tokens: int) -> "State":
        """Return the state in a cache, after `tokens` tokens. It shares the cache's tensors.

        Raises:
            ValueError: If the model has attention layers, or the cache holds no tokens.
        """
        constant_state_config(model)
        if not any(map(held, cache.layers)):
            raise ValueError("The cache holds no tokens. Let the model read some first.")
        FINGERPRINTS[model] = fingerprint(model)
        return cls([tensors_of(layer) for layer in cache.layers], FINGERPRINTS[model], tokens)

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> "State":
        """Load a state that `save` wrote for the same model.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not a state, is damaged, or belongs to another model.
        """
        config = constant_state_config(model)
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no state {path}. Make one with: deltify read MODEL TEXT -o {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a state, or is damaged ({error}).") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is not a state of format {FORMAT}, but {metadata.get('format')!r}.")
        if metadata["fingerprint"] != (own := fingerprint(model)):
            raise ValueError(
                f"{path} was read by another model: its fingerprint is {metadata['fingerprint']}, this model's {own}. "
                "Read the text again with this model."
            )
        layers: list[dict[str, Tensor]] = [{} for _ in range(config.num_hidden_layers)]
        for name, tensor in tensors.items():
            layer, tensor_name = name.split(".")
            layers[int(layer)][tensor_name] = tensor
        return cls(layers, metadata["fingerprint"], int(metadata["tokens"]))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whose size does not depend on the number of tokens."""
        named = {f"{i}.{name}": x for i, layer in enumerate(self.layers) for name, x in layer.items()}
        tensors = {name: x.contiguous().cpu() for name, x in named.items()}
        # the width of the number is fixed, so that files have one size
        metadata = {"format": FORMAT, "fingerprint": self.fingerprint, "tokens": f"{self.tokens:016d}"}
        save_file(tensors, path, metadata)

    def cache(self, model: PreTrainedModel) -> DeltifyCache:
        """Return a cache for `generate` or `forward` to continue from. The state does not change.

        The cache counts no tokens, so that `generate` reads the whole prompt. Neither KDA nor sliding layers need
        positions.

        Raises:
            ValueError: If another model read the text.
        """
        cache = DeltifyCache(config=constant_state_config(model))
        if self.fingerprint and model not in FINGERPRINTS:
            FINGERPRINTS[model] = fingerprint(model)
        if len(self.layers) != len(cache.layers) or (self.fingerprint and FINGERPRINTS[model] != self.fingerprint):
            raise ValueError("The state was read by another model. Read the text again with this model.")
        for layer, tensors in zip(cache.layers, self.layers):
            x = {name: tensor.to(model.device) for name, tensor in tensors.items()}
            if isinstance(layer, SinkLayer):
                layer.put(x["keys"].to(model.dtype), x["values"].to(model.dtype), x["seen"])
            else:
                assert isinstance(layer, LinearAttentionLayer)
                own = torch.promote_types(model.dtype, torch.float32)
                write_states(layer, x["conv"].to(model.dtype), x["recurrent"].to(own))
        return cache


def tensors_of(layer: object) -> dict[str, Tensor]:
    """Return the tensors of a cache layer of constant size by name."""
    if isinstance(layer, SinkLayer):
        return layer.tensors()
    conv_state, state = states_of(layer)
    return {"conv": conv_state, "recurrent": state}


def constant_state_config(model: PreTrainedModel) -> DeltifyConfig:
    """Return the configuration of a model whose layers are all KDA or sliding.

    Raises:
        ValueError: If the model has other layers, or is no model of deltify.
    """
    if not isinstance(model, DeltifyPreTrainedModel):
        raise ValueError(f"{type(model).__name__} is no deltify model. Only models that deltify converted have states.")
    kinds = model.config.layer_types
    if attention := [i for i, kind in enumerate(kinds) if kind == "full_attention"]:
        raise ValueError(
            f"Layers {attention} are attention, which keeps every token. Only KDA and sliding layers have a state."
        )
    return model.config

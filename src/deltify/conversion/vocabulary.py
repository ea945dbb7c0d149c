"""Make a tokenizer fit a model: every token must have an embedding."""

import json

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, source: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer without special tokens that have no embedding, such as a padding token added later.

    The name of such a token in a text is split into ordinary tokens again, as when the model was trained.

    Args:
        tokenizer: Tokenizer of the model.
        config: Configuration of the model. `vocab_size` is its number of embeddings.
        source: Name of the teacher, for errors.

    Raises:
        ValueError: If an ordinary token, or one that begins or ends every text, has no embedding. Or if the tokenizer
            has so few tokens that it belongs to another model.
    """
    size = config.vocab_size
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= size}
    # embeddings may be padded to a round number, by a few hundred
    if len(tokenizer) - len(beyond) < 0.9 * size - 300:
        raise ValueError(
            f"the tokenizer of {source} has {len(tokenizer)} tokens, the model {size} embeddings; they do not belong "
            "together"
        )
    if not beyond:
        return tokenizer
    added = tokenizer.added_tokens_decoder
    ordinary = sorted(token for token, index in beyond.items() if index not in added or not added[index].special)
    if ordinary or not tokenizer.is_fast:
        names = ", ".join(repr(token) for token in (ordinary or sorted(beyond))[:5])
        raise ValueError(
            f"the tokenizer of {source} has {names} and more, up to id {max(beyond.values())}, but the model has only "
            f"{size} embeddings; they do not belong together"
        )
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < size]
    special = {name: getattr(tokenizer, name) for name in SPECIAL}
    special = {name: token for name, token in special.items() if token is not None and token not in beyond}
    if "eos_token" not in special and tokenizer.eos_token is not None:
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        if (end := next((end for end in ends if end is not None and end < size), None)) is None:
            raise ValueError(f"the end-of-sequence token of {source}, {tokenizer.eos_token!r}, has no embedding")
        special["eos_token"] = tokenizer.convert_ids_to_tokens(end)
    fitted = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **special)
    for name in ("chat_template", "model_max_length", "split_special_tokens"):
        setattr(fitted, name, getattr(tokenizer, name))
    if any(index >= size for index in fitted.encode("a")):
        raise ValueError(f"the tokenizer of {source} begins or ends texts with a token that has no embedding")
    return fitted


def set_beginning(tokenizer: PreTrainedTokenizerBase, begins: bool, ends: bool) -> None:
    """Set whether the tokenizer adds the beginning- and the end-of-sequence token to every text."""
    bos, eos = [tokenizer.bos_token] if begins else [], [tokenizer.eos_token] if ends else []
    added_ids = [tokenizer.get_vocab()[token] for token in bos + eos]
    bare = list(tokenizer.encode("a", add_special_tokens=False))
    if tokenizer.encode("a") == added_ids[: len(bos)] + bare + added_ids[len(bos) :]:
        return
    pair = [f"{token}:1" for token in (*bos, "$B", *eos)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*bos, "$A", *eos], pair=[*bos, "$A", *eos, *pair], special_tokens=list(zip(bos + eos, added_ids))
    )

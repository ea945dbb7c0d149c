"""Encode texts that a model continues: with the special tokens that begin a document, without those that end it.

Some tokenizers add tokens before and after every text. But only the first text of a document begins with special
tokens, and a model does not continue after an end-of-sequence token.
"""

import copy
from itertools import takewhile

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

TOKENIZER_PROBE = "Ünïcode, 1234567890 = 3.14;\n\tdef f(x): return 'x'  # 漢字"  # text that tokenizers cut differently
CUT_CHARACTER = "\ufffd"  # what decoding makes of a character whose last bytes are missing


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, begins: bool = True) -> list[int]:
    """Return the token ids of a text, without tokens that end a document. An empty text has none.

    Args:
        tokenizer: Tokenizer of the model.
        text: Text to encode.
        begins: Whether the text begins a document. Tokens that begin one are then added, unless the text has their
            names already. Otherwise they are removed if the text has them, and the text gets no space before it, which
            sentencepiece tokenizers put before every text.
    """
    start, ids = beginning(tokenizer), tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    written = ids[: len(start)] == start
    if begins:
        return ids if written or not ids else [*start, *ids]
    return ids[len(start) :] if start and written else without_space(tokenizer, text, ids)


def without_space(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> list[int]:
    """Return the token ids of a text that follows another one, without a space that the tokenizer puts before `ids`."""
    if not ids or not str(tokenizer.convert_ids_to_tokens(ids[0])).startswith("\u2581"):
        return ids
    line, both = (tokenizer(x, add_special_tokens=False, verbose=False)["input_ids"] for x in ("\n", "\n" + text))
    return both[len(line) :] if both[: len(line)] == line else ids


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that the tokenizer adds before every text."""
    ids, added = added_tokens(tokenizer)
    return [token for token, _ in takewhile(lambda pair: pair[1], zip(ids, added))]


def open_ended(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer that adds no tokens after a text: a copy if this one does, else itself."""
    _, added = added_tokens(tokenizer)
    if not added[-1]:
        return tokenizer
    start = beginning(tokenizer)
    names = tokenizer.convert_ids_to_tokens(start)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*names, "$A"], pair=[*names, "$A", "$B"], special_tokens=list(zip(names, start))
    )
    return tokenizer


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the token ids of an example text, and for each of them whether the tokenizer added it."""
    encoding = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    return encoding["input_ids"], encoding["special_tokens_mask"]

"""Token ids of texts that a model goes on from: special tokens begin a document, and end none.

Some tokenizers put tokens before every text, and some put one after it. But only a document's first text begins with
them, and a model that has read an end does not go on.
"""

import copy
from itertools import takewhile

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, begins: bool = True) -> list[int]:
    """Returns the token ids of a text, without the tokens that end one; none at all for an empty text.

    Args:
        begins: whether the text begins a document. Then the tokens that begin one come first, once, though the text has
            them written out; otherwise they are left out, though it has.
    """
    start, ids = beginning(tokenizer), tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    written = ids[: len(start)] == start
    if begins:
        return ids if written or not ids else [*start, *ids]
    return ids[len(start) :] if written else ids


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the special tokens that the tokenizer puts before every text."""
    ids, added = added_tokens(tokenizer)
    return [token for token, _ in takewhile(lambda pair: pair[1], zip(ids, added))]


def open_ended(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Returns the tokenizer, or of one that ends every text with a token a copy that does not."""
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
    """Returns the token ids of some text, and for each of them whether the tokenizer added it."""
    found = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    return found["input_ids"], found["special_tokens_mask"]

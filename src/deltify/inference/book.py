"""Texts that a model reads once, and questions about them. Each question starts from the memory of the text alone.

A model with constant state keeps the state and none of the tokens. Other models keep their whole cache, which is copied
for each question.

Legend: T tokens.
"""

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..model import DeltifyConfig
from ..model.causal_lm import CausalLM
from ..model.modeling import cache_argument
from ..utils.tokens import token_ids
from .generate import GREEDY, STREAMED
from .prefill import cache_bytes, has_growing_cache, teacher_cache_bytes
from .states import State, tensors_of

PLACE = "\ufdd0"  # stands for the text in a chat template: a code point that no text may contain


@dataclass(frozen=True)
class Book:
    """A text that a model has read.

    Args:
        bytes: Bytes of the model's memory of it.
        ids_1T: Tokens that the caches of `cache` count: those of the text, or none if no layer needs positions.
        cache: Function that returns a new cache to continue from.
    """

    bytes: int
    ids_1T: Tensor
    cache: Callable[[], DynamicCache]


def remember(model: PreTrainedModel, ids_1T: Tensor, cache: DynamicCache) -> Book:
    """Return the book of a text whose tokens were read into `cache`."""
    size = cache_bytes(cache)
    if has_growing_cache(model):
        return Book(size, ids_1T, partial(copy.deepcopy, cache))
    state = State([tensors_of(layer) for layer in cache.layers], "", ids_1T.shape[1])  # never saved: no fingerprint
    return Book(size, ids_1T[:, :0], partial(state.cache, model))


def attention_layers(model: PreTrainedModel) -> int:
    """Return the number of layers that keep keys and values of every token."""
    config = model.config
    if not isinstance(config, DeltifyConfig):
        return config.num_hidden_layers
    return config.layer_types.count("full_attention")


def growing_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Return the bytes of keys and values of `tokens` tokens in the model's own attention layers."""
    return teacher_cache_bytes(model, tokens) * attention_layers(model) // model.config.num_hidden_layers


def beginning_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Return the tokens [1, T] of a text and all that the chat template writes before it.

    Raises:
        ValueError: If the text is empty.
    """
    if not text.strip():
        raise ValueError("The text is empty. Give at least one word.")
    if tokenizer.chat_template:
        before, _ = around_text(tokenizer, [], "")
        return torch.tensor([tokenizer(before + text, add_special_tokens=False, verbose=False)["input_ids"]])
    return torch.tensor([token_ids(tokenizer, text)])


def question_ids(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]], question: str) -> Tensor:
    """Return the tokens [1, T] that follow a text: earlier questions and answers, and a question.

    With a chat template, the text and the first question are one message of the user. Without one, the model continues
    the text, an empty line, and the question.
    """
    if tokenizer.chat_template:
        _, after = around_text(tokenizer, turns, question)
    else:
        after = "".join(f"\n\n{part}" for part in (*map("".join, turns), question))
    return torch.tensor([token_ids(tokenizer, after, begins=False)])


def around_text(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]], question: str) -> tuple[str, str]:
    """Return what the chat template writes before the text and after it.

    Raises:
        ValueError: If the template leaves the text out.
    """
    messages = [
        message
        for asked, answer in turns
        for message in ({"role": "user", "content": asked}, {"role": "assistant", "content": answer})
    ]
    messages.append({"role": "user", "content": question})
    messages[0] = {"role": "user", "content": f"{PLACE}\n\n{messages[0]['content']}"}
    written = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    before, place, after = written.partition(PLACE)
    if not place:
        raise ValueError("The tokenizer's chat template leaves out the user's message.")
    return before, after


def answer(
    model: CausalLM,
    book: Book,
    ids_1T: Tensor,
    *,
    max_new_tokens: int,
    streamer: BaseStreamer | None = None,
    stopped: threading.Event | None = None,
) -> tuple[Tensor, int]:
    """Return the tokens [T] that follow a text and a question, and the bytes of the cache after them.

    Decoding is greedy. The book does not change.

    Args:
        model: Model that has read the text.
        book: What it remembers.
        ids_1T: Tokens of `question_ids`.
        max_new_tokens: Largest number of new tokens.
        streamer: Streamer that gets the tokens as they come.
        stopped: Event that ends the answer early.
    """
    prompt, cache = torch.cat([book.ids_1T, ids_1T], 1).to(model.device), book.cache()

    def is_stopped(ids: Tensor, scores: object, **_: object) -> Tensor:
        return torch.full((len(ids),), stopped is not None and stopped.is_set(), device=ids.device)

    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        **GREEDY,
        **STREAMED,
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList([is_stopped]),
        **cache_argument(cache),
    )
    return out[0, prompt.shape[1] :], cache_bytes(cache)

"""Chats as training text: rendered by the teacher's chat template, with a mask of the tokens of answers.

A line has one of the forms that TRL calls conversational language modeling and prompt-completion:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": [{"role": "user", "content": "..."}], "completion": [{"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}

The messages of assistants count, but none of those in a prompt. An answer ends after its first
end-of-sequence token. Strings are not rendered, and the whole completion counts.
"""

import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .encoding import Encoded
from .sources import held_out, records, repair

GROUP = 256  # chats that are encoded before they are written
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
FORMS = "messages, or prompt and completion (strings, or lists of messages)"
Message = dict[str, str]


@dataclass(frozen=True)
class Chats:
    """A source of chats: JSON-lines file, folder of such files, or `hf:NAME[:CONFIG][:SPLIT]`."""

    source: str


@dataclass(frozen=True)
class Chat:
    """A chat as tokens. All answers to the same `prompt` are held out, or none is."""

    prompt: str
    ids: list[int]
    answer: np.ndarray  # [tokens] bool: whether the token belongs to an answer
    place: str  # file and line, or row of a dataset
    repaired: int = 0  # number of replaced characters

    @property
    def loss_mask(self) -> np.ndarray:
        """Whether the prediction made at a token counts: whether the next one belongs to an answer, [tokens] bool."""
        return np.append(self.answer[1:], False)


def encode_chats(
    chats: Chats,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    *,
    split: bool,
    wanted: Callable[[], tuple[bool, bool]],
) -> Generator[Encoded]:
    """Yield encoded chats, with their loss masks, a few hundred at a time. The arguments are those of `encode_all`.

    A line is unfit if it is no chat, no token of it counts, or the template cannot render it or mark its answers. Of a
    file, it becomes the error of what is yielded. Of a dataset of the hub, it is left out, unless no line is fit among
    the first ones.

    Raises:
        ValueError: If the tokenizer is implemented in Python.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"chat:{chats.source}: the tokenizer {type(tokenizer).__name__} does not tell which characters a token "
            "stands for. Chats need a tokenizer of the library tokenizers"
        )
    lines, hub, some, error = records(chats.source), chats.source.startswith("hf:"), False, None
    while error is None:
        made, unfit, size, error = encode_group(lines, tokenizer, hub)
        if not made and not unfit and error is None:
            return
        some = some or bool(made)
        if not some and unfit:
            error = unfit[0]
        held = np.array([split and held_out(chat.prompt) for chat in made], bool)
        needed = np.array(wanted(), bool)[held.astype(int)]
        order = [i for part in (False, True) for i in np.flatnonzero(needed & (held == part))]
        lengths = np.array([len(chat.ids) for chat in made], np.int64) * needed
        yield Encoded(
            held,
            lengths,
            np.array([token for i in order for token in made[i].ids], dtype),
            repaired=[(i, chat.repaired, chat.place) for i, chat in enumerate(made) if chat.repaired],
            size=size,
            error=error,
            loss_mask=np.concatenate([made[i].loss_mask for i in order]) if order else np.zeros(0, bool),
            unfit=unfit,
        )


def encode_group(
    lines: Iterator[tuple[str, dict]], tokenizer: PreTrainedTokenizerBase, leave_out: bool
) -> tuple[list[Chat], list[ValueError], int, Exception | None]:
    """Return the chats of the next lines, why lines are left out, the bytes of all, and the error that ended them.

    Args:
        lines: Pairs of place and line.
        tokenizer: Tokenizer of the teacher.
        leave_out: Whether to leave out unfit lines, instead of ending with an error.
    """
    made, unfit, size = [], [], 0
    try:
        for place, record in islice(lines, GROUP):
            size += len(str(record).encode(errors="replace"))
            try:
                made.append(encode_chat(record, tokenizer, place))
            except ValueError as error:
                if not leave_out:
                    raise
                unfit.append(error)
    except Exception as error:
        return made, unfit, size, error
    return made, unfit, size, None


def encode_chat(record: dict, tokenizer: PreTrainedTokenizerBase, place: str) -> Chat:
    """Return the tokens of a line, which end with an end-of-sequence token.

    Args:
        record: The line.
        tokenizer: Tokenizer of the teacher.
        place: Name of the line in errors.

    Raises:
        ValueError: If the line is unfit, see `encode_chats`.
    """
    record, repaired = repair_all(record)
    prompt, completion = record.get("prompt"), record.get("completion")
    of_strings = isinstance(prompt, str) and isinstance(completion, str)
    try:
        if record.get("tools"):
            raise ValueError("chats with tools are not supported. Remove the line")
        if of_strings:
            key, text = prompt, prompt + completion
            ids, answer = encode_spans(text, [(len(prompt), len(text))], tokenizer, framed=True)
        elif "messages" in record:
            key, ids, answer = encode_messages(checked(record["messages"], "messages"), tokenizer)
        elif "prompt" in record and "completion" in record:
            before, after = checked(prompt, "prompt"), checked(completion, "completion")
            key, ids, answer = encode_messages([*before, *after], tokenizer, len(before))
        else:
            raise ValueError(f"its fields are {', '.join(record) or 'none'}; a chat has {FORMS}")
        size = size_to_end(ids, tokenizer)
        ids, answer = ids[:size], answer[:size]
        if not answer.any():
            raise ValueError("no token of it counts: it has no answer. Remove the line")
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    end = tokenizer.eos_token_id
    if end is not None and ids[-1] != end:
        ids, answer = [*ids, end], np.append(answer, of_strings)
    return Chat(key, ids, answer, place, repaired)


def size_to_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of tokens without white space after the last end-of-sequence token, which templates write."""
    end = tokenizer.eos_token_id
    size = len(ids) - ids[::-1].index(end) if end in ids else len(ids)
    return len(ids) if str(tokenizer.decode(ids[size:])).strip() else size


def repair_all(value: Any) -> tuple[Any, int]:
    """Return a JSON value whose strings are valid Unicode (`sources.repair`), and the number of replaced characters."""
    if isinstance(value, str):
        return repair(value)
    if isinstance(value, list | dict):
        pairs = [repair_all(part) for part in (value.values() if isinstance(value, dict) else value)]
        parts, replaced = [part for part, _ in pairs], sum(count for _, count in pairs)
        return (dict(zip(value, parts)) if isinstance(value, dict) else parts), replaced
    return value, 0


def checked(messages: Any, field: str) -> list[Message]:
    """Return messages.

    Raises:
        ValueError: If they are not a list of objects whose role and content are strings.
    """
    fits = isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)
    if not fits or not all(isinstance(message.get(key), str) for message in messages for key in ("role", "content")):
        raise ValueError(
            f"the field {field!r} is {str(messages)[:60]}, not a list of messages whose role and content are strings"
        )
    return messages


def encode_messages(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, before: int = 0
) -> tuple[str, list[int], np.ndarray]:
    """Return what comes before the first answer, the token ids, and whether each belongs to an answer.

    Args:
        messages: Messages of a chat.
        tokenizer: Tokenizer of the teacher.
        before: Number of messages of the prompt, in which no message is an answer.
    """
    answers = [i for i, message in enumerate(messages) if i >= before and message["role"] == "assistant"]
    if not answers:
        where = " of the completion" if before else ""
        raise ValueError(f"no message{where} has the role 'assistant', so no token counts. Remove the line")
    key = "".join(f"{message['role']}: {message['content']}\n" for message in messages[: answers[0]])
    ids, answer = encode_answers(messages, answers, tokenizer, before)
    first = answer & ~np.append(False, answer[:-1])
    start = np.maximum.accumulate(np.where(first, np.arange(len(ids)), 0))  # of each token's answer
    is_end = answer & np.equal(ids, -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id)
    ends = np.cumsum(is_end) - is_end  # before each token
    return key, ids, answer & (ends == ends[start])  # a generation stops after the first end


def encode_answers(
    messages: list[Message], answers: list[int], tokenizer: PreTrainedTokenizerBase, before: int
) -> tuple[list[int], np.ndarray]:
    """Return the token ids of a chat, and whether each stands in one of the messages `answers`, [tokens] bool."""
    if MARKED.search(template_of(tokenizer)):
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        encoding = apply_template(messages, tokenizer, **options)
        ids, marked = encoding["input_ids"], np.array(encoding["assistant_masks"], bool)
        if not before:
            return ids, marked
        whole = rendered(messages, tokenizer)
        completion = (beginning(messages[:before], whole, tokenizer), len(whole))
        return ids, marked & encode_spans(whole, [completion], tokenizer)[1]
    whole, spans = rendered(messages, tokenizer), []
    for i in answers:
        end = rendered(messages[: i + 1], tokenizer)
        if not whole.startswith(end):
            raise ValueError(
                "the chat template renders the messages up to an answer otherwise than as part of the whole chat. Give "
                "each answer a line of its own, or mark answers in the template with {% generation %}"
            )
        spans.append((beginning(messages[:i], end, tokenizer), len(end)))
    return encode_spans(whole, spans, tokenizer)


def beginning(before: list[Message], whole: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of characters of a rendered chat before the answer to its first messages.

    Raises:
        ValueError: If the chat does not begin as the template begins an answer to these messages.
    """
    if not before:
        raise ValueError("the chat begins with an answer. Give a message before it")
    start = apply_template(before, tokenizer, tokenize=False, add_generation_prompt=True)
    if not whole.startswith(start):
        raise ValueError(
            f"the chat template begins an answer with {start[-40:]!r}, but the rendered chat has "
            f"{whole[: len(start)][-40:]!r} there. Give prompt and completion as strings that the teacher reads"
        )
    return len(start)


def rendered(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return messages as the chat template writes them."""
    return apply_template(messages, tokenizer, tokenize=False)


def apply_template(messages: list[Message], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    """Return what the chat template makes of messages.

    Raises:
        ValueError: If there is no template, or it refuses the messages.
    """
    template_of(tokenizer)
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # errors of jinja2, and those of any expression in the template
        raise ValueError(f"the chat template refuses it: {error}") from error


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template of a tokenizer. Raise ValueError if it has none."""
    if not tokenizer.chat_template:
        raise ValueError("the teacher's tokenizer has no chat template. Give prompt and completion as strings")
    return tokenizer.get_chat_template()


def encode_spans(
    text: str, spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase, *, framed: bool = False
) -> tuple[list[int], np.ndarray]:
    """Return token ids, and whether each has a character of one of the spans (first, last + 1), [tokens] bool.

    Args:
        framed: Whether the tokenizer adds the special tokens of a text. An end of sequence among them is in a span.
    """
    encoding = tokenizer(text, add_special_tokens=framed, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoding["input_ids"], np.array(encoding["offset_mapping"], np.int64).reshape(-1, 2)
    inside = np.zeros(len(ids), bool)
    for first, end in spans:
        inside |= (offsets[:, 0] < end) & (offsets[:, 1] > first)
    if framed and inside.any() and ids[-1] == tokenizer.eos_token_id:
        inside[-1] = True
    return ids, inside

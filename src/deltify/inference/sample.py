"""Documents that a model writes itself: continuations of other documents' beginnings, or answers to messages.

    deltify sample runs/kda TEXT -o own.jsonl                     # text of the student
    deltify sample smollm2-135m-instruct TEXT -o teachers.jsonl   # text of the teacher
    deltify sample smollm2-135m-instruct QUESTIONS.jsonl --chat --field question -o answers.jsonl

A student that trains on its own text, with the teacher's distribution as the target, is corrected where its own samples
lead it. This is on-policy distillation (Agarwal et al. 2024, arXiv 2306.13649), here in rounds with one file each.

Legend: B batch, P tokens of a prompt.
"""

import itertools
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from ..conversion.teacher import locate
from ..data.sources import documents, held_out, records
from ..model.causal_lm import CausalLM
from ..training.distributed import LONG_WAIT, check_same, process_group, rank, share_out
from ..utils.console import log
from ..utils.devices import pick_device
from ..utils.fingerprint import fingerprint
from ..utils.folders import model_folder
from ..utils.tokens import CUT_CHARACTER, token_ids
from .generate import sampling_options
from .loading import load_model, load_tokenizer
from .prefill import stop_tokens

T = TypeVar("T")
R = TypeVar("R")
MAX_CHARS_PER_TOKEN = 100  # upper bound, so that whole documents are not tokenized


@torch.no_grad()
def sample(
    model: str | Path,
    source: str,
    output: str | Path,
    *,
    count: int = 1024,
    prompt_tokens: int = 32,
    length: int = 512,
    batch: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    device: str = "auto",
) -> Path:
    """Write documents of a model as JSON lines, {"text": ...}, and return the path.

    Each document continues the beginning of a document of the source. It ends with the model's end-of-sequence token or
    after `length` tokens. Documents that are held out for validation are not used. Every batch is written at once, so
    that an interrupted run leaves a file that can be used. Processes under torchrun share the batches, and the file is
    the same.

    Args:
        model: Folder of a model or run (its furthest stage), GGUF file, hub id, or name of the embedded teacher.
        source: Text whose documents begin the new ones, see `data.sources.documents`.
        output: File to write, which ends in .jsonl and must not exist.
        count: Number of documents. There are fewer if the source has fewer.
        prompt_tokens: Tokens at the beginning of a document that are given to the model. Shorter documents are skipped.
        length: Largest number of tokens of a document, its beginning included.
        batch: Number of documents written at a time.
        temperature: Softmax temperature. Tokens are drawn from the whole vocabulary. With 0, the likeliest are taken.
        seed: Random seed. The same text also needs the same batch and device.
        device: auto, cpu, cuda or mps. Weights are bfloat16 on cuda, else float32.

    Raises:
        FileExistsError: If `output` exists.
        FileNotFoundError: If model or source do not exist.
        ValueError: If settings do not fit, or the source has no document that is long enough.
    """
    output = Path(output)
    check_settings(output, temperature, count=count, batch=batch)
    if not 0 < prompt_tokens < length:
        raise ValueError(f"prompt_tokens={prompt_tokens} must be at least 1 and below length={length}.")
    folder = find_writer(model, length)
    tokenizer = load_tokenizer(folder)
    prompts = itertools.islice(beginnings(source, tokenizer, prompt_tokens), count)
    if (first := next(prompts, None)) is None:
        raise ValueError(f"No document of {source!r} has prompt_tokens={prompt_tokens} tokens. Give fewer.")
    prompts = itertools.chain([first], prompts)
    with process_group(pick_device(device), LONG_WAIT) as own_device:
        loaded, eos_token_ids = open_writer(folder, tokenizer, own_device)

        def go_on(batch_prompts: list[list[int]]) -> list[list[int]]:
            drawn = continuations(loaded, torch.tensor(batch_prompts), length, temperature, eos_token_ids)
            return [prompt + new for prompt, (new, _) in zip(batch_prompts, drawn)]

        written = tokens = 0
        for sequences in share_batches(prompts, batch, go_on, seed):
            texts = (str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in sequences)
            append(output, ({"text": text.rstrip(CUT_CHARACTER)} for text in texts), new=not written)
            written, tokens = written + len(sequences), tokens + sum(map(len, sequences))
            log(f"{written:,} of {count:,} documents, {tokens:,} tokens")
    if written < count:
        log(f"{source} has no more documents of {prompt_tokens} tokens")
    return output


@torch.no_grad()
def sample_answers(
    model: str | Path,
    source: str | Path,
    output: str | Path,
    *,
    field: str = "text",
    count: int = 1024,
    samples: int = 1,
    length: int = 512,
    batch: int = 64,
    temperature: float = 1.0,
    keep_number: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Path:
    """Write chats as JSON lines, {"messages": [...]}: a user's message and the model's answer. Return the path.

    `chat:FILE` in data.train trains on the answers. Answers that do not end after `length` tokens are left out. Every
    batch is written at once, so that an interrupted run leaves a file that can be used. Processes under torchrun share
    the batches, and the file is the same.

    Args:
        model: As for `sample`.
        source: JSON-lines file (.jsonl, .jsonl.gz or .jsonl.zst), folder of such files, or `hf:NAME`.
        output: File to write, which ends in .jsonl and must not exist.
        field: Field of each line that is the message.
        count: Largest number of messages.
        samples: Number of answers to each message.
        length: Largest number of tokens of a chat, its message included. Longer messages are skipped.
        batch: Number of answers written at a time.
        temperature: Softmax temperature. Tokens are drawn from the whole vocabulary. With 0, the likeliest are taken.
        keep_number: Field of each line with the right answer. If given, only those answers are written whose last
            number equals the last number of this field.
        seed: Random seed. The same text also needs the same batch and device.
        device: auto, cpu, cuda or mps. Weights are bfloat16 on cuda, else float32.

    Raises:
        FileExistsError: If `output` exists.
        FileNotFoundError: If model or source do not exist.
        ValueError: If settings do not fit, the tokenizer has no chat template, a line lacks a field, or no message is
            short enough.
    """
    output = Path(output)
    check_settings(output, temperature, count=count, samples=samples, length=length, batch=batch)
    folder = find_writer(model, length)
    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        raise ValueError(f"The tokenizer of {model} has no chat template. Leave --chat out to continue documents.")
    questions = itertools.islice(read_questions(source, field, keep_number), count)
    asked = (question for question in questions for _ in range(samples))
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with process_group(pick_device(device), LONG_WAIT) as own_device:
        loaded, eos_token_ids = open_writer(folder, tokenizer, own_device)

        def reply(group: list[Question]) -> tuple[int, int, int, list[dict]]:
            """Return how many messages fit, how many do not, how many tokens were written, and the chats to keep."""
            rendered = [(question, render(tokenizer, question.message)) for question in group]
            encoded = tokenizer([prompt for _, prompt in rendered], add_special_tokens=False)["input_ids"]
            fitting = [pair for pair, ids in zip(rendered, encoded) if len(ids) < length]
            if not fitting:
                return 0, len(group), 0, []
            prompts = [prompt for _, prompt in fitting]
            inputs = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            chats, tokens = [], 0
            drawn = continuations(loaded, ids, length, temperature, eos_token_ids, mask)
            for (question, _), (new, ended) in zip(fitting, drawn):
                answer = str(tokenizer.decode(new, skip_special_tokens=True))
                tokens += len(new)
                if ended and question.accepts(answer):
                    said = {"user": question.message, "assistant": answer}
                    chats.append({"messages": [{"role": role, "content": text} for role, text in said.items()]})
            return len(fitting), len(group) - len(fitting), tokens, chats

        tried = kept = skipped = written = 0
        started = time.monotonic()
        for fitting, too_long, tokens, chats in share_batches(asked, batch, reply, seed):
            skipped += too_long
            if not fitting:
                continue
            append(output, chats, new=not tried)
            tried, kept, written = tried + fitting, kept + len(chats), written + tokens
            speed = written / (time.monotonic() - started)
            log(f"{tried:,} answers, {kept:,} kept; {speed:,.0f} tokens/s")
    if not tried:
        raise ValueError(f"No message of {source} is shorter than length={length} tokens. Give more.")
    if skipped:
        log(f"{skipped:,} answers were left out, because their messages have {length} tokens or more")
    return output


@dataclass(frozen=True)
class Question:
    """A message to answer, and the number that the answer must end with, if any."""

    message: str
    number: str | None = None

    def accepts(self, answer: str) -> bool:
        found = last_number(answer)
        return self.number is None or (found is not None and Decimal(found) == Decimal(self.number))


def read_questions(source: str | Path, field: str, keep_number: str | None) -> Iterator[Question]:
    """Yield the question of each line of a source, see `data.sources.records`.

    Raises:
        ValueError: If a line is not a JSON object, lacks a field, has no text in it, or has no number in the field
            `keep_number`.
    """
    for place, record in records(str(source)):
        if not {field, keep_number or field} <= record.keys():
            fields = field if keep_number is None else f"{field} and {keep_number}"
            raise ValueError(
                f"{place}: {str(record)[:60]!r} is not a JSON object with {fields}. Name other fields with --field and "
                "--keep-number"
            )
        number = None if keep_number is None else last_number(str(record[keep_number]))
        if keep_number is not None and number is None:
            raise ValueError(
                f"{place}: {keep_number} has no number, as answers need: {str(record[keep_number])[:60]!r}"
            )
        if not isinstance(record[field], str):
            raise ValueError(f"{place}: {field} is not a text, but {str(record[field])[:60]!r}. Name another --field")
        yield Question(record[field], number)


def last_number(text: str) -> str | None:
    """Return the last number of a text without thousands separators, or None."""
    numbers = re.findall(r"(?<!\d)-?\d[\d,]*(?:\.\d+)?", text)  # the 5 of 3-5 is not negative
    return numbers[-1].replace(",", "") if numbers else None


def render(tokenizer: PreTrainedTokenizerBase, message: str) -> str:
    """Return a chat up to where the answer to a message begins, as the template writes it."""
    messages = [{"role": "user", "content": message}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def check_settings(output: Path, temperature: float, **positive: float) -> None:
    """Raise an error if the file exists or ends wrongly, or a number is not above 0; the temperature may be 0."""
    sampling_options(temperature)
    if output.exists():
        raise FileExistsError(f"{output} exists. Delete it, or name another file.")
    if output.suffix != ".jsonl":
        raise ValueError(f"output={str(output)!r} must end in .jsonl, as it holds JSON lines.")
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be a number above 0.")


def find_writer(model: str | Path, length: int) -> str | Path:
    """Return the folder or hub id of a model. Raise ValueError if it cannot read `length` tokens."""
    folder = model_folder(str(model)) if Path(model).expanduser().is_dir() else locate(str(model))
    config = AutoConfig.from_pretrained(folder)
    if any(getattr(config, "use_rope", [True])) and length > config.max_position_embeddings:
        raise ValueError(
            f"length={length} is more than the {config.max_position_embeddings} tokens that {model} reads."
        )
    return folder


def open_writer(
    folder: str | Path, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> tuple[CausalLM, set[int]]:
    """Return a model that samples from its plain distribution, and its end-of-sequence tokens."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    loaded = load_model(folder, device=device, dtype=dtype)
    check_same("models", lambda: fingerprint(loaded))
    eos_token_ids = stop_tokens(loaded, tokenizer)
    loaded.generation_config = GenerationConfig()  # penalties and the like would change the distribution
    return loaded, eos_token_ids


def share_batches(items: Iterator[T], size: int, write: Callable[[list[T]], R], seed: int) -> Iterator[R]:
    """Yield what `write` returns for each batch of items. Processes under torchrun share the batches.

    Each batch has a random seed of its own, so that its samples do not depend on the number of processes.
    """

    def seeded(numbered: tuple[int, list[T]]) -> R:
        number, batch = numbered
        torch.manual_seed(random.Random(f"{seed}/{number}").getrandbits(32))
        return write(batch)

    batches = iter(lambda: list(itertools.islice(items, size)), [])
    return (written for _, written in share_out(enumerate(batches), seeded))


def append(output: Path, lines: Iterable[dict], *, new: bool) -> None:
    """Append lines to a JSON-lines file, which only the first process does.

    Raises:
        FileExistsError: If the file is `new` but exists, because another process writes it, too.
    """
    if rank() > 0:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("x" if new else "a", encoding="utf-8") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)


def beginnings(source: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Iterator[list[int]]:
    """Yield the first tokens of each document that is long enough and not held out."""
    for text in documents(source):
        ids = token_ids(tokenizer, text[: MAX_CHARS_PER_TOKEN * tokens])[:tokens]
        if len(ids) == tokens and not held_out(text):
            yield ids


def continuations(
    model: CausalLM,
    prompts_BP: Tensor,
    length: int,
    temperature: float,
    eos_token_ids: set[int],
    attention_mask_BP: Tensor | None = None,
) -> Iterator[tuple[list[int], bool]]:
    """Yield the new tokens of each sequence up to an end-of-sequence token, and whether there was one.

    Args:
        length: Largest number of tokens of a sequence with its prompt, without padding.
        attention_mask_BP: 0 for padding on the left, 1 for tokens of prompts. Defaults to no padding.
    """
    prompts_BP, P = prompts_BP.to(model.device), prompts_BP.shape[1]
    mask_BP = torch.ones_like(prompts_BP) if attention_mask_BP is None else attention_mask_BP.to(model.device)
    own_B = mask_BP.sum(1)
    drawn = model.generate(
        prompts_BP,
        attention_mask=mask_BP,
        max_new_tokens=length - int(own_B.min()),
        **sampling_options(temperature, top_k=0, top_p=1.0),
        eos_token_id=sorted(eos_token_ids) or None,
        pad_token_id=min(eos_token_ids, default=0),
    )
    for row, own in zip(drawn[:, P:].tolist(), own_B.tolist()):
        new = row[: length - own]
        kept = list(itertools.takewhile(lambda token: token not in eos_token_ids, new))
        yield kept, len(kept) < len(new)

"""Streamed generation, and reading of a text file into a state."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from ..model.modeling import cache_argument
from ..utils.tokens import token_ids
from .loading import load_model, load_tokenizer
from .states import State

# the likeliest token, without penalties that a student has from its teacher
GREEDY = {"do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0}
# what a streamer and a given cache need, whatever the settings from the teacher are
STREAMED = {"num_beams": 1, "return_dict_in_generate": False, "use_cache": True}


def sampling_options(temperature: float, **options: float) -> dict[str, Any]:
    """Return options of transformers' `generate`: those of sampling, or with temperature 0 the likeliest token.

    Raises:
        ValueError: If the temperature is below 0 or no number.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be a number of at least 0")
    return {"do_sample": True, "temperature": temperature, **options} if temperature else dict(GREEDY)


@torch.no_grad()
def generate(
    path: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.7,
    top_p: float = 0.95,
    greedy: bool = False,
    chat: bool = False,
    device: str = "cpu",
    seed: int = 0,
    state: str | Path | None = None,
) -> str:
    """Stream a continuation of `prompt` to the terminal, print tokens per second, and return the text.

    Args:
        path: Folder of a model, folder of a run (its furthest stage), or hub id.
        prompt: Text to continue.
        max_new_tokens: Largest number of new tokens.
        temperature: Softmax temperature of sampling. With 0, the likeliest token is taken.
        top_p: Fraction of the probability mass to sample from.
        greedy: Whether to take the likeliest token instead of sampling.
        chat: Whether to apply the tokenizer's chat template to the prompt.
        device: Device of the model.
        seed: Random seed of sampling.
        state: File of `State.save`. The prompt continues the text that was read into it.

    Raises:
        ValueError: If the prompt is empty, or the state is of another model.
    """
    model, tokenizer = load_model(path, device=device), load_tokenizer(path)
    prompt_tokens = prompt_ids(tokenizer, prompt, chat=chat, begins=state is None)
    if not prompt_tokens:
        raise ValueError("The prompt is empty. Give at least one token.")
    ids = torch.tensor([prompt_tokens], device=device)
    torch.manual_seed(seed)
    sampling = sampling_options(0.0 if greedy else temperature, top_p=top_p)
    if state is not None:
        sampling |= cache_argument(State.load(state, model).cache(model))
    streamer = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    started = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        **STREAMED,
        **sampling,
    )
    seconds, new = time.perf_counter() - started, out.shape[1] - ids.shape[1]
    print(f"[{new} tokens in {seconds:.2f} s, {new / seconds:.1f} tokens/s, prompt of {ids.shape[1]} included]")
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool, begins: bool) -> list[int]:
    """Return the token ids of a prompt.

    A chat template writes special tokens itself, so none are added to its text.

    Args:
        tokenizer: Tokenizer of the model.
        prompt: Text of the prompt.
        chat: Whether to apply the chat template.
        begins: Whether the prompt begins a document. Otherwise the special tokens that begin one are left out.
    """
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        if begins:
            return tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    return token_ids(tokenizer, prompt, begins=begins)


def read_file(path: str | Path, text: str | Path, output: str | Path, *, device: str = "cpu") -> None:
    """Read a text file with a model, write the state, and print time and size.

    Args:
        path: Folder of a model, folder of a run (its furthest stage), or hub id.
        text: Text file.
        output: State file to write.
        device: Device of the model.

    Raises:
        FileNotFoundError: If there is no such text or model.
        ValueError: If the model has attention layers, whose cache grows with the text.
    """
    if not Path(text).is_file():
        raise FileNotFoundError(f"There is no text {text}.")
    model = load_model(path, device=device)
    ids = token_ids(load_tokenizer(path), Path(text).read_text(encoding="utf-8"))
    started = time.perf_counter()
    State.from_text(model, ids).save(output)
    seconds, size = time.perf_counter() - started, Path(output).stat().st_size
    print(f"read {len(ids):,} tokens in {seconds:.1f} s, {len(ids) / seconds:,.0f} tokens/s; {output}: {size:,} bytes")

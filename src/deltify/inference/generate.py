"""Text from a model, streamed."""

import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, TextStreamer

from ..utils.folders import model_folder
from ..utils.tokens import token_ids
from .states import load_state, read


@torch.no_grad()
def generate(
    path: str,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.7,
    top_p: float = 0.95,
    greedy: bool = False,
    chat: bool = False,
    device: str = "cpu",
    seed: int = 0,
    state: str | None = None,
) -> str:
    """Streams a continuation of `prompt` to the terminal, then tokens per second; returns the text.

    Args:
        path: model folder, run folder (its furthest stage), or hub id.
        greedy: take the likeliest token instead of sampling.
        chat: put the prompt through the tokenizer's chat template.
        state: file of a text that the model has read, see `deltify.states`; the prompt follows it.
    """
    source = model_folder(path)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    found = prompt_ids(tokenizer, prompt, chat=chat, begins=state is None)
    if not found:
        raise ValueError("the prompt is empty; give at least one token")
    ids = torch.tensor([found], device=device)
    torch.manual_seed(seed)
    sampling: dict[str, object] = (
        {"do_sample": False} if greedy else {"do_sample": True, "temperature": temperature, "top_p": top_p}
    )
    if state is not None:
        sampling["past_key_values"] = load_state(state, model).cache(model)
    streamer = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    started = time.perf_counter()
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, streamer=streamer, **sampling
    )
    seconds, new = time.perf_counter() - started, out.shape[1] - ids.shape[1]
    print(f"[{new} tokens in {seconds:.2f} s, {new / seconds:.1f} tokens/s, prompt of {ids.shape[1]} included]")
    return tokenizer.decode(out[0], skip_special_tokens=True)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool, begins: bool) -> list[int]:
    """Token ids of a prompt that begins a document, or follows another text.

    A chat template writes special tokens itself, and none are added to those. After another text, those that begin a
    document are left out.
    """
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        if begins:
            return tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    return token_ids(tokenizer, prompt, begins=begins)


def read_file(path: str, text: str, output: str, *, device: str = "cpu") -> None:
    """Reads a text file with a model and writes the state; prints how long that took and how large it is."""
    source = model_folder(path)
    if not Path(text).is_file():
        raise FileNotFoundError(f"there is no text {text}")
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").to(device).eval()
    ids = token_ids(AutoTokenizer.from_pretrained(source), Path(text).read_text(encoding="utf-8"))
    started = time.perf_counter()
    read(model, ids).save(output)
    seconds, size = time.perf_counter() - started, Path(output).stat().st_size
    print(f"read {len(ids):,} tokens in {seconds:.1f} s, {len(ids) / seconds:,.0f} tokens/s; {output}: {size:,} bytes")

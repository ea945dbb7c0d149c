"""Documents that a model writes itself, from the beginnings of other documents.

    deltify sample runs/kda TEXT -o own.jsonl                     # text of the student
    deltify sample smollm2-135m-instruct TEXT -o teachers.jsonl   # text of the teacher

A student that trains on its own text, with the teacher's distribution as the target, is corrected where its own samples
lead it. This is on-policy distillation (Agarwal et al. 2024, arXiv 2306.13649), here in rounds with one file each.

Legend: B batch, P tokens of a prompt.
"""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from ..conversion.teacher import locate
from ..data.sources import documents, held_out
from ..model.causal_lm import CausalLM
from ..utils.console import log
from ..utils.devices import pick_device
from ..utils.folders import model_folder
from ..utils.tokens import token_ids
from .loading import load_model, load_tokenizer
from .prefill import stop_tokens

MAX_CHARS_PER_TOKEN = 100  # upper bound, so that whole documents are not tokenized
CUT_CHARACTER = "\ufffd"  # what decoding makes of a character whose last bytes are missing


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
    that an interrupted run leaves a file that can be used.

    Args:
        model: Folder of a model or run (its furthest stage), GGUF file, hub id, or name of the embedded teacher.
        source: Text whose documents begin the new ones, see `data.sources.documents`.
        output: File to write, which ends in .jsonl and must not exist.
        count: Number of documents. There are fewer if the source has fewer.
        prompt_tokens: Tokens at the beginning of a document that are given to the model. Shorter documents are skipped.
        length: Largest number of tokens of a document, its beginning included.
        batch: Number of documents written at a time.
        temperature: Softmax temperature. Tokens are drawn from the whole vocabulary.
        seed: Random seed. The same text also needs the same batch and device.
        device: auto, cpu, cuda or mps. Weights are bfloat16 on cuda, else float32.

    Raises:
        FileExistsError: If `output` exists.
        FileNotFoundError: If model or source do not exist.
        ValueError: If settings do not fit, or the source has no document that is long enough.
    """
    output = Path(output)
    check_settings(output, count, prompt_tokens, length, batch, temperature)
    folder = model_folder(str(model)) if Path(model).expanduser().is_dir() else locate(str(model))
    config = AutoConfig.from_pretrained(folder)
    if any(getattr(config, "use_rope", [True])) and length > config.max_position_embeddings:
        raise ValueError(
            f"length={length} is more than the {config.max_position_embeddings} tokens that {model} reads."
        )
    tokenizer = load_tokenizer(folder)
    prompts = itertools.islice(beginnings(source, tokenizer, prompt_tokens), count)
    if (first := next(prompts, None)) is None:
        raise ValueError(f"No document of {source!r} has prompt_tokens={prompt_tokens} tokens. Give fewer.")
    torch_device = pick_device(device)
    dtype = torch.bfloat16 if torch_device.type == "cuda" else torch.float32
    loaded = load_model(folder, device=torch_device, dtype=dtype)
    eos_token_ids = stop_tokens(loaded, tokenizer)
    loaded.generation_config = GenerationConfig()  # penalties and the like would change the distribution
    torch.manual_seed(seed)
    written = tokens = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    prompts = itertools.chain([first], prompts)
    while batch_prompts := list(itertools.islice(prompts, batch)):
        sequences = list(continuations(loaded, torch.tensor(batch_prompts), length, temperature, eos_token_ids))
        texts = (str(tokenizer.decode(ids, skip_special_tokens=True)).rstrip(CUT_CHARACTER) for ids in sequences)
        with output.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        written, tokens = written + len(sequences), tokens + sum(map(len, sequences))
        log(f"{written:,} of {count:,} documents, {tokens:,} tokens")
    if written < count:
        log(f"{source} has no more documents of {prompt_tokens} tokens")
    return output


def check_settings(output: Path, count: int, prompt_tokens: int, length: int, batch: int, temperature: float) -> None:
    """Raise an error if the file exists or a setting of `sample` is out of range."""
    if output.exists():
        raise FileExistsError(f"{output} exists. Delete it, or name another file.")
    if output.suffix != ".jsonl":
        raise ValueError(f"output={str(output)!r} must end in .jsonl, as it holds JSON lines.")
    if not 0 < prompt_tokens < length:
        raise ValueError(f"prompt_tokens={prompt_tokens} must be at least 1 and below length={length}.")
    for name, value in (("count", count), ("batch", batch), ("temperature", temperature)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be a number above 0.")


def beginnings(source: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Iterator[list[int]]:
    """Yield the first tokens of each document that is long enough and not held out."""
    for text in documents(source):
        ids = token_ids(tokenizer, text[: MAX_CHARS_PER_TOKEN * tokens])[:tokens]
        if len(ids) == tokens and not held_out(text):
            yield ids


def continuations(
    model: CausalLM, prompts_BP: Tensor, length: int, temperature: float, eos_token_ids: set[int]
) -> Iterator[list[int]]:
    """Yield the tokens of each sequence with its prompt, up to an end-of-sequence token or `length`."""
    prompts_BP, P = prompts_BP.to(model.device), prompts_BP.shape[1]
    drawn = model.generate(
        prompts_BP,
        attention_mask=torch.ones_like(prompts_BP),
        max_new_tokens=length - P,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        eos_token_id=sorted(eos_token_ids) or None,
        pad_token_id=min(eos_token_ids, default=0),
    )
    for prompt, new in zip(prompts_BP.tolist(), drawn[:, P:].tolist()):
        yield prompt + list(itertools.takewhile(lambda token: token not in eos_token_ids, new))

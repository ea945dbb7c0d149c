"""Text of a model's own: documents that begin as another text's do, and go on as the model would.

    deltify sample runs/kda TEXT -o own.jsonl                     # the student's own text
    deltify sample smollm2-135m-instruct TEXT -o teachers.jsonl   # the teacher's

A student that trains on its own text, with the teacher's distribution for each of its tokens, is corrected where its
own words lead it (on-policy distillation, Agarwal et al. 2024, arXiv 2306.13649); here in rounds, a file each.

Legend: B documents at a time, P tokens of a beginning.
"""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..conversion.teacher import locate
from ..data.sources import documents, held_out
from ..utils.console import console
from ..utils.devices import pick_device
from ..utils.folders import model_folder
from ..utils.tokens import token_ids
from .prefill import stop_tokens

LETTERS = 100  # of a text that are enough for a token of it
CUT_LETTER = "\ufffd"  # what decoding makes of a letter whose last bytes are missing


@torch.no_grad()
def sample(
    model: str,
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
    """Writes `count` documents as JSON lines, {"text": ...}, one for each of the first fit documents of a text.

    A document ends with an end-of-sequence token of the model's or after `length` tokens. Documents that `data` would
    hold out are left out, so that a file made of a training text holds nothing that judges. Each batch is written as it
    comes: what is there when a run is stopped can be used.

    Args:
        model: folder of a model or run (its furthest stage), GGUF file, hub id, or the embedded teacher's name.
        source: text whose documents begin the new ones, see `text.documents`.
        output: .jsonl file, which must not exist yet.
        count: of documents; fewer if the source has fewer.
        prompt_tokens: of a document that are given to the model; shorter ones are passed over.
        length: largest number of tokens of a document, its beginning included.
        batch: documents at a time.
        temperature: of the logits; the whole vocabulary is drawn from.
        seed: of all that is drawn; the same text again needs the same batch and device, too.
        device: auto, cpu, cuda or mps; bfloat16 on cuda, else float32.

    Raises:
        FileExistsError: if `output` exists.
        FileNotFoundError: if model or source do not.
        ValueError: for settings that do not fit, or a source without a document that is long enough.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"{output} exists; delete it, or name another file")
    if output.suffix != ".jsonl":
        raise ValueError(f"output={str(output)!r} must end in .jsonl, as what is in it are JSON lines")
    if not 0 < prompt_tokens < length:
        raise ValueError(f"prompt_tokens={prompt_tokens} must be at least 1 and below length={length}")
    for name, value in (("count", count), ("batch", batch), ("temperature", temperature)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be a number above 0")
    folder = model_folder(model) if Path(model).expanduser().is_dir() else locate(model)
    config = AutoConfig.from_pretrained(folder)
    if any(getattr(config, "use_rope", [True])) and length > config.max_position_embeddings:
        raise ValueError(f"length={length} is more than the {config.max_position_embeddings} tokens that {model} reads")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = itertools.islice(beginnings(source, tokenizer, prompt_tokens), count)
    if (first := next(prompts, None)) is None:
        raise ValueError(f"no document of {source!r} has prompt_tokens={prompt_tokens} tokens; give fewer")
    prompts = itertools.chain([first], prompts)
    where = pick_device(device)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(where).eval()
    ends = stop_tokens(network, tokenizer)
    network.generation_config = GenerationConfig()  # penalties and the like would be another distribution
    torch.manual_seed(seed)
    written = tokens = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    while rows := list(itertools.islice(prompts, batch)):
        found = list(continuations(network, torch.tensor(rows), length, temperature, ends))
        texts = (tokenizer.decode(ids, skip_special_tokens=True).rstrip(CUT_LETTER) for ids in found)
        with output.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        written, tokens = written + len(rows), tokens + sum(map(len, found))
        console.print(f"{written:,} of {count:,} documents, {tokens:,} tokens", highlight=False)
    if written < count:
        console.print(f"{source} has no more documents of {prompt_tokens} tokens", highlight=False, soft_wrap=True)
    return output


def beginnings(source: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Iterator[list[int]]:
    """The first tokens of each document that is long enough and not held out."""
    for text in documents(source):
        ids = token_ids(tokenizer, text[: LETTERS * tokens])[:tokens]
        if len(ids) == tokens and not held_out(text):
            yield ids


def continuations(
    model: PreTrainedModel, prompts_BP: Tensor, length: int, temperature: float, ends: set[int]
) -> Iterator[list[int]]:
    """Each row's tokens, prompt included, up to the first of the tokens `ends`, or `length`."""
    prompts_BP, P = prompts_BP.to(model.device), prompts_BP.shape[1]
    drawn = model.generate(
        prompts_BP,
        attention_mask=torch.ones_like(prompts_BP),
        max_new_tokens=length - P,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
    )
    for prompt, new in zip(prompts_BP.tolist(), drawn[:, P:].tolist()):
        yield prompt + list(itertools.takewhile(lambda token: token not in ends, new))

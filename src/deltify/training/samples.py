"""Samples of a run: greedy continuations of fixed held-out prompts, at each validation.

Legend: B prompts, P tokens of a prompt, D model width.
"""

from collections.abc import Iterator
from itertools import islice, pairwise, takewhile, zip_longest

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.token_files import TokenFile
from ..model.cache import new_cache
from ..model.modeling import cache_argument
from ..utils.tokens import CUT_CHARACTER

PROMPTS = 4
PROMPT_TOKENS = 32
NEW_TOKENS = 32


def heldout_prompts(heldout: list[TokenFile]) -> Tensor:
    """Return the first tokens of the first documents of validation texts, [B, P]. The texts take turns.

    B is PROMPTS, or less if fewer documents are longer than a prompt.
    """
    starts = zip_longest(*(islice(long_documents(file), PROMPTS) for file in heldout))
    prompts = [prompt for of_texts in starts for prompt in of_texts if prompt is not None][:PROMPTS]
    return torch.tensor(prompts, dtype=torch.int64).reshape(-1, PROMPT_TOKENS)


def long_documents(file: TokenFile) -> Iterator[list[int]]:
    """Yield the first PROMPT_TOKENS tokens of each document that is longer."""
    for start, end in pairwise(file.bounds):
        if end - start > PROMPT_TOKENS:
            yield file.tokens[start : start + PROMPT_TOKENS].tolist()


@torch.no_grad()
def greedy_tokens(model: PreTrainedModel, prompts_BP: Tensor, new_tokens: int) -> Tensor:
    """Return the most likely next tokens after each prompt, [B, `new_tokens`], as plain argmax.

    Neither the model's generation settings nor a random number generator is used. The model must be in eval mode.
    """
    cache, ids, drawn = new_cache(model), prompts_BP.to(model.device), []
    for _ in range(new_tokens):
        hidden_BD = model.model(input_ids=ids, use_cache=True, **cache_argument(cache)).last_hidden_state[:, -1]
        ids = model.lm_head(hidden_BD).argmax(-1, keepdim=True)
        drawn.append(ids)
    return torch.cat(drawn, 1)


def write_samples(
    model: PreTrainedModel, prompts_BP: Tensor, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, str]]:
    """Return each prompt and its continuation, which ends before an end-of-sequence token."""
    if not len(prompts_BP):
        return []

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    samples = []
    for prompt, new in zip(prompts_BP.tolist(), greedy_tokens(model, prompts_BP, NEW_TOKENS).tolist()):
        start = text(prompt).rstrip(CUT_CHARACTER)
        whole = text(prompt + list(takewhile(lambda token: token != tokenizer.eos_token_id, new)))
        samples.append({"prompt": start, "continuation": whole[len(start) :].rstrip(CUT_CHARACTER)})
    return samples

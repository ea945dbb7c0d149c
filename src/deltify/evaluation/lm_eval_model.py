"""Models as lm-eval uses them: log-likelihoods of continuations, and generation.

A model whose state has constant size reads a shared prefix once and continues from copies of its state, for every
choice of a question and for every question after the same examples.

Legend: R sequences of a batch, T tokens, D model width, P predictions, W vocabulary.
"""

import contextlib
import json
import logging
import warnings
from collections import defaultdict
from collections.abc import Generator, Iterator
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import LinearAttentionLayer

from ..model import DeltifyConfig, DeltifyKDA
from ..model.cache import states_of, write_states
from ..model.modeling import DeltifyCache, DeltifyForCausalLM
from ..utils.tokens import open_ended
from .prefix_tree import Node, prefix_tree, walk

try:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"Benchmarks run through lm-eval, but {error.name} is not installed. Run: pip install 'lm_eval>=0.4.13'"
    ) from error

# upper bounds of one forward pass
BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}  # tokens, padding included
STATE_BYTES = {"cpu": 2**28, "cuda": 2**31}  # recurrent states
WHOLE_BATCH_SIZE = {"cpu": 8, "cuda": 64}  # sequences of a `WholeLM`
LOGIT_BYTES = {"cpu": 2**30, "cuda": 2**33}  # logits of a `WholeLM`, their log-softmax, and that of the last batch
MAX_PREDICTIONS = 1024  # positions whose logits exist at a time
SAMPLING = {"do_sample", "temperature", "top_k", "top_p"}  # options of generation that do not depend on the prompt


def lm_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    fast: bool = True,
    batch_size: int | None = None,
    max_length: int | None = None,
) -> HFLM:
    """Return a model for lm-eval: a `ConstantStateLM` if every layer is KDA and `fast`, else a `WholeLM`.

    The tokenizer decides which tokens begin a text, as HFLM's `add_bos_token` stays unset. No tokens end one.

    Args:
        model: Model to score.
        tokenizer: Tokenizer of the model.
        fast: Whether to read shared prefixes once, if every layer is KDA.
        batch_size: Sequences per batch. Defaults to what the device's memory holds.
        max_length: Number of tokens that are read of a request, which are its last ones. Defaults to HFLM's choice from
            the configuration.
    """
    device = model.device.type
    tokenizer = open_ended(tokenizer)
    with quiet():
        if fast and has_constant_state(model):
            fitting = max(1, min(512, STATE_BYTES.get(device, 2**31) // recurrent_state_bytes(model)))
            return ConstantStateLM(model, tokenizer=tokenizer, batch_size=batch_size or fitting, max_length=max_length)
        batch_size = batch_size or WHOLE_BATCH_SIZE.get(device, 64)
        # pyrefly: ignore[bad-argument-type]  # lm-eval lists two classes of tokenizers instead of their base class
        return WholeLM(model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)


def has_constant_state(model: PreTrainedModel) -> TypeGuard[DeltifyForCausalLM]:
    """Return whether a model's state says all about the tokens before: if every mixer is a KDA layer.

    The control whose states are zeroed also depends on how many tokens there were.
    """
    is_ours = isinstance(model, DeltifyForCausalLM)
    return is_ours and all(isinstance(layer.self_attn, DeltifyKDA) for layer in model.model.layers)


def recurrent_state_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of one sequence's recurrent states in all layers, without the small convolution states."""
    config = model.config
    return 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim**2


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Hide lm-eval's log lines on models that are given as objects and on tasks that are built."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class WholeLM(HFLM):
    """HFLM, with the prefix token before any text that has no token before it.

    HFLM itself fails at a single empty prompt and at a context of spaces alone. An empty prompt in a batch would
    continue padding.
    """

    def tok_batch_encode(self, strings: list[str], *args, **options) -> tuple[Tensor, Tensor]:
        if not self.tok_encode(""):
            # pyrefly: ignore[bad-argument-type]  # lm-eval declares Iterator[list[str]] for the token ids
            prefix = self.tok_decode([self.prefix_token_id], skip_special_tokens=False)
            strings = [string or prefix for string in strings]
        return super().tok_batch_encode(strings, *args, **options)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        tokens, following = super()._encode_pair(context, continuation)
        return tokens or [self.prefix_token_id], following

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        """Answer in batches whose logits fit into LOGIT_BYTES, as HFLM has those of all tokens at once.

        The size depends on the requests, not on free memory, as rounding depends on batches.
        """
        tokens = max((min(len(context + following), self.max_length) for _, context, following in requests), default=1)
        model, usual = self.model, self.batch_size_per_gpu
        assert isinstance(model, PreTrainedModel)
        each = 3 * tokens * model.config.vocab_size * model.dtype.itemsize
        fitting = LOGIT_BYTES.get(model.device.type, 2**33) // each
        self.batch_size_per_gpu = max(1, min(int(usual), fitting))
        try:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        finally:
            self.batch_size_per_gpu = usual


# ---- models of constant state ----------------------------------------------------------------------------------------


class ConstantStateLM(WholeLM):
    """`WholeLM` for models whose layers are all KDA: the same answers up to rounding, from a fraction of the tokens.

    Contexts are read as a tree, so that a shared prefix is read once. The choices of a question continue from copies of
    the state. `tokens_read` counts the tokens read, `tokens_whole` the tokens that HFLM would read.
    """

    def __init__(self, model: DeltifyForCausalLM, **options):
        super().__init__(model, backend="causal", **options)
        self.student = model
        self.batch_tokens = BATCH_TOKENS.get(model.device.type, 65536)
        self.tokens_read = self.tokens_whole = 0

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        """Return (log-likelihood, whether it is the greedy continuation) of each (strings, context, continuation)."""
        roots, request_ids, lengths = self.plan(requests)
        total, greedy = np.zeros(len(request_ids)), np.ones(len(request_ids), bool)
        remaining = np.array(lengths)  # tokens of each answer that are not predicted yet
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for nodes, _, hidden_PD, rows in self.read_tree(roots):
                if hidden_PD is None or rows is None:
                    continue
                tokens = np.concatenate([part for node in nodes for _, part, _ in node.targets])
                answer = np.concatenate([np.full(len(part), a) for node in nodes for _, part, a in node.targets])
                logprob, likeliest = self.predict(hidden_PD, rows, tokens)
                np.add.at(total, answer, logprob)
                np.logical_and.at(greedy, answer, likeliest)
                np.subtract.at(remaining, answer, 1)
                for a in np.unique(answer[remaining[answer] == 0]):
                    for i in request_ids[a]:
                        answers[i] = (float(total[a]), bool(greedy[a]))
                        if requests[i][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
                    bar.update(len(request_ids[a]))
        return answers

    def plan(self, requests) -> tuple[list[Node], list[list[int]], list[int]]:
        """Return the trees to read, and for each distinct answer the indices of its requests and its length in tokens.

        Raises:
            ValueError: If a context is empty, or a continuation empty or too long.
        """
        continuations: dict[bytes, dict[bytes, int]] = {}  # answers by context and continuation
        contexts, request_ids, endings, whole = [], [], [], {}
        for i, (_, context, continuation) in enumerate(requests):
            if not context:
                raise ValueError("A context has no tokens. Give the prefix token in its place.")
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(f"A continuation has {len(continuation)} tokens. 1 to {self.max_length} are allowed.")
            tokens = np.array((context + continuation)[-(self.max_length + 1) :], dtype=np.int64)
            start, ending = tokens[: -len(continuation)], tokens[-len(continuation) :]
            whole[tokens[:-1].tobytes()] = len(tokens) - 1
            if (key := start.tobytes()) not in continuations:
                continuations[key] = {}
                contexts.append(start)
            answer = continuations[key].setdefault(ending.tobytes(), len(request_ids))
            if answer == len(request_ids):
                request_ids.append([])
                endings.append(ending)
            request_ids[answer].append(i)
        if cut := sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests):
            warnings.warn(
                f"{cut} of {len(requests)} requests are longer than {self.max_length} tokens. Their last part is read.",
                stacklevel=2,
            )
        roots = prefix_tree(contexts)
        for node in list(walk(roots)):
            if node.context is None:
                continue
            last, by_prefix = len(node.tokens) - 1, {}  # answers by all tokens but their last
            for answer in continuations[contexts[node.context].tobytes()].values():
                by_prefix.setdefault(endings[answer][:-1].tobytes(), []).append(answer)
            if len(by_prefix) == 1 and not node.children:  # nothing is shared: context and continuation are one node
                (own,) = by_prefix.values()
                node.tokens = np.concatenate([node.tokens, endings[own[0]][:-1]])
                node.targets = [(last, endings[answer], answer) for answer in own]
                continue
            for own in by_prefix.values():
                node.targets += [(last, endings[answer][:1], answer) for answer in own]
                if len(endings[own[0]]) > 1:
                    targets = [(0, endings[answer][1:], answer) for answer in own]
                    node.children.append(Node(endings[own[0]][:-1], targets=targets))
        self.tokens_whole += sum(whole.values())
        return roots, request_ids, [len(ending) for ending in endings]

    @torch.no_grad()
    def read_tree(
        self, roots: list[Node]
    ) -> Iterator[tuple[list[Node], DeltifyCache, Tensor | None, np.ndarray | None]]:
        """Read all nodes, parents first and depth first, so that few states exist at a time.

        Yields:
            For each batch: the nodes, the cache after them, the hidden states [P, D] at all positions that predict
            (None if none does), and for every predicted token, in the order of the nodes' targets, its index in P.
        """
        todo: list[tuple[list[tuple[int, Node]], DeltifyCache | None]] = []
        todo += [(batch, None) for batch in self.batches([(0, node) for node in roots])][::-1]
        while todo:
            batch, above = todo.pop()
            cache = None if above is None else fork(above, [row for row, _ in batch], self.student.config)
            nodes = [node for _, node in batch]
            hidden_PD, rows, cache = self.read_batch(nodes, cache)
            yield nodes, cache, hidden_PD, rows
            children = [(row, child) for row, node in enumerate(nodes) for child in node.children]
            todo.extend((part, cache) for part in self.batches(children))

    def batches(self, nodes: list[tuple[int, Node]]) -> Iterator[list[tuple[int, Node]]]:
        """Yield batches of nodes of similar length.

        Args:
            nodes: Nodes with their index in the cache of their parents.
        """
        nodes = sorted(nodes, key=lambda pair: -len(pair[1].tokens))
        while nodes:
            size = min(int(self.batch_size), max(1, self.batch_tokens // len(nodes[0][1].tokens)))
            yield nodes[:size]
            nodes = nodes[size:]

    def read_batch(
        self, nodes: list[Node], cache: DeltifyCache | None
    ) -> tuple[Tensor | None, np.ndarray | None, DeltifyCache]:
        """Read nodes after `cache`.

        Returns:
            Hidden states and indices of predicted tokens, as `read_tree` yields them, and the cache after the nodes.
        """
        lengths = np.array([len(node.tokens) for node in nodes])
        width = lengths.max()
        real_RT = np.arange(width) < lengths[:, None]
        ids_RT = np.zeros((len(nodes), width), dtype=np.int64)
        ids_RT[real_RT] = np.concatenate([node.tokens for node in nodes])
        self.tokens_read += int(lengths.sum())
        predicting = [
            row * width + position + np.arange(len(tokens))
            for row, node in enumerate(nodes)
            for position, tokens, _ in node.targets
        ]
        # distinct positions in [R * T], and each token's index there
        flat_positions, rows = np.empty(0, np.int64), None
        if predicting:
            flat_positions, rows = np.unique(np.concatenate(predicting), return_inverse=True)
        position_in_row = flat_positions % width
        ids, mask = torch.from_numpy(ids_RT).to(self.device), None
        if not real_RT.all():
            mask = torch.from_numpy(real_RT.astype(np.int64)).to(self.device)
        cache = DeltifyCache(config=self.student.config) if cache is None else cache
        hidden = []
        for start in range(0, width, self.batch_tokens):  # more than one piece only if a single sequence is long
            piece = slice(start, start + self.batch_tokens)
            part = None if mask is None else mask[:, piece]
            out = self.student.model(
                input_ids=ids[:, piece], attention_mask=part, past_key_values=cache, use_cache=True
            )
            in_piece = flat_positions[(position_in_row >= start) & (position_in_row < start + self.batch_tokens)]
            row, position = torch.from_numpy(in_piece // width), torch.from_numpy(in_piece % width - start)
            hidden.append(out.last_hidden_state[row.to(self.device), position.to(self.device)])
        return torch.cat(hidden) if predicting else None, rows, cache

    @torch.no_grad()
    def predict(self, hidden_PD: Tensor, rows: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the log-probability of each token after its row of hidden states, and whether it is the likeliest."""
        order = np.argsort(rows, kind="stable")
        chosen = torch.from_numpy(np.stack([rows[order], tokens[order]])).to(self.device)
        logprobs, likeliest = [], []
        for start in range(0, len(hidden_PD), MAX_PREDICTIONS):
            logits_PW = self.student.lm_head(hidden_PD[start : start + MAX_PREDICTIONS])
            logits_PW = logits_PW.to(torch.promote_types(logits_PW.dtype, torch.float32))
            low, high = np.searchsorted(rows[order], [start, start + MAX_PREDICTIONS])
            row, token = chosen[0, low:high] - start, chosen[1, low:high]
            # the same function as HFLM's: on a CPU it errs by 1e-6, so another one would differ by 2e-4 in sums
            logprobs.append(logits_PW.log_softmax(-1)[row, token])
            likeliest.append(logits_PW.argmax(-1)[row] == token)
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return torch.cat(logprobs).double().cpu().numpy()[back], torch.cat(likeliest).cpu().numpy()[back]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the same texts as HFLM. Prompts are read as a tree, all but their last token."""
        groups: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[json.dumps(request.arguments[1], sort_keys=True)].append(i)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for group in groups.values():
                for i, text in self.generate_group([requests[i] for i in group]):
                    texts[group[i]] = text
                    bar.update()
        return texts

    def generate_group(self, requests: list[Instance]) -> Iterator[tuple[int, str]]:
        """Yield the index and the text of requests with equal options.

        Raises:
            ValueError: If the new tokens leave no space for a prompt.
        """
        options: dict[str, Any] = dict(normalize_gen_kwargs(requests[0].arguments[1], self.max_gen_toks))
        # pyrefly: ignore[bad-argument-type]
        end_of_text = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        stop = handle_stop_sequences(options.pop("until"), end_of_text)
        new = options.pop("max_gen_toks")
        prompts = self.group_by_prompt(requests, new)
        # prompts without anything to share, and options that depend on the prompt, are left to HFLM
        whole = [ids for ids in prompts if len(ids) == 1 or options.keys() - SAMPLING]
        for indices in [prompts.pop(ids) for ids in whole]:
            texts = super().generate_until([requests[i] for i in indices], disable_tqdm=True)
            yield from zip(indices, texts)
        self.tokens_whole += sum(len(ids) for ids in prompts)
        self.tokens_read += len(prompts)
        by_start: dict[tuple[int, ...], list[tuple[int, ...]]] = defaultdict(list)  # by all but the last token
        for ids in prompts:
            by_start[ids[:-1]].append(ids)
        starts = list(by_start)
        for nodes, cache, _, _ in self.read_tree(prefix_tree([np.array(start, dtype=np.int64) for start in starts])):
            ended = [
                (row, ids)
                for row, node in enumerate(nodes)
                if node.context is not None
                for ids in by_start[starts[node.context]]
            ]
            if not ended:
                continue
            last = torch.tensor([ids[-1:] for _, ids in ended], device=self.device)
            out = self._model_generate(
                context=last,
                max_length=1 + new,
                stop=stop,
                attention_mask=torch.ones_like(last),
                past_key_values=fork(cache, [row for row, _ in ended], self.student.config),
                **options,
            )
            for (_, ids), tokens in zip(ended, out[:, 1:].tolist()):
                text = postprocess_generated_text(self.tok_decode(tokens), stop, None)
                for i in prompts[ids]:
                    self.cache_hook.add_partial("generate_until", requests[i].arguments, text)
                    yield i, text

    def group_by_prompt(self, requests: list[Instance], new: int) -> dict[tuple[int, ...], list[int]]:
        """Return the indices of requests by the token ids of their prompt, cut so that `new` tokens fit after it."""
        longest = self.max_length - new
        if longest < 1:
            raise ValueError(f"{new} new tokens leave no space for a prompt in max_length={self.max_length}.")
        prompts: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            text = request.arguments[0]
            ids, _ = self.tok_batch_encode([text], left_truncate_len=longest, truncation=self.truncation)
            prompts[tuple(ids[0].tolist())].append(i)
        return prompts


def fork(cache: DeltifyCache, rows: list[int], config: DeltifyConfig) -> DeltifyCache:
    """Return a cache with copies of some sequences' states. It counts no tokens, which KDA layers do not need."""
    copy = DeltifyCache(config=config)
    index = torch.tensor(rows, device=states_of(cache.layers[0])[1].device)
    for old, new in zip(cache.layers, copy.layers):
        assert isinstance(new, LinearAttentionLayer)
        conv_state, state = states_of(old)
        write_states(new, conv_state[index], state[index])
    return copy

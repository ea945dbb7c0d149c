"""Models as lm-eval asks them: log-likelihoods of continuations, and generation.

A model whose state has constant size reads a shared beginning once and goes on from copies of its state: for every
choice of a question, and for every question after the same examples.

Legend: R rows, T tokens, D model width, P predictions, W vocabulary.
"""

import contextlib
import json
import logging
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..model.cache import write_states
from ..model.modeling import DeltifyCache, DeltifyForCausalLM
from ..utils.tokens import open_ended

try:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"benchmarks run through lm-eval, but {error.name} is not installed; run: pip install 'lm_eval>=0.4.13'"
    ) from error

# what one forward may hold: a batch of rows has at most so many tokens, padding included, and so many bytes of state
BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}
STATE_BYTES = {"cpu": 2**28, "cuda": 2**31}
WHOLE_ROWS = {"cpu": 8, "cuda": 64}  # of a model that reads every request from its start
SHARED_TOKENS = 64  # a beginning is read apart if that saves at least so many tokens
PREDICTED_ROWS = 1024  # whose logits exist at a time
SAMPLING = {"do_sample", "temperature", "top_k", "top_p"}  # options of generation that do not look at the prompt


def lm_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    fast: bool = True,
    batch_size: int | None = None,
    max_length: int | None = None,
) -> HFLM:
    """lm-eval's view of a model: `ConstantStateLM` if every layer is KDA and `fast`, else `WholeLM`.

    The tokenizer decides what begins a text (HFLM's `add_bos_token` stays unset); nothing ends one.

    Args:
        batch_size: rows of a batch; by the device's memory if absent.
        max_length: tokens of a request that are read, the last ones; as HFLM finds it in the configuration if absent.
    """
    device = model.device.type
    constant = isinstance(model, DeltifyForCausalLM) and set(model.config.layer_types) == {"linear_attention"}
    tokenizer = open_ended(tokenizer)
    with quiet():
        if fast and constant:
            rows = max(1, min(512, STATE_BYTES.get(device, 2**31) // state_bytes(model)))
            return ConstantStateLM(model, tokenizer=tokenizer, batch_size=batch_size or rows, max_length=max_length)
        rows = batch_size or WHOLE_ROWS.get(device, 64)
        return WholeLM(model, backend="causal", tokenizer=tokenizer, batch_size=rows, max_length=max_length)


def state_bytes(model: PreTrainedModel) -> int:
    """Of one sequence, in all layers; the few inputs that convolutions keep are left out."""
    config = model.config
    return 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim**2


@contextlib.contextmanager
def quiet():
    """Without lm-eval's remarks on models that are handed over as objects and tasks that are built."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class WholeLM(HFLM):
    """HFLM, but what has no token before it follows the prefix token, as HFLM's own empty contexts do.

    HFLM fails at an empty prompt, or beside other prompts answers to padding; and at a context of spaces alone.
    """

    def tok_batch_encode(self, strings: list[str], *args, **options) -> tuple[Tensor, Tensor]:
        if not self.tok_encode(""):
            prefix = self.tok_decode([self.prefix_token_id], skip_special_tokens=False)
            strings = [string or prefix for string in strings]
        return super().tok_batch_encode(strings, *args, **options)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        tokens, following = super()._encode_pair(context, continuation)
        return tokens or [self.prefix_token_id], following


# ---- what is read, as a tree -----------------------------------------------------------------------------------------


@dataclass
class Node:
    """Tokens that follow those of the parent."""

    tokens: np.ndarray
    context: int | None = None  # number of the context that ends here
    children: list["Node"] = field(default_factory=list)
    # (position, tokens, answer): the token at `position` and those after it predict `tokens`, for this answer
    targets: list[tuple[int, np.ndarray, int]] = field(default_factory=list)


def prefix_tree(contexts: list[np.ndarray]) -> list[Node]:
    """Different, non-empty token sequences as trees, so that what they share is read once.

    A beginning gets a node of its own where that saves at least `SHARED_TOKENS` tokens.
    """
    order = sorted(range(len(contexts)), key=lambda i: contexts[i].astype(">u4").tobytes())
    rows = [contexts[i] for i in order]
    roots: list[Node] = []
    # rows[low:high] share `depth` tokens, of which the nodes above read `above`
    todo = [(0, len(rows), 0, 0, roots)] if rows else []
    while todo:
        low, high, depth, above, siblings = todo.pop()
        if len(rows[low]) == depth:
            siblings.append(Node(rows[low][above:], order[low]))
            low += 1
        while low < high:
            end = low + 1
            while end < high and rows[end][depth] == rows[low][depth]:
                end += 1
            common = shared_tokens(rows[low], rows[end - 1])
            if end == low + 1:
                siblings.append(Node(rows[low][above:], order[low]))
            elif (common - above) * (end - low - 1) < SHARED_TOKENS:
                todo.append((low, end, common, above, siblings))
            else:
                node = Node(rows[low][above:common])
                siblings.append(node)
                if len(rows[low]) == common:
                    node.context = order[low]
                    low += 1
                todo.append((low, end, common, common, node.children))
            low = end
    return roots


def shared_tokens(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with in common."""
    least = min(len(a), len(b))
    differ = np.flatnonzero(a[:least] != b[:least])
    return int(differ[0]) if len(differ) else least


def walk(roots: list[Node]) -> Iterator[Node]:
    todo = list(roots)
    while todo:
        node = todo.pop()
        yield node
        todo.extend(node.children)


# ---- a model that goes on from copies of its state -------------------------------------------------------------------


class ConstantStateLM(WholeLM):
    """`WholeLM` for models of KDA layers alone: the same answers, to rounding, from a fraction of the tokens.

    Contexts are read as a tree, so that a beginning they share is read once; the choices of a question each go on from
    a copy of the state. `tokens_read` counts the tokens read, `tokens_whole` those that HFLM would read.
    """

    def __init__(self, model: DeltifyForCausalLM, **options):
        super().__init__(model, backend="causal", **options)
        self.batch_tokens = BATCH_TOKENS.get(model.device.type, 65536)
        self.tokens_read = self.tokens_whole = 0

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        """(log-likelihood, whether it is the greedy continuation) of each (strings, context, continuation)."""
        roots, owners, lengths = self.plan(requests)
        total, greedy, left = np.zeros(len(owners)), np.ones(len(owners), bool), np.array(lengths)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for nodes, _, hidden_PD, rows in self.read_tree(roots):
                if hidden_PD is None:
                    continue
                tokens = np.concatenate([part for node in nodes for _, part, _ in node.targets])
                answer = np.concatenate([np.full(len(part), a) for node in nodes for _, part, a in node.targets])
                logprob, likeliest = self.predict(hidden_PD, rows, tokens)
                np.add.at(total, answer, logprob)
                np.logical_and.at(greedy, answer, likeliest)
                np.subtract.at(left, answer, 1)
                for a in np.unique(answer[left[answer] == 0]):
                    for number in owners[a]:
                        answers[number] = (float(total[a]), bool(greedy[a]))
                        if requests[number][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
                    bar.update(len(owners[a]))
        return answers

    def plan(self, requests) -> tuple[list[Node], list[list[int]], list[int]]:
        """(trees to read, the requests of each answer, the tokens of each answer)."""
        continuations: dict[bytes, dict[bytes, int]] = {}
        contexts, owners, endings, whole = [], [], [], {}
        for number, (_, context, continuation) in enumerate(requests):
            if not context:
                raise ValueError("a context has no tokens; give the prefix token in its place")
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(f"a continuation has {len(continuation)} tokens; 1 to {self.max_length} are allowed")
            tokens = np.array((context + continuation)[-(self.max_length + 1) :], dtype=np.int64)
            start, ending = tokens[: -len(continuation)], tokens[-len(continuation) :]
            whole[tokens[:-1].tobytes()] = len(tokens) - 1
            if (key := start.tobytes()) not in continuations:
                continuations[key] = {}
                contexts.append(start)
            answer = continuations[key].setdefault(ending.tobytes(), len(owners))
            if answer == len(owners):
                owners.append([])
                endings.append(ending)
            owners[answer].append(number)
        if cut := sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests):
            warnings.warn(
                f"{cut} of {len(requests)} requests are longer than {self.max_length}; the last part is read",
                stacklevel=2,
            )
        roots = prefix_tree(contexts)
        for node in list(walk(roots)):
            if node.context is None:
                continue
            last, begun = len(node.tokens) - 1, {}
            for answer in continuations[contexts[node.context].tobytes()].values():
                begun.setdefault(endings[answer][:-1].tobytes(), []).append(answer)
            if len(begun) == 1 and not node.children:  # nothing to share: context and continuation in one go
                (own,) = begun.values()
                node.tokens = np.concatenate([node.tokens, endings[own[0]][:-1]])
                node.targets = [(last, endings[answer], answer) for answer in own]
                continue
            for own in begun.values():
                node.targets += [(last, endings[answer][:1], answer) for answer in own]
                if len(endings[own[0]]) > 1:
                    targets = [(0, endings[answer][1:], answer) for answer in own]
                    node.children.append(Node(endings[own[0]][:-1], targets=targets))
        self.tokens_whole += sum(whole.values())
        return roots, owners, [len(ending) for ending in endings]

    @torch.no_grad()
    def read_tree(
        self, roots: list[Node]
    ) -> Iterator[tuple[list[Node], DeltifyCache, Tensor | None, np.ndarray | None]]:
        """Reads all nodes, parents first, depth first, so that few states exist at a time.

        Yields for each batch: the nodes, the cache after them, hidden states [P, D] at the different positions that
        predict (None if none does), and for every predicted token, in the order of the nodes' targets, its row there.
        """
        todo = [(batch, None) for batch in self.batches([(0, node) for node in roots])][::-1]
        while todo:
            batch, above = todo.pop()
            cache = None if above is None else fork(above, [row for row, _ in batch], self.model.config)
            nodes = [node for _, node in batch]
            hidden_PD, rows, cache = self.read_batch(nodes, cache)
            yield nodes, cache, hidden_PD, rows
            children = [(row, child) for row, node in enumerate(nodes) for child in node.children]
            todo.extend((part, cache) for part in self.batches(children))

    def batches(self, nodes: list[tuple[int, Node]]) -> Iterator[list[tuple[int, Node]]]:
        """Nodes of similar length together, with their row in the cache of their parents."""
        nodes = sorted(nodes, key=lambda pair: -len(pair[1].tokens))
        while nodes:
            rows = min(int(self.batch_size), max(1, self.batch_tokens // len(nodes[0][1].tokens)))
            yield nodes[:rows]
            nodes = nodes[rows:]

    def read_batch(self, nodes: list[Node], cache: DeltifyCache | None):
        """(hidden states where something is predicted, the row there of each predicted token, the cache after)."""
        lengths = np.array([len(node.tokens) for node in nodes])
        width = lengths.max()
        real_RT = np.arange(width) < lengths[:, None]
        ids_RT = np.zeros((len(nodes), width), dtype=np.int64)
        ids_RT[real_RT] = np.concatenate([node.tokens for node in nodes])
        self.tokens_read += int(lengths.sum())
        flat = [
            row * width + position + np.arange(len(tokens))
            for row, node in enumerate(nodes)
            for position, tokens, _ in node.targets
        ]
        wanted, rows = np.unique(np.concatenate(flat), return_inverse=True) if flat else (np.empty(0, np.int64), None)
        ids, mask = torch.from_numpy(ids_RT).to(self.device), None
        if not real_RT.all():
            mask = torch.from_numpy(real_RT.astype(np.int64)).to(self.device)
        cache = DeltifyCache(config=self.model.config) if cache is None else cache
        hidden = []
        for start in range(0, width, self.batch_tokens):  # more than one piece only where a single row is long
            piece = slice(start, start + self.batch_tokens)
            part = None if mask is None else mask[:, piece]
            out = self.model.model(input_ids=ids[:, piece], attention_mask=part, past_key_values=cache, use_cache=True)
            here = wanted[(wanted % width >= start) & (wanted % width < start + self.batch_tokens)]
            row, position = torch.from_numpy(here // width), torch.from_numpy(here % width - start)
            hidden.append(out.last_hidden_state[row.to(self.device), position.to(self.device)])
        return torch.cat(hidden) if flat else None, rows, cache

    @torch.no_grad()
    def predict(self, hidden_PD: Tensor, rows: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(log-probability, whether it is the likeliest) of each token after the hidden state of its row."""
        order = np.argsort(rows, kind="stable")
        chosen = torch.from_numpy(np.stack([rows[order], tokens[order]])).to(self.device)
        logprobs, likeliest = [], []
        for start in range(0, len(hidden_PD), PREDICTED_ROWS):
            logits_PW = self.model.lm_head(hidden_PD[start : start + PREDICTED_ROWS])
            logits_PW = logits_PW.to(torch.promote_types(logits_PW.dtype, torch.float32))
            low, high = np.searchsorted(rows[order], [start, start + PREDICTED_ROWS])
            row, token = chosen[0, low:high] - start, chosen[1, low:high]
            # HFLM's function: that of the CPU is off by 1e-6, which sums to 2e-4 against an exact one
            logprobs.append(logits_PW.log_softmax(-1)[row, token])
            likeliest.append(logits_PW.argmax(-1)[row] == token)
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return torch.cat(logprobs).double().cpu().numpy()[back], torch.cat(likeliest).cpu().numpy()[back]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """HFLM's texts; all but a prompt's last token is read as a tree, and the rest generated from copies."""
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[json.dumps(request.arguments[1], sort_keys=True)].append(number)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for group in groups.values():
                for number, text in self.generate_group([requests[number] for number in group]):
                    texts[group[number]] = text
                    bar.update()
        return texts

    def generate_group(self, requests: list[Instance]) -> Iterator[tuple[int, str]]:
        """(number, text) of requests with equal options."""
        given = requests[0].arguments[1]
        options = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        stop = handle_stop_sequences(
            options.pop("until"), self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        )
        new = options.pop("max_gen_toks")
        room = self.max_length - new
        if room < 1:
            raise ValueError(f"{new} new tokens leave no room for a prompt in max_length={self.max_length}")
        prompts: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            ids, _ = self.tok_batch_encode([request.arguments[0]], left_truncate_len=room, truncation=self.truncation)
            prompts[tuple(ids[0].tolist())].append(number)
        whole = [ids for ids in prompts if len(ids) == 1 or options.keys() - SAMPLING]
        for numbers in [prompts.pop(ids) for ids in whole]:
            texts = super().generate_until([requests[number] for number in numbers], disable_tqdm=True)
            yield from zip(numbers, texts)
        self.tokens_whole += sum(len(ids) for ids in prompts)
        self.tokens_read += len(prompts)
        lasts: dict[tuple[int, ...], list[tuple[int, ...]]] = defaultdict(list)
        for ids in prompts:
            lasts[ids[:-1]].append(ids)
        starts = list(lasts)
        for nodes, cache, _, _ in self.read_tree(prefix_tree([np.array(start, dtype=np.int64) for start in starts])):
            asked = [
                (row, ids)
                for row, node in enumerate(nodes)
                if node.context is not None
                for ids in lasts[starts[node.context]]
            ]
            if not asked:
                continue
            last = torch.tensor([ids[-1:] for _, ids in asked], device=self.device)
            out = self._model_generate(
                context=last,
                max_length=1 + new,
                stop=stop,
                attention_mask=torch.ones_like(last),
                past_key_values=fork(cache, [row for row, _ in asked], self.model.config),
                **options,
            )
            for (_, ids), tokens in zip(asked, out[:, 1:].tolist()):
                text = postprocess_generated_text(self.tok_decode(tokens), stop, None)
                for number in prompts[ids]:
                    self.cache_hook.add_partial("generate_until", requests[number].arguments, text)
                    yield number, text


def fork(cache: DeltifyCache, rows: list[int], config) -> DeltifyCache:
    """A cache with copies of some rows' states; it counts no tokens, which KDA layers do not need."""
    copy = DeltifyCache(config=config)
    index = torch.tensor(rows, device=cache.layers[0].recurrent_states[0].device)
    for old, new in zip(cache.layers, copy.layers):
        write_states(new, old.conv_states[0][index], old.recurrent_states[0][index])
    return copy

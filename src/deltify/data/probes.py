"""Documents in which it is known which tokens repeat earlier ones, and from how far.

Legend: T tokens of a document, A answer tokens.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..utils.tokens import beginning
from .recall import SENTENCE_END
from .sparse_recall import HELDOUT_FACTS, sparse_documents
from .token_files import TokenFile

SEED = "probe"
SPARE = 1.5  # text per token of documents, because sentences are left out where they do not fit


@dataclass(frozen=True)
class Probe:
    """A document with answer tokens, each of which repeats an earlier token.

    Args:
        task: Kind of the document: "facts" for sparse recall text, or the name of a needle task.
        ids: Token ids [T].
        answers: Index [A] of each answer token, ascending.
        sources: Index [A] of the token that each answer token repeats.
    """

    task: str
    ids: np.ndarray
    answers: np.ndarray
    sources: np.ndarray

    @property
    def distances(self) -> np.ndarray:
        """Number of tokens [A] from the repeated token to the answer token."""
        return self.answers - self.sources

    @property
    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that identify the document and its answer tokens."""
        arrays = (np.asarray(x, np.int64).tobytes() for x in (self.ids, self.answers, self.sources))
        return hashlib.sha256(b"".join(arrays)).hexdigest()[:16]


def make_probe(
    task: str,
    text: str,
    repeated: Iterable[tuple[slice, slice]],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None = None,
) -> Probe:
    """Return the probe of a text.

    A token of an answer counts if the stated value has the same token at the same place.

    Args:
        task: Kind of the document.
        text: Text of the document.
        repeated: Characters of a stated value and of the answer that repeats it, for each answer.
        tokenizer: Tokenizer of the model.
        max_tokens: Number of tokens that are kept, from the end of the text. Defaults to all.

    Raises:
        ValueError: If the tokenizer does not tell which characters a token has.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"Recall needs a tokenizer that tells which characters a token has, and {type(tokenizer).__name__} does "
            "not. Use the fast tokenizer of the model, if it has one."
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    start, ids, bounds = beginning(tokenizer), np.asarray(encoded["input_ids"]), np.asarray(encoded["offset_mapping"])

    def tokens(span: slice) -> dict[tuple[int, int, int], int]:
        """Return the tokens of a span by their characters in it and their id."""
        first = int(np.searchsorted(bounds[:, 1], span.start, side="right"))
        last = int(np.searchsorted(bounds[:, 0], span.stop, side="left"))
        parts = (bounds[first:last].clip(span.start, span.stop) - span.start).tolist()
        return {(*part, token): i for i, (part, token) in enumerate(zip(parts, ids[first:last].tolist()), first)}

    pairs = []
    for stated, answer in repeated:
        sources = tokens(stated)
        pairs += [(index, sources[token]) for token, index in tokens(answer).items() if token in sources]
    cut = 0 if max_tokens is None else max(0, len(start) + len(ids) - max_tokens)
    kept = [pair for pair in sorted(pairs) if pair[1] >= cut]
    answers, sources = np.asarray(kept, np.int64).reshape(-1, 2).T + len(start) - cut
    return Probe(task, np.concatenate([start, ids[cut:]]).astype(np.int64), answers, sources)


def text_probes(texts: Iterable[str], counts: Mapping[int, int], tokenizer: PreTrainedTokenizerBase) -> list[Probe]:
    """Return sparse recall documents with facts of kinds that no training text has.

    There are fewer than asked for if the text is too short. Documents of different lengths share their text.

    Args:
        texts: Text around the facts. Only its beginning is read.
        counts: Number of documents of each length in tokens.
        tokenizer: Tokenizer of the model.
    """

    def sizes_of(parts: list[str]) -> list[int]:
        ids = tokenizer(parts, add_special_tokens=False, verbose=False)["input_ids"] if parts else []
        return [len(part) for part in ids]

    sentences: list[str] = []
    tokens, needed = 0, SPARE * max((length * count for length, count in counts.items()), default=0)
    for text in texts:
        if tokens >= needed:
            break
        new = [sentence for sentence in SENTENCE_END.split(text) if sentence]
        sentences += new
        tokens += sum(sizes_of(new))
    probes = []
    for length, count in counts.items():
        documents = sparse_documents(sentences, length, sizes_of, SEED, HELDOUT_FACTS)
        for document in islice(documents, count):
            repeated = [(recall.stated, recall.answered) for recall in document.recalls]
            probes.append(make_probe("facts", document.text, repeated, tokenizer, length))
    return [probe for probe in probes if len(probe.answers)]


def beginnings(files: list[TokenFile], tokens: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the texts of the documents at the beginning of token files, `tokens` tokens in all."""
    texts, share = [], tokens // len(files)
    for file in files:
        bounds = [*file.bounds[file.bounds < share].tolist(), min(share, len(file))]
        parts = (file.tokens[start:end].tolist() for start, end in pairwise(bounds))
        texts += [str(tokenizer.decode(part, skip_special_tokens=True)) for part in parts]
    return texts

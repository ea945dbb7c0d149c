"""Generate sparse recall text: documents that fill a training sequence and ask for few facts, from far away.

Recall text (recall.py) asks for much, nearly all of it from near. Here a document states a few facts about invented
people between the sentences of another text. It asks for each of them once, mostly at its end, so the distances between
statements and answers fill the document. docs/log/recall.md compares the distances.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, count

from .recall import FACTS, name

SPARSE_RECALL = "sparse-recall"
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)  # tokens of a document, each for training sequences of up to as many
TOKENS_PER_FACT = 350  # mean; in a document half to twice as many
MOST_FACTS = 16  # of a document: a value has about seven tokens, and two heads with keys of width 64 hold 128
ASKED_EARLIER = 0.25  # fraction of the facts that are asked for before the end
NEAREST = 512  # characters, about 128 tokens: smallest distance of a question that comes before the end

CARGO = "barley coal flax hemp iron lime rye salt slate tar timber wool".split()
MONTHS = "January February March April May June July August September October November December".split()
SHIPS = "barge brig cutter ferry frigate ketch schooner sloop".split()

# kinds of facts that are in no training text: recall of them shows what a model has learnt beyond FACTS
HELDOUT_FACTS = {
    "ship": (
        lambda rng: f"{rng.choice(SHIPS)} {name(rng)}",
        ("{who} sails on the {what}.", "On board the {what} works {who}."),
        ("Which ship does {who} sail on? The {what}.", "{who} left port with the {what}."),
    ),
    "birth": (
        lambda rng: f"{rng.randrange(1, 29)} {rng.choice(MONTHS)} {rng.randrange(1500, 1900)}",
        ("{who}'s date of birth is {what}.", "On {what} the parents of {who} had a child."),
        ("When was {who} born? On {what}.", "The birthday of {who} was {what}."),
    ),
    "cargo": (
        lambda rng: f"{rng.randrange(20, 1000)} sacks of {rng.choice(CARGO)} and {rng.randrange(20, 1000)} of peat",
        ("{who} ordered {what}.", "The merchants sent {what} to {who}."),
        ("What did {who} order? {what}.", "{who} received {what}."),
    ),
    "train": (
        lambda rng: f"{rng.randrange(24)}:{rng.randrange(60):02} to {name(rng)}",
        ("{who} always takes the {what}.", "The {what} is never late when {who} is on it."),
        ("Which train does {who} take? The {what}.", "{who} waits for the {what}."),
    ),
}


@dataclass(frozen=True)
class Fact:
    """A statement, and a question with its answer. Both contain the value."""

    statement: str
    question: str
    stated: slice  # characters of the value in the statement
    answered: slice  # characters of the value in the question


@dataclass(frozen=True)
class Recall:
    """Where the value of one fact is in a document, in characters."""

    stated: slice
    answered: slice


@dataclass(frozen=True)
class SparseDocument:
    """A text, and one entry for each fact in it."""

    text: str
    recalls: list[Recall]


def sparse_documents(
    sentences: Sequence[str],
    length: int,
    sizes_of: Callable[[list[str]], list[int]],
    seed: str,
    kinds: Mapping = FACTS,
) -> Iterator[SparseDocument]:
    """Yield documents of `length` tokens, made from consecutive sentences.

    A document may be longer by less than its first sentence, which comes before all facts. So it can be cut to its
    length at its beginning. Sentences at the end that do not fill a document are left out.

    Args:
        sentences: Text of the documents.
        length: Number of tokens of a document.
        sizes_of: Function that returns the number of tokens of each text.
        seed: Seed of the facts.
        kinds: Kinds of facts, such as FACTS or HELDOUT_FACTS.
    """
    sizes = sizes_of([f" {sentence}" for sentence in sentences])
    last = 0
    for number in count():
        rng = random.Random(f"{seed}:{length}:{number}")
        wanted = round(length / TOKENS_PER_FACT * 2 ** rng.uniform(-1, 1))
        facts = draw_facts(rng, min(MOST_FACTS, max(1, wanted)), kinds)
        added = [sum(sizes_of([f" {fact.statement}", f" {fact.question}"])) for fact in facts]
        while sum(added) > length // 2:  # a short document has room for fewer facts
            facts.pop()
            added.pop()
        size = sum(added)
        first = last
        while size < length and last < len(sentences):
            size += sizes[last]
            last += 1
        if size < length:
            return
        while size - sizes[first] >= length:
            size -= sizes[first]
            first += 1
        yield sparse_document(rng, sentences[first:last], facts)


def sparse_document(rng: random.Random, sentences: Sequence[str], facts: Sequence[Fact]) -> SparseDocument:
    """Return the sentences with each fact stated once between them and asked for once, later.

    Statements are at places even over the text, after its first sentence. Most questions are at the end, the others
    after a log-uniform distance.
    """
    *starts, end = accumulate((len(sentence) + 1 for sentence in sentences), initial=0)
    placed = [(float(start), sentence, None, slice(0)) for start, sentence in zip(starts, sentences)]
    for number, fact in enumerate(facts):
        place = rng.uniform(1, end)
        asked = place + NEAREST * ((end - place) / NEAREST) ** rng.random()
        if rng.random() >= ASKED_EARLIER or asked >= end:
            asked = end + rng.random()
        placed += [(place, fact.statement, number, fact.stated), (asked, fact.question, number, fact.answered)]
    found: list[list[slice]] = [[] for _ in facts]
    texts, offset = [], 0
    for _, text, number, value in sorted(placed, key=lambda item: item[0]):
        if number is not None:
            found[number].append(slice(offset + value.start, offset + value.stop))
        texts.append(text)
        offset += len(text) + 1
    return SparseDocument(" ".join(texts), [Recall(*pair) for pair in found])


def draw_facts(rng: random.Random, number: int, kinds: Mapping = FACTS) -> list[Fact]:
    """Return facts about `number` different people, one each."""
    people = dict.fromkeys(f"{name(rng)} {name(rng)}" for _ in range(number))
    return [draw_fact(rng, who, kinds[rng.choice(list(kinds))]) for who in people]


def draw_fact(rng: random.Random, who: str, kind: tuple[Callable, Sequence[str], Sequence[str]]) -> Fact:
    """Return a fact of a kind about a person."""
    draw, statements, questions = kind
    what = draw(rng)
    pair = [rng.choice(statements), rng.choice(questions)]
    starts = [len(template.partition("{what}")[0].format(who=who)) for template in pair]
    texts = [template.format(who=who, what=what) for template in pair]
    stated, answered = (slice(start, start + len(what)) for start in starts)
    return Fact(texts[0], texts[1], stated, answered)

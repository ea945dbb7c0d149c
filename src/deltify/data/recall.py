"""Synthetic documents that say many things once and ask for them later: text on which a model without memory fails.

They share neither sentences nor kind of key with the needle tasks (`haystack.py`): keys are made-up names. What lies
between a fact and its question are other facts, and, if there is another text to take them from, passages of that,
some of whose sentences come a second time: a teacher that looks back knows every word of these, and a student learns
from every word what it should have kept (docs/recipe.md has what this brings).
"""

import random
import re
from collections.abc import Iterable, Iterator
from itertools import count, islice

RECALL = "recall"
COUNT = 10_000  # documents, 7M of SmolLM2's tokens or so
SHORTEST, LONGEST = 4, 256  # sentences of a scattered document, those that come again not counted
AGAIN = 0.25  # of its sentences come again
SYLLABLES = (
    "ba bel dor dra fen gar hol jor kal kes lin lum mar mel nor pra qui ra ris sel tam tor ven wyn yar zo".split()
)
TRADES = "baker carpenter clerk dyer glazier lawyer mason miller nurse painter pilot potter sailor smith tailor".split()
COLOURS = (
    "amber black blue brown crimson green grey ivory orange pink purple red silver teal violet white yellow".split()
)
BEASTS = "badger camel crow dog donkey falcon goat hare heron horse lynx otter owl parrot pony raven sheep wolf".split()

# what a document tells of each name: how its value is drawn, how it is told, and how it is asked for and answered
FACTS = {
    "town": (
        lambda r: name(r),
        ("{who} comes from {what}.", "{who} was born in {what}.", "In {what} lives {who}."),
        ("Where does {who} come from? From {what}.", "{who}'s town is {what}."),
    ),
    "trade": (
        lambda r: f"{r.choice(COLOURS)}-coated {r.choice(TRADES)}",
        ("{who} is known as the {what}.", "People call {who} the {what}."),
        ("Who is {who}? The {what}.", "{who}, the {what}, signed here."),
    ),
    "door": (
        lambda r: f"{r.randrange(10, 1000)} {name(r)} Street",
        ("{who} moved to {what}.", "Letters for {who} go to {what}.", "The house of {who} is {what}."),
        ("{who} can be found at {what}.", "The address of {who}: {what}."),
    ),
    "beast": (
        lambda r: f"{r.choice(COLOURS)} {r.choice(BEASTS)} called {name(r)}",
        ("{who} keeps a {what}.", "With {who} walks a {what}."),
        ("The animal of {who} is a {what}.", "What does {who} keep? A {what}."),
    ),
    "sum": (
        lambda r: f"{r.randrange(100, 100_000):,} crowns",
        ("{who} owes {what}.", "The ledger has {what} against {who}."),
        ("How much does {who} owe? {what}.", "{who} paid {what} in full."),
    ),
    "card": (
        lambda r: str(r.randrange(10 ** r.randrange(3, 9), 10**9)),
        ("The library card of {who} bears the digits {what}.", "{who} signs as reader {what}."),
        ("Which digits are on the library card of {who}? {what}.", "As a reader {who} is {what}."),
    ),
}
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
BREAKS = ("Some time later.", "And now the list again.", "What was said above, once more:", "To sum up.", "***")


def name(random: random.Random) -> str:
    return "".join(random.choice(SYLLABLES) for _ in range(random.choice((2, 2, 3)))).capitalize()


def recall_documents(first: int = 0, last: int = COUNT, seed: int = 0) -> Iterator[str]:
    """Yield documents `first` to `last` of `COUNT`, the same on any machine.

    Each tells 4 to 93 facts and then asks for each of them once or twice, in another order.
    """
    for number in range(first, min(last, COUNT)):
        yield recall_document(random.Random(f"{seed}:{number}"))


def scattered_outlines(passages: Iterable[str], seed: int = 0) -> Iterator[tuple[int, list[str]]]:
    """Yield number and sentences of the documents that passages are cut into: all sentences of each, in their order.

    The documents have 4 to 256 sentences, fewer at the end of a passage, and each doubling of that length gets as many
    of the sentences as the next: whoever reads shorter rows finds questions whose answers were cut off.
    """
    numbers = count()
    for passage in passages:
        sentences = (sentence for sentence in SENTENCE_END.split(passage) if sentence)
        for first in sentences:
            number = next(numbers)
            _, size = opening(number, first, seed)
            yield number, [first, *islice(sentences, size - 1)]


def scattered_documents(outlines: Iterable[tuple[int, list[str]]], seed: int = 0) -> Iterator[str]:
    """Yield the documents of outlines: their sentences, some of them twice, with facts and questions between them.

    What is told depends on a document's number and on the sentence that begins it, so that no two documents or texts
    tell the same.
    """
    for number, sentences in outlines:
        generator, _ = opening(number, sentences[0], seed)
        yield scattered_document(generator, sentences)


def opening(number: int, first: str, seed: int) -> tuple[random.Random, int]:
    """Return the random numbers of a scattered document, and how many sentences it has room for."""
    generator = random.Random(f"{seed}:{number}:{first}")
    return generator, int(1 / (1 / SHORTEST - generator.random() * (1 / SHORTEST - 1 / LONGEST)))


def recall_document(random: random.Random) -> str:
    pairs = facts(random, int(2 ** random.uniform(2, 5)))
    told = [tell for tell, _ in pairs]
    asked = [random.choice(ask) for _, ask in pairs for _ in range(random.choice((1, 1, 2)))]
    random.shuffle(told)
    random.shuffle(asked)
    between = random.choice((" ", "\n"))
    return between.join(told) + f"\n\n{random.choice(BREAKS)}\n\n" + between.join(asked)


def scattered_document(random: random.Random, sentences: list[str]) -> str:
    """The sentences, some of them again and facts among them, each of these asked for twice: what comes again, and the
    first question, come after a stretch whose length is drawn evenly on a logarithmic scale, the second at the end."""
    size = len(sentences)

    def later(place: float) -> float:
        return place + (size - place) ** random.random()

    placed = [(float(place), sentence) for place, sentence in enumerate(sentences)]
    placed += [(later(place), sentence) for place, sentence in placed if random.random() < AGAIN]
    for tell, ask in facts(random, max(1, int(size**0.7 / 2 ** random.uniform(0, 2.5)))):
        place = random.uniform(0, 0.9 * size)
        placed += [(place, tell), (later(place), random.choice(ask)), (size + random.random(), random.choice(ask))]
    return " ".join(sentence for _, sentence in sorted(placed))


def facts(random: random.Random, count: int) -> list[tuple[str, list[str]]]:
    """Of `count` people, one to three facts each: how it is told, and ways to ask for it."""
    kinds = random.sample(list(FACTS), random.choice((1, 1, 2, 3)))
    found = []
    for who in dict.fromkeys(f"{name(random)} {name(random)}" for _ in range(count)):
        for kind in kinds:
            draw, tell, ask = FACTS[kind]
            what = draw(random)
            found.append((random.choice(tell).format(who=who, what=what), [a.format(who=who, what=what) for a in ask]))
    return found

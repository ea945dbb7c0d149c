"""Generate recall text: synthetic documents that state facts once and ask for them later.

A model without memory cannot predict the answers. The documents share neither sentences nor kinds of keys with the
needle tasks (evaluation/needles.py): keys are made-up names. Other facts lie between a fact and its question.

`recall:SOURCE` scatters facts and questions over the documents of another text and repeats some of its sentences. A
teacher with attention predicts every token of a repeated sentence, so that every token teaches the student what to
keep. docs/log/recall.md has the measurements.
"""

import random
import re
from collections.abc import Iterable, Iterator
from itertools import count, islice

RECALL = "recall"
COUNT = 10_000  # documents; about 7M tokens of SmolLM2's tokenizer
SHORTEST, LONGEST = 4, 256  # sentences of a scattered document, without repeated ones
REPEATED = 0.25  # fraction of its sentences that are repeated
SYLLABLES = (
    "ba bel dor dra fen gar hol jor kal kes lin lum mar mel nor pra qui ra ris sel tam tor ven wyn yar zo".split()
)
TRADES = "baker carpenter clerk dyer glazier lawyer mason miller nurse painter pilot potter sailor smith tailor".split()
COLOURS = (
    "amber black blue brown crimson green grey ivory orange pink purple red silver teal violet white yellow".split()
)
BEASTS = "badger camel crow dog donkey falcon goat hare heron horse lynx otter owl parrot pony raven sheep wolf".split()

# kinds of facts about a name: how the value is drawn, sentences that state it, and questions with their answers
FACTS = {
    "town": (
        lambda rng: name(rng),
        ("{who} comes from {what}.", "{who} was born in {what}.", "In {what} lives {who}."),
        ("Where does {who} come from? From {what}.", "{who}'s town is {what}."),
    ),
    "trade": (
        lambda rng: f"{rng.choice(COLOURS)}-coated {rng.choice(TRADES)}",
        ("{who} is known as the {what}.", "People call {who} the {what}."),
        ("Who is {who}? The {what}.", "{who}, the {what}, signed here."),
    ),
    "door": (
        lambda rng: f"{rng.randrange(10, 1000)} {name(rng)} Street",
        ("{who} moved to {what}.", "Letters for {who} go to {what}.", "The house of {who} is {what}."),
        ("{who} can be found at {what}.", "The address of {who}: {what}."),
    ),
    "beast": (
        lambda rng: f"{rng.choice(COLOURS)} {rng.choice(BEASTS)} called {name(rng)}",
        ("{who} keeps a {what}.", "With {who} walks a {what}."),
        ("The animal of {who} is a {what}.", "What does {who} keep? A {what}."),
    ),
    "sum": (
        lambda rng: f"{rng.randrange(100, 100_000):,} crowns",
        ("{who} owes {what}.", "The ledger has {what} against {who}."),
        ("How much does {who} owe? {what}.", "{who} paid {what} in full."),
    ),
    "card": (
        lambda rng: str(rng.randrange(10 ** rng.randrange(3, 9), 10**9)),
        ("The library card of {who} bears the digits {what}.", "{who} signs as reader {what}."),
        ("Which digits are on the library card of {who}? {what}.", "As a reader {who} is {what}."),
    ),
}
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
BREAKS = ("Some time later.", "And now the list again.", "What was said above, once more:", "To sum up.", "***")


def name(rng: random.Random) -> str:
    """Return a made-up name."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 2, 3)))).capitalize()


def recall_documents(first: int = 0, last: int = COUNT, seed: int = 0) -> Iterator[str]:
    """Yield documents `first` to `last` of `COUNT`, the same on any machine.

    Each states 4 to 93 facts and then asks for each of them once or twice, in another order.
    """
    for number in range(first, min(last, COUNT)):
        yield recall_document(random.Random(f"{seed}:{number}"))


def scattered_outlines(passages: Iterable[str], seed: int = 0) -> Iterator[tuple[int, list[str]]]:
    """Yield number and sentences of the documents into which passages are cut, in order.

    Documents have 4 to 256 sentences, fewer at the end of a passage. Lengths are drawn so that each doubling gets about
    as many sentences as the next: a run with short sequences still finds questions whose answers are not cut off.
    """
    numbers = count()
    for passage in passages:
        sentences = (sentence for sentence in SENTENCE_END.split(passage) if sentence)
        for first in sentences:
            number = next(numbers)
            _, size = seeded_outline(number, first, seed)
            yield number, [first, *islice(sentences, size - 1)]


def scattered_documents(outlines: Iterable[tuple[int, list[str]]], seed: int = 0) -> Iterator[str]:
    """Yield the documents of outlines: their sentences, some repeated, with facts and questions between them.

    The facts depend on the document's number and first sentence, so that no two documents or texts share them.
    """
    for number, sentences in outlines:
        rng, _ = seeded_outline(number, sentences[0], seed)
        yield scattered_document(rng, sentences)


def seeded_outline(number: int, first: str, seed: int) -> tuple[random.Random, int]:
    """Return the random generator of a scattered document, and its greatest number of sentences."""
    rng = random.Random(f"{seed}:{number}:{first}")
    return rng, int(1 / (1 / SHORTEST - rng.random() * (1 / SHORTEST - 1 / LONGEST)))


def recall_document(rng: random.Random) -> str:
    """Return a document that states facts and then asks for them."""
    pairs = facts(rng, int(2 ** rng.uniform(2, 5)))
    statements = [statement for statement, _ in pairs]
    questions = [rng.choice(ways) for _, ways in pairs for _ in range(rng.choice((1, 1, 2)))]
    rng.shuffle(statements)
    rng.shuffle(questions)
    between = rng.choice((" ", "\n"))
    return between.join(statements) + f"\n\n{rng.choice(BREAKS)}\n\n" + between.join(questions)


def scattered_document(rng: random.Random, sentences: list[str]) -> str:
    """Return the sentences, some of them repeated, with facts and questions between them.

    Each fact is asked for twice: after a log-uniform distance, and at the end. Sentences are repeated after a
    log-uniform distance.
    """
    size = len(sentences)

    def later(place: float) -> float:
        return place + (size - place) ** rng.random()

    placed = [(float(place), sentence) for place, sentence in enumerate(sentences)]
    placed += [(later(place), sentence) for place, sentence in placed if rng.random() < REPEATED]
    for statement, ways in facts(rng, max(1, int(size**0.7 / 2 ** rng.uniform(0, 2.5)))):
        place = rng.uniform(0, 0.9 * size)
        placed += [(place, statement), (later(place), rng.choice(ways)), (size + rng.random(), rng.choice(ways))]
    return " ".join(sentence for _, sentence in sorted(placed))


def facts(rng: random.Random, count: int) -> list[tuple[str, list[str]]]:
    """Return facts about `count` people, one to three each: a statement, and ways to ask for it."""
    kinds = rng.sample(list(FACTS), rng.choice((1, 1, 2, 3)))
    pairs = []
    for who in dict.fromkeys(f"{name(rng)} {name(rng)}" for _ in range(count)):
        for kind in kinds:
            draw, statements, questions = FACTS[kind]
            what = draw(rng)
            statement = rng.choice(statements).format(who=who, what=what)
            pairs.append((statement, [question.format(who=who, what=what) for question in questions]))
    return pairs

"""Synthetic documents that say many things once and ask for them later: text on which a model without memory fails.

They share neither sentences, nor kind of key, nor filling with the needle tasks (`haystack.py`): keys are made-up
names, and what lies between a fact and its question are other facts.
"""

import random
from collections.abc import Iterator

RECALL = "recall"
COUNT = 10_000  # documents, about 7M of SmolLM2's tokens
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
}
BREAKS = ("Some time later.", "And now the list again.", "What was said above, once more:", "To sum up.", "***")


def name(random: random.Random) -> str:
    return "".join(random.choice(SYLLABLES) for _ in range(random.choice((2, 2, 3)))).capitalize()


def recall_documents(count: int = COUNT, seed: int = 0) -> Iterator[str]:
    """`count` documents of 4 to 48 facts, each asked for once or twice, in another order; the same on any machine."""
    for number in range(count):
        yield recall_document(random.Random(f"{seed}:{number}"))


def recall_document(random: random.Random) -> str:
    kinds = random.sample(list(FACTS), random.choice((1, 1, 2, 3)))
    people = list(dict.fromkeys(f"{name(random)} {name(random)}" for _ in range(int(2 ** random.uniform(2, 5)))))
    told, asked = [], []
    for who in people:
        for kind in kinds:
            draw, tell, ask = FACTS[kind]
            what = draw(random)
            told.append(random.choice(tell).format(who=who, what=what))
            asked += [random.choice(ask).format(who=who, what=what) for _ in range(random.choice((1, 1, 2)))]
    random.shuffle(told)
    random.shuffle(asked)
    between = random.choice((" ", "\n"))
    return between.join(told) + f"\n\n{random.choice(BREAKS)}\n\n" + between.join(asked)

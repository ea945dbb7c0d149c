"""Haystacks: texts as words and token ids, from which prompts are cut without tokenizing again."""

import random
import re
import uuid
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..data.sources import documents
from ..utils.tokens import beginning

# ---- tokens, word by word --------------------------------------------------------------------------------------------

# a word with the space before it and the line ends after it; usual tokenizers never join two of these
WORD = re.compile(r" ?\S+\n*")
MAX_CACHED_WORDS = 1_000_000
MIN_FILLERS = 100  # number of words to fill gaps with
MAX_CUTS = 50  # number of cuts of a haystack that are tried for one that fits exactly
PROBE = "One of these is green-apple: 1234567.\nThe other (0f2c-41aa) is 90; find it?\nYes."


class Words:
    """Token ids of words inside a text. `exact` tells whether a text has the tokens of its words."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.cached: dict[str, list[int]] = {}
        self.start = beginning(tokenizer)
        self.exact = self.check([PROBE])

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a whole text without special tokens."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def check(self, texts: list[str]) -> bool:
        """Return whether the words of each text have the same tokens as the text."""
        wholes = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        split = [WORD.findall(text) for text in texts]
        firsts = self.tokenizer([words[0] for words in split], add_special_tokens=False, verbose=False)["input_ids"]
        return all(
            whole == [*first, *chain.from_iterable(self.ids(rest))]
            for whole, first, (_, *rest) in zip(wholes, firsts, split)
        )

    def ids(self, words: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each word. New words are tokenized in one batch."""
        if len(self.cached) > MAX_CACHED_WORDS:
            self.cached.clear()
        new = [word for word in dict.fromkeys(words) if word not in self.cached]
        for before in (".", ".\n"):  # the text before a word that begins with a space, and before one that does not
            group = [word for word in new if word.startswith(" ") == (before == ".")]
            if group:
                skip = len(self.encode(before))
                texts = self.tokenizer([before + word for word in group], add_special_tokens=False, verbose=False)
                self.cached.update((word, ids[skip:]) for word, ids in zip(group, texts["input_ids"]))
        return [self.cached[word] for word in words]

    def count(self, text: str) -> int:
        """Return the number of tokens of a text inside another text."""
        return sum(map(len, self.ids(WORD.findall(text))))


class Haystack:
    """An endlessly repeated text as words and token ids.

    Args:
        words: Words of the text.
        joints: Indices of words before which a needle may go.
        tokens: Token ids of words.
        exact: Whether the words have the tokens of the text. Otherwise every prompt is tokenized whole.
    """

    def __init__(self, words: list[str], joints: Sequence[int], tokens: Words, exact: bool):
        ids = tokens.ids(words)
        self.words, self.joints, self.exact = words, joints, exact
        self.ids = np.fromiter(chain.from_iterable(ids), np.int32)
        self.offsets = np.concatenate([[0], np.cumsum([len(x) for x in ids])])
        plain = [(word, len(x)) for word, x in zip(words[:1000], ids) if re.fullmatch(" [a-z]+", word)]
        self.plain = plain[:MIN_FILLERS] * (MIN_FILLERS // max(1, len(plain)) + 1)

    def filler(self, tokens: int) -> str:
        """Return plain words of exactly `tokens` tokens, or an empty text if no words fit."""
        if tokens <= 0:
            return ""
        smallest, chosen = min((size for _, size in self.plain), default=0), []
        for word, size in self.plain:
            if size == tokens or tokens - size >= smallest:
                chosen.append(word)
                tokens -= size
            if tokens == 0:
                return "".join(chosen)
        return ""

    def count(self, start: int, end: int) -> int:
        """Return the number of tokens of the words `start` to `end`."""

        def before(word: int) -> int:
            repeats, index = divmod(word, len(self.words))
            return repeats * len(self.ids) + int(self.offsets[index])

        return before(end) - before(start)

    def fit(self, start: int, tokens: int) -> int:
        """Return how many words from `start` on take at most `tokens` tokens."""
        repeats, remainder = divmod(self.count(0, start) + tokens, len(self.ids))
        return repeats * len(self.words) + int(np.searchsorted(self.offsets, remainder, side="right")) - 1 - start

    def slices(self, start: int, end: int) -> Iterator[slice]:
        """Yield slices of the text's words that together are the words `start` to `end`."""
        while start < end:
            first = start % len(self.words)
            stop = min(len(self.words), first + end - start)
            yield slice(first, stop)
            start += stop - first

    def tokens(self, start: int, end: int) -> Iterator[np.ndarray]:
        """Yield the token ids of the words `start` to `end`."""
        return (self.ids[self.offsets[s.start] : self.offsets[s.stop]] for s in self.slices(start, end))

    def text(self, start: int, end: int) -> str:
        """Return the text of the words `start` to `end`."""
        return "".join(chain.from_iterable(self.words[s] for s in self.slices(start, end)))

    def nearest_joint(self, depth: float, start: int, end: int) -> int:
        """Return the joint nearest to `depth` percent of the way from word `start` to `end`. Both ends are joints."""
        target = start + round(depth * (end - start) / 100)
        if target in (start, end):
            return target
        repeats, word = divmod(target, len(self.words))
        index = bisect_left(self.joints, word)
        after = self.joints[index] if index < len(self.joints) else len(self.words) + self.joints[0]
        before = self.joints[index - 1] if index else self.joints[-1] - len(self.words)
        nearest = repeats * len(self.words) + (after if after - word < word - before else before)
        return min(max(nearest, start), end)


def line_haystack(lines: list[str], tokens: Words) -> Haystack:
    """Return a haystack of lines, with a joint before each."""
    split = [WORD.findall(line + "\n") for line in lines]
    starts = np.cumsum([0, *(len(words) for words in split[:-1])])
    return Haystack(list(chain.from_iterable(split)), starts.tolist(), tokens, tokens.exact)


def text_haystack(source: str, tokens: Words, characters: int = 4_000_000) -> Haystack:
    """Return a haystack of a source's first characters in one line, with a joint before each sentence.

    Args:
        source: Source of the text, see `data.sources.documents`.
        tokens: Token ids of words.
        characters: Number of characters, to the end of the last document.

    Raises:
        ValueError: If the text has fewer than 100 words.
    """
    texts, total = [], 0
    for text in documents(source):
        texts.append(text)
        total += len(text)
        if total > characters:
            break
    words = [" " + word for word in " ".join(texts).split()]
    if len(words) < 100:
        raise ValueError(f"The haystack {source!r} has {len(words)} words. Give a text of at least 100.")
    ends = re.compile(r"[.!?][\"')\]\u201d\u2019]*$")
    joints = [0, *(i + 1 for i, word in enumerate(words[:-1]) if ends.search(word))]
    stretches = ["".join(words[i : i + 1000])[1:] for i in range(0, len(words), 1000)]
    return Haystack(words, joints, tokens, tokens.exact and tokens.check(stretches))


def lay_out(
    haystack: Haystack, start: int, end: int, needles: list[tuple[float, str]], *, filler: str, lines: bool
) -> list[str | tuple[int, int]]:
    """Return the words `start` to `end` of a haystack with needles among them.

    Args:
        haystack: Haystack.
        start: Index of the first word.
        end: Index after the last word.
        needles: Depths in percent, and sentences.
        filler: Words to put before the last one.
        lines: Whether needles are lines of their own, not sentences in a line.

    Returns:
        Parts of one text, in order, that are texts or (start, end) of haystack words. The text begins without a space
        and ends with a line end.
    """
    space, stop = ("", "\n") if lines else (" ", "")
    last = haystack.words[(end - 1) % len(haystack.words)].rstrip("\n") + stop
    placed = [(haystack.nearest_joint(depth, start, end), f"{space}{needle}{stop}") for depth, needle in needles]
    parts: list[str | tuple[int, int]] = []
    at = start
    for joint, needle in [*sorted(placed, key=lambda pair: pair[0]), (end, "")]:
        if joint > at:
            parts += [(at, min(joint, end - 1)), *([filler, last] if joint == end else [])]
            at = joint
        parts.append(needle)
    parts = [part for part in parts if (part if isinstance(part, str) else part[0] < part[1])]
    if isinstance(parts[0], tuple):
        begin, until = parts[0]
        parts[:1] = [haystack.words[begin % len(haystack.words)].lstrip(" "), (begin + 1, until)]
    else:
        parts[0] = parts[0].lstrip(" ")
    ending = parts[-1]
    assert isinstance(ending, str)  # the last word, or a needle after it
    parts[-1] = ending.rstrip("\n") + "\n"
    return parts


def write(haystack: Haystack, parts: list[str | tuple[int, int]]) -> str:
    """Return the text of parts as `lay_out` returns them."""
    return "".join(part if isinstance(part, str) else haystack.text(*part) for part in parts)


def fill(
    haystack: Haystack,
    words: Words,
    tokens: int,
    head: str,
    needles: list[tuple[float, str]],
    tail: str,
    *,
    start: int,
    lines: bool,
) -> tuple[str, np.ndarray]:
    """Return the text and the ids [tokens] of `head`, a piece of the haystack with the needles, and `tail`.

    The piece begins at word `start`, and is as long as fits. Plain words fill the gap that is left. If no words do,
    there are fewer than `tokens` ids.

    Raises:
        ValueError: If `tokens` leave no space for a haystack.
    """
    head_ids = [*words.start, *words.encode(head)]

    def parts(number: int, filler: str = "") -> list[str | tuple[int, int]]:
        return lay_out(haystack, start, start + number, needles, filler=filler, lines=lines)

    def missing(parts: list[str | tuple[int, int]]) -> int:
        if not haystack.exact:
            return tokens - len(words.start) - len(words.encode(head + write(haystack, parts) + tail))
        sizes = (words.count(part) if isinstance(part, str) else haystack.count(*part) for part in parts)
        return tokens - len(head_ids) - sum(sizes) - words.count(tail)

    fixed = len(head_ids) + sum(map(words.count, (tail, *(needle for _, needle in needles))))
    max_words = haystack.fit(start, tokens - fixed)
    if not haystack.exact:  # the words' tokens are only an estimate
        max_words = last_that(lambda number: missing(parts(number)) >= 0, max_words)
    best, gap = None, tokens
    for number in range(max_words + 1, max(1, max_words - MAX_CUTS), -1):
        if lines and not haystack.words[(start + number - 1) % len(haystack.words)].startswith(" "):
            continue  # a filler before the first word of a line would run into it
        candidates = [parts(number)]
        if filler := haystack.filler(missing(candidates[0])):
            candidates.append(parts(number, filler))
        for candidate in candidates:
            if 0 <= (left := missing(candidate)) < gap:
                best, gap = candidate, left
        if gap == 0:
            break
    if best is None:
        raise ValueError(f"No haystack fits into {tokens} tokens. Choose a greater length.")
    text = head + write(haystack, best) + tail
    if not haystack.exact:
        return text, np.asarray([*words.start, *words.encode(text)], np.int32)
    ids = chain.from_iterable(
        words.ids(WORD.findall(part)) if isinstance(part, str) else haystack.tokens(*part) for part in (*best, tail)
    )
    return text, np.concatenate([head_ids, *ids]).astype(np.int32)


def last_that(fits: Callable[[int], bool], guess: int) -> int:
    """Return the largest number that fits, at least 1, if every number below it fits and none above it."""
    low, high = 1, max(2, guess)
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# ---- keys and values -------------------------------------------------------------------------------------------------

ADJECTIVES = """able agile amber ample ancient arctic autumn azure bold brave brief bright brisk bronze calm
candid careful cheerful chilly civil clever cloudy coastal cosmic cozy crimson crisp curious curly daily
dainty damp daring deep distant dizzy dusty eager early earnest eastern elegant endless exact fabled faint
fair famous fancy fast fierce fine firm fluffy fond formal frank fresh frosty gentle giant gifted glad glossy
golden graceful grand green handy happy harsh hasty heavy hidden hollow honest humble icy ideal idle jolly
keen kind large late lavish lean level light lively local lofty lone loud loyal lucky lunar mellow merry
mighty mild misty modern modest narrow neat noble noisy northern novel odd orange pale patient plain playful
polite prime proud purple quick quiet rapid rare ready rich ripe robust rosy round royal rural rustic sandy
scarlet secret serene shallow sharp shiny silent silver simple sleepy slender slow smooth snowy sober solar
solid southern spare steady steep stern still stormy strict sturdy subtle sunny sweet swift tall tame tender
tidy tiny tough tranquil upper urban vague vast velvet violet vivid warm wary western wide wild windy wise
witty wooden young zesty""".split()
NOUNS = """acorn anchor apple apron arrow badge bagel barley barn basil basket beacon beaver bell bench berry
blanket boat bonnet book bottle bowl bridge brook broom brush bucket button cabin cactus camel canal candle
canoe canyon carpet carrot castle cedar cello chair cherry chimney cider cinema circle clock cloud clover coin
comet compass copper coral corner cottage cotton cradle crane crater creek cricket crown crystal cupboard
curtain daisy dance dawn desert diary dolphin donkey door dragon drawer dream drum eagle echo elbow ember
engine envelope fabric falcon feather fence fern ferry fiddle field finger flag flute forest fossil fountain
fox garden garlic gate ginger glacier glove goose granite grape guitar hammer harbor harp hazel hedge helmet
heron hill honey horse hotel iceberg inlet island ivory jacket jasmine jewel journal jungle kettle key kitchen
kite ladder lagoon lake lamp lantern laurel leaf lemon letter library lily lion lizard lobster magnet mango
maple marble market meadow melon mirror mitten moon mosaic moss motor mountain museum napkin needle nest
notebook oak oasis ocean olive onion orbit orchard otter oven owl oyster paddle palace panda paper parade
parrot peach pebble pencil pepper piano picnic pigeon pillow pine planet plaza plum pocket pond poppy prairie
prism pumpkin puzzle quarry quilt rabbit radio raft rain raven ribbon river robin rocket roof rope saddle sail
salmon sand scarf school seal shadow shelf shell ship shovel signal sled snail socket sparrow spider spoon
spring squirrel stable star statue stone stove street sugar summit swan table teapot temple thistle thunder
ticket tiger timber tower train trumpet tulip tunnel turtle valley vase village violin wagon walnut walrus
water whale wheat wheel whistle willow window winter yard""".split()


def draw(kind: str, rng: random.Random) -> str:
    """Return a random key or value: a number of seven digits, a pair of words, or a UUID."""
    if kind == "numbers":
        return str(rng.randint(1_000_000, 9_999_999))
    if kind == "words":
        return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def distinct(kind: str, number: int, rng: random.Random) -> list[str]:
    """Return distinct random keys or values."""
    drawn: dict[str, None] = {}
    while len(drawn) < number:
        drawn[draw(kind, rng)] = None
    return list(drawn)

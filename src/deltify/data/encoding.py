"""Encode texts to token ids on all cores, in the order of the texts.

Processes do it, not threads: reading, packing and taking ids out of a tokenizer hold Python's lock for 6 % of the time,
so that threads would keep 17 cores busy at most. A process is a bare Python with this module, numpy and tokenizers.
Neither torch nor the user's script is imported there, so a script needs no guard. Nothing is forked (threads, locks,
CUDA). A process starts in 0.2 s, takes 70 MB with SmolLM2's tokenizer, and ends with the one that started it.

A document is encoded by one process, however long it is. Tokenizers that are not of the library tokenizers, or change
what it does in Python, work in this process alone.
"""

import contextlib
import math
import os
import pickle
import queue
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from . import sources
from .sources import Piece, cleaned, held_out

if TYPE_CHECKING:  # the other processes do without transformers
    from transformers import PreTrainedTokenizerBase

HERE = 4  # pieces that are encoded before other processes start: little text does not wait for them
AHEAD = 4  # pieces read ahead for each process
START = """
import sys
root, rules, sys.path[:] = sys.argv[1], sys.argv[2], sys.argv[3:]
for name in ("deltify", "deltify.data"):  # packages without what their __init__ imports
    sys.modules[name] = type(sys)(name)
    sys.modules[name].__path__ = [root + name.removeprefix("deltify").replace(".", "/")]
from deltify.data.encoding import serve
serve(int(rules))
"""

Encode = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class Rules:
    """What a process must know of a tokenizer, and of the token file."""

    json: str | None  # the whole tokenizer; None if it works in Python
    split_special: bool  # whether special tokens that a text spells are taken apart
    before: int  # tokens that the tokenizer puts before a text
    added: int  # tokens that it puts before and after a text
    end: int | None  # token that ends every document
    special: list[int]
    unknown: tuple[int, str] | None  # special token that also stands for what the vocabulary lacks
    dtype: str
    split: bool  # whether documents are held out


@dataclass
class Encoded:
    """Documents as token ids. In `tokens` those that train come first, then those that are held out."""

    held: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # [documents]
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [documents]; 0: no tokens of its own
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint16))  # [sum of lengths]
    spelled: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))  # document and id of special tokens
    repaired: list[tuple[int, int, str]] = field(default_factory=list)  # document, characters replaced, place
    size: int = 0  # of the texts, in bytes
    done: float | None = None  # part of the source that has been read
    error: Exception | None = None  # raised in place of the document that would come next


def encode_all(
    texts: Iterable[str | Piece],
    tokenizer: "PreTrainedTokenizerBase",
    dtype: str,
    *,
    split: bool,
    wanted: Callable[[], tuple[bool, bool]],
    processes: int | None = None,
) -> Generator[Encoded]:
    """Yield the encoded documents of texts and pieces, in order; of a few hundred kilobytes each.

    Args:
        texts: Texts, or pieces of a source, which are then made in the other processes.
        split: Whether some documents are held out.
        wanted: Function that tells whether documents that train, and those that are held out, are still to be encoded.
            It is asked before each piece. Documents that are not wanted have a length of 0.
        processes: Number of processes. Defaults to the number of cores. The results are the same for any number.
    """
    rules = rules_of(tokenizer, dtype, split)
    pieces, number = grouped(texts), usable_cores() if processes is None else processes
    alone = rules.json is None or number <= 1
    ids_of = python_ids(tokenizer) if rules.json is None else library_ids(rules)
    for piece in islice(pieces, None if alone else HERE):
        yield encode(piece, ids_of, rules, wanted())
    first = next(pieces, None)
    if first is None:
        return
    with Processes(rules, number) as pool:
        waiting: deque[Future[Encoded]] = deque()
        for piece in chain([first], pieces):
            waiting.append(pool.submit(piece, wanted()))
            while waiting and (len(waiting) > AHEAD * number or waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def grouped(texts: Iterable[str | Piece]) -> Iterator[Piece | Exception]:
    """Yield pieces as they are, texts together as pieces, and an exception of the source where it was raised."""
    waiting: list[tuple[str, str]] = []
    numbers, size = count(1), 0
    try:
        for item in texts:
            if isinstance(item, str):
                waiting.append((f"document {next(numbers)}", item))
                size += len(item) + 100  # what a tokenizer does for a document is worth 100 characters
            if waiting and (size >= sources.PIECE or isinstance(item, Piece)):
                yield Piece(list, (waiting,))
                waiting, size = [], 0
            if isinstance(item, Piece):
                yield item
    except Exception as error:
        yield Piece(list, (waiting,))
        yield error
        return
    if waiting:
        yield Piece(list, (waiting,))


def encode(piece: Piece | Exception, ids_of: Encode, rules: Rules, wanted: tuple[bool, bool]) -> Encoded:
    """Make the documents of a piece and encode those that are wanted; an error comes after the documents before it."""
    if isinstance(piece, Exception):
        return Encoded(error=piece)
    documents, error = [], None
    try:
        for document in cleaned(piece.make(*piece.args)):
            documents.append(document)
    except Exception as raised:
        error = raised
    held = np.array([rules.split and held_out(document.text) for document in documents], bool)
    order = np.concatenate([np.flatnonzero(held == part) for part in (False, True) if wanted[part]] or [[]]).astype(int)
    try:
        lists = ids_of([documents[i].text for i in order]) if len(order) else []
    except Exception as raised:
        return Encoded(error=raised)
    own = np.array([max(0, len(ids) - rules.added) for ids in lists], np.int64)  # tokens that stand for the text
    for ids, size in zip(lists, own):
        if not size:
            ids.clear()
        elif rules.end is not None and ids[-1] != rules.end:
            ids.append(rules.end)
    sizes = np.array([len(ids) for ids in lists], np.int64)
    lengths = np.zeros(len(documents), np.int64)
    lengths[order] = sizes
    tokens = np.fromiter(chain.from_iterable(lists), rules.dtype, int(sizes.sum()))
    return Encoded(
        held,
        lengths,
        tokens,
        spelled_tokens(tokens, sizes, own, order, [document.text for document in documents], rules),
        [(i, document.repaired, document.place) for i, document in enumerate(documents) if document.repaired],
        sum(len(document.text.encode()) for document in documents),
        piece.done,
        error,
    )


def spelled_tokens(
    tokens: np.ndarray, sizes: np.ndarray, own: np.ndarray, order: np.ndarray, texts: list[str], rules: Rules
) -> np.ndarray:
    """Return document and id [n, 2] of the special tokens that texts spelled; not of those that were put around them.

    The token for what the vocabulary lacks counts as often as its name is in the text.
    """
    places = np.flatnonzero(np.isin(tokens, rules.special))
    starts = np.cumsum(sizes) - sizes
    which = np.searchsorted(starts, places, side="right") - 1
    inside = places - starts[which] - rules.before
    kept = (inside >= 0) & (inside < own[which])
    found = np.stack([order[which[kept]], tokens[places[kept]].astype(np.int64)], 1)
    if rules.unknown is None:
        return found
    unknown, name = rules.unknown
    is_unknown = found[:, 1] == unknown
    documents, counts = np.unique(found[is_unknown, 0], return_counts=True)
    counts = [min(times, texts[document].count(name)) for document, times in zip(documents, counts)]
    again = np.stack([np.repeat(documents, counts), np.full(sum(counts), unknown)], 1)
    return np.concatenate([found[~is_unknown], again])


def rules_of(tokenizer: "PreTrainedTokenizerBase", dtype: str, split: bool) -> Rules:
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", verbose=False)["input_ids"]
    before = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {*tokenizer.all_special_ids}
    unknown = None if tokenizer.unk_token is None else (tokenizer.unk_token_id, tokenizer.unk_token)
    return Rules(
        tokenizer.backend_tokenizer.to_str() if is_library(tokenizer) else None,
        tokenizer.split_special_tokens,
        before,
        len(whole) - len(bare),
        tokenizer.eos_token_id,
        [] if tokenizer.split_special_tokens else sorted(special),
        unknown,
        dtype,
        split,
    )


def is_library(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Tell whether the ids of a tokenizer are those of the library tokenizers: it has such a one, and no calls of its
    own."""
    from transformers import PreTrainedTokenizerFast

    calls = [
        [getattr(kind, name, None) for name in ("__call__", "_encode_plus", "_batch_encode_plus")]
        for kind in (type(tokenizer), PreTrainedTokenizerFast)
    ]
    return isinstance(tokenizer, PreTrainedTokenizerFast) and calls[0] == calls[1]


def library_ids(rules: Rules) -> Encode:
    """Return the function that a tokenizer's own call comes to, without masks and offsets."""
    backend = Tokenizer.from_str(rules.json)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = rules.split_special
    return lambda texts: [encoding.ids for encoding in backend.encode_batch_fast(texts)]


def python_ids(tokenizer: "PreTrainedTokenizerBase") -> Encode:
    return lambda texts: [tokenizer(one, verbose=False)["input_ids"] for one in texts]


def usable_cores() -> int:
    """Return the number of cores that this process may use: of the machine, its affinity, and a container's share."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


# ---- processes -------------------------------------------------------------------------------------------------------


class Processes:
    """Processes that encode pieces, each with a thread here that waits for it."""

    def __init__(self, rules: Rules, number: int):
        self.rules = tempfile.TemporaryFile()  # noqa: SIM115  (without a name, so that nothing stays after a kill)
        self.rules.write(pickle.dumps(rules))
        self.rules.flush()
        command = [sys.executable, "-c", START, str(Path(__file__).parents[1]), str(self.rules.fileno()), *sys.path]
        self.threads = ThreadPoolExecutor(number)
        self.all: list[subprocess.Popen] = []
        self.idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        try:
            for _ in range(number):
                self.all.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        pass_fds=[self.rules.fileno()],
                        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
                        start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the others
                    )
                )
                self.idle.put(self.all[-1])
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)
        for process in self.all:
            process.kill()
        self.threads.shutdown()
        for process in self.all:
            with contextlib.suppress(OSError):
                process.stdin.close()
            process.stdout.close()
            process.wait()
        self.rules.close()

    def submit(self, piece: Piece | Exception, wanted: tuple[bool, bool]) -> "Future[Encoded]":
        if isinstance(piece, Exception):
            failed: Future[Encoded] = Future()
            failed.set_result(Encoded(error=piece))
            return failed
        return self.threads.submit(self.ask, piece, wanted)

    def ask(self, piece: Piece, wanted: tuple[bool, bool]) -> Encoded:
        request, process = pickle.dumps((piece, wanted), 5), self.idle.get()
        try:
            process.stdin.write(request)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise RuntimeError(
                f"a process that tokenizes ended with status {process.wait()}. If memory ran out, give this program "
                "fewer cores: taskset -c 0-7 ..."
            ) from error
        finally:
            self.idle.put(process)


def serve(rules_file: int) -> None:
    """Answer requests of `Processes.ask` on standard input until it ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not print into the answers
    rules = pickle.loads(os.pread(rules_file, os.fstat(rules_file).st_size, 0))  # all processes share its position
    ids_of = library_ids(rules)
    with contextlib.suppress(EOFError, BrokenPipeError):  # the process that asked is gone
        while True:
            piece, wanted = pickle.load(sys.stdin.buffer)
            answers.write(packed(encode(piece, ids_of, rules, wanted)))
            answers.flush()


def packed(encoded: Encoded) -> bytes:
    """Return an answer as bytes; an error that cannot travel is told in words."""
    try:
        pickle.loads(pickle.dumps(encoded.error))
    except Exception:
        encoded.error = RuntimeError(f"{type(encoded.error).__name__}: {encoded.error}")
    return pickle.dumps(encoded, 5)

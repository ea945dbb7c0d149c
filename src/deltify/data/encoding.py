"""Encode texts to token ids on all cores, in the order of the texts.

The work is done by processes, because reading, packing and taking ids out of a tokenizer hold Python's lock for 6 % of
the time: threads would keep at most 17 cores busy. A worker process is a bare Python with this module, numpy and
tokenizers. It imports neither torch nor the user's script, so a script needs no `if __name__ == "__main__"`. Workers
are started, not forked, because forking breaks threads, locks and CUDA. A worker starts in 0.2 s, takes 70 MB with
SmolLM2's tokenizer, and ends with the process that started it.

One process encodes a whole document, however long it is. Tokenizers that do not use the library tokenizers, or that
change its results in Python, run in this process alone.
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
from typing import IO, TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from . import sources
from .sources import Piece, cleaned, held_out

if TYPE_CHECKING:  # worker processes must not import transformers
    from transformers import PreTrainedTokenizerBase

PIECES_BEFORE_WORKERS = 4  # encoded by this process first, so that little text does not wait for workers to start
PIECES_AHEAD = 4  # read ahead for each worker
START = """
import sys
root, rules, sys.path[:] = sys.argv[1], sys.argv[2], sys.argv[3:]
for name in ("deltify", "deltify.data"):  # packages without the imports of their __init__
    sys.modules[name] = type(sys)(name)
    sys.modules[name].__path__ = [root + name.removeprefix("deltify").replace(".", "/")]
from deltify.data.encoding import serve
serve(int(rules))
"""

Encode = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class Rules:
    """What a worker must know about a tokenizer and the token file."""

    json: str | None  # the whole tokenizer; None if it needs Python code
    split_special: bool  # whether the name of a special token in a text is split into ordinary tokens
    before: int  # number of tokens that the tokenizer adds before a text
    added: int  # number of tokens that it adds before and after a text
    end: int | None  # token that ends every document
    special: list[int]  # ids of special tokens, whose occurrences in texts are counted
    unknown: tuple[int, str] | None  # id and name of the special token for text outside the vocabulary
    dtype: str  # of token ids in the file
    split: bool  # whether documents are held out


@dataclass
class Encoded:
    """Documents as token ids. `tokens` and `loss_mask` have all training documents first, then all held-out ones."""

    held: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # [documents]
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [documents]; 0 for those not encoded
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint16))  # [sum of lengths]
    spelled: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))  # see `spelled_tokens`
    repaired: list[tuple[int, int, str]] = field(default_factory=list)  # document, number of replaced characters, place
    size: int = 0  # bytes of the texts
    done: float | None = None  # fraction of the source read so far
    error: Exception | None = None  # raised when the next document was made
    loss_mask: np.ndarray | None = None  # [sum of lengths] bool, of chats (chats.py)
    unfit: list[ValueError] = field(default_factory=list)  # why rows of a dataset are not among the documents


def encode_all(
    texts: Iterable[str | Piece],
    tokenizer: "PreTrainedTokenizerBase",
    dtype: str,
    *,
    split: bool,
    wanted: Callable[[], tuple[bool, bool]],
    processes: int | None = None,
) -> Generator[Encoded]:
    """Yield the encoded documents of texts and pieces, in order, a few hundred kilobytes at a time.

    Args:
        texts: Texts, or pieces of a source. The texts of a piece are made by a worker.
        tokenizer: Tokenizer of the teacher.
        dtype: Name of the data type of token ids.
        split: Whether some documents are held out.
        wanted: Function that returns whether training documents, and whether held-out ones, are still needed. It is
            called before each piece. Documents that are not needed get a length of 0.
        processes: Number of processes. Defaults to the number of cores. The results are the same for any number.
    """
    rules = rules_of(tokenizer, dtype, split)
    pieces, number = group_texts(texts), usable_cores() if processes is None else processes
    alone = rules.json is None or number <= 1
    ids_of = python_ids(tokenizer) if rules.json is None else library_ids(rules)
    for piece in islice(pieces, None if alone else PIECES_BEFORE_WORKERS):
        yield encode(piece, ids_of, rules, wanted())
    first = next(pieces, None)
    if first is None:
        return
    with Processes(rules, number) as pool:
        waiting: deque[Future[Encoded]] = deque()
        for piece in chain([first], pieces):
            waiting.append(pool.submit(piece, wanted()))
            while waiting and (len(waiting) > PIECES_AHEAD * number or waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def group_texts(texts: Iterable[str | Piece]) -> Iterator[Piece | Exception]:
    """Yield pieces as they are and texts grouped into pieces; if the source raises, its exception last."""
    waiting: list[tuple[str, str]] = []
    numbers, size = count(1), 0
    try:
        for item in texts:
            if isinstance(item, str):
                waiting.append((f"document {next(numbers)}", item))
                size += len(item) + 100  # a document costs a tokenizer as much as 100 characters more
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
    """Make the documents of a piece and encode those that are wanted, up to the first error."""
    if isinstance(piece, Exception):
        return Encoded(error=piece)
    documents, error = [], None

    def sizes_of(texts: list[str]) -> list[int]:
        return [len(ids) - rules.added for ids in ids_of(texts)]

    try:
        for document in cleaned(piece.texts(sizes_of)):
            documents.append(document)
    except Exception as raised:
        error = raised
    held = np.array([rules.split and held_out(document.text) for document in documents], bool)
    order = np.concatenate([np.flatnonzero(held == part) for part in (False, True) if wanted[part]] or [[]]).astype(int)
    try:
        lists = ids_of([documents[i].text for i in order]) if len(order) else []
    except Exception as raised:
        return Encoded(error=raised)
    own = np.array([max(0, len(ids) - rules.added) for ids in lists], np.int64)  # without added tokens
    for ids, size in zip(lists, own):
        if not size:
            ids.clear()
        elif rules.end is not None and ids[-1] != rules.end:
            ids.append(rules.end)
    if piece.lengths:
        cut = [len(ids) - max((n for n in piece.lengths if n <= len(ids)), default=0) for ids in lists]
        for ids, number in zip(lists, cut):
            del ids[rules.before : rules.before + number]
        own = own - cut
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
    """Return document and id [n, 2] of each special token whose name is in a text, without those added around texts.

    The unknown token is counted only as often as its name is in the text: it also replaces other text.

    Args:
        tokens: Token ids of all encoded documents.
        sizes: Number of tokens of each document in `tokens`.
        own: The same without added tokens.
        order: Index in `texts` of each document in `tokens`.
        texts: All documents.
        rules: Rules of the tokenizer.
    """
    places = np.flatnonzero(np.isin(tokens, rules.special))
    starts = np.cumsum(sizes) - sizes
    which = np.searchsorted(starts, places, side="right") - 1
    inside = places - starts[which] - rules.before
    kept = (inside >= 0) & (inside < own[which])
    pairs = np.stack([order[which[kept]], tokens[places[kept]].astype(np.int64)], 1)
    if rules.unknown is None:
        return pairs
    unknown, name = rules.unknown
    is_unknown = pairs[:, 1] == unknown
    documents, counts = np.unique(pairs[is_unknown, 0], return_counts=True)
    counts = [min(times, texts[document].count(name)) for document, times in zip(documents, counts)]
    unknown_pairs = np.stack([np.repeat(documents, counts), np.full(sum(counts), unknown)], 1)
    return np.concatenate([pairs[~is_unknown], unknown_pairs])


def rules_of(tokenizer: "PreTrainedTokenizerBase", dtype: str, split: bool) -> Rules:
    """Return what a worker must know about a tokenizer."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", verbose=False)["input_ids"]
    before = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {*tokenizer.all_special_ids}
    unknown = None if tokenizer.unk_token is None else (tokenizer.unk_token_id, tokenizer.unk_token)
    return Rules(
        tokenizer.backend_tokenizer.to_str() if uses_library(tokenizer) else None,
        tokenizer.split_special_tokens,
        before,
        len(whole) - len(bare),
        tokenizer.eos_token_id,
        [] if tokenizer.split_special_tokens else sorted(special),
        unknown,
        dtype,
        split,
    )


def uses_library(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether a tokenizer's ids are those of the library tokenizers: no method of its own changes them."""
    from transformers import PreTrainedTokenizerFast

    calls = [
        [getattr(kind, name, None) for name in ("__call__", "_encode_plus", "_batch_encode_plus")]
        for kind in (type(tokenizer), PreTrainedTokenizerFast)
    ]
    return isinstance(tokenizer, PreTrainedTokenizerFast) and calls[0] == calls[1]


def library_ids(rules: Rules) -> Encode:
    """Return a function that encodes texts as the tokenizer does, without the cost of masks and offsets."""
    assert rules.json is not None
    backend = Tokenizer.from_str(rules.json)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = rules.split_special
    return lambda texts: [encoding.ids for encoding in backend.encode_batch_fast(texts)]


def python_ids(tokenizer: "PreTrainedTokenizerBase") -> Encode:
    """Return a function that encodes texts by calls of the tokenizer."""
    return lambda texts: [tokenizer(text, verbose=False)["input_ids"] for text in texts]


def usable_cores() -> int:
    """Return the number of cores that this process may use, by its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


# ---- processes -------------------------------------------------------------------------------------------------------


class Processes:
    """Worker processes that encode pieces. A thread of this process waits for each of them."""

    def __init__(self, rules: Rules, number: int):
        self.rules = tempfile.TemporaryFile()  # noqa: SIM115  (has no name, so that a killed process leaves no file)
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
                        start_new_session=True,  # Ctrl-C reaches only this process, which ends the workers
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
            requests, answers = pipes(process)
            with contextlib.suppress(OSError):
                requests.close()
            answers.close()
            process.wait()
        self.rules.close()

    def submit(self, piece: Piece | Exception, wanted: tuple[bool, bool]) -> "Future[Encoded]":
        """Encode a piece in the next idle worker."""
        if isinstance(piece, Exception):
            failed: Future[Encoded] = Future()
            failed.set_result(Encoded(error=piece))
            return failed
        return self.threads.submit(self.ask, piece, wanted)

    def ask(self, piece: Piece, wanted: tuple[bool, bool]) -> Encoded:
        """Send a piece to an idle worker and return its answer.

        Raises:
            RuntimeError: If the worker has ended.
        """
        request, process = pickle.dumps((piece, wanted), 5), self.idle.get()
        try:
            requests, answers = pipes(process)
            requests.write(request)
            requests.flush()
            return pickle.load(answers)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise RuntimeError(
                f"a worker process for tokenization ended with status {process.wait()}. If memory ran out, run this "
                "program on fewer cores: taskset -c 0-7 ..."
            ) from error
        finally:
            self.idle.put(process)


def pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    """Return standard input and output of a worker."""
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout


def serve(rules_file: int) -> None:
    """Answer requests of `Processes.ask` on standard input until it ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get into the answers
    # pread, not read: all workers share the file's position
    rules = pickle.loads(os.pread(rules_file, os.fstat(rules_file).st_size, 0))
    ids_of = library_ids(rules)
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent process has ended
        while True:
            piece, wanted = pickle.load(sys.stdin.buffer)
            answers.write(pickled(encode(piece, ids_of, rules, wanted)))
            answers.flush()


def pickled(encoded: Encoded) -> bytes:
    """Return an answer as bytes. An error that cannot be pickled becomes a RuntimeError with its text."""
    try:
        pickle.loads(pickle.dumps(encoded.error))
    except Exception:
        encoded.error = RuntimeError(f"{type(encoded.error).__name__}: {encoded.error}")
    return pickle.dumps(encoded, 5)

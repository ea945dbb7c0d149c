"""A web page: a model reads a text once, then answers many questions about it.

One thread does all work with the model, piece by piece and answer by answer, in the order of the requests. Requests of
several users thus take turns.
"""

import json
import secrets
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import HTMLResponse, StreamingResponse
from jinja2 import Environment, PackageLoader, select_autoescape
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send
from transformers import PreTrainedTokenizerBase, TextIteratorStreamer

from ..model.cache import new_cache
from ..model.causal_lm import CausalLM
from ..utils.devices import device_name
from ..utils.formats import gib
from .book import Book, answer, attention_layers, beginning_ids, growing_bytes, question_ids, remember
from .prefill import cache_bytes, max_cache_bytes, piece_length, read_pieces, teacher_cache_bytes

MAX_TEXT_BYTES = 5_000_000
MAX_QUESTION_CHARACTERS = 20_000  # of the question and the conversation before it
MAX_NEW_TOKENS = 256  # of an answer
MAX_BOOKS = 16  # texts in memory
CPU_PIECE = 512  # tokens read between two reports of progress, without a CUDA GPU
WAIT_SECONDS = 0.3  # after this, a user learns that other requests come first

Event = dict[str, Any]


class Question(BaseModel):
    """A question about a text, and the questions and answers before it."""

    question: str
    turns: list[tuple[str, str]] = []


def page_routes(model: CausalLM, tokenizer: PreTrainedTokenizerBase, name: str) -> APIRouter:
    """Return the page and its endpoints.

    Args:
        model: Model that reads and answers.
        tokenizer: Tokenizer of the model, which nothing else uses.
        name: Name of the model on the page.
    """
    routes, worker = APIRouter(), ThreadPoolExecutor(1)
    books: dict[str, tuple[Book, Event]] = {}  # by id, the oldest first, with their sizes
    expected: dict[str, int] = {}  # bytes of keys and values, when read, of the texts that are being read
    page = page_html(model, tokenizer, name)

    @routes.get("/", response_class=HTMLResponse)
    def show() -> str:
        return page

    @routes.post("/states")
    async def read(request: Request, name: str = "text") -> JSONLines:
        return JSONLines(reading(await uploaded_text(request), name))

    @routes.get("/states/{book_id}")
    def sizes(book_id: str) -> Event:
        return find(book_id)[1]

    @routes.post("/states/{book_id}/ask")
    def ask(book_id: str, question: Question) -> JSONLines:
        if not question.question.strip():
            raise HTTPException(400, "The question is empty.")
        characters = len(question.question) + sum(len(part) for turn in question.turns for part in turn)
        if characters > MAX_QUESTION_CHARACTERS:
            raise HTTPException(
                413,
                f"The question and the conversation have {characters:,} characters. At most "
                f"{MAX_QUESTION_CHARACTERS:,} are allowed. Ask without the conversation, or ask a shorter question.",
            )
        return JSONLines(answering(find(book_id)[0], question))

    def find(book_id: str) -> tuple[Book, Event]:
        if book_id not in books:
            raise HTTPException(
                404,
                f"This state is not in the server's memory. It keeps the {MAX_BOOKS} newest texts until it stops. "
                "Give the text again.",
            )
        return books[book_id]

    def keep(book: Book, sizes: Event) -> int:
        """Store a book and return how many old ones were dropped for it. Only the worker calls this."""
        books[sizes["id"]], before = (book, sizes), len(books) + 1
        while len(books) > MAX_BOOKS or (len(books) > 1 and held(books) > max_cache_bytes(model)):
            del books[next(iter(books))]
        return before - len(books)

    def reading(text: str, name: str) -> Generator[Event]:
        """Read a text and yield the sizes after each piece. The last event has the id of the state."""
        started, book_id = time.perf_counter(), secrets.token_urlsafe(9)
        ids_1T = worker.submit(beginning_ids, tokenizer, text).result()
        tokens, read, cache = ids_1T.shape[1], 0, new_cache(model)
        check_size(model, tokens, sum(expected.values()))
        piece = piece_length(model, 1, tokens)
        if model.device.type != "cuda":
            piece = min(piece, CPU_PIECE)
        pieces = read_pieces(model, ids_1T.to(model.device), cache, piece)

        def sizes() -> Event:
            seconds, teacher_bytes = time.perf_counter() - started, teacher_cache_bytes(model, read)
            facts = {"name": name, "tokens": tokens, "read": read, "seconds": seconds}
            return facts | {"bytes": cache_bytes(cache), "teacher_bytes": teacher_bytes}

        expected[book_id] = growing_bytes(model, tokens)
        try:
            while read < tokens:
                yield sizes()
                read += worker.submit(next, pieces).result().shape[1]
            last = sizes() | {"id": book_id}
            dropped = worker.submit(lambda: keep(remember(model, ids_1T, cache), last)).result()
        finally:
            del expected[book_id]
        yield last | {"dropped": dropped}

    def answering(book: Book, question: Question) -> Generator[Event]:
        """Yield pieces of an answer, and then its number of tokens, its seconds and the bytes of the cache."""
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        begun, stopped = threading.Event(), threading.Event()

        def work() -> Event:
            begun.set()
            started = time.perf_counter()
            try:
                ids_1T = question_ids(tokenizer, question.turns, question.question)
                options = {"max_new_tokens": MAX_NEW_TOKENS, "streamer": streamer, "stopped": stopped}
                out, size = answer(model, book, ids_1T, **options)
            finally:
                streamer.end()  # an error must not leave the reader waiting
            seconds = time.perf_counter() - started
            return {"tokens": len(out), "seconds": seconds, "bytes": size, "cut": len(out) == MAX_NEW_TOKENS}

        future = worker.submit(work)
        try:
            if not begun.wait(WAIT_SECONDS):
                yield {"waiting": True}
            for text in streamer:
                yield {"text": text}
            yield future.result()
        finally:
            stopped.set()  # the user left
            future.cancel()

    return routes


def page_html(model: CausalLM, tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """Return the page, which needs no other file."""
    environment = Environment(loader=PackageLoader("deltify.inference"), autoescape=select_autoescape())
    return environment.get_template("page.html").render(
        name=name,
        chat=bool(tokenizer.chat_template),
        layers=model.config.num_hidden_layers,
        attention=attention_layers(model),
        dtype=str(model.dtype).removeprefix("torch."),
        device=device_name(model.device),
        max_bytes=MAX_TEXT_BYTES,
        max_books=MAX_BOOKS,
        max_new_tokens=MAX_NEW_TOKENS,
    )


async def uploaded_text(request: Request) -> str:
    """Return the body of a request as text.

    Raises:
        HTTPException: If it is too large or not UTF-8.
    """
    body, limit = bytearray(), f"Texts of at most {MAX_TEXT_BYTES / 1e6:g} MB are allowed. Give a part of it."
    if int(request.headers.get("content-length", 0)) > MAX_TEXT_BYTES:
        raise HTTPException(413, f"The text is too large. {limit}")
    async for part in request.stream():
        body += part
        if len(body) > MAX_TEXT_BYTES:
            raise HTTPException(413, f"The text is too large. {limit}")
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise HTTPException(
            415,
            f"The text is not UTF-8: byte {error.start + 1:,} is 0x{body[error.start]:02x}. Save it as plain text in "
            "UTF-8.",
        ) from None
    if "\0" in text:
        raise HTTPException(415, "The file is not plain text: it has zero bytes. Save it as plain text in UTF-8.")
    if not text.strip():
        raise HTTPException(400, "The text is empty. Give at least one word.")
    return text


def check_size(model: CausalLM, tokens: int, others: int) -> None:
    """Raise ValueError if the model's attention layers would take too much memory for a text.

    Args:
        model: Model that reads.
        tokens: Number of tokens of the text.
        others: Bytes that the attention layers will take for other texts that are being read.
    """
    needed, available = growing_bytes(model, tokens), max_cache_bytes(model)
    if needed > available:
        raise ValueError(
            f"The text has {tokens:,} tokens. For these, the attention layers of this model would keep "
            f"{gib(needed)}. {gib(available)} are allowed, which is {tokens * available // needed:,} tokens. Give a "
            "part of the text, or serve a model without attention layers."
        )
    if needed and needed + others > available:
        raise ValueError("Other texts are being read, and there is no memory for this one. Try again later.")


def held(books: dict[str, tuple[Book, Event]]) -> int:
    """Return the bytes of all books."""
    return sum(book.bytes for book, _ in books.values())


class JSONLines(StreamingResponse):
    """A response with one JSON object per line. An error becomes the last line. If the user leaves, the work ends."""

    def __init__(self, events: Generator[Event]):
        self.events = events
        super().__init__(self.lines(), media_type="application/x-ndjson")

    def lines(self) -> Iterator[str]:
        try:
            for event in self.events:
                yield json.dumps(event) + "\n"
        except Exception as error:
            if not isinstance(error, ValueError):  # out of memory, or a fault of this server
                traceback.print_exc()
            yield json.dumps({"error": str(error)}) + "\n"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.events.close()

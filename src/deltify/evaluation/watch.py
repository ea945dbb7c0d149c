"""A page that shows the progress of a run, served from the files in the run's folder.

    deltify watch runs/smollm2-135m-kda

It needs nothing but the folder, so it works during a run, after it, and on a copy.
"""

import secrets
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

from ..config import Recipe
from ..training.recall import curve_of
from ..utils.console import log
from ..utils.formats import duration, flat
from ..utils.statistics import spread
from .charts import tokens_axis
from .pages import render
from .progress import RunProgress, read_progress
from .svg import Look
from .training_charts import RECALL, Curves, draw_curves, of_stages, training_curves

REFRESH_SECONDS, REFRESH_FINISHED_SECONDS = 5, 30
RECALL_CURVES = 4  # validations whose recall curves are drawn
SHOWN_SAMPLES = 5  # validations whose samples are shown
LOCAL = ("localhost", "127.0.0.1", "::1")


def watch(run: str | Path, *, host: str = "127.0.0.1", port: int = 8010) -> None:
    """Serve the page of a run until Ctrl-C.

    Args:
        run: Folder of the run.
        host: Name or address to listen on. Others than this machine can read the page if it is not 127.0.0.1.
        port: Port to listen on, or 0 for a free one.

    Raises:
        FileNotFoundError: If the folder holds no run.
        ValueError: If a file of the run is damaged.
        OSError: If the port is in use.
    """
    read_progress(Path(run))  # raises before anyone opens the page
    with serving(Path(run), host=host, port=port) as url:
        log(f"{run}: {url} (Ctrl-C ends it; the run goes on)")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            log("")


@contextmanager
def serving(run: Path, *, recipe: Recipe | None = None, host: str = "127.0.0.1", port: int = 0) -> Generator[str]:
    """Serve the page of a run in another thread, and yield its URL.

    Args:
        recipe: Recipe of a run whose folder may not exist yet. Defaults to the one in the folder.

    Raises:
        OSError: If the port is in use or the host is unknown.
    """

    def page(nonce: str) -> str:
        return render_page(read_progress(run, recipe), nonce)

    try:
        server = PageServer(host, port, page)
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}, port {port}: {error}. Choose another --port, or --port 0 for a free one"
        ) from None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    name = socket.gethostname() if host in ("0.0.0.0", "::", "") else host
    try:
        yield f"http://{f'[{name}]' if ':' in name else name}:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class PageServer(ThreadingHTTPServer):
    """Serves one page.

    Args:
        page: Function that returns the page as HTML, whose script has the nonce that it gets.
    """

    daemon_threads = True

    def __init__(self, host: str, port: int, page: Callable[[str], str]):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.page, self.local = page, host in LOCAL
        super().__init__((host, port), PageHandler)


class PageHandler(BaseHTTPRequestHandler):
    """Answers requests to a `PageServer`."""

    def do_GET(self) -> None:
        """Answer with the page, or with a line that says what is wrong."""
        server, nonce = cast(PageServer, self.server), secrets.token_urlsafe(16)
        asked = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if server.local and asked not in LOCAL:  # another site, whose name leads to this machine
            self.answer(HTTPStatus.FORBIDDEN, f"This page is http://localhost:{server.server_port}/")
        elif urlsplit(self.path).path != "/":
            self.answer(HTTPStatus.NOT_FOUND, "There is one page here: /")
        else:
            try:
                self.answer(HTTPStatus.OK, server.page(nonce), "html", nonce)
            except (OSError, ValueError) as error:
                self.answer(HTTPStatus.INTERNAL_SERVER_ERROR, f"deltify: {error}")

    def answer(self, status: HTTPStatus, text: str, kind: str = "plain", nonce: str = "none") -> None:
        """Send a text."""
        content = text.encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", f"text/{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header(
                "Content-Security-Policy",
                f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
                f"script-src 'nonce-{nonce}'; frame-ancestors 'none'",
            )
            self.end_headers()
            self.wfile.write(content)
        except ConnectionError:  # the browser went away
            pass

    def log_message(self, format: str, *args) -> None:
        """Log nothing."""


# ---- the page --------------------------------------------------------------------------------------------------------


def render_page(progress: RunProgress, nonce: str) -> str:
    """Return the page of a run.

    Args:
        nonce: Random text that allows the page's script to run.
    """
    return render(
        "watch.html",
        run=progress,
        nonce=nonce,
        state=state_of(progress),
        validations=[record for record in progress.records if "heldout_kl" in record],
        last=next((record for record in reversed(progress.records) if "loss" in record), None),
        charts=charts_of(progress),
        samples=samples_of(progress),
        refresh=REFRESH_FINISHED_SECONDS if progress.finished else REFRESH_SECONDS,
    )


def state_of(progress: RunProgress) -> tuple[str, str]:
    """Return the state of a run as a word and a sentence."""
    resume = f"deltify distill {progress.folder / 'recipe.yaml'} --resume"
    stage = progress.current
    if progress.finished:
        return "finished", ""
    if progress.stopped_early:
        return "stopped", f"--max-minutes ended it. Continue it with: {resume}"
    if progress.quiet_seconds is not None:
        quiet = duration(progress.quiet_seconds)
        return "quiet", f"It has written nothing for {quiet}. If its process has ended, continue it with: {resume}"
    if not progress.records:
        return "starting", "The teacher and the text are being opened, and the teacher is being converted."
    return "running", f"{stage.name}, step {min(stage.done + 1, stage.steps):,} of {stage.steps:,}"


def charts_of(progress: RunProgress) -> list[Curves]:
    """Return the charts of a run, without those that have no points."""
    recalls = [record for record in progress.records if "recall" in record]
    speed = draw_curves("Speed", "tokens per second", of_stages(progress.stage_records, "tokens_per_second"))
    charts = [*training_curves(progress.stage_records), recall_by_distance(recalls), speed]
    return [chart for chart in charts if chart is not None]


def recall_by_distance(records: list[dict]) -> Curves | None:
    """Return the recall curves of some validations, the latest strongest. One distance is no curve."""
    if not records or len(distances := list(curve_of(records[-1]))) < 2:
        return None
    chosen = spread(records, RECALL_CURVES)
    data = {place(record): list(curve_of(record).items()) for record in chosen}
    looks = {name: Look(1, opacity=(number + 2) / (len(data) + 1)) for number, name in enumerate(data)}
    x = tokens_axis("distance of the answer, tokens", distances)
    return draw_curves("Recall by distance", RECALL, data, looks, x=x)


def place(record: dict) -> str:
    """Return the stage and step of a line."""
    return f"{record['stage']}, step {record['step']:,}" if record["step"] else record["stage"]


def samples_of(progress: RunProgress) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return each prompt with the names and continuations of the teacher and of some validations, latest first."""
    teacher = [line for line in progress.samples if line["stage"] == "teacher"]
    students = [line for line in progress.samples if line["stage"] != "teacher"]
    if not students:
        return []
    shown = [*teacher, *reversed(spread(students, SHOWN_SAMPLES))]
    by_prompt: dict[str, list[tuple[str, str]]] = {}
    for line in shown:
        for sample in line["samples"]:
            by_prompt.setdefault(shown_text(sample["prompt"]), []).append(
                (place(line), shown_text(sample["continuation"]))
            )
    return list(by_prompt.items())


def shown_text(text: str) -> str:
    """Return a text as one line, without control characters."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in flat(text))

"""A page that shows the progress of a run, served from the files in the run's folder.

    deltify watch runs/smollm2-135m-kda

It needs nothing but the folder, so it works during a run, after it, and on a copy.
"""

import functools
import secrets
import socket
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import numpy as np
from jinja2 import Environment, PackageLoader, Template

from ..config import STAGES, Recipe
from ..training.recall import curve_of
from ..utils.console import log
from . import live_charts as charts
from .live_charts import Chart, Line
from .plots import short
from .progress import RunProgress, read_progress
from .report import flat

REFRESH_SECONDS, REFRESH_FINISHED_SECONDS = 5, 30
RECALL_CURVES = 4  # validations whose recall curves are drawn
SHOWN_SAMPLES = 5  # validations whose samples are shown
RECALL = "log-probability of far answers, nats"
COLOR_OF = {stage: number for number, stage in enumerate(("converted", *STAGES))}
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
    return template().render(
        run=progress,
        nonce=nonce,
        size=(charts.WIDTH, charts.HEIGHT, charts.LEFT, charts.RIGHT, charts.TOP, charts.BOTTOM),
        state=state_of(progress),
        validations=[record for record in progress.records if "heldout_kl" in record],
        last=next((record for record in reversed(progress.records) if "loss" in record), None),
        charts=[charts.layout(chart) for chart in charts_of(progress) if any(line.points for line in chart.lines)],
        samples=samples_of(progress),
        refresh=REFRESH_FINISHED_SECONDS if progress.finished else REFRESH_SECONDS,
    )


@functools.cache
def template() -> Template:
    """Return the template of the page."""
    environment = Environment(
        loader=PackageLoader("deltify.evaluation"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"duration": duration, "si": charts.si, "gib": gib}
    return environment.get_template("watch.html")


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


def charts_of(progress: RunProgress) -> list[Chart]:
    """Return the charts of a run. Those without figures have no points."""
    records = progress.records
    stages = list(dict.fromkeys(record["stage"] for record in records))
    validated = [(r["tokens"], r["heldout_kl"]) for r in records if "heldout_kl" in r]

    def lines(key: str, of_stages: Sequence[str], **looks) -> list[Line]:
        of = {s: [(r["tokens"], r[key]) for r in records if r["stage"] == s and key in r] for s in of_stages}
        return [Line(stage, points, COLOR_OF[stage], **looks) for stage, points in of.items()]

    kl = [
        Line(line.name, line.points, line.color, dots=True, before=last_before(validated, line))
        for line in lines("heldout_kl", stages)
    ]
    recalls = [record for record in records if "recall" in record]
    chosen = np.unique(np.linspace(0, len(recalls) - 1, RECALL_CURVES).round().astype(int)) if recalls else []
    by_distance = [
        Line(place(recalls[i]), list(curve_of(recalls[i]).items()), 1, (number + 1) / len(chosen), True)
        for number, i in enumerate(chosen)
    ]
    distances = list(curve_of(recalls[-1])) if recalls else []
    by_distance = by_distance if len(distances) > 1 else []  # one distance is no curve
    over_tokens = [
        Line(f"from {short(d)} tokens", [(r["tokens"], curve_of(r)[d]) for r in recalls], number % 6 + 1, dots=True)
        for number, d in enumerate(distances)
    ]
    x = "training tokens"
    return [
        Chart("KL to the teacher on held-out text, nats per token", x, kl),
        Chart("Training loss, nats per token", x, lines("loss", [s for s in stages if s != "align"])),
        Chart("Training loss of align, relative error", x, lines("loss", [s for s in stages if s == "align"])),
        Chart(f"Recall by distance: {RECALL}", "distance of the answer, tokens", by_distance, True, False),
        Chart(f"Recall over training: {RECALL}", x, over_tokens, from_zero=False),
        Chart("Tokens per second", x, lines("tokens_per_second", stages)),
    ]


def last_before(points: charts.Points, line: Line) -> tuple[float, float] | None:
    """Return the last of some points before a line."""
    earlier = [point for point in points if line.points and point[0] < line.points[0][0]]
    return earlier[-1] if earlier else None


def place(record: dict) -> str:
    """Return the stage and step of a line."""
    return f"{record['stage']}, step {record['step']:,}" if record["step"] else record["stage"]


def samples_of(progress: RunProgress) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return each prompt with the names and continuations of the teacher and of some validations, latest first."""
    teacher = [line for line in progress.samples if line["stage"] == "teacher"]
    students = [line for line in progress.samples if line["stage"] != "teacher"]
    if not students:
        return []
    indices = np.unique(np.linspace(0, len(students) - 1, SHOWN_SAMPLES).round().astype(int))
    shown = [*teacher, *(students[i] for i in reversed(indices))]
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


def duration(seconds: float) -> str:
    """Return a time such as 40 s, 12 min, 3 h 05 min or 2 d 4 h."""
    minutes, hours = round(seconds / 60), seconds / 3600
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{round(hours) // 24} d {round(hours) % 24} h"


def gib(size: float) -> str:
    """Return a number of bytes in GiB."""
    return f"{size / 2**30:.1f} GiB"

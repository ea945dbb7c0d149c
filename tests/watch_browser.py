"""Chromium without a window, driven through a pipe by the Chrome DevTools Protocol."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    "--remote-debugging-pipe",
)


class Browser:
    """A browser with one page. Use it as a context manager."""

    def __enter__(self) -> "Browser":
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (read_here, write_there), (read_there, write_here) = os.pipe(), os.pipe()
        # Chromium reads commands from descriptor 3 and writes answers to 4
        script = f'exec "$@" 3<&{read_there} 4>&{write_there}'
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={self.profile.name}", "about:blank"]
        given = (read_there, write_there)
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command], pass_fds=given, stderr=subprocess.DEVNULL
        )
        for descriptor in given:
            os.close(descriptor)
        self.answers, self.commands = os.fdopen(read_here, "rb"), os.fdopen(write_here, "wb")
        self.buffer, self.numbers, self.session = b"", itertools.count(1), None
        page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self.session = attached["sessionId"]
        self.call("Page.enable")
        return self

    def __exit__(self, *error) -> None:
        self.process.kill()
        self.process.wait()
        self.commands.close()
        self.answers.close()
        self.profile.cleanup()

    def read(self) -> dict:
        """Return the next message. Messages end with a zero byte."""
        while b"\0" not in self.buffer:
            self.buffer += os.read(self.answers.fileno(), 2**20) or b"{}\0"
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **parameters) -> dict:
        """Call a method of the protocol and return its result."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        self.commands.write(json.dumps(message).encode() + b"\0")
        self.commands.flush()
        while (answer := self.read()).get("id") != number:
            assert self.process.poll() is None, "the browser ended"
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def open(self, url: str, *, width: int, height: int = 900, dark: bool = False, phone: bool = False) -> None:
        """Open a page in a window of this size and wait until it has loaded."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        while self.read().get("method") != "Page.loadEventFired":
            assert self.process.poll() is None, "the browser ended"

    def evaluate(self, expression: str):
        """Return the value of a JavaScript expression on the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page as PNG."""
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(picture["data"]))

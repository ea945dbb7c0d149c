"""Signals that end a run: SIGTERM, as schedulers send it, and SIGINT, which is Ctrl-C."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """A run that a signal ended; the exit code says which, as shells do it: 143 for SIGTERM, 130 for SIGINT."""

    def __init__(self, number: int, what: str = "what was saved can be taken up with --resume"):
        super().__init__(f"stopped by {signal.Signals(number).name}: {what}")
        self.exit_code = 128 + number


class Stopper:
    """While it is entered, SIGTERM and SIGINT raise Stopped, at once or, inside `held`, when the block is left.

    In a held block `signal` is the number of the one that came, else 0; a second SIGINT does not wait. Signals are left
    alone outside the main thread, where Python cannot take them.
    """

    def __init__(self) -> None:
        self.signal, self.holding, self.before = 0, False, {}

    def __enter__(self) -> "Stopper":
        if threading.current_thread() is threading.main_thread():
            self.before = {n: signal.signal(n, self.receive) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        if not self.holding or (self.signal and number == signal.SIGINT):
            raise Stopped(number)
        if not self.signal:
            again = "; Ctrl-C once more to stop at once" if number == signal.SIGINT else ""
            # not print: the signal may have come in the middle of one
            os.write(2, f"\n{signal.Signals(number).name}: saving after this step{again}\n".encode())
        self.signal = self.signal or number

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lets a block come to a good end before Stopped is raised, unless it raises something else itself."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
        if self.signal:
            raise Stopped(self.signal)

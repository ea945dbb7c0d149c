"""Signals that end a run: SIGTERM, which schedulers send, and SIGINT, which Ctrl-C sends."""

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """Raised when a signal ends a run. `exit_code` is that of shells: 143 for SIGTERM, 130 for SIGINT."""

    def __init__(self, number: int, what: str = "--resume continues from the last checkpoint"):
        super().__init__(f"stopped by {signal.Signals(number).name}: {what}")
        self.exit_code = 128 + number


class Stopper:
    """Turns SIGTERM and SIGINT into `Stopped`, raised at once or, inside `held()`, when the block ends.

    A second Ctrl-C is never delayed. In threads other than the main one, where Python cannot handle signals, it does
    nothing.

    Attributes:
        signal: Number of the pending signal, or 0.
    """

    def __init__(self) -> None:
        self.signal, self.holding, self.previous_handlers = 0, False, {}

    def __enter__(self) -> "Stopper":
        if threading.current_thread() is threading.main_thread():
            self.previous_handlers = {n: signal.signal(n, self.receive) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if not self.holding or (self.signal and number == signal.SIGINT):
            raise Stopped(number)
        if not self.signal:
            again = "; Ctrl-C once more to stop at once" if number == signal.SIGINT else ""
            # not print: the signal may interrupt another print
            os.write(2, f"\n{signal.Signals(number).name}: saving after this step{again}\n".encode())
        self.signal = self.signal or number

    @contextmanager
    def held(self) -> Generator[None]:
        """Delay `Stopped` to the end of the block. An error of the block takes precedence."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
        if self.signal:
            raise Stopped(self.signal)

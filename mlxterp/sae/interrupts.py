"""Requests to stop, noted when they come and obeyed between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TERMINATED = 128 + signal.SIGTERM


class Requests:
    """What has asked the process to stop: `pending` is the name of the signal, or `None`."""

    def __init__(self) -> None:
        self.pending: str | None = None
        self._interrupted = False

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """Take a signal; a second SIGINT raises `KeyboardInterrupt` at once."""
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        # A process that is told to end must end, whatever its user presses before or after.
        if self.pending != "SIGTERM":
            self.pending = signal.Signals(number).name

    def raise_if_pending(self) -> None:
        """Raises `KeyboardInterrupt` after SIGINT, `SystemExit(143)` after SIGTERM."""
        if self.pending == "SIGINT":
            raise KeyboardInterrupt
        if self.pending == "SIGTERM":
            raise SystemExit(TERMINATED)


@contextlib.contextmanager
def stop_requests() -> Iterator[Requests]:
    """Hold SIGINT (Ctrl-C) and SIGTERM back within the block, so that no step is cut in two.

    The block asks for them with `requests.pending` and obeys with `requests.raise_if_pending()`; a
    request that it did not see takes effect at its end. Handlers are restored. Outside the main
    thread, which alone receives signals, and for signals that the process ignores, nothing changes.
    """
    requests = Requests()
    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.getsignal(number) for number in SIGNALS}
    # `None` is a handler that is not Python's, which could not be restored.
    previous = {n: old for n, old in previous.items() if old not in (None, signal.SIG_IGN)}
    try:
        for number in previous:
            signal.signal(number, requests.note)
        yield requests
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
    requests.raise_if_pending()

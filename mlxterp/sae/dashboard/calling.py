"""One thread in which all calls of a model are made, one after another."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

import mlx.core as mx

Result = TypeVar("Result")
Jobs = SimpleQueue[tuple[Future, Callable[[], Any]] | None]

SECONDS_TO_END = 10.0


class Caller:
    """Calls functions in a thread of its own, in the order in which they are submitted.

    MLX lets go of some objects only in the thread that made them. The thread ends with the object,
    or with the process: after the functions registered with `atexit` later, so that a server which
    is stopped by one of these can still submit what closes its generations.
    """

    def __init__(self, name: str):
        self._jobs: Jobs = SimpleQueue()
        thread = threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True)
        thread.start()
        weakref.finalize(self, _end, self._jobs, thread)

    def submit(self, function: Callable[[], Result]) -> Future[Result]:
        """What a function will return."""
        future: Future[Result] = Future()
        self._jobs.put((future, function))
        return future


def _work(jobs: Jobs) -> None:
    while (job := jobs.get()) is not None:
        future, function = job
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except BaseException as error:  # which is for whoever waits for the result
                future.set_exception(error)
        del job, future, function  # else they would live until the next one comes
    mx.clear_streams()  # else MLX would end their threads after this one, and perhaps too late


def _end(jobs: Jobs, thread: threading.Thread) -> None:
    jobs.put(None)
    if thread is not threading.current_thread():
        thread.join(SECONDS_TO_END)

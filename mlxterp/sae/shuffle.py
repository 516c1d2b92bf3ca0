"""Shuffled batches from more activations than memory holds."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxterp.sae.shards import Rows

BATCHES_AHEAD = 2


def shuffle_buffer(
    chunks: Iterator[mx.array], capacity: int, batch_size: int, rng: np.random.Generator | None
) -> Iterator[mx.array]:
    """Batches of rows drawn at random from a buffer of `capacity` rows; in order without `rng`.

    The buffer is filled, shuffled, emptied by half, and filled again; what is left when the chunks
    end is emitted to the last row, so the final batch may be smaller.
    """
    held: list[mx.array] = []
    size = 0
    for chunk in chunks:
        held.append(chunk)
        size += len(chunk)
        if size < max(capacity, batch_size):
            continue
        buffer = _joined(held, rng)
        n_emitted = max(1, size // 2 // batch_size) * batch_size
        for start in range(0, n_emitted, batch_size):
            yield buffer[start : start + batch_size]
        held = [mx.contiguous(buffer[n_emitted:])]
        size -= n_emitted
    if size:
        buffer = _joined(held, rng)
        for start in range(0, size, batch_size):
            yield buffer[start : start + batch_size]


def _joined(chunks: list[mx.array], rng: np.random.Generator | None) -> mx.array:
    rows = mx.concatenate(chunks)
    return rows if rng is None else rows[mx.array(rng.permutation(len(rows)))]


@dataclass(frozen=True)
class Span:
    """Rows `start` to `end` of a chunk."""

    chunk: int
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


def spans_of(ends: Sequence[int], rows: range) -> list[Span]:
    """The spans that some of all rows make up, for chunks that end at these rows."""
    starts = [0, *ends[:-1]]
    return [
        Span(i, max(rows.start, first) - first, min(rows.stop, last) - first)
        for i, (first, last) in enumerate(zip(starts, ends, strict=True))
        if last > rows.start and first < rows.stop
    ]


@dataclass(frozen=True)
class Order:
    """The order in which rows on a disk are read and given out, the same for the same `seed`.

    Chunks are read in random order, as many at a time as `capacity` rows have room for; the rows of
    these are shuffled together. Where a row comes is known without reading those before it. Without
    a `seed` nothing is shuffled.
    """

    spans: list[Span]
    capacity: int
    seed: tuple[int, ...] | None

    def groups(self) -> Iterator[list[Span]]:
        """The spans that are read and shuffled together."""
        order: Any = range(len(self.spans))
        if self.seed is not None:
            order = np.random.default_rng(self.seed).permutation(len(self.spans))
        group: list[Span] = []
        size = 0
        for i in order:
            span = self.spans[i]
            if group and size + len(span) > self.capacity:
                yield group
                group, size = [], 0
            group.append(span)
            size += len(span)
        if group:
            yield group

    def permutation(self, number: int, n_rows: int) -> np.ndarray:
        """Which of a group's rows come in what order."""
        if self.seed is None:
            return np.arange(n_rows)
        return np.random.default_rng((*self.seed, number + 1)).permutation(n_rows)

    def batches(
        self, read: Callable[[list[Span]], Rows], batch_size: int, start: int = 0
    ) -> Iterator[Rows]:
        """Batches of rows, of which `read` gives those of some spans; the first `start` left out.

        The last batch may be smaller.
        """
        skipped, wanted = start * batch_size, []
        for number, group in enumerate(self.groups()):
            n_rows = sum(map(len, group))
            if skipped < n_rows:
                wanted.append((number, n_rows, skipped, group))
            skipped = max(0, skipped - n_rows)
        groups = _read_ahead(read, [group for *_, group in wanted])
        held: list[Rows] = []
        for number, n_rows, first, _ in wanted:
            rows, order = next(groups), self.permutation(number, n_rows)[first:]
            while len(order):
                room = batch_size - sum(map(_length, held))
                picked, order = order[:room], order[room:]
                held.append({name: array.take(picked, axis=0) for name, array in rows.items()})
                if len(picked) == room:
                    yield _merged(held)
                    held = []
            del rows  # before the next ones but one are read
        if held:
            yield _merged(held)


def _read_ahead(read: Callable[[list[Span]], Rows], groups: list[list[Span]]) -> Iterator[Rows]:
    """The rows of each group, read while those of the one before it are in use."""
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(read, groups[0]) if groups else None
        for i in range(len(groups)):
            rows = [waiting.result()] if waiting is not None else []
            waiting = thread.submit(read, groups[i + 1]) if i + 1 < len(groups) else None
            yield rows.pop()


def _length(rows: Rows) -> int:
    return len(next(iter(rows.values())))


def _merged(parts: list[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def ahead(items: Iterator[Any], n: int = BATCHES_AHEAD) -> Iterator[Any]:
    """The same items, made by a thread, up to `n` of them before they are asked for."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(n)
    stopped = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((kind, value), timeout=0.1)
                return

    def work() -> None:
        try:
            for item in items:
                put("item", item)
                if stopped.is_set():
                    return
            put("end", None)
        except BaseException as error:  # raised where the items are asked for
            put("error", error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stopped.set()
        thread.join()

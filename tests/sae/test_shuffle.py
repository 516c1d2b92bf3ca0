import itertools
import threading
import time
import weakref
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest

from mlxterp.sae.shuffle import Order, Span, ahead, shuffle_buffer, spans_of

SIZES = [7, 10, 10, 3, 10, 1, 10, 10, 10, 6]
ENDS = list(itertools.accumulate(SIZES))
N = ENDS[-1]


class Reader:
    """Rows that say their own number, and the spans that were asked for."""

    def __init__(self, ends=ENDS):
        self.starts, self.groups = [0, *ends[:-1]], []

    def __call__(self, spans):
        self.groups.append(spans)
        found = [np.arange(s.start, s.end) + self.starts[s.chunk] for s in spans]
        number = np.concatenate(found)
        return {"number": number, "vector": np.stack([number, -number], axis=1)}


def order(capacity=25, seed: tuple[int, ...] | None = (0, 0), ends=ENDS, rows=None):
    return Order(spans_of(ends, rows or range(ends[-1])), capacity, seed)


def numbers(batches):
    return [batch["number"].tolist() for batch in batches]


def flat(batches):
    return [i for batch in numbers(batches) for i in batch]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.parametrize("seed", [(0, 0), (3, 1), None])
@pytest.mark.parametrize("capacity", [1, 10, 25, 1000])
@pytest.mark.parametrize("batch_size", [1, 4, 16, 77, 500])
def test_every_row_comes_once_in_full_batches(batch_size, capacity, seed):
    batches = list(order(capacity, seed).batches(Reader(), batch_size))
    assert Counter(flat(batches)) == Counter(range(N))
    assert [len(b["number"]) for b in batches] == [
        min(batch_size, N - start) for start in range(0, N, batch_size)
    ]
    for batch in batches:  # the parts of a row stay together
        np.testing.assert_array_equal(batch["vector"], batch["number"][:, None] * [1, -1])


def test_without_a_seed_rows_keep_their_order():
    assert flat(order(seed=None).batches(Reader(), 8)) == [*range(N)]


def test_the_order_is_given_by_the_seed():
    first = flat(order(seed=(5, 1)).batches(Reader(), 8))
    assert flat(order(seed=(5, 1)).batches(Reader(), 8)) == first
    assert flat(order(seed=(5, 1)).batches(Reader(), 16)) == first
    others = [flat(order(seed=seed).batches(Reader(), 8)) for seed in ((5, 0), (5, 2), (6, 1))]
    assert len(set(map(tuple, [first, *others]))) == 4


def test_epochs_read_the_chunks_in_another_order_and_shuffle_them_otherwise():
    epochs = [order(1000, seed=(5, epoch)) for epoch in range(4)]
    chunks = [tuple(span.chunk for group in o.groups() for span in group) for o in epochs]
    within = [tuple(o.permutation(0, 50).tolist()) for o in epochs]
    within += [tuple(epochs[0].permutation(number, 50).tolist()) for number in range(1, 4)]
    assert len(set(chunks)) == 4 and len(set(within)) == 7


@pytest.mark.parametrize("seed", [(1, 0), None])
@pytest.mark.parametrize("batch_size", [1, 8, 30])
def test_start_leaves_out_exactly_the_first_batches(batch_size, seed):
    mixed = order(seed=seed)
    batches = numbers(mixed.batches(Reader(), batch_size))
    for start in range(len(batches) + 3):
        assert numbers(mixed.batches(Reader(), batch_size, start)) == batches[start:]


def test_start_reads_nothing_of_what_comes_before():
    mixed = order(seed=(1, 0))
    ends = [*itertools.accumulate(sum(map(len, group)) for group in mixed.groups())]
    assert len(ends) >= 4
    for start in range(N // 8 + 3):
        reader = Reader()
        list(mixed.batches(reader, 8, start))
        wanted = [g for g, end in zip(mixed.groups(), ends, strict=True) if end > start * 8]
        assert reader.groups == wanted


@pytest.mark.parametrize("capacity", [1, 9, 10, 20, 25, 60])
def test_no_more_is_held_than_there_is_room_for_or_a_single_chunk(capacity):
    for seed in range(20):
        groups = list(order(capacity, (seed, 0)).groups())
        assert all(sum(map(len, g)) <= capacity or len(g) == 1 for g in groups)
        # And no room is wasted: the next chunk would not have fitted.
        for group, following in itertools.pairwise(groups):
            assert sum(map(len, group)) + len(following[0]) > capacity


def test_at_most_one_group_is_read_before_it_is_needed():
    reader, given = Reader(), 0
    mixed = order(seed=(2, 0))
    ends = [*itertools.accumulate(sum(map(len, group)) for group in mixed.groups())]
    for batch in mixed.batches(reader, 5):
        given += len(batch["number"])
        needed = 1 + sum(end < given for end in ends)
        assert needed <= len(reader.groups) <= needed + 1


def test_rows_that_were_given_out_are_not_kept():
    class Rows(dict):
        pass

    ends, made = [*range(100, 1001, 100)], []

    def read(spans):
        rows = Rows(number=np.concatenate([np.arange(s.start, s.end) for s in spans]))
        made.append(weakref.ref(rows))
        return rows

    held = [
        sum(rows() is not None for rows in made) for _ in order(100, (0, 0), ends).batches(read, 8)
    ]
    assert len(made) == 10 and max(held) <= 2  # in use, and waiting


def test_an_error_in_reading_is_raised_and_the_thread_ends():
    reader = Reader()

    def read(spans):
        if len(reader.groups) == 2:
            raise OSError("no disk")
        return reader(spans)

    given = []
    with pytest.raises(OSError, match="no disk"):
        for batch in order(seed=(2, 0)).batches(read, 5):
            given += batch["number"].tolist()
    assert 0 < len(given) < N


def test_a_pass_that_is_left_early_ends_its_thread():
    batches = order(seed=(2, 0)).batches(Reader(), 5)
    next(batches)
    assert threading.active_count() > 1
    batches.close()


def test_rows_of_a_chunk_do_not_stay_together():
    ends = [*range(100, 10_001, 100)]
    found = flat(order(2500, (0, 0), ends).batches(Reader(ends), 64))
    chunks = np.array(found) // 100
    # Next to each other in a shuffled group of 25 chunks, two are of one in 1 of 25 cases.
    assert (chunks[1:] == chunks[:-1]).mean() == pytest.approx(1 / 25, rel=0.25)
    # 64 rows drawn from 25 chunks are of 25 * (1 - (24 / 25)^64) different ones.
    batches = [len(set(chunks[i : i + 64])) for i in range(0, 9984, 64)]
    assert np.mean(batches) == pytest.approx(25 * (1 - (24 / 25) ** 64), rel=0.15)
    steps = np.diff(found)
    assert (steps == 1).mean() < 0.01
    # Chunks that are neighbours on the disk are not read together.
    group = sorted(set(chunks[:2500].tolist()))
    assert len(group) == 25 and group[-1] - group[0] > 50


@pytest.mark.parametrize(
    "rows", [range(0, N), range(5, 20), range(17, 27), range(30, 31), range(8, 8)]
)
def test_spans_are_the_rows_asked_for_and_no_others(rows):
    spans = spans_of(ENDS, rows)
    assert flat([Reader()([span]) for span in spans]) == [*rows]
    found = flat(order(rows=rows).batches(Reader(), 4)) if len(rows) else []
    assert sorted(found) == [*rows]


def test_a_span_lies_within_one_chunk():
    assert spans_of([7, 17, 27], range(5, 20)) == [Span(0, 5, 7), Span(1, 0, 10), Span(2, 0, 3)]


# --- from chunks that are being computed


def test_a_buffer_emits_every_row_and_mixes_distant_ones():
    rows = [mx.arange(i, i + 10)[:, None].astype(mx.float32) for i in range(0, 1000, 10)]
    batches = list(shuffle_buffer(iter(rows), 400, 32, np.random.default_rng(0)))
    out = [int(i) for batch in batches for i in batch[:, 0].tolist()]
    assert sorted(out) == list(range(1000))
    first = np.array(out[:32])
    assert first.max() - first.min() > 250
    assert np.corrcoef(np.arange(1000), out)[0, 1] < 0.95


# --- one thread ahead


class Items:
    """Numbers, and how many were made."""

    def __init__(self, n=10**9, error_at=None):
        self.n, self.error_at, self.made = n, error_at, 0

    def __iter__(self):
        for i in range(self.n):
            if i == self.error_at:
                raise OSError(f"item {i}")
            self.made += 1
            yield i


def settled(items):
    """How many items are made when no more are."""
    found = -1
    while found != items.made:
        found = items.made
        time.sleep(0.03)
    return found


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_same_items_come_in_order(n):
    assert list(ahead(iter(Items(50)), n)) == [*range(50)]
    assert list(ahead(iter(()), n)) == []


def test_items_may_be_nothing():
    assert list(ahead(iter([None, 0, (), None]))) == [None, 0, (), None]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_no_more_items_are_made_than_may_be_ahead(n):
    items = Items()
    stream = ahead(iter(items), n)
    assert settled(items) == 0
    for given in range(1, 4):
        assert next(stream) == given - 1
        # Those that wait, and one in the hand of the thread.
        assert given + n <= settled(items) <= given + n + 1
    stream.close()


@pytest.mark.parametrize("error_at", [0, 1, 6])
def test_an_error_is_raised_where_the_item_would_come(error_at):
    found = []
    with pytest.raises(OSError, match=f"item {error_at}"):
        for item in ahead(iter(Items(10, error_at))):
            found.append(item)
    assert found == [*range(error_at)]


def test_closing_early_ends_the_thread():
    items = Items()
    stream = ahead(iter(items))
    next(stream)
    settled(items)
    assert threading.active_count() > 1
    started = time.perf_counter()
    stream.close()
    assert time.perf_counter() - started < 1
    assert items.made == settled(items) <= 4


def test_an_error_of_the_one_who_asks_ends_the_thread():
    with pytest.raises(KeyError):
        stream = ahead(iter(Items()))
        try:
            for _ in stream:
                raise KeyError
        finally:
            stream.close()

import gc
import threading
import time

import pytest

from mlxterp.sae.dashboard.calling import Caller


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_calls_are_made_in_one_thread_and_in_order():
    caller, seen = Caller("of-the-test"), []

    def call(i: int) -> int:
        time.sleep(0.001 * (5 - i))
        seen.append((i, threading.current_thread().name))
        return i

    futures = [caller.submit(lambda i=i: call(i)) for i in range(5)]
    assert [future.result(5) for future in futures] == [*range(5)]
    assert seen == [(i, "of-the-test") for i in range(5)]


def test_an_error_is_for_whoever_waits():
    caller = Caller("of-the-test")
    failed = caller.submit(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        failed.result(5)
    assert caller.submit(lambda: 3).result(5) == 3


def test_what_was_cancelled_is_not_called():
    caller, entered, go, seen = Caller("of-the-test"), threading.Event(), threading.Event(), []
    first = caller.submit(lambda: (entered.set(), go.wait(5)))
    assert entered.wait(5)
    second = caller.submit(lambda: seen.append(2))
    assert second.cancel()
    go.set()
    assert first.result(5)[1] and caller.submit(lambda: 3).result(5) == 3 and seen == []


def test_the_thread_ends_with_the_object():
    caller = Caller("ends-with-the-object")
    assert caller.submit(lambda: 1).result(5) == 1 and "ends-with-the-object" in threads()
    del caller
    gc.collect()
    assert "ends-with-the-object" not in threads()

import contextlib
import signal
import threading

import pytest

from mlxterp.sae.interrupts import stop_requests

INTERRUPT, TERMINATE = signal.SIGINT, signal.SIGTERM


@contextlib.contextmanager
def handlers(handler):
    """The same handler for both signals, for as long as the block lasts."""
    before = {number: signal.signal(number, handler) for number in (INTERRUPT, TERMINATE)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@pytest.mark.parametrize("number", [INTERRUPT, TERMINATE])
def test_a_signal_is_noted_and_raised_when_asked_for(number):
    done = []
    with pytest.raises((KeyboardInterrupt, SystemExit)) as raised, stop_requests() as requests:
        assert requests.pending is None
        requests.raise_if_pending()
        signal.raise_signal(number)
        done.append("the step")
        assert requests.pending == number.name
        requests.raise_if_pending()
        done.append("the next step")
    assert done == ["the step"]
    if number == INTERRUPT:
        assert raised.type is KeyboardInterrupt
    else:
        assert raised.type is SystemExit and raised.value.code == 143


def test_a_second_interrupt_is_raised_at_once():
    done = []
    with pytest.raises(KeyboardInterrupt), stop_requests():
        signal.raise_signal(INTERRUPT)
        done.append("the step")
        signal.raise_signal(INTERRUPT)
        done.append("the rest of it")
    assert done == ["the step"]
    with pytest.raises(KeyboardInterrupt), stop_requests():
        for number in (TERMINATE, INTERRUPT, INTERRUPT):
            signal.raise_signal(number)
        done.append("the rest of it")
    assert done == ["the step"]


@pytest.mark.parametrize("order", [(INTERRUPT, TERMINATE), (TERMINATE, INTERRUPT)])
def test_to_terminate_counts_more_than_to_interrupt(order):
    with pytest.raises(SystemExit), stop_requests() as requests:
        for number in order:
            signal.raise_signal(number)
        assert requests.pending == "SIGTERM"


@pytest.mark.parametrize("number", [INTERRUPT, TERMINATE])
def test_a_request_that_nobody_asked_for_takes_effect_at_the_end(number):
    done = []
    with pytest.raises((KeyboardInterrupt, SystemExit)), stop_requests():
        signal.raise_signal(number)
        done.append("the last step")
    assert done == ["the last step"]


def test_an_error_of_the_block_is_not_covered_up():
    with pytest.raises(ZeroDivisionError), stop_requests():
        signal.raise_signal(INTERRUPT)
        raise ZeroDivisionError


@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_handlers_are_restored_however_the_block_ends(error):
    def own(number, frame):
        raise AssertionError("not to be called")

    with handlers(own):
        with contextlib.suppress(ZeroDivisionError, KeyboardInterrupt), stop_requests():
            assert own not in (signal.getsignal(INTERRUPT), signal.getsignal(TERMINATE))
            if error:
                raise error
        assert signal.getsignal(INTERRUPT) is signal.getsignal(TERMINATE) is own


def test_blocks_may_be_nested():
    with pytest.raises(KeyboardInterrupt), stop_requests() as outer:
        with contextlib.suppress(KeyboardInterrupt), stop_requests() as inner:
            signal.raise_signal(INTERRUPT)
            assert (outer.pending, inner.pending) == (None, "SIGINT")
        signal.raise_signal(INTERRUPT)
        assert outer.pending == "SIGINT"


def test_signals_that_the_process_ignores_stay_ignored():
    with handlers(signal.SIG_IGN), stop_requests() as requests:
        signal.raise_signal(INTERRUPT)
        signal.raise_signal(TERMINATE)
        assert requests.pending is None


def test_in_another_thread_nothing_changes():
    before = signal.getsignal(INTERRUPT), signal.getsignal(TERMINATE)
    seen = []

    def work():
        with stop_requests() as requests:
            requests.raise_if_pending()
            seen.append(
                (requests.pending, signal.getsignal(INTERRUPT), signal.getsignal(TERMINATE))
            )

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, *before)]

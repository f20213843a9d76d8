"""A consumer beside its producer: order, bounded room, and what happens when either side fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

import pytest

from utils import background
from utils.background import Background


def nothing() -> None:
    """To stop a consumer that needs no stopping."""


def produce(
    aside: Background[int],
    items: Iterable[int],
    put: list[int],
    error: BaseException | type[BaseException] | None = None,
) -> None:
    """Put the items, and raise the error; `put` says how far it went."""
    with aside:
        for item in items:
            aside.put(item)
            put.append(item)
        if error is not None:
            raise error


def threads() -> int:
    return sum(thread.name == "background" for thread in threading.enumerate())


def test_everything_is_consumed_in_order_before_the_block_ends() -> None:
    consumed: list[int] = []
    with Background(consumed.append, 2, nothing) as aside:
        for item in range(50):
            aside.put(item)
    assert consumed == list(range(50))
    assert threads() == 0


def test_a_slow_consumer_holds_the_producer_up() -> None:
    made, used, ahead = 0, 0, []

    def consume(_: int) -> None:
        nonlocal used
        time.sleep(0.01)
        used += 1

    with Background(consume, 2, nothing) as aside:
        for item in range(12):
            aside.put(item)
            made += 1
            ahead.append(made - used)
    assert max(ahead) <= 4  # two that wait, one at work, one just done
    assert used == 12


def test_the_consumers_error_is_raised_by_the_next_put() -> None:
    consumed = []

    def consume(item: int) -> None:
        if item == 1:
            raise KeyError("disk")
        consumed.append(item)

    put: list[int] = []
    with pytest.raises(KeyError, match="disk"):
        produce(Background(consume, 1, nothing), range(100), put)
    assert consumed == [0]
    assert len(put) <= 4
    assert threads() == 0


def test_an_error_with_the_last_item_is_raised_at_the_end() -> None:
    def consume(item: int) -> None:
        time.sleep(0.05)
        raise KeyError(item)

    with pytest.raises(KeyError), Background(consume, 1, nothing) as aside:
        aside.put(0)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_what_waits_is_dropped_when_the_producer_fails(error: type[BaseException]) -> None:
    consumed = []

    def consume(item: int) -> None:
        time.sleep(0.1)
        consumed.append(item)

    with pytest.raises(error):
        produce(Background(consume, 5, nothing), range(5), [], error)
    assert len(consumed) <= 1
    assert threads() == 0


def test_a_consumer_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "PATIENCE_S", 0.2)
    stopped = threading.Event()

    def consume(_: int) -> None:
        assert stopped.wait(20)
        raise BrokenPipeError

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        produce(Background(consume, 1, stopped.set), range(2), [], KeyboardInterrupt)  # the first is at work
    assert stopped.is_set()
    assert time.monotonic() - begun < 5
    assert threads() == 0


def fails_at_once(error: BaseException) -> tuple[Background[int], threading.Event]:
    """A consumer that raises `error` for its first item, and what says that it has."""
    raised = threading.Event()

    def consume(_: int) -> None:
        raised.set()
        raise error

    return Background(consume, 2, nothing), raised


def produce_and_fail(aside: Background[int], raised: threading.Event, error: BaseException) -> None:
    with aside:
        aside.put(0)
        raised.wait(20)
        while aside._error is None:
            time.sleep(0.001)
        raise error


def test_of_two_failures_the_first_is_raised(caplog: pytest.LogCaptureFixture) -> None:
    """The disk was full before the device failed: else the user would mend the second and meet the first again."""
    disk = KeyError("disk full")
    with pytest.raises(KeyError, match="disk full") as caught:
        produce_and_fail(*fails_at_once(disk), RuntimeError("device\nlost"))
    assert caught.value is disk
    assert isinstance(caught.value.__context__, RuntimeError)
    assert caplog.messages == ["this failed as well: RuntimeError: device lost"]


def test_an_interruption_is_passed_on_whatever_has_failed(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyboardInterrupt):
        produce_and_fail(*fails_at_once(KeyError("disk full")), KeyboardInterrupt())
    assert caplog.messages == ["this failed as well: KeyError: 'disk full'"]


def test_a_failure_that_follows_from_stopping_is_not_the_one_raised(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "PATIENCE_S", 0.2)
    stopped = threading.Event()

    def consume(_: int) -> None:
        assert stopped.wait(20)
        raise BrokenPipeError

    with pytest.raises(RuntimeError, match="device lost"):
        produce(Background(consume, 1, stopped.set), range(1), [], RuntimeError("device lost"))
    assert threads() == 0

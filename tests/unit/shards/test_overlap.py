"""Threads that read ahead and write behind: bounded, in order, and an error comes out where its work would."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest

from shards.files.overlap import WriteBehind, read_ahead


def test_items_come_in_order_and_no_more_are_taken_than_may_wait() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    with read_ahead(items(), ahead=2) as given:
        for number in given:
            assert len(taken) <= number + 1 + 2 + 1, "two wait, one is in the making"
    assert taken == list(range(20))


def test_the_next_is_made_while_the_last_is_used() -> None:
    making = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        making.set()
        yield 1

    with read_ahead(items()) as given:
        assert next(given) == 0
        assert making.wait(10), "the caller has not asked for it"


def test_an_error_comes_after_what_was_read_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("line 2 is damaged")

    with read_ahead(items()) as given:
        assert next(given) == 1
        with pytest.raises(OSError, match="line 2"):
            next(given)


def test_leaving_early_ends_the_thread() -> None:
    threads = threading.active_count()
    with read_ahead(iter(range(1000))) as given:
        next(given)
    assert threading.active_count() == threads


def test_one_thing_is_written_at_a_time_while_the_next_is_made() -> None:
    release, written = threading.Event(), list[int]()

    def write(number: int) -> None:
        assert release.wait(10)
        written.append(number)

    with WriteBehind() as behind:
        behind.write(lambda: write(1))
        assert written == [], "the caller goes on"
        release.set()
        behind.write(lambda: write(2))
        assert written[0] == 1, "the first is done before the second begins"
    assert written == [1, 2], "leaving waits for the last"


def test_an_error_of_the_last_writing_is_not_lost() -> None:
    def full() -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"), WriteBehind() as behind:
        behind.write(full)
    begun: list[int] = []
    with WriteBehind() as behind:
        behind.write(full)
        with pytest.raises(OSError, match="the disk is full"):
            behind.write(lambda: begun.append(1))
    assert begun == []


def test_what_is_finished_is_written_where_the_next_fails() -> None:
    written: list[int] = []
    with contextlib.suppress(KeyError), WriteBehind() as behind:
        behind.write(lambda: written.append(1))
        raise KeyError("the next shard")
    assert written == [1]

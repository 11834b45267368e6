"""Who is called slow: what a rank did by itself, against what the others did."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import pytest

from engine.reliability.pace import Pace, slow_ranks, slowest_share

HOSTS = ["a", "a", "b", "b"]


def paces(speeds: Sequence[float], seconds: float = 10.0) -> list[Pace]:
    return [Pace(1, round(speed * seconds), seconds if speed else 0.0) for speed in speeds]


def test_the_time_counts_from_the_first_unit_to_the_end_of_the_last() -> None:
    def slowly_given() -> Iterator[int]:
        time.sleep(0.2)
        yield 1

    pace = Pace()
    with pace.timed(iter([1, 2])) as units:
        for _ in units:
            pace.count(3, 40)
        time.sleep(0.04)
    assert pace.seconds >= 0.04
    before = pace.seconds
    with pace.timed(slowly_given()) as units:
        assert list(units) == [1]
    with pace.timed(iter([])) as units:
        assert list(units) == []
    assert pace.seconds - before < 0.1, "waiting for work is no work"
    assert (pace.documents, pace.tokens) == (6, 80)


def test_a_slow_rank_is_named_with_its_host_and_both_speeds() -> None:
    told = slow_ranks(paces([100, 110, 90, 40]), HOSTS)
    assert told is not None
    assert told.startswith("slow: rank 3 on b (40 tokens a second, the others 100). ")
    assert "Remedy: " in told


def test_the_slowest_are_named_first_and_not_all_of_them() -> None:
    told = slow_ranks(paces([100.0] * 7 + [10, 30, 20, 40, 25]), [f"h{rank}" for rank in range(12)])
    assert told is not None
    assert [told.index(f"rank {rank} on h{rank} ") for rank in (7, 9, 11, 8)] == sorted(
        told.index(f"rank {rank} on h{rank} ") for rank in (7, 9, 11, 8)
    )
    assert "rank 10" not in told
    assert " and 1 more. " in told


@pytest.mark.parametrize(
    "made",
    [
        paces([100, 100, 100, 55]),
        paces([100]),
        paces([100, 0, 0, 0]),
        paces([100, 100, 100, 10], seconds=1.0),
        [],
    ],
    ids=["half the pace is kept", "one rank", "one rank took all", "too short to tell", "nobody"],
)
def test_nobody_is_called_slow(made: list[Pace]) -> None:
    assert slow_ranks(made, HOSTS) is None


def test_of_two_ranks_the_other_is_the_measure() -> None:
    told = slow_ranks(paces([100, 45]), HOSTS)
    assert told is not None
    assert "rank 1 on a (45 tokens a second, the others 100)" in told


def test_the_slowest_share_leaves_out_who_had_nothing_to_do() -> None:
    assert slowest_share(paces([100, 100, 25, 0])) == pytest.approx(0.25)
    assert slowest_share(paces([100, 0])) is None


def test_what_is_shown_and_what_is_told_measure_alike() -> None:
    """Symptom: of two ranks one was told to be slow while its share was shown as 0.62, as it counted among the rest."""
    assert slowest_share(paces([100, 45])) == pytest.approx(0.45)

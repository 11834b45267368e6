"""The coordinator's contracts, each on both transports, between real processes.

Starting a world costs seconds, so one world goes through many contracts: the functions named `..._on_every_rank` run
on the ranks and assert there; the tests only start them. Contracts that leave the ranks apart each get a coordinator
of their own inside that world.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Callable

import pytest

from engine.coordination import star
from engine.coordination.coordinator import Coordinator, LocalTransport, MpiTransport, PeerError, StoreTransport
from engine.errors import ArtifactError, CoordinationError
from tests.distributed.processes import free_port, report, run_ranks

HERE = "tests.distributed.test_coordinator"
HOST = socket.gethostname()
PATIENCE = 120.0  # of ranks that wait for each other, on a machine that may be busy


# --- on the ranks ----------------------------------------------------------------------------------------------------


def connect(timeout_seconds: float = PATIENCE) -> Coordinator:
    if "OMPI_COMM_WORLD_SIZE" in os.environ:
        return Coordinator(MpiTransport(), timeout_seconds)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return Coordinator(StoreTransport(rank, world_size, address, port, timeout_seconds), timeout_seconds)


def another(first: Coordinator, timeout_seconds: float = PATIENCE) -> Coordinator:
    """Return a second coordinator between the same ranks, to be spoilt."""
    if first.kind == "mpi":
        return Coordinator(MpiTransport(), timeout_seconds)
    hosted = StoreTransport(0, first.world_size, "127.0.0.1") if first.rank == 0 else None
    port = first.broadcast("port", hosted.port if hosted else None)
    return Coordinator(hosted or StoreTransport(first.rank, first.world_size, "127.0.0.1", port), timeout_seconds)


def caught(action: Callable[[], object]) -> BaseException:
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("no rank may get through this")


def says(error: object, text: str) -> bool:
    return text.lower() in str(error).lower()  # a sentence may get a capital letter


def contracts_on_every_rank() -> None:
    first = connect()
    for contract in (
        check_values,
        check_large_messages,
        check_refused_objects,
        check_agreement,
        check_failure_before_an_inner_point,
        check_nested_agreements,
        check_root_fails_twice_before_others_look,
        check_only_rank_zero,
        check_hand_out,
        check_hand_out_with_a_slow_rank,
        check_hand_out_after_a_failure,
        check_hand_out_of_differing_lists,
        check_failure_outside_an_agreement,
        check_slow_rank,
        check_nothing_is_left_over,
        check_differing_names,
        check_missing_rank,
        check_late_root,
    ):
        contract(first)
        first.barrier(f"after {contract.__name__}")  # whatever it went through, the ranks are together again
    first.close()
    assert "closed" in str(caught(lambda: first.barrier("after the end")))
    print("all contracts hold")


def check_values(c: Coordinator) -> None:
    assert c.hosts == [HOST] * c.world_size
    assert c.is_first_of_host == (c.rank == 0)
    assert c.gather("ranks", c.rank) == list(range(c.world_size))
    assert (
        c.gather("json", {"t": (1, 2.5), "none": None, 3: "ü\n"})
        == [{"t": [1, 2.5], "none": None, "3": "ü\n"}] * c.world_size
    )
    assert c.broadcast("who", f"from {c.rank}") == "from 0"
    assert c.barrier("plain") is None
    with c.agreement("quiet"):
        pass


def check_large_messages(c: Coordinator) -> None:
    text = "x" * (9 * 2**20 if c.rank == 1 else 10)  # above what one value of the store can hold
    assert [len(part) for part in c.gather("large", text)] == [10, 9 * 2**20, 10][: c.world_size]


def check_refused_objects(c: Coordinator) -> None:
    error = caught(lambda: c.gather("odd", {1, 2} if c.rank == 1 else [1, 2]))
    assert says(error, "gather 'odd'")
    assert says(error, "set is not JSON serializable")
    assert isinstance(error, PeerError) == (c.rank != 1)
    limit, star.MAX_EXCHANGE_BYTES = star.MAX_EXCHANGE_BYTES, 500
    error = caught(lambda: c.gather("sum", "y" * 400))
    assert says(error, f"carries {402 * c.world_size} bytes")
    star.MAX_EXCHANGE_BYTES = limit


def check_agreement(c: Coordinator) -> None:
    def work() -> None:
        with c.agreement("write@3"):
            if c.rank == 1:
                raise ArtifactError("part 5 is short")

    error = caught(work)
    if c.rank == 1:
        assert type(error) is ArtifactError
    else:
        assert type(error) is PeerError
        assert says(error, f"Rank 1 (host {HOST}) failed at agreement 'write@3': Part 5 is short")


def check_failure_before_an_inner_point(c: Coordinator) -> None:
    """A rank fails inside the body while the others already wait at a barrier inside it."""
    last = c.world_size - 1

    def work() -> None:
        with c.agreement("outer"):
            if c.rank == last:
                raise ValueError("before the barrier")
            c.barrier("inner")

    error = caught(work)
    if c.rank == last:
        assert str(error) == "before the barrier"
    else:
        assert says(error, f"Rank {last} (host {HOST}) failed at agreement 'outer': ValueError: before the barrier")
        assert says(error, "barrier 'inner'")


def check_nested_agreements(c: Coordinator) -> None:
    def work() -> None:
        with c.agreement("outer"), c.agreement("inner"):
            if c.rank == 0:
                raise ValueError("deep")

    error = caught(work)
    assert says(error, "deep" if c.rank == 0 else "agreement 'inner': ValueError: deep")

    def translate() -> None:
        with c.agreement("outer"):
            try:
                work()
            except Exception as reason:
                raise ArtifactError("translated") from reason

    assert says(caught(translate), "translated")  # what everybody knows is not announced a second time


def check_root_fails_twice_before_others_look(c: Coordinator) -> None:
    """Symptom: rank 0 had sent two verdicts, the slow rank read both at once and lost the second."""

    def work() -> None:
        with c.agreement("quick"):
            if c.rank == 0:
                raise ValueError("at once")
            time.sleep(0.2)

    for _ in range(2):
        assert says(caught(work), "at once")


def check_only_rank_zero(c: Coordinator) -> None:
    calls: list[int] = []
    assert c.only_rank_zero("count", lambda: calls.append(1) or ("a", 1)) == ["a", 1]
    assert len(calls) == (c.rank == 0)

    def fail() -> None:
        raise ArtifactError("disk full")

    error = caught(lambda: c.only_rank_zero("publish", fail))
    assert type(error) is (PeerError if c.rank else ArtifactError)
    assert says(error, "isk full")


def check_hand_out(c: Coordinator) -> None:
    units = [7, 3, 5, 11, 2, 13]
    for again in range(2):
        with c.agreement(f"work {again}"):
            mine = list(c.hand_out("work", units))
        everybody = c.gather("done", mine)
        assert sorted(unit for done in everybody for unit in done) == sorted(units)
    assert list(c.hand_out("nothing", [])) == []


def check_hand_out_with_a_slow_rank(c: Coordinator) -> None:
    with c.agreement("uneven work"):
        mine = []
        for unit in c.hand_out("uneven work", list(range(12))):
            mine.append(unit)
            time.sleep(1.0 if c.rank == 1 else 0.01)
    counts = [len(done) for done in c.gather("done", mine)]
    assert sum(counts) == 12
    assert counts[1] <= 2  # an equal share would be 4 or more


def check_hand_out_after_a_failure(c: Coordinator) -> None:
    def work() -> None:
        with c.agreement("encode@3"):
            for _ in c.hand_out("encode@3", list(range(10_000))):
                if c.rank == 1:
                    raise ArtifactError("shard 5 is short")
                time.sleep(0.02)

    start = time.monotonic()
    error = caught(work)
    assert says(error, "shard 5 is short")
    assert isinstance(error, PeerError) == (c.rank != 1)
    assert time.monotonic() - start < 60  # the others stop with their unit; all of them would take minutes


def check_hand_out_of_differing_lists(c: Coordinator) -> None:
    assert says(caught(lambda: list(c.hand_out("odd", [c.rank]))), "different lists of units")


def check_failure_outside_an_agreement(c: Coordinator) -> None:
    if c.rank == 1:
        (failure,) = c.report_failure(ArtifactError("lost the file"))
        assert (failure.rank, failure.host) == (1, HOST)
        assert says(failure.message, "lost the file")
    else:
        error = caught(lambda: c.barrier("far away"))
        assert isinstance(error, PeerError)
        assert says(error, f"Rank 1 (host {HOST}) failed")
        assert says(error, "Lost the file")


def check_slow_rank(c: Coordinator) -> None:
    if c.rank == c.world_size - 1:
        time.sleep(0.3)
    used = time.process_time()
    c.barrier("slow", timeout_seconds=PATIENCE)
    assert time.process_time() - used < 0.15, "waiting must not burn a core"


def check_nothing_is_left_over(c: Coordinator) -> None:
    """The store must not grow with the number of exchanges."""
    if not isinstance(c._transport, StoreTransport):
        return
    before = c.broadcast("keys", c._transport._store.num_keys())
    for number in range(20):
        c.gather(f"again {number}", "z" * 5 * 2**20 if number == 0 else None)
    after = c.broadcast("keys", c._transport._store.num_keys())
    assert after <= before + c.world_size  # the others may be at the next exchange already


def check_differing_names(first: Coordinator) -> None:
    c = another(first)
    error = caught(lambda: c.barrier("one") if c.rank == 0 else c.gather("two", 1))
    assert isinstance(error, CoordinationError)
    assert says(error, f"rank 0 (host {HOST}) at barrier 'one'")
    assert re.search(r"rank [12] \(host .*\) at gather 'two'", str(error))  # whichever came first
    assert "do not meet" in str(caught(lambda: c.barrier("three"))), "ranks that are apart must not go on"
    first.barrier("before closing")
    c.close()


def check_missing_rank(first: Coordinator) -> None:
    """The last rank comes after the others' timeout: they name it, and it is told at once when it comes."""
    c, last = another(first), first.world_size - 1
    if c.rank == last:
        time.sleep(2.0)
    error = caught(lambda: c.barrier("index@3 trained", timeout_seconds=PATIENCE if c.rank == last else 0.8))
    assert says(error, f"Barrier 'index@3 trained' waited 0.8 s and rank {last} (host {HOST}) did not come")
    assert "rank 0" not in str(error)
    assert isinstance(error, PeerError) == (c.rank != 0)
    first.barrier("before closing")
    c.close()


def check_late_root(first: Coordinator) -> None:
    """Rank 0 comes after the others' timeout: they name it, and it learns that they have given up."""
    c = another(first)
    grace, star.GRACE_SECONDS = star.GRACE_SECONDS, 0.5  # rank 0 offers its verdict for so long
    if c.rank == 0:
        time.sleep(2.0)
    error = caught(lambda: c.barrier("shards written", timeout_seconds=PATIENCE if c.rank == 0 else 0.3))
    if c.rank == 0:
        assert says(error, f"rank 1 (host {HOST}) gave up after 0.3 s")
    else:
        assert says(error, f"rank {c.rank} (host {HOST}) waited 0.3 s and rank 0 (host {HOST}) did not come")
    star.GRACE_SECONDS = grace
    first.barrier("before closing")
    c.close()


def root_leaves_at_once_on_every_rank() -> None:
    """Rank 0 dies right after an exchange, while rank 1 is slow to read the answer; then rank 1 is alone."""
    c = connect()
    if c.rank == 1:
        send = c._transport._send  # type: ignore[attr-defined]

        def send_and_stall(receiver: int, message: bytes) -> None:
            send(receiver, message)
            time.sleep(0.7)

        c._transport._send = send_and_stall  # type: ignore[attr-defined]
    print(json.dumps(c.gather("last", c.rank)), flush=True)
    if c.rank == 0:
        os._exit(9)
    print(caught(lambda: c.barrier("after a death", timeout_seconds=300.0)))


def rank_one_dies_on_every_rank() -> None:
    c = connect()
    if c.rank == 1:
        os._exit(9)
    try:
        c.barrier("after a death", timeout_seconds=2.0 if c.kind == "store" else 300.0)
    except CoordinationError as error:
        print(error)


# --- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("launcher", "world_size"), [("store", 2), ("store", 3), ("mpirun", 3)])
def test_contracts(launcher: str, world_size: int) -> None:
    results = run_ranks(f"{HERE}:contracts_on_every_rank", world_size, launcher, timeout=2 * PATIENCE)
    outcome = [(result.returncode, result.stdout) for result in results]
    assert outcome == [(0, "all contracts hold\n")] * world_size, report(results)


def test_root_that_leaves_takes_no_answer_with_it() -> None:
    """Symptom: the run was over, and rank 1 ended with "connection reset" in its last barrier."""
    results = run_ranks(f"{HERE}:root_leaves_at_once_on_every_rank", 2, "store", timeout=PATIENCE)
    assert results[0].returncode == 9
    answer, loss = results[1].stdout.splitlines()
    assert answer == "[0, 1]"
    assert says(
        loss, f"rank 1 (host {HOST}) has lost its store connection to rank 0 (host {HOST})"
    )  # long before its timeout


def test_dead_rank_is_named() -> None:
    results = run_ranks(f"{HERE}:rank_one_dies_on_every_rank", 3, "store", timeout=PATIENCE)
    for rank in (0, 2):
        assert says(results[rank].stdout, f"barrier 'after a death' waited 2 s and rank 1 (host {HOST}) did not come")
    assert results[1].returncode == 9


def test_dead_rank_ends_an_mpi_world() -> None:
    results = run_ranks(f"{HERE}:rank_one_dies_on_every_rank", 2, "mpirun", timeout=PATIENCE)
    assert results[0].returncode == 9


def test_unreachable_store_is_an_error_with_its_address() -> None:
    with pytest.raises(CoordinationError, match=r"ank 1 .* cannot reach the store of rank 0 at 127\.0\.0\.1:"):
        StoreTransport(1, 2, "127.0.0.1", free_port(), timeout_seconds=0.2)


class OfTwoHosts(LocalTransport):
    """What rank 0 of two hosts hears: of the greeting their names, else its own words twice."""

    def __init__(self) -> None:
        super().__init__()
        self.world_size = 2

    def exchange(self, name: str, payload: bytes, timeout_seconds: float, *, failed: bool = False) -> list[bytes]:
        return [b'"node-1"', b'"node-2"'] if name.startswith("greeting") else [payload, payload]


@pytest.mark.parametrize(("given", "used"), [(None, "node-1"), ("10.0.0.1", "10.0.0.1")])
def test_units_are_dealt_at_the_address_of_rank_zero(
    given: str | None, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Symptom guarded against: host names lead to a network on which the hosts do not reach each other."""
    opened: list[tuple[object, ...]] = []

    class Counter:
        port = 5

        def __init__(self, *place: object) -> None:
            opened.append(place)

        def next(self, name: str) -> int:
            return 9

    monkeypatch.setattr("engine.coordination.coordinator.SharedCounter", Counter)
    c = Coordinator(OfTwoHosts(), 1.0, given)
    assert list(c.hand_out("work", [1, 2])) == []
    assert opened == [(0, 2, used, 0, 1.0)]


def test_world_of_one() -> None:
    c = Coordinator(LocalTransport())
    assert (c.kind, c.rank, c.world_size, c.hosts) == ("local", 0, 1, [HOST])
    c.barrier("alone")
    assert c.gather("alone", (1, 2)) == [[1, 2]]
    assert c.broadcast("alone", {"a": 1}) == {"a": 1}
    assert c.only_rank_zero("alone", lambda: 7) == 7
    with pytest.raises(ValueError, match="mine"), c.agreement("alone"):
        raise ValueError("mine")
    with pytest.raises(CoordinationError, match="not JSON"):
        c.gather("alone", object())
    c.barrier("still alive")
    c.close()

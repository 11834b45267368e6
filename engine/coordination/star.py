"""How ranks exchange bytes: one protocol between a root and its followers, whatever carries the messages.

A transport knows one primitive, `exchange`: every rank gives bytes under a name, every rank gets everybody's bytes.
`engine.coordination.coordinator` builds barriers, gathers and agreements on it. MPI and torch's store both carry this
protocol, so that what holds on one holds on the other:

* Followers (ranks 1, 2, ...) send a frame to the root (rank 0) and poll for its answer. The root collects, decides,
  and answers each follower with either everybody's payloads or a verdict that says why there is no result.
* Every exchange has a number, counted by each rank. A frame of an earlier exchange is recognised by it and dropped,
  so a rank that comes late meets the verdict of the exchange that it missed, never the contents of another one.
* The root decides as early as it can: at the first failed rank and at the first differing name, without waiting for
  the ranks that are still on their way.
* A follower whose patience ends says so to the root and waits a short grace for the answer. A root that is waiting
  itself then tells everybody which ranks are missing; a root that comes later tells everybody who has given up. Only
  where no answer comes does the follower report the root itself as missing.
* The root leaves an exchange when its answers have been taken (or the grace is over), so that it can exit at any time
  between two exchanges and take the store that it hosts with it, and so that no large message is left to a process
  that no longer makes progress on it.
* After an exchange that ended without all ranks (one missing, names that differ, a lost connection) the ranks no
  longer stand at the same place: every further exchange is refused at once.

Waiting is polling with short sleeps: it leaves the cores to the work, and it ends at its deadline whatever the other
side does. Nothing is pickled; a frame is a line of JSON and the payload.
"""

from __future__ import annotations

import contextlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, Protocol

from engine.errors import CoordinationError
from shards.errors import listed
from shards.files import parse_record

Kind = Literal["mpi", "store", "local"]

MAX_EXCHANGE_BYTES = 64 * 2**20
"""The most that the payloads of one exchange may hold together: it carries control messages, not data."""

GRACE_SECONDS = 5.0
"""How long a rank waits for the other side to take or to answer its last word."""

_LONGEST_PAUSE_SECONDS = 0.05


class PeerError(CoordinationError):
    """An exchange ended early and another rank reports why: this rank did nothing wrong and need not report it."""

    crashed = False
    """Whether what stopped the other rank is an error of the program, not one that its user can mend."""
    lost = False
    """Whether what stopped it is a rank that did not come."""


class Transport(Protocol):
    """What a coordinator needs of the ranks' connection."""

    kind: Kind
    rank: int
    world_size: int
    hosts: list[str]
    """Host name of each rank, filled in by the coordinator's greeting; empty before it."""

    def exchange(self, name: str, payload: bytes, timeout_seconds: float, *, failed: bool = False) -> list[bytes]:
        """Give `payload` to every rank and get every rank's, in rank order; see `StarTransport.exchange`."""
        ...

    def close(self) -> None:
        """Give up the connection, after the other ranks have taken what was sent to them."""
        ...


@dataclass(frozen=True, slots=True)
class Frame:
    """One message between the root and a follower.

    `kind` is "present", "failed" or "gave_up" from a follower, "result" or "verdict" from the root.
    """

    sender: int
    kind: str
    number: int
    name: str
    payload: bytes

    def encode(self) -> bytes:
        """Return the frame as bytes."""
        head = json.dumps([self.sender, self.kind, self.number, self.name])
        return head.encode() + b"\n" + self.payload

    @staticmethod
    def decode(message: bytes) -> Frame:
        """Return the frame that `encode` made these bytes of."""
        head, _, payload = message.partition(b"\n")
        sender, kind, number, name = json.loads(head)
        return Frame(sender, kind, number, name, payload)


@dataclass(frozen=True, slots=True)
class RankFailure:
    """What a rank that cannot go on says to all: at which point, on which host, and why.

    `crashed` tells an error of the program from one that its user can mend.
    """

    rank: int
    name: str
    message: str
    host: str = ""
    crashed: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why an exchange has no result."""

    reason: Literal["failed", "names", "missing", "size"]
    failures: list[RankFailure] = field(default_factory=list)
    names: list[tuple[str, list[int]]] = field(default_factory=list)
    """What the ranks came for, where that differs, and which of them for each."""
    missing: list[int] = field(default_factory=list)
    rank: int = 0
    """Who gave up first, and after how many seconds."""
    seconds: float = 0.0
    size: int = 0
    """Bytes of all payloads, where that is too much."""


def _pack(payloads: Sequence[bytes]) -> bytes:
    return json.dumps([len(payload) for payload in payloads]).encode() + b"\n" + b"".join(payloads)


def _unpack(packed: bytes) -> list[bytes]:
    head, _, body = packed.partition(b"\n")
    payloads, start = [], 0
    for size in json.loads(head):
        payloads.append(body[start : start + size])
        start += size
    return payloads


class Patience:
    """A deadline, and pauses that grow from a fraction of a millisecond while nothing happens."""

    def __init__(self, seconds: float) -> None:
        self._start, self._seconds, self._pause = time.monotonic(), seconds, 0.0002

    @property
    def over(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() - self._start >= self._seconds

    def pause(self) -> None:
        """Sleep, longer from call to call."""
        time.sleep(self._pause)
        self._pause = min(self._pause * 1.5, _LONGEST_PAUSE_SECONDS)


class StarTransport(ABC):
    """The protocol between a root and its followers, on top of messages that a subclass moves.

    Args:
        rank: This process, 0 to world_size - 1.
        world_size: Number of ranks.
    """

    kind: Kind

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size, self.hosts = rank, world_size, list[str]()
        self._number = 0
        self._broken = ""
        self._inbox: list[Frame] = []
        self._connection_errors: tuple[type[Exception], ...] = ()

    def exchange(self, name: str, payload: bytes, timeout_seconds: float, *, failed: bool = False) -> list[bytes]:
        """Give `payload` to every rank and get every rank's; all ranks must call it, in the same order.

        Args:
            name: What the ranks meet for; must be the same on all of them.
            payload: This rank's contribution; with `failed`, a JSON object with the key "message".
            timeout_seconds: How long to wait for the others, above 0.
            failed: This rank cannot go on, and the payload says why.

        Returns:
            Every rank's payload in rank order; for a rank that called it with `failed`, the payloads of the failed
            ranks that the root knew of when it decided.

        Raises:
            PeerError: Another rank failed, or the root has found that the ranks do not meet and reports it itself.
            CoordinationError: On the root, or where the root cannot be reached: a rank is missing at the deadline,
                names differ, payloads are too large together, or a connection is lost.
        """
        if self._broken:
            fact = f"{name} cannot start, for the ranks have lost each other before: {self._broken}"
            raise PeerError(fact, remedy="stop this process and start the run again")
        self._number += 1
        act = self._lead if self.rank == 0 else self._follow
        try:
            answer = act(
                Frame(self.rank, "failed" if failed else "present", self._number, name, payload), timeout_seconds
            )
        except self._connection_errors as error:
            other = "the other ranks" if self.rank == 0 else self._who(0)
            raise self._break(
                f"{name}: {self._who(self.rank)} has lost its {self.kind} connection to {other}: "
                f"{str(error).splitlines()[0]}",
                remedy="look in the other side's log for why it stopped, or check the network between the hosts",
            ) from error
        if answer.kind == "result":
            return _unpack(answer.payload)
        verdict = parse_record(json.loads(answer.payload), Verdict, f"rank 0's verdict on {name}")
        return self._obey(verdict, name, failed)

    def close(self) -> None:
        """Give up the connection, after the other ranks have taken what was sent to them."""
        if self._broken:
            return  # whoever could still take its answer has had the time for it
        self._broken = "the connection was closed"
        with contextlib.suppress(*self._connection_errors):  # the other side has gone: nothing is left to wait for
            self._flush(range(self.world_size), GRACE_SECONDS)

    def _take(self, number: int) -> list[Frame]:
        """Return what has arrived for an exchange.

        Frames of earlier ones are dropped: last words of ranks whose exchange was decided without them. Frames of
        later ones are kept: a root that fails decides at once, and may do so again before a slow follower has looked.
        """
        waiting = [frame for frame in [*self._inbox, *self._receive()] if frame.number >= number]
        self._inbox = [frame for frame in waiting if frame.number > number]
        return [frame for frame in waiting if frame.number == number]

    # The root's side

    def _lead(self, own: Frame, timeout_seconds: float) -> Frame:
        arrived: dict[int, Frame] = {0: own}
        gave_up: dict[int, float] = {}
        patience = Patience(timeout_seconds)
        while (answer := self._decide(arrived, gave_up)) is None:
            if patience.over:
                gave_up[0] = timeout_seconds
            else:
                patience.pause()
            for frame in self._take(own.number):
                if frame.kind == "gave_up":
                    gave_up[frame.sender] = float(frame.payload)
                else:
                    arrived[frame.sender] = frame
        kind, payload = answer
        reply = Frame(0, kind, own.number, own.name, payload)
        for follower in range(1, self.world_size):  # also to those on their way: they meet the verdict on arrival
            self._send(follower, reply.encode())
        self._flush([rank for rank in arrived if rank], GRACE_SECONDS)
        return reply

    def _decide(self, arrived: dict[int, Frame], gave_up: dict[int, float]) -> tuple[str, bytes] | None:
        frames = [arrived[rank] for rank in sorted(arrived)]
        missing = [rank for rank in range(self.world_size) if rank not in arrived]
        names: dict[str, list[int]] = {}
        for frame in frames:
            names.setdefault(frame.name, []).append(frame.sender)
        if failures := [frame for frame in frames if frame.kind == "failed"]:
            told = [{"rank": f.sender, "name": f.name, **json.loads(f.payload)} for f in failures]
            verdict = Verdict("failed", [parse_record(one, RankFailure, "the report of a failure") for one in told])
        elif len(names) > 1:
            verdict = Verdict("names", names=list(names.items()))
        elif gave_up:
            rank = min(gave_up)
            verdict = Verdict("missing", missing=missing, rank=rank, seconds=gave_up[rank])
        elif missing:
            return None
        elif (size := sum(len(frame.payload) for frame in frames)) > MAX_EXCHANGE_BYTES:
            verdict = Verdict("size", size=size)
        else:
            return "result", _pack([frame.payload for frame in frames])
        return "verdict", json.dumps(asdict(verdict)).encode()

    # The followers' side

    def _follow(self, own: Frame, timeout_seconds: float) -> Frame:
        self._send(0, own.encode())
        patience, asked = Patience(timeout_seconds), False
        while True:
            if frames := self._take(own.number):
                return frames[0]
            if not patience.over:
                patience.pause()
            elif not asked:
                word = Frame(self.rank, "gave_up", own.number, own.name, b"%g" % timeout_seconds)
                self._send(0, word.encode())
                patience, asked = Patience(min(GRACE_SECONDS, timeout_seconds)), True
            else:
                raise self._break(
                    f"{own.name}: {self._who(self.rank)} waited {timeout_seconds:g} s and {self._who(0)} did not come",
                    expected=f"all {self.world_size} ranks at this point",
                    remedy="look in the log of rank 0 for why it stopped; where it is only slow, raise the timeout",
                )

    # What a verdict means

    def _obey(self, verdict: Verdict, name: str, failed: bool) -> list[bytes]:
        if verdict.reason == "failed":
            if failed:
                return [json.dumps(asdict(failure)).encode() for failure in verdict.failures]
            first = verdict.failures[0]
            where = f"rank {first.rank} (host {first.host or 'unknown'})"
            error = PeerError(
                f"{where} failed at {first.name}: {first.message}",
                expected=f"every rank to get through it; {self._who(self.rank)} was at {name}",
                remedy="mend what that rank reports and start again",
            )
            error.crashed = any(failure.crashed for failure in verdict.failures)
            raise error
        error_class = CoordinationError if self.rank == 0 else PeerError
        if verdict.reason == "size":
            raise error_class(
                f"{name} carries {verdict.size} bytes",
                expected=f"at most {MAX_EXCHANGE_BYTES} bytes from all ranks together",
                remedy="write what is large to a file and exchange its name",
            )
        if verdict.reason == "names":
            stands = [f"{self._who(*ranks)} at {there}" for there, ranks in verdict.names]
            raise self._break(
                f"the ranks do not meet: {', '.join(stands)}",
                expected="every rank to come to the same points in the same order",
                remedy="look for a condition in front of one of these that differs between ranks",
                error_class=error_class,
            )
        if verdict.missing:
            fact = f"{name} waited {verdict.seconds:g} s and {self._who(*verdict.missing)} did not come"
        else:
            fact = f"{name}: {self._who(verdict.rank)} gave up after {verdict.seconds:g} s, before the last rank came"
        raise self._break(
            fact,
            expected=f"all {self.world_size} ranks at this point",
            remedy="look in the missing ranks' log for why they stopped; where they are only slow, raise the timeout",
            error_class=error_class,
        )

    def _break(
        self,
        fact: str,
        *,
        expected: str = "",
        remedy: str = "",
        error_class: type[CoordinationError] = CoordinationError,
    ) -> CoordinationError:
        self._broken = fact
        return error_class(fact, expected=expected, remedy=remedy)

    def _who(self, *ranks: int) -> str:
        def host(rank: int) -> str:
            return self.hosts[rank] if self.hosts else "not known yet"

        return listed((f"rank {rank} (host {host(rank)})" for rank in ranks), 8)

    # What a subclass does

    @abstractmethod
    def _send(self, receiver: int, message: bytes) -> None:
        """Hand over a message without waiting for the receiver."""

    @abstractmethod
    def _receive(self) -> list[Frame]:
        """Return the messages that have arrived, without waiting."""

    @abstractmethod
    def _flush(self, receivers: Sequence[int], seconds: float) -> None:
        """Wait until these ranks have taken all that was sent to them, at most for `seconds`."""

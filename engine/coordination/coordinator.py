"""How ranks agree: named barriers with timeouts, and one rank's error stops all of them with that rank's message.

A run is many processes that do the same things in the same order. They meet at named points, given here. The rules:

* Every rank calls the same methods with the same names in the same order. Where they do not, every rank gets an error
  that says who stands where.
* Waiting ends. After the timeout an error names the ranks that did not come, and their hosts.
* Work that can fail on one rank alone (reading a file, writing a part) stands inside `agreement`: where one rank fails,
  all fail there, that rank with its own exception and the others with one that quotes it. So no rank walks on into a
  collective operation that the failed one will never enter. An error that escapes outside is spread by
  `report_failure`, which stops whoever waits at any later point.
* Work that is cut into units is dealt by `hand_out`: a unit goes to whoever is free next, so a slow rank holds nobody
  up. Units whose files lie on one host's own disk go to the ranks of that host.
* What is exchanged is small and is JSON: tuples come back as lists, keys of objects as strings, on the giving rank
  too. What is large goes through files or through `torch.distributed`.

How bytes travel (MPI, a store of torch, or not at all in a world of one) is the business of `engine.coordination`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from engine.coordination.counter import SharedCounter
from engine.coordination.local import LocalTransport
from engine.coordination.mpi import MpiTransport
from engine.coordination.star import MAX_EXCHANGE_BYTES, Kind, PeerError, RankFailure, Transport
from engine.coordination.store import StoreTransport
from engine.errors import CoordinationError, SparringError
from engine.log import get_logger
from engine.reliability.preemption import PREEMPTION
from shards.errors import listed
from shards.files import parse_record
from shards.files.unusable import as_told

__all__ = ["Coordinator", "LocalTransport", "MpiTransport", "PeerError", "StoreTransport", "Transport"]

_log = get_logger(__name__)
_PROTOCOL = 1
_MAX_MESSAGE_CHARACTERS = 4000
_LAST_WORD_SECONDS = 3.0
_SHARED = "_sparring_shared"


def _mark_shared(error: BaseException, failures: list[RankFailure]) -> None:
    error.__dict__[_SHARED] = failures


def _shared_failures(error: BaseException | None) -> list[RankFailure] | None:
    """Return what all ranks know of this error, or of one it was raised from or while handling; None for nothing."""
    while error is not None:
        if (failures := error.__dict__.get(_SHARED)) is not None:
            return list(failures)
        error = error.__cause__ or error.__context__
    return None


class Coordinator:
    """Points where all ranks meet.

    Constructing one is the first of them: the ranks greet each other and learn their host names.

    Args:
        transport: The connection between the ranks.
        timeout_seconds: How long a rank waits for the others where a call does not say otherwise, above 0. It must
            exceed the difference between the fastest and the slowest rank's work, not the work itself.
        address: Rank 0's, as the ranks of other hosts reach it; its host name by default.

    Raises:
        CoordinationError: A rank did not come to the greeting.
    """

    def __init__(self, transport: Transport, timeout_seconds: float = 600.0, address: str | None = None) -> None:
        self._transport = transport
        self.timeout_seconds = timeout_seconds
        self.rank: int = transport.rank
        self.world_size: int = transport.world_size
        self.kind: Kind = transport.kind
        self._host = socket.gethostname()
        # The version is in the name, so that ranks of different releases get the error about differing names.
        label = f"greeting of the coordinator (protocol {_PROTOCOL})"
        self.hosts: list[str] = self._exchange(label, self._host, None)
        transport.hosts = self.hosts
        self.address: str = address or self.hosts[0]
        self._counter: SharedCounter | None = None
        self._num_hand_outs = 0
        self._handing_out: list[str] = []

    @property
    def host(self) -> str:
        """This rank's host, as all ranks call it."""
        return self.hosts[self.rank]

    @property
    def ranks_of_host(self) -> list[int]:
        """The ranks on this rank's host, this one too, in order."""
        return [rank for rank, host in enumerate(self.hosts) if host == self.host]

    @property
    def is_first_of_host(self) -> bool:
        """Whether this rank does what one rank of each host is to do."""
        return self.ranks_of_host[0] == self.rank

    def barrier(self, name: str, timeout_seconds: float | None = None) -> None:
        """Wait until every rank is here.

        Args:
            name: What is waited for, such as `index@3 trained`; the same on all ranks.
            timeout_seconds: How long to wait; the coordinator's own timeout by default.

        Raises:
            CoordinationError: A rank is missing at the deadline, stands elsewhere, or has failed.
        """
        self._exchange(f"barrier '{name}'", None, timeout_seconds)

    def gather(self, name: str, obj: Any, timeout_seconds: float | None = None) -> list[Any]:
        """Give an object to all ranks and get everybody's.

        Args:
            name: What is gathered; the same on all ranks.
            obj: Anything that JSON can hold; 64 MiB from all ranks together at most.
            timeout_seconds: How long to wait; the coordinator's own timeout by default.

        Returns:
            Every rank's object, in rank order, as JSON gives it back.

        Raises:
            CoordinationError: As `barrier`; also, on every rank, where one rank's object is too large or not JSON.
        """
        return self._exchange(f"gather '{name}'", obj, timeout_seconds)

    def broadcast(self, name: str, obj: Any, timeout_seconds: float | None = None) -> Any:
        """Return rank 0's object on all ranks; what the other ranks give is ignored. Otherwise as `gather`."""
        given = obj if self.rank == 0 else None
        return self._exchange(f"broadcast '{name}'", given, timeout_seconds)[0]

    @contextmanager
    def agreement(self, name: str, timeout_seconds: float | None = None) -> Iterator[None]:
        """Run the body on every rank; leave together, or fail together.

        Other points may lie inside the body, agreements too: a rank that fails before such a point releases the
        ranks that wait there.

        Args:
            name: What the ranks do, such as `encode@3`; the same on all ranks.
            timeout_seconds: How long the first rank to finish waits for the last; the coordinator's own by default.

        Raises:
            Exception: On a rank whose body raised, what it raised.
            PeerError: On the others; it names that rank, its host, and quotes its message.
            CoordinationError: As `barrier`.
        """
        label = f"agreement '{name}'"
        try:
            yield
        except BaseException as error:
            self._announce(label, error, timeout_seconds)
            raise
        self._exchange(label, None, timeout_seconds)

    def only_rank_zero(self, name: str, function: Callable[[], Any], timeout_seconds: float | None = None) -> Any:
        """Run a function on rank 0 and return its result on all ranks.

        Args:
            name: What rank 0 does; the same on all ranks.
            function: Runs on rank 0 alone, so it must hold no point where ranks meet; its result must be JSON.
            timeout_seconds: How long the others wait for it; the coordinator's own timeout by default.

        Returns:
            The function's result, as JSON gives it back, on rank 0 too.

        Raises:
            Exception: On rank 0, what the function raised.
            PeerError: On the others, quoting it.
            CoordinationError: As `gather`.
        """
        label = f"work of rank 0 '{name}'"
        result = None
        if self.rank == 0:
            try:
                result = function()
            except BaseException as error:
                self._announce(label, error, timeout_seconds)
                raise
        return self._exchange(label, result, timeout_seconds)[0]

    def hand_out(
        self,
        name: str,
        units: Sequence[int],
        timeout_seconds: float | None = None,
        *,
        homes: Sequence[str] | None = None,
    ) -> Iterator[int]:
        """Deal units of work to whoever is free next, in the order of the list, each to one rank.

        To be iterated by every rank inside an `agreement`, which is where the ranks learn that all came to the end:
        where one fails, the others get no further unit. The loop's body must hold no point where ranks meet. Put long
        units first, so that nobody is left with one at the end.

        Args:
            name: What the units are, such as `encode@3`; the same on all ranks.
            units: Their numbers; the same list on all ranks, of any length.
            timeout_seconds: How long to wait for the others to begin and for rank 0's answers; the coordinator's own
                timeout by default.
            homes: Of each unit, the host whose ranks alone may take it, as its files lie there; the same on all ranks.
                Any rank may take any unit where it is left out.

        Yields:
            This rank's next unit.

        Raises:
            CoordinationError: As `barrier`; or the lists differ, a home is no host of a rank, or rank 0 is gone.
            Preempted: This rank was asked to stop; what is finished stays, and the unit that was due is not begun.
        """
        if homes is not None and (strange := sorted(set(homes) - set(self.hosts))):
            raise CoordinationError(
                f"hand-out '{name}' has units for {listed(strange, 8)}, where no rank is",
                expected=f"hosts of the ranks: {listed(dict.fromkeys(self.hosts), 8)}",
            )
        own = [unit for place, unit in enumerate(units) if homes is None or homes[place] == self.host]
        if self.world_size == 1:
            for unit in own:
                PREEMPTION.require_none(f"hand-out '{name}'")
                yield unit
            return
        counter = self._open_counter(timeout_seconds)
        told = list(units) if homes is None else [list(units), list(homes)]
        digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        if len(set(self._exchange(f"hand-out '{name}'", digest, timeout_seconds))) > 1:
            raise CoordinationError(
                f"the ranks came to hand-out '{name}' with different lists of units",
                expected="one list",
                remedy="let rank 0 make the list and broadcast it",
            )
        self._num_hand_outs += 1
        key = f"{self._num_hand_outs}/{name}"
        # A counter for each host: where this rank fails, the ranks of the others are to get nothing more, either.
        self._handing_out = [key] if homes is None else [f"{key}/{host}" for host in dict.fromkeys(self.hosts)]
        own_key = key if homes is None else f"{key}/{self.host}"
        while (place := counter.next(own_key)) < len(own):
            PREEMPTION.require_none(f"hand-out '{name}'")
            yield own[place]
        self._handing_out = []

    def report_failure(self, error: BaseException, timeout_seconds: float = _LAST_WORD_SECONDS) -> list[RankFailure]:
        """Tell the other ranks, wherever they are, that this one stops; for an error that no agreement has caught.

        Ranks that wait at a point, or come to one later, get a `PeerError` that quotes it. Never raises.

        Args:
            error: Why this rank stops.
            timeout_seconds: How long to wait for rank 0 to spread the word.

        Returns:
            What failed in the same moment, one entry a rank, of this report or of the agreement that spread the error
            before; empty where rank 0 does not answer.
        """
        return self._announce("the end of its work", error, timeout_seconds)

    def close(self) -> None:
        """Give up the connection; rank 0 first waits, for seconds at most, until the others have its last answer."""
        self._transport.close()

    def _open_counter(self, timeout_seconds: float | None) -> SharedCounter:
        """Return the counter that rank 0 hosts, opened at first use; a point where ranks meet."""
        if self._counter is None:
            seconds = self._seconds(timeout_seconds)
            address = "127.0.0.1" if len(set(self.hosts)) == 1 else self.address
            hosted = SharedCounter(0, self.world_size, address, 0, seconds) if self.rank == 0 else None
            port = self.broadcast("port of the counter", hosted.port if hosted else None, timeout_seconds)
            self._counter = hosted or SharedCounter(self.rank, self.world_size, address, port, seconds)
        return self._counter

    def _seconds(self, timeout_seconds: float | None) -> float:
        return self.timeout_seconds if timeout_seconds is None else timeout_seconds

    def _exchange(self, label: str, obj: Any, timeout_seconds: float | None) -> list[Any]:
        try:
            payload = self._encode(label, obj)
        except CoordinationError as error:
            self._announce(label, error, timeout_seconds)  # else the others would wait for this rank
            raise
        try:
            payloads = self._transport.exchange(label, payload, self._seconds(timeout_seconds))
        except CoordinationError as error:
            _mark_shared(error, [])
            raise
        return [json.loads(payload) for payload in payloads]

    def _encode(self, label: str, obj: Any) -> bytes:
        try:
            payload = json.dumps(obj).encode()
        except (TypeError, ValueError, RecursionError) as error:
            fact = f"what rank {self.rank} gives to {label} is not JSON: {error}"
            raise CoordinationError(fact, remedy="give numbers, strings, lists and dicts with string keys") from error
        if len(payload) > MAX_EXCHANGE_BYTES:
            raise CoordinationError(
                f"what rank {self.rank} gives to {label} has {len(payload)} bytes",
                expected=f"at most {MAX_EXCHANGE_BYTES} bytes",
                remedy="write it to a file and give the file's name",
            )
        return payload

    def _announce(self, label: str, error: BaseException, timeout_seconds: float | None) -> list[RankFailure]:
        """Tell all ranks that this one failed, unless they know; the caller re-raises its own exception."""
        if (known := _shared_failures(error)) is not None:
            return known
        if self._counter is not None and self._handing_out:
            with contextlib.suppress(CoordinationError):  # rank 0 is gone, and nobody gets anything any more
                for key in self._handing_out:
                    self._counter.end(key)
            self._handing_out = []
        seconds = self._seconds(timeout_seconds)
        if not isinstance(error, Exception):  # an interrupt or an exit: whoever asked for it will not wait long
            seconds = min(seconds, _LAST_WORD_SECONDS)
        told = as_told(error) or error
        crashed = not isinstance(told, SparringError)
        text = f"{type(error).__name__}: {error}" if crashed else str(told)
        word = {"host": self._host, "message": text[:_MAX_MESSAGE_CHARACTERS], "crashed": crashed}
        try:
            answers = self._transport.exchange(label, json.dumps(word).encode(), seconds, failed=True)
        except CoordinationError as refusal:
            _log.warning("The other ranks could not be told that this one fails: %s", refusal)
            answers = []
        failures = [parse_record(json.loads(answer), RankFailure, "the report of a failure") for answer in answers]
        _mark_shared(error, failures)
        return failures

"""A connection that notes what it waits for, so that others can see where a rank stands."""

from __future__ import annotations

from engine.coordination.star import Kind, Transport
from engine.reliability.activity import ACTIVITY


class WatchedTransport:
    """Any transport, with each exchange named in `engine.reliability.activity` while it lasts.

    Args:
        inner: What carries the messages.
    """

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.kind: Kind = inner.kind
        self.rank: int = inner.rank
        self.world_size: int = inner.world_size

    @property
    def hosts(self) -> list[str]:
        """Host name of each rank."""
        return self._inner.hosts

    @hosts.setter
    def hosts(self, hosts: list[str]) -> None:
        """Take the host names from the coordinator's greeting."""
        self._inner.hosts = hosts

    def exchange(self, name: str, payload: bytes, timeout_seconds: float, *, failed: bool = False) -> list[bytes]:
        """Give `payload` to every rank and get every rank's, as `StarTransport.exchange`."""
        if failed:  # the last word of a rank that is ending; what it did before is what counts
            return self._inner.exchange(name, payload, timeout_seconds, failed=True)
        with ACTIVITY.waiting(name):
            return self._inner.exchange(name, payload, timeout_seconds)

    def close(self) -> None:
        """Give up the connection."""
        self._inner.close()
